// The depthwise convolution of DaViT's blocks.
#include "common.h"

namespace conv_ {

constexpr int THREADS = 256;
// Positions of a row that a thread computes, so that it reads each column of its strip once.
constexpr int STRIP = 8;

// The fours of a column at rows y - 1, y, y + 1; zeros outside the picture.
struct Column {
    float4 of[3];
};

} // namespace conv_

// out [B, H, W, C] = x + bias [C] + conv3x3(x, taps [9, C]), padded with zeros. `out` is not `x`.
//
// A thread computes four channels of a strip of positions; the block's index names picture and row.
// Of every position the taps are added from the first to the last.
__device__ inline void depthwise(
    const float* __restrict__ x, const float* __restrict__ taps, const float* __restrict__ bias,
    float* __restrict__ out, int b, int h, int w, int c) {
    using namespace conv_;
    const int fours = c / 4, index = blockIdx.x * THREADS + threadIdx.x;
    const int first = index / fours * STRIP, channel = index % fours * 4, y = blockIdx.y;
    if (first >= w) {
        return;
    }
    const size_t picture = size_t(blockIdx.z) * h;
    const auto column = [&](int at) {
        Column column;
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const int row = y + i - 1;
            const bool inside = at >= 0 && at < w && row >= 0 && row < h;
            column.of[i] =
                inside ? load4(x + ((picture + row) * w + at) * c + channel) : all4(0.0f);
        }
        return column;
    };
    float4 weights[9];
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
        weights[tap] = load4(taps + tap * c + channel);
    }
    const float4 shift = load4(bias + channel);
    Column left = column(first - 1), middle = column(first);
#pragma unroll
    for (int i = 0; i < STRIP; i++) {
        const Column right = column(first + i + 1);
        float4 sum = middle.of[1] + shift;
#pragma unroll
        for (int row = 0; row < 3; row++) {
            sum = sum + left.of[row] * weights[row * 3];
            sum = sum + middle.of[row] * weights[row * 3 + 1];
            sum = sum + right.of[row] * weights[row * 3 + 2];
        }
        if (first + i < w) {
            store4(out + ((picture + y) * w + first + i) * c + channel, sum);
        }
        left = middle;
        middle = right;
    }
}
ENTRY(depthwise, f32, conv_::THREADS, 2,
      (const float* x, const float* taps, const float* bias, float* out, int b, int h, int w,
       int c),
      (x, taps, bias, out, b, h, w, c))
