// The decoder's and the encoder's input.
#include "common.h"

// out [rows, D] = table [V, D] of ids [rows] + positions [P, D] of at [rows].
template <class E>
__device__ void embed(
    const E* table, const float* positions, const int* ids, const int* at, float* out, int rows,
    int d) {
    for_each_four(rows, d, [&](size_t row, int column) {
        const float4 word = load4(table + size_t(ids[row]) * d + column);
        const float4 position = load4(positions + size_t(at[row]) * d + column);
        store4(out + row * d + column, word + position);
    });
}

#define EMBED(suffix)                                                                             \
    ENTRY(embed, suffix, FOURS_THREADS, 4,                                                        \
          (const T* table, const float* positions, const int* ids, const int* at, float* out,     \
           int rows, int d),                                                                      \
          (table, positions, ids, at, out, rows, d))
EMBED(f32)
EMBED(f16)
EMBED(bf16)
#undef EMBED
