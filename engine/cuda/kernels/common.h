// What all kernels are written with: numbers, groups of four of them, reductions, entry points.
//
// The letters: B pictures, N = H * W tokens of a picture, C channels, D the language model's size,
// K the size of a head or of a group of channels, V words. All arrays are contiguous, all rows have
// a multiple of four elements, and pointers are aligned to four of theirs.
//
// Products take and give T, float or bf16; all sums are in float. Every sum has an order that
// depends on the size of what is summed and on nothing else: not on other rows, nor on the grid.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define REGISTER(name, threads)
#define REQUIRE_ALIGNED(pointer, bytes)
#else
#include "host.h"
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;

// What T is in an entry point of that suffix.
namespace with_f32 {
using T = float;
}
namespace with_f16 {
using T = f16;
}
namespace with_bf16 {
using T = bf16;
}

// A kernel that the driver finds as `name_suffix`: for blocks of at most so many threads, and with
// registers for so many blocks at once on a multiprocessor.
#define ENTRY(name, suffix, threads, blocks, parameters, arguments)                               \
    namespace with_##suffix {                                                                     \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name##_##suffix parameters {    \
        name arguments;                                                                           \
    }                                                                                             \
    REGISTER(name##_##suffix, threads)                                                            \
    }
#define ENTRIES(name, threads, blocks, parameters, arguments)                                     \
    ENTRY(name, f32, threads, blocks, parameters, arguments)                                      \
    ENTRY(name, bf16, threads, blocks, parameters, arguments)

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

__device__ inline void store(float* at, float x) { *at = x; }
__device__ inline void store(bf16* at, float x) { *at = __float2bfloat16_rn(x); }

// N numbers that are read and written at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T of[N];
};

template <class T>
__device__ inline float4 load4(const T* at) {
    REQUIRE_ALIGNED(at, sizeof(Pack<T, 4>));
    const auto x = *reinterpret_cast<const Pack<T, 4>*>(at);
    return make_float4(to_float(x.of[0]), to_float(x.of[1]), to_float(x.of[2]), to_float(x.of[3]));
}

template <class T>
__device__ inline float2 load2(const T* at) {
    REQUIRE_ALIGNED(at, sizeof(Pack<T, 2>));
    const auto x = *reinterpret_cast<const Pack<T, 2>*>(at);
    return make_float2(to_float(x.of[0]), to_float(x.of[1]));
}

template <class T>
__device__ inline void store4(T* at, float4 x) {
    REQUIRE_ALIGNED(at, sizeof(Pack<T, 4>));
    Pack<T, 4> pack;
    store(&pack.of[0], x.x);
    store(&pack.of[1], x.y);
    store(&pack.of[2], x.z);
    store(&pack.of[3], x.w);
    *reinterpret_cast<Pack<T, 4>*>(at) = pack;
}

template <class T>
__device__ inline void store2(T* at, float2 x) {
    REQUIRE_ALIGNED(at, sizeof(Pack<T, 2>));
    Pack<T, 2> pack;
    store(&pack.of[0], x.x);
    store(&pack.of[1], x.y);
    *reinterpret_cast<Pack<T, 2>*>(at) = pack;
}

__device__ inline float4 all4(float x) { return make_float4(x, x, x, x); }

__device__ inline float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ inline float4 operator*(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ inline float4 operator*(float a, float4 b) { return all4(a) * b; }

// `sum + a * b`, element after element.
__device__ inline float add_dot(float sum, float4 a, float4 b) {
    sum += a.x * b.x;
    sum += a.y * b.y;
    sum += a.z * b.z;
    return sum + a.w * b.w;
}

// Over each aligned group of LANES lanes of a warp. At every step two lanes exchange what they
// have, so that all end with the same bits.
template <int LANES>
__device__ inline float sum_of(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, lane);
    }
    return x;
}
template <int LANES>
__device__ inline float max_of(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
    }
    return x;
}

// The block's shared memory, all of which its launch asks for.
template <class T>
__device__ inline T* shared_memory() {
#ifdef __CUDACC__
    extern __shared__ float4 shared[];
    return reinterpret_cast<T*>(shared);
#else
    return static_cast<T*>(host::shared());
#endif
}

__host__ __device__ constexpr int divided_up(int a, int b) { return (a + b - 1) / b; }

// Calls `f(row, column)` for every four of `[rows, size]`. A block takes 32 rows of 32 fours; a
// warp reads fours that lie beside each other.
constexpr int FOURS_THREADS = 256;
constexpr int FOURS_ROWS = 32;

template <class F>
__device__ inline void for_each_four(size_t rows, int size, F f) {
    constexpr int warps = FOURS_THREADS / WARP;
    const int column = (blockIdx.y * WARP + threadIdx.x % WARP) * 4;
    if (column >= size) {
        return;
    }
#pragma unroll
    for (int i = 0; i < FOURS_ROWS / warps; i++) {
        const size_t row = size_t(blockIdx.x) * FOURS_ROWS + i * warps + threadIdx.x / WARP;
        if (row < rows) {
            f(row, column);
        }
    }
}
