// Layer normalisation, with the sum before it.
#include "common.h"

namespace norm_ {

constexpr int THREADS = 128;
// Fours that a thread holds: a warp takes rows of up to 512 elements, a block of up to 4,096.
constexpr int FOURS = 4;
constexpr int FOURS_OF_BLOCK = 8;
constexpr float EPSILON = 1e-5f;

// The sum over WARPS warps: of a warp by exchange, then of warp after warp. `sums` is shared, and
// of this sum alone.
template <int WARPS>
__device__ inline float sum_of_row(float x, float* sums) {
    x = sum_of<WARP>(x);
    if (WARPS == 1) {
        return x;
    }
    if (threadIdx.x % WARP == 0) {
        sums[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    x = sums[0];
    for (int warp = 1; warp < WARPS; warp++) {
        x += sums[warp];
    }
    return x;
}

// What a row of the sum consists of, and where it goes.
template <class T>
struct Row {
    const float* x;
    const T* product;
    const float* bias;
    const float* weight;
    const float* shift;
    float* sum_out;
    float* out;
    T* out_t;
};

template <class T>
__device__ inline float4 summand(const Row<T>& row, int at) {
    float4 s = all4(0.0f);
    if (row.product) {
        s = load4(row.product + at);
    }
    if (row.bias) {
        s = s + load4(row.bias + at);
    }
    return row.x ? load4(row.x + at) + s : s;
}

// A row by WARPS warps, whose threads hold up to HELD fours each. The threads of a block whose row
// does not exist take part in the barriers.
template <class T, int WARPS, int HELD>
__device__ void normalise(const Row<T>& row, bool exists, int size) {
    constexpr int threads = WARPS * WARP;
    const int fours = exists ? size / 4 : 0, first = threadIdx.x % threads;
    float4 s[HELD];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int four = first + i * threads;
        if (four < fours) {
            s[i] = summand(row, four * 4);
            sum = add_dot(sum, s[i], all4(1.0f));
        }
    }
    const float mean = sum_of_row<WARPS>(sum, shared_memory<float>()) / size;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (first + i * threads < fours) {
            const float4 off = s[i] + all4(-mean);
            squares = add_dot(squares, off, off);
        }
    }
    const float variance = sum_of_row<WARPS>(squares, shared_memory<float>() + WARPS) / size;
    const float scale = rsqrtf(variance + EPSILON);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int four = first + i * threads, at = four * 4;
        if (four < fours) {
            const float4 off = scale * (s[i] + all4(-mean));
            const float4 y = off * load4(row.weight + at) + load4(row.shift + at);
            if (row.sum_out) {
                store4(row.sum_out + at, s[i]);
            }
            if (row.out) {
                store4(row.out + at, y);
            }
            if (row.out_t) {
                store4(row.out_t + at, y);
            }
        }
    }
}

template <class P>
__device__ inline P* moved(P* pointer, size_t by) {
    return pointer ? pointer + by : nullptr;
}

} // namespace norm_

// s [rows, size] = x? + (product? + bias [size]?); sum_out? = s; out?, out_t? = (s - mean) /
// sqrt(variance + 1e-5) * weight [size] + shift [size]. `sum_out` may be `x`.
//
// A warp holds a row of up to 512 elements, a block of 128 threads a longer one; the variance is
// summed after the mean is known. Which element a thread adds when depends on `size` alone.
template <class T>
__device__ void layer_norm(
    const float* x, const T* product, const float* bias, const float* weight, const float* shift,
    float* sum_out, float* out, T* out_t, int rows, int size) {
    using namespace norm_;
    const bool by_warp = size <= WARP * FOURS * 4;
    const size_t r = by_warp ? size_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP
                             : size_t(blockIdx.x);
    const size_t at = r * size;
    const Row<T> row = {
        moved(x, at),       moved(product, at), bias,           weight, shift,
        moved(sum_out, at), moved(out, at),     moved(out_t, at)};
    const bool exists = r < size_t(rows);
    if (by_warp) {
        normalise<T, 1, FOURS>(row, exists, size);
    } else {
        normalise<T, THREADS / WARP, FOURS_OF_BLOCK>(row, exists, size);
    }
}
ENTRIES(layer_norm, norm_::THREADS, 8,
        (const float* x, const T* product, const float* bias, const float* weight,
         const float* shift, float* sum_out, float* out, T* out_t, int rows, int size),
        (x, product, bias, weight, shift, sum_out, out, out_t, rows, size))
