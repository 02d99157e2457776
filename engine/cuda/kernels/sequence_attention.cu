// Attention of rows over sequences of keys and values: the encoder's, and the decoder's over what
// the encoder has made of picture and prompt.
#include "common.h"

namespace sequence_ {

constexpr int THREADS = 128;
// Rows of a block. A thread computes two of them; 16 threads share the two.
constexpr int ROWS = 16;
constexpr int SHARERS = 16;
// Keys and values that are in shared memory at a time; a thread computes the scores of four.
constexpr int TILE = 64;
constexpr int KEYS = TILE / SHARERS;
constexpr int WEIGHTS_STRIDE = TILE + 4;

// A head of a sequence, and a run of rows that look at it.
template <class T>
struct Run {
    const T* keys;
    const T* values;
    int length;
    size_t first;
    int rows;
};

template <class T>
__device__ void attend(
    const Run<T>& run, const T* q, const float* q_bias, T* out, int d, int channel, int k) {
    // Four more keep readers of rows that follow each other out of each other's banks.
    const int stride = k + 4, fours = k / 4;
    float* queries = shared_memory<float>();               // [ROWS, stride]
    float* keys = queries + ROWS * stride;                 // [TILE, stride]
    float* values = keys + TILE * stride;                  // [TILE, stride]
    float* weights = values + TILE * stride;               // [ROWS, WEIGHTS_STRIDE]
    const int row = threadIdx.x / SHARERS * 2, part = threadIdx.x % SHARERS;
    const bool busy = int(threadIdx.x) / WARP * (2 * WARP / SHARERS) < run.rows;
    const float scale = rsqrtf(float(k));
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * fours; i += THREADS) {
        const int at = i / fours, dim = i % fours * 4;
        float4 x = all4(0.0f);
        if (at < run.rows) {
            x = load4(q + (run.first + at) * d + channel + dim) + load4(q_bias + channel + dim);
        }
        store4(queries + at * stride + dim, scale * x);
    }
    float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
    float4 sum[2] = {};
    for (int start = 0; start < run.length; start += TILE) {
        const int count = min(TILE, run.length - start);
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * fours; i += THREADS) {
            const int at = i / fours, dim = i % fours * 4;
            const size_t from = size_t(start + at) * d + dim;
            const bool exists = at < count;
            store4(keys + at * stride + dim, exists ? load4(run.keys + from) : all4(0.0f));
            store4(values + at * stride + dim, exists ? load4(run.values + from) : all4(0.0f));
        }
        __syncthreads();
        if (!busy) {
            continue;
        }
        float scores[2][KEYS] = {};
        for (int dim = 0; dim < k; dim += 4) {
            const float4 q0 = load4(queries + row * stride + dim);
            const float4 q1 = load4(queries + (row + 1) * stride + dim);
#pragma unroll
            for (int j = 0; j < KEYS; j++) {
                const float4 key = load4(keys + (part + j * SHARERS) * stride + dim);
                scores[0][j] = add_dot(scores[0][j], q0, key);
                scores[1][j] = add_dot(scores[1][j], q1, key);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float high = -INFINITY, added = 0.0f;
#pragma unroll
            for (int j = 0; j < KEYS; j++) {
                if (part + j * SHARERS >= count) {
                    scores[r][j] = -INFINITY;
                }
                high = fmaxf(high, scores[r][j]);
            }
            high = fmaxf(most[r], max_of<SHARERS>(high));
            const float fade = expf(most[r] - high);
#pragma unroll
            for (int j = 0; j < KEYS; j++) {
                const float weight = expf(scores[r][j] - high);
                weights[(row + r) * WEIGHTS_STRIDE + part + j * SHARERS] = weight;
                added += weight;
            }
            most[r] = high;
            total[r] = total[r] * fade + sum_of<SHARERS>(added);
            sum[r] = fade * sum[r];
        }
        // A warp reads only the weights that it has written itself.
        __syncwarp();
        if (part < fours) {
            for (int i = 0; i < count; i += 4) {
                const float4 w0 = load4(weights + row * WEIGHTS_STRIDE + i);
                const float4 w1 = load4(weights + (row + 1) * WEIGHTS_STRIDE + i);
                const float of[2][4] = {{w0.x, w0.y, w0.z, w0.w}, {w1.x, w1.y, w1.z, w1.w}};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4 value = load4(values + (i + j) * stride + part * 4);
                    sum[0] = sum[0] + of[0][j] * value;
                    sum[1] = sum[1] + of[1][j] * value;
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (row + r < run.rows && part < fours) {
            const size_t to = (run.first + row + r) * d + channel + part * 4;
            store4(out + to, (1.0f / total[r]) * sum[r]);
        }
    }
}

} // namespace sequence_

// q [rows, D] without its bias [D] -> out [rows, D]: row r over the keys and values [length, D] of
// sequence of_row[r], its query scaled by K^-0.5. Sequences have at least one key.
//
// A block computes a head of sixteen rows. Rows that follow each other and look at the same
// sequence are a run, and read its keys and values together; of the runs among the block's rows,
// blockIdx.z takes every gridDim.z-th. Keys are taken in from the first to the last, 64 at a time,
// whatever the run; so a sum's order depends on the length alone.
template <class T>
__device__ void sequence_attention(
    const T* q, const float* q_bias, const T* const* keys, const T* const* values,
    const int* lengths, const int* of_row, T* out, int rows, int d, int heads) {
    using namespace sequence_;
    const int k = d / heads, channel = blockIdx.y * k;
    const int first = blockIdx.x * ROWS, end = min(first + ROWS, rows);
    unsigned run = 0;
    for (int begin = first; begin < end; run++) {
        const int of = of_row[begin], start = begin;
        while (begin < end && of_row[begin] == of) {
            begin++;
        }
        if (run % gridDim.z == blockIdx.z) {
            const Run<T> it = {keys[of] + channel, values[of] + channel, lengths[of],
                               size_t(start), begin - start};
            attend(it, q, q_bias, out, d, channel, k);
        }
    }
}
ENTRIES(sequence_attention, sequence_::THREADS, 4,
        (const T* q, const float* q_bias, const T* const* keys, const T* const* values,
         const int* lengths, const int* of_row, T* out, int rows, int d, int heads),
        (q, q_bias, keys, values, lengths, of_row, out, rows, d, heads))
