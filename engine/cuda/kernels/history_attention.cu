// The decoder's attention over what its rows have seen.
#include "common.h"

namespace history_ {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

} // namespace history_

// q [rows, D] without its bias [D] -> out [rows, D]: row r over the keys and values in slots
// seen[r][0 .. counts[r]] of the arenas [slots, D], at least one, its query scaled by K^-0.5.
//
// A block computes a head of a row. Each of its warps takes every fourth group of 32 slots, a lane
// the score of one and then two of the sum's dimensions; the warps' sums are added one after the
// other. So a sum's order depends on the count alone.
template <class T>
__device__ void history_attention(
    const T* q, const float* q_bias, const T* arena_k, const T* arena_v, const int* const* seen,
    const int* counts, T* out, int rows, int d, int heads) {
    using namespace history_;
    const int k = d / heads, channel = blockIdx.y * k;
    const size_t row = blockIdx.x;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, dim = lane * 2;
    const int* slots = seen[row];
    const int count = counts[row];
    float* query = shared_memory<float>();  // [K]
    float* sums = query + k;                // [WARPS, K]
    float* most_of = sums + WARPS * k;      // [WARPS]
    float* total_of = most_of + WARPS;      // [WARPS]
    const float scale = rsqrtf(float(k));
    for (int i = threadIdx.x * 4; i < k; i += THREADS * 4) {
        const float4 x = load4(q + row * d + channel + i) + load4(q_bias + channel + i);
        store4(query + i, scale * x);
    }
    __syncthreads();
    float most = -INFINITY, total = 0.0f;
    float2 sum = make_float2(0.0f, 0.0f);
    for (int start = warp * WARP; start < count; start += THREADS) {
        const int slot = start + lane < count ? slots[start + lane] : -1;
        float score = -INFINITY;
        if (slot >= 0) {
            const T* key = arena_k + size_t(slot) * d + channel;
            score = 0.0f;
#pragma unroll 4
            for (int i = 0; i < k; i += 4) {
                score = add_dot(score, load4(query + i), load4(key + i));
            }
        }
        const float high = fmaxf(most, max_of<WARP>(score));
        const float fade = expf(most - high), weight = expf(score - high);
        most = high;
        total = total * fade + sum_of<WARP>(weight);
        sum = make_float2(sum.x * fade, sum.y * fade);
        const int here = min(WARP, count - start);
#pragma unroll 8
        for (int i = 0; i < here; i++) {
            const float share = __shfl_sync(ALL_LANES, weight, i);
            const int of = __shfl_sync(ALL_LANES, slot, i);
            if (dim < k) {
                const float2 value = load2(arena_v + size_t(of) * d + channel + dim);
                sum = make_float2(sum.x + share * value.x, sum.y + share * value.y);
            }
        }
    }
    if (dim < k) {
        store2(sums + warp * k + dim, sum);
    }
    if (lane == 0) {
        most_of[warp] = most;
        total_of[warp] = total;
    }
    __syncthreads();
    if (warp > 0 || dim >= k) {
        return;
    }
    for (int other = 1; other < WARPS; other++) {
        most = fmaxf(most, most_of[other]);
    }
    total = 0.0f;
    sum = make_float2(0.0f, 0.0f);
    for (int other = 0; other < WARPS; other++) {
        const float fade = expf(most_of[other] - most);
        const float2 x = load2(sums + other * k + dim);
        total += fade * total_of[other];
        sum = make_float2(sum.x + fade * x.x, sum.y + fade * x.y);
    }
    const float share = 1.0f / total;
    store2(out + row * d + channel + dim, make_float2(share * sum.x, share * sum.y));
}
ENTRIES(history_attention, history_::THREADS, 8,
        (const T* q, const float* q_bias, const T* arena_k, const T* arena_v,
         const int* const* seen, const int* counts, T* out, int rows, int d, int heads),
        (q, q_bias, arena_k, arena_v, seen, counts, out, rows, d, heads))
