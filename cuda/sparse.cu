// Sparse update: one variable with a gradient for some of its rows, equal bit for bit to the dense update with the same
// gradient written out. Each slot (slots.cuh) is read and written once.
//
// A block takes a tile of the variable: as many whole rows as fit into GPU_ADAM_TILE elements, or a piece of one row.
// The block writes the tile's gradient into shared memory, zero where no index points, and then updates the tile with
// that gradient as dense.cu would.
//
// Launch   any grid, any block of at most 256 threads in x.
// Needs    keys sorted by sort.cu; all slots at one offset from a 16-byte boundary.
// Scalars  by value, or with GPU_ADAM_STAGED from where `staged` points. Where their `apply` is 0, the variable stays as
//          it is; rows out of range are noted nevertheless.
// Order    rows that occur several times: 0 + first + second + ..., by position in the gradient. No atomics on numbers:
//          the same bits for every launch shape.
// Sums     with GPU_ADAM_MEASURE those of each tile, as in dense.cu.
// count=0  every row moves by its momentum, as with a dense gradient of zeros. Rows out of range are not applied.
// NaN      as in dense.cu.
#include "memory.cuh"
#include "sort.cuh"

// The variable, and how its rows are cut into tiles. Mirrored by gpu_adam.kernels.EMBEDDING_TABLE.
struct EmbeddingTable {
    Slots slots;
    long long rows;
    long long row_size;        // elements of a row, > 0
    long long rows_per_tile;   // 1 where a row is cut into pieces
    long long pieces;          // tiles per row where a row does not fit into one, else 1
    long long tiles;
    long long place;           // among the variables, in the order in which they got their slots
};

// The first k in [begin, end) with row[k] >= wanted; `end` where there is none.
__device__ inline long long lower_bound(const long long* row, long long begin, long long end, long long wanted) {
    while (begin < end) {
        const long long middle = begin + (end - begin) / 2;
        if (row[middle] < wanted) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

// The rows and columns of one tile.
struct Tile {
    long long first_row, last_row;  // [first, last)
    long long first_column;
    int columns;
};

__device__ inline Tile tile_at(const EmbeddingTable& table, long long index) {
    if (table.pieces > 1) {
        const long long row = index / table.pieces;
        const long long first = (index - row * table.pieces) * GPU_ADAM_TILE;
        const long long left = table.row_size - first;
        return {row, row + 1, first, static_cast<int>(left < GPU_ADAM_TILE ? left : GPU_ADAM_TILE)};
    }
    const long long row = index * table.rows_per_tile;
    const long long end = row + table.rows_per_tile;
    return {row, end < table.rows ? end : table.rows, 0, static_cast<int>(table.row_size)};
}

// gradient[row, column] of the tile = the sum of its occurrences; keys [begin, end) are those of the tile's rows. Groups
// of threads take a row each, threads of a group its columns.
__device__ inline void sum_rows(const Tile& tile, const Keys keys, long long begin, long long end, const Gradient* values,
                                long long row_size, const Factor& factor, const StepScalars& step, Value* gradient) {
    const int lanes = tile.columns < static_cast<int>(blockDim.x) ? tile.columns : blockDim.x;
    const int groups = blockDim.x / lanes;
    const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    if (group >= groups) return;
    for (long long k = begin + group; k < end; k += groups) {
        const long long row = keys.row[k];
        if (k > begin && keys.row[k - 1] == row) continue;  // not the row's first occurrence
        const long long last = lower_bound(keys.row, k + 1, end, row + 1);
        Value* const target = gradient + (row - tile.first_row) * tile.columns;
        for (int c = lane; c < tile.columns; c += lanes) {
            const Gradient* const column = values + tile.first_column + c;
            Value sum = value(Gradient{});
#pragma unroll 8
            for (long long j = k; j < last; ++j) {
                sum = sum + clipped(value(column[keys.position[j] * row_size]), step, factor);
            }
            target[c] = sum;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
sparse(const EmbeddingTable table, const Indices indices, const Keys keys, const Gradient* values, const double* factors,
       const StepScalars scalars, const StepScalars* staged, IndexErrors* errors, const MeasuredSums sums) {
    const StepScalars step = scalars_of(0, scalars, staged, nullptr);
    alignas(16) __shared__ Value gradient[GPU_ADAM_TILE];
    __shared__ BlockMeasures block;
    if (blockIdx.x == 0 && threadIdx.x == 0) record_first(errors, indices);
    if (STAGED && step.apply == 0) {
        for (long long index = blockIdx.x; MEASURES && index < table.tiles; index += gridDim.x) {
            write_measures(sums, index, {}, block);
        }
        return;
    }
    const Factor factor(factors ? *factors : 1.0);

    for (long long index = blockIdx.x; index < table.tiles; index += gridDim.x) {
        const Tile tile = tile_at(table, index);
        const int size = static_cast<int>(tile.last_row - tile.first_row) * tile.columns;
        for (int i = threadIdx.x; i < size; i += blockDim.x) gradient[i] = value(Gradient{});
        const long long begin = lower_bound(keys.row, 0, indices.count, tile.first_row);
        const long long end = lower_bound(keys.row, begin, indices.count, tile.last_row);
        __syncthreads();
        sum_rows(tile, keys, begin, end, values, table.row_size, factor, step, gradient);
        __syncthreads();
        const long long offset = tile.first_row * table.row_size + tile.first_column;
        const Range range = {table.slots.at(offset), size, offset, noise_of(step.noise, table.place)};
        const Measures own = aligned(gradient + head_size(range.slots.theta, size))  // two loops, as in dense.cu
                                 ? update_range(range, SharedGradient<true>{gradient}, step)
                                 : update_range(range, SharedGradient<false>{gradient}, step);
        write_measures(sums, index, own, block);
        __syncthreads();  // before the next tile's zeros
    }
}
