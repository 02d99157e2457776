// The patches of a convolution as rows of a matrix.
#include "common.h"

// x [B, H, W, C] -> out [B * H' * W', size * size * C, and zeros up to a multiple of eight]: the
// elements of a patch in the order of row, column, channel; zeros outside the picture.
//
// A thread writes four elements of a patch; nothing is summed.
template <class T>
__device__ void patches(
    const float* __restrict__ x, T* __restrict__ out, int b, int h, int w, int c, int size,
    int stride, int padding) {
    const int rows = (h + 2 * padding - size) / stride + 1;
    const int columns = (w + 2 * padding - size) / stride + 1;
    const int length = size * size * c, padded = divided_up(length, 8) * 8;
    for_each_four(size_t(b) * rows * columns, padded, [&](size_t patch, int element) {
        const int position = int(patch % (rows * columns));
        const size_t picture = patch / (rows * columns);
        const int top = position / columns * stride - padding;
        const int left = position % columns * stride - padding;
        // Where the element of the patch is read, if it is inside.
        const auto source = [&](int i) -> const float* {
            const int cell = i / c, y = top + cell / size, x_ = left + cell % size;
            const bool inside = i < length && y >= 0 && y < h && x_ >= 0 && x_ < w;
            return inside ? x + ((picture * h + y) * w + x_) * c + i % c : nullptr;
        };
        float4 four = all4(0.0f);
        if (c % 4 == 0) {
            const float* at = source(element);
            four = at ? load4(at) : four;
        } else {
            float* of[4] = {&four.x, &four.y, &four.z, &four.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* at = source(element + i);
                *of[i] = at ? *at : 0.0f;
            }
        }
        store4(out + patch * padded + element, four);
    });
}
ENTRIES(patches, FOURS_THREADS, 4,
        (const float* x, T* out, int b, int h, int w, int c, int size, int stride, int padding),
        (x, out, b, h, w, c, size, stride, padding))
