// What a search needs of a row of logits.
#include "common.h"

namespace top_ {

constexpr int THREADS = 1024;
constexpr int NONE = 0x7fffffff;

struct Word {
    float value;
    int id;
};

// The order of the answer: the larger value first, of equal ones the lower id; NONE comes last.
__device__ inline bool before(Word a, Word b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The first word of all lanes.
__device__ inline Word first_of(Word word) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) {
        const Word other = {__shfl_xor_sync(ALL_LANES, word.value, lane),
                            __shfl_xor_sync(ALL_LANES, word.id, lane)};
        word = before(other, word) ? other : word;
    }
    return word;
}

} // namespace top_

// logits [rows, V] + bias [V]? -> the logarithm of the sum of their exponentials, log_sum [rows],
// and the k largest, values [rows, k], with their ids [rows, k], of equal ones the lower id first.
// NaN counts as -infinity; places beyond V are -infinity and id -1. No logit is +infinity.
//
// A block computes a row; each thread looks at every 1,024th word and holds the first of its words
// that is not taken yet. The first of all is found k times; after each, the warp of the thread that
// held it looks for that thread's next one. A thread adds its exponentials from the first word to
// the last, then lanes exchange sums, then warp after warp.
__device__ inline void top_k(
    const float* logits, const float* bias, float* log_sum, float* values, int* ids, int rows,
    int vocabulary, int k) {
    using namespace top_;
    const size_t row = blockIdx.x;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const float* words = logits + row * vocabulary;
    const auto read = [&](int id) {
        const float x = bias ? words[id] + bias[id] : words[id];
        return isnan(x) ? -INFINITY : x;
    };
    Word* firsts = shared_memory<Word>();                           // [WARP], of each warp
    float* sums = reinterpret_cast<float*>(firsts + WARP);          // [WARP], of each warp
    const Word none = {-INFINITY, NONE};

    Word held = none;
    for (int id = threadIdx.x; id < vocabulary; id += THREADS) {
        const Word word = {read(id), id};
        held = before(word, held) ? word : held;
    }
    const Word first = first_of(held);
    if (lane == 0) {
        firsts[warp] = first;
    }
    __syncthreads();

    const float most = first_of(firsts[lane]).value;
    float sum = 0.0f;
    if (most > -INFINITY) {
        for (int id = threadIdx.x; id < vocabulary; id += THREADS) {
            sum += expf(read(id) - most);
        }
    }
    sum = sum_of<WARP>(sum);
    if (lane == 0) {
        sums[warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int other = 1; other < WARP; other++) {
            sum += sums[other];
        }
        log_sum[row] = most + logf(sum);
    }

    for (int i = 0; i < k; i++) {
        const Word taken = first_of(firsts[lane]);
        if (threadIdx.x == 0) {
            values[row * k + i] = taken.value;
            ids[row * k + i] = taken.id == NONE ? -1 : taken.id;
        }
        __syncthreads();
        const int holder = taken.id % THREADS;
        if (taken.id != NONE && holder / WARP == warp) {
            Word next = none;
            for (int id = holder + THREADS * lane; id < vocabulary; id += THREADS * WARP) {
                const Word word = {read(id), id};
                next = before(taken, word) && before(word, next) ? word : next;
            }
            next = first_of(next);
            held = lane == holder % WARP ? next : held;
            const Word best = first_of(held);
            if (lane == 0) {
                firsts[warp] = best;
            }
        }
        __syncthreads();
    }
}
ENTRY(top_k, f32, top_::THREADS, 1,
      (const float* logits, const float* bias, float* log_sum, float* values, int* ids, int rows,
       int vocabulary, int k),
      (logits, bias, log_sum, values, ids, rows, vocabulary, k))
