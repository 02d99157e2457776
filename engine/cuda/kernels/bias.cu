// What follows a product, element by element, and rows with their bias on the way to where they
// are kept. Nothing is summed over elements.
#include "common.h"

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

// x [rows, size] = gelu(x + bias [size]), with the exact error function, in place.
template <class T>
__device__ void bias_gelu(T* x, const float* bias, size_t rows, int size) {
    for_each_four(rows, size, [&](size_t row, int column) {
        T* at = x + row * size + column;
        const float4 sum = load4(at) + load4(bias + column);
        store4(at, make_float4(gelu(sum.x), gelu(sum.y), gelu(sum.z), gelu(sum.w)));
    });
}
ENTRIES(bias_gelu, FOURS_THREADS, 4, (T * x, const float* bias, size_t rows, int size),
        (x, bias, rows, size))

// out [rows, size] = residual + (product + bias [size]); `out` may be `residual`.
template <class T>
__device__ void bias_residual(
    const T* product, const float* bias, const float* residual, float* out, size_t rows, int size) {
    for_each_four(rows, size, [&](size_t row, int column) {
        const size_t at = row * size + column;
        store4(out + at, load4(residual + at) + (load4(product + at) + load4(bias + column)));
    });
}
ENTRIES(bias_residual, FOURS_THREADS, 4,
        (const T* product, const float* bias, const float* residual, float* out, size_t rows,
         int size),
        (product, bias, residual, out, rows, size))

// out [rows, size] = x + bias [size]; `out` may be `x`.
template <class T>
__device__ void add_bias(const T* x, const float* bias, T* out, size_t rows, int size) {
    for_each_four(rows, size, [&](size_t row, int column) {
        const size_t at = row * size + column;
        store4(out + at, load4(x + at) + load4(bias + column));
    });
}
ENTRIES(add_bias, FOURS_THREADS, 4, (const T* x, const float* bias, T* out, size_t rows, int size),
        (x, bias, out, rows, size))

// Keys and values [rows, D], with their biases, to their slots in the arenas [slots, D] of a
// layer. No slot is named twice.
template <class T>
__device__ void history_append(
    const T* k, const T* v, const float* k_bias, const float* v_bias, T* arena_k, T* arena_v,
    const int* slots, int rows, int d) {
    for_each_four(rows, d, [&](size_t row, int column) {
        const size_t from = row * d + column, to = size_t(slots[row]) * d + column;
        store4(arena_k + to, load4(k + from) + load4(k_bias + column));
        store4(arena_v + to, load4(v + from) + load4(v_bias + column));
    });
}
ENTRIES(history_append, FOURS_THREADS, 4,
        (const T* k, const T* v, const float* k_bias, const float* v_bias, T* arena_k, T* arena_v,
         const int* slots, int rows, int d),
        (k, v, k_bias, v_bias, arena_k, arena_v, slots, rows, d))
