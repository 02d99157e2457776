// Kernels with the faults that a launch on the host has to find. They are not part of `all.cu`.
#include "common.h"

// The first warp waits for the block, the others end.
__device__ inline void waits_in_vain(float* out) {
    if (threadIdx.x < WARP) {
        __syncthreads();
        *out = 1.0f;
    }
}
ENTRY(waits_in_vain, f32, 64, 1, (float* out), (out))

// One lane is not there for the exchange.
__device__ inline void lacks_a_lane(float* out) {
    if (threadIdx.x > 0) {
        *out = sum_of<WARP>(1.0f);
    }
}
ENTRY(lacks_a_lane, f32, 64, 1, (float* out), (out))

// Writes one element of shared memory that it has not asked for.
__device__ inline void writes_behind(float* out) {
    shared_memory<float>()[threadIdx.x] = 1.0f;
    *out = 1.0f;
}
ENTRY(writes_behind, f32, 64, 1, (float* out), (out))

__device__ inline void reads_askew(float* out) { store4(out, load4(out + 1)); }
ENTRY(reads_askew, f32, 64, 1, (float* out), (out))

// Reads what another thread writes without waiting for it.
__device__ inline void races(float* out) {
    float* shared = shared_memory<float>();
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}
ENTRY(races, f32, 64, 1, (float* out), (out))
