// Products in float32, whose results do not depend on how many rows there are: libraries choose
// another order of sums for another number of rows.
#include "common.h"

namespace product_ {

// Elements of the rows that are in shared memory at a time. Their sum is added to the whole at once.
constexpr int PART = 32;

// What a thread carries from global memory to shared memory: of a tile [LINES, PART], fours of the
// lines that it takes. Neighbours take neighbouring lines, so that they write to different banks.
template <int LINES, int THREADS>
struct Fours {
    static constexpr int COUNT = LINES * PART / 4 / THREADS;
    static constexpr int STRIDE = LINES + 4;
    float4 of[COUNT];

    __device__ void fetch(const float* from, size_t first, size_t lines, int start, int inputs) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int at = threadIdx.x + i * THREADS, k = start + at / LINES * 4;
            const size_t line = first + at % LINES;
            const bool is_there = line < lines && k < inputs;
            of[i] = is_there ? load4(from + line * inputs + k) : all4(0.0f);
        }
    }

    __device__ void put(float* to) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int at = threadIdx.x + i * THREADS;
            float* column = to + at / LINES * 4 * STRIDE + at % LINES;
            column[0] = of[i].x;
            column[STRIDE] = of[i].y;
            column[2 * STRIDE] = of[i].z;
            column[3 * STRIDE] = of[i].w;
        }
    }
};

// A block's tile [ROWS, COLUMNS], of which a thread computes EACH rows and columns.
//
// Every sum goes over PART elements from the first to the last, and then over these parts: in every
// tile the same, whatever its size.
template <int ROWS, int COLUMNS, int EACH>
__device__ void tile(
    const float* x, const float* weight, float* out, size_t rows, int inputs, int outputs) {
    constexpr int ACROSS = COLUMNS / EACH, THREADS = ACROSS * (ROWS / EACH);
    using Left = Fours<ROWS, THREADS>;
    using Right = Fours<COLUMNS, THREADS>;
    float* xs = shared_memory<float>();        // [PART, ROWS + 4]
    float* weights = xs + PART * Left::STRIDE; // [PART, COLUMNS + 4]
    const size_t first_row = size_t(blockIdx.x) * ROWS;
    const int first_column = blockIdx.y * COLUMNS;
    const int row = threadIdx.x / ACROSS * EACH, column = threadIdx.x % ACROSS * EACH;
    float sum[EACH][EACH] = {};
    Left left;
    Right right;
    left.fetch(x, first_row, rows, 0, inputs);
    right.fetch(weight, first_column, outputs, 0, inputs);
    for (int start = 0; start < inputs; start += PART) {
        __syncthreads();
        left.put(xs);
        right.put(weights);
        __syncthreads();
        if (start + PART < inputs) {
            left.fetch(x, first_row, rows, start + PART, inputs);
            right.fetch(weight, first_column, outputs, start + PART, inputs);
        }
        float part[EACH][EACH] = {};
#pragma unroll
        for (int k = 0; k < PART; k++) {
            const auto a = *reinterpret_cast<const Pack<float, EACH>*>(xs + k * Left::STRIDE + row);
            const auto b =
                *reinterpret_cast<const Pack<float, EACH>*>(weights + k * Right::STRIDE + column);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    part[i][j] = fmaf(a.of[i], b.of[j], part[i][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                sum[i][j] += part[i][j];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            if (first_row + row + i < rows && first_column + column + j < outputs) {
                out[(first_row + row + i) * outputs + first_column + column + j] = sum[i][j];
            }
        }
    }
}

} // namespace product_

// x [rows, inputs], weight [outputs, inputs] -> out [rows, outputs] = x weight^T.
__device__ inline void product(
    const float* x, const float* weight, float* out, size_t rows, int inputs, int outputs) {
    product_::tile<64, 64, 4>(x, weight, out, rows, inputs, outputs);
}
ENTRY(product, f32, 256, 2,
      (const float* x, const float* weight, float* out, size_t rows, int inputs, int outputs),
      (x, weight, out, rows, inputs, outputs))

// The same bits, sooner where rows are few: in more and smaller tiles.
__device__ inline void product_few(
    const float* x, const float* weight, float* out, size_t rows, int inputs, int outputs) {
    product_::tile<32, 16, 2>(x, weight, out, rows, inputs, outputs);
}
ENTRY(product_few, f32, 128, 4,
      (const float* x, const float* weight, float* out, size_t rows, int inputs, int outputs),
      (x, weight, out, rows, inputs, outputs))
