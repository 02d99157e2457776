// Attention across the channels of a group, in three steps: scores of chunks of tokens, their sum's
// softmax, and the channels mixed by it. K = C / groups.
#include "common.h"

namespace channels_ {

constexpr int SCORES_THREADS = 256;
// Tokens of which queries and keys are in shared memory at a time.
constexpr int SCORES_TOKENS = 32;
// Threads that share a tile of 4 x 4 scores, each with some of the tokens.
constexpr int SPLITS = 4;
constexpr int SOFTMAX_THREADS = 128;
constexpr int APPLY_THREADS = 128;
constexpr int APPLY_TOKENS = 64;
// The distance of two channels' tokens; four more keep writers out of each other's banks.
constexpr int APPLY_STRIDE = APPLY_TOKENS + 4;

// A tile of scores: element (i, j) is `i` of the query's four times `j` of the key's.
struct Tile {
    float4 of[4];

    __device__ void add(float4 q, float4 k) {
        of[0] = of[0] + q.x * k;
        of[1] = of[1] + q.y * k;
        of[2] = of[2] + q.z * k;
        of[3] = of[3] + q.w * k;
    }
};

} // namespace channels_

// qkv [B, N, 3C] without its bias [3C] -> partial [B, groups, chunks, K, K]: the sums of q^T k over
// the tokens of each chunk of `chunk` tokens.
//
// A block computes a chunk of a group. A thread holds 4 x 4 scores and takes every SPLITS-th token
// (fewer splits for K over 32); the splits are added one after the other.
template <class T>
__device__ void channel_scores(
    const T* qkv, const float* bias, float* partial, int b, int n, int c, int groups, int chunk) {
    using namespace channels_;
    const int k = c / groups, fours = k / 4, tiles = fours * fours;
    const int most = SCORES_THREADS / tiles, splits = most < SPLITS ? most : SPLITS;
    const int tile = threadIdx.x % tiles, split = threadIdx.x / tiles;
    const int group = blockIdx.y, picture = blockIdx.z;
    const int begin = blockIdx.x * chunk, end = min(begin + chunk, n);
    float* queries = shared_memory<float>();
    float* keys = queries + SCORES_TOKENS * k;
    Tile scores = {};
    for (int start = begin; start < end; start += SCORES_TOKENS) {
        const int count = min(SCORES_TOKENS, end - start);
        __syncthreads();
        for (int i = threadIdx.x; i < count * fours; i += SCORES_THREADS) {
            const size_t token = size_t(picture) * n + start + i / fours;
            const int channel = group * k + i % fours * 4;
            const T* at = qkv + token * 3 * c + channel;
            store4(queries + i * 4, load4(at) + load4(bias + channel));
            store4(keys + i * 4, load4(at + c) + load4(bias + c + channel));
        }
        __syncthreads();
        if (split < splits) {
            for (int i = split; i < count; i += splits) {
                scores.add(load4(queries + i * k + tile / fours * 4),
                           load4(keys + i * k + tile % fours * 4));
            }
        }
    }
    __syncthreads();
    float* sums = queries;
    if (split < splits) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = tile / fours * 4 + i;
            store4(sums + (split * k + row) * k + tile % fours * 4, scores.of[i]);
        }
    }
    __syncthreads();
    const size_t block = (size_t(picture) * groups + group) * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x * 4; i < k * k; i += SCORES_THREADS * 4) {
        float4 sum = load4(sums + i);
        for (int other = 1; other < splits; other++) {
            sum = sum + load4(sums + other * k * k + i);
        }
        store4(partial + block * k * k + i, sum);
    }
}
ENTRIES(channel_scores, channels_::SCORES_THREADS, 4,
        (const T* qkv, const float* bias, float* partial, int b, int n, int c, int groups,
         int chunk),
        (qkv, bias, partial, b, n, c, groups, chunk))

// partial [B, groups, chunks, K, K] -> weights [B, groups, K, K]: the softmax of the sum over
// chunks, times n^-0.5, along the last dimension.
//
// A block computes a row. Each of its warps adds every fourth chunk, the first warp adds the four
// sums; a lane holds two columns.
__device__ inline void channel_softmax(
    const float* partial, float* weights, int b, int n, int groups, int k, int chunks) {
    using namespace channels_;
    constexpr int warps = SOFTMAX_THREADS / WARP;
    const int warp = threadIdx.x / WARP, column = threadIdx.x % WARP * 2;
    const size_t group = blockIdx.x / k, row = blockIdx.x % k;
    float* sums = shared_memory<float>();
    if (column < k) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
        for (int chunk = warp; chunk < chunks; chunk += warps) {
            const float2 x = load2(partial + ((group * chunks + chunk) * k + row) * k + column);
            sum = make_float2(sum.x + x.x, sum.y + x.y);
        }
        store2(sums + warp * k + column, sum);
    }
    __syncthreads();
    if (warp > 0) {
        return;
    }
    float2 score = make_float2(-INFINITY, -INFINITY);
    if (column < k) {
        score = load2(sums + column);
        for (int other = 1; other < warps; other++) {
            const float2 x = load2(sums + other * k + column);
            score = make_float2(score.x + x.x, score.y + x.y);
        }
        const float scale = rsqrtf(float(n));
        score = make_float2(score.x * scale, score.y * scale);
    }
    const float most = max_of<WARP>(fmaxf(score.x, score.y));
    const float2 weight = make_float2(expf(score.x - most), expf(score.y - most));
    const float share = 1.0f / sum_of<WARP>(weight.x + weight.y);
    if (column < k) {
        store2(weights + (group * k + row) * k + column,
               make_float2(weight.x * share, weight.y * share));
    }
}
ENTRY(channel_softmax, f32, channels_::SOFTMAX_THREADS, 8,
      (const float* partial, float* weights, int b, int n, int groups, int k, int chunks),
      (partial, weights, b, n, groups, k, chunks))

// The values of qkv [B, N, 3C], with their part of bias [3C], mixed: out [B, N, C], of which
// channel i of a group is the sum over j of weights [B, groups, K, K] at (i, j) times value j.
//
// A block computes a group of some tokens; a thread holds 4 tokens x 4 channels, and takes the
// values' channels from the first to the last.
template <class T>
__device__ void channel_apply(
    const T* qkv, const float* bias, const float* weights, T* out, int b, int n, int c,
    int groups) {
    using namespace channels_;
    const int k = c / groups, fours = k / 4, first = blockIdx.x * APPLY_TOKENS;
    const int group = blockIdx.y, count = min(APPLY_TOKENS, n - first);
    const size_t picture = blockIdx.z, token = picture * n + first;
    float* values = shared_memory<float>();           // [K, APPLY_STRIDE]
    float* columns = values + k * APPLY_STRIDE;       // [K, K], the weights transposed
    for (int i = threadIdx.x; i < APPLY_TOKENS * fours; i += APPLY_THREADS) {
        const int at = i / fours, dim = i % fours * 4, channel = 2 * c + group * k + dim;
        float4 value = all4(0.0f);
        if (at < count) {
            value = load4(qkv + (token + at) * 3 * c + channel) + load4(bias + channel);
        }
        values[dim * APPLY_STRIDE + at] = value.x;
        values[(dim + 1) * APPLY_STRIDE + at] = value.y;
        values[(dim + 2) * APPLY_STRIDE + at] = value.z;
        values[(dim + 3) * APPLY_STRIDE + at] = value.w;
    }
    for (int i = threadIdx.x; i < k * k; i += APPLY_THREADS) {
        columns[i % k * k + i / k] = weights[(picture * groups + group) * k * k + i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < APPLY_TOKENS / 4 * fours; i += APPLY_THREADS) {
        const int at = i / fours * 4, dim = i % fours * 4;
        Tile sums = {};
        for (int j = 0; j < k; j++) {
            sums.add(load4(values + j * APPLY_STRIDE + at), load4(columns + j * k + dim));
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (at + j < count) {
                store4(out + (token + at + j) * c + group * k + dim, sums.of[j]);
            }
        }
    }
}
ENTRIES(channel_apply, channels_::APPLY_THREADS, 8,
        (const T* qkv, const float* bias, const float* weights, T* out, int b, int n, int c,
         int groups),
        (qkv, bias, weights, out, b, n, c, groups))
