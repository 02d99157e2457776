// Attention within the square windows of a grid of tokens.
#include "common.h"

namespace window_ {

constexpr int THREADS = 256;
// Dimensions of a head that a thread holds: a head of up to 64 takes two threads a query.
constexpr int DIMS = 32;
// Cells whose keys and values are in shared memory at a time, for one thread a query.
constexpr int TILE = 144;
// Cells whose scores a thread holds at a time.
constexpr int CHUNK = 8;

// A block's window, and the head that it computes.
template <class T>
struct Window {
    const T* qkv;
    const float* bias;
    // The picture's first token.
    size_t tokens;
    int top, left, h, w, c, size, channel, k;

    // The token in a cell, or none.
    __device__ bool find(int cell, size_t* token) const {
        const int y = top + cell / size, x = left + cell % size;
        *token = tokens + size_t(y) * w + x;
        return y < h && x < w;
    }

    // Four elements of a cell's query, key or value, `part` 0 to 2: of a padded cell the bias
    // alone, beyond the head zeros.
    __device__ float4 four(int part, bool exists, size_t token, int dim) const {
        if (dim >= k) {
            return all4(0.0f);
        }
        const int at = part * c + channel + dim;
        const float4 b = load4(bias + at);
        return exists ? load4(qkv + token * 3 * c + at) + b : b;
    }
};

// What a query has found so far, of the dimensions that the thread holds.
template <int PARTS>
struct Query {
    float4 q[DIMS / 4];
    float4 sum[DIMS / 4];
    float most, total;

    // Takes in `count` cells, at most CHUNK, whose rows are PARTS * DIMS long.
    __device__ void see(const float* keys, const float* values, int count) {
        constexpr int width = PARTS * DIMS;
        float scores[CHUNK];
        float high = most;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            float score = 0.0f;
            if (i < count) {
#pragma unroll
                for (int j = 0; j < DIMS / 4; j++) {
                    score = add_dot(score, q[j], load4(keys + i * width + j * 4));
                }
            }
            if (PARTS == 2) {
                score = sum_of<2>(score);
            }
            scores[i] = i < count ? score : -INFINITY;
            high = fmaxf(high, scores[i]);
        }
        const float fade = expf(most - high);
        most = high;
        total *= fade;
#pragma unroll
        for (int j = 0; j < DIMS / 4; j++) {
            sum[j] = fade * sum[j];
        }
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            if (i < count) {
                const float weight = expf(scores[i] - high);
                total += weight;
#pragma unroll
                for (int j = 0; j < DIMS / 4; j++) {
                    sum[j] = sum[j] + weight * load4(values + i * width + j * 4);
                }
            }
        }
    }
};

template <class T, int PARTS>
__device__ void attend(const Window<T>& window, T* out) {
    constexpr int width = PARTS * DIMS, fours = width / 4;
    const int cells = window.size * window.size;
    const int tile = cells < TILE / PARTS ? cells : TILE / PARTS;
    float* keys = shared_memory<float>();
    float* values = keys + tile * width;
    const int part = threadIdx.x % PARTS * DIMS;
    for (int first = 0; first < cells; first += blockDim.x / PARTS) {
        const int cell = first + threadIdx.x / PARTS;
        size_t token;
        const bool exists = window.find(cell, &token) && cell < cells;
        Query<PARTS> query = {{}, {}, -INFINITY, 0.0f};
        const float scale = rsqrtf(float(window.k));
#pragma unroll
        for (int j = 0; j < DIMS / 4; j++) {
            query.q[j] = scale * window.four(0, exists, token, part + j * 4);
        }
        for (int start = 0; start < cells; start += tile) {
            const int count = min(tile, cells - start);
            __syncthreads();
            for (int i = threadIdx.x; i < count * fours; i += blockDim.x) {
                const int dim = i % fours * 4;
                size_t other;
                const bool inside = window.find(start + i / fours, &other);
                store4(keys + i * 4, window.four(1, inside, other, dim));
                store4(values + i * 4, window.four(2, inside, other, dim));
            }
            __syncthreads();
            for (int i = 0; i < count; i += CHUNK) {
                const int at = i * width + part;
                query.see(keys + at, values + at, count - i);
            }
        }
        const float share = 1.0f / query.total;
#pragma unroll
        for (int j = 0; j < DIMS / 4; j++) {
            const int dim = part + j * 4;
            if (exists && dim < window.k) {
                store4(out + token * window.c + window.channel + dim, share * query.sum[j]);
            }
        }
    }
}

} // namespace window_

// qkv [B, N, 3C] without its bias [3C] -> out [B, N, C]: softmax(q k^T / sqrt(K)) v within windows
// of window * window cells. Cells of the last windows that stick out of the grid have the bias as
// query, key and value, and take part.
//
// A block computes a head of a window: keys and values go to shared memory in tiles, a thread (two,
// if K is over 32) holds a query and takes in the cells from the first to the last, eight at a
// time; so a sum's order depends on the window alone.
template <class T>
__device__ void window_attention(
    const T* qkv, const float* bias, T* out, int b, int h, int w, int c, int heads, int window) {
    using namespace window_;
    const int k = c / heads, columns = divided_up(w, window);
    const Window<T> it = {qkv,
                          bias,
                          size_t(blockIdx.z) * h * w,
                          int(blockIdx.x) / columns * window,
                          int(blockIdx.x) % columns * window,
                          h,
                          w,
                          c,
                          window,
                          int(blockIdx.y) * k,
                          k};
    if (k <= DIMS) {
        attend<T, 1>(it, out);
    } else {
        attend<T, 2>(it, out);
    }
}
ENTRIES(window_attention, window_::THREADS, 2,
        (const T* qkv, const float* bias, T* out, int b, int h, int w, int c, int heads,
         int window),
        (qkv, bias, out, b, h, w, c, heads, window))
