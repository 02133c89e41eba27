// Deferred sparse update: one variable with a gradient for some of its rows, of which no other row is read or written. A row
// that is touched first takes the steps that it has missed (replay.cuh), then this one. After `bring_up_to_date` of all rows
// every bit is that of sparse.cu, and so of a dense update with the same gradient written out.
//
// A block takes a tile: up to `rows_per_tile` consecutive keys, each row by its first key. A thread takes strips of it.
//
// Launch   any grid, any block of at most 256 threads in x.
// Needs    keys sorted by sort.cu; all slots at one offset from a 16-byte boundary; no other launch at work on the variable.
// Log      `last_step[row]` of the log's steps have been taken by a row; the launch adds its own step to the log, by the
//          block that ends last. Where its `apply` is 0, nothing changes; rows out of range are noted nevertheless.
// Order    rows that occur several times: 0 + first + second + ..., by position in the gradient. No atomics on numbers:
//          the same bits for every launch shape.
// count=0  the log grows by a step.
// NaN      as in dense.cu.
// Traffic  for each row that is touched: reads and writes every slot once, whatever it has missed.
#include "replay.cuh"
#include "sort.cuh"

// The variable, and how its rows are cut into strips. Mirrored by gpu_adam.kernels.DEFERRED_TABLE.
struct DeferredTable {
    Slots slots;
    long long rows;
    long long row_size;        // elements of a row, > 0
    long long rows_per_tile;   // up to TILE
    long long place;           // among the variables, in the order in which they got their slots
    int* last_step;            // of each row: how many of the logged steps it has taken
    StepLog* log;
    long long at_once;         // 1 where v takes missed steps in one product, else 0
};

constexpr int TILE = 1024;  // keys of a tile, at most

// The rows of a launch, in ascending order: keys, or with null keys all rows from `first` on.
struct TouchedRows {
    Keys keys;
    long long first, count, rows;

    __device__ long long row(long long k) const { return keys.row ? keys.row[k] : first + k; }
    // Whether key k is its row's first one, and the row exists.
    __device__ bool begins(long long k) const {
        return row(k) < rows && (!keys.row || k == 0 || keys.row[k - 1] != keys.row[k]);
    }
};

// The sum of the gradients of key k's row, for `columns` elements from `column` on.
struct SummedGradient {
    Keys keys;
    long long count, row_size;
    const Gradient* values;
    Factor factor;

    __device__ void add(Value* sum, long long k, long long column, int columns, const StepScalars& step) const {
        for (long long j = k; j < count && keys.row[j] == keys.row[k]; ++j) {
            const Gradient* const g = values + keys.position[j] * row_size + column;
#pragma unroll
            GPU_ADAM_INDEPENDENT
            for (int c = 0; c < (STRIP_ROWS == 1 ? STRIP_SIZE : columns); ++c) {
                if (STRIP_ROWS == 1 && c >= columns) break;
                sum[c] = sum[c] + clipped(value(g[c]), step, factor);
            }
        }
    }
};

// Some elements of rows that lie in a strip together: `columns` of each row, from `column` on.
struct Strip {
    StripRows rows;
    long long column;
    long long keys[STRIP_ROWS];
    long long firsts[STRIP_ROWS];  // index of the first of these elements of each row in the variable
};

// Memory to registers, or back.
template <bool LOADS>
__device__ __forceinline__ void move_lanes(SlotPacks<STRIP_SIZE>& packs, const Slots& slots, const Strip& strip) {
    if (STRIP_ROWS == 1 && strip.rows.columns == STRIP_SIZE && aligned(slots.theta + strip.firsts[0])) {
        const Slots at = slots.at(strip.firsts[0]);
#define MOVE_PACK(slot, Memory, Register, present)                     \
    if constexpr (present) {                                           \
        if constexpr (LOADS) packs.slot = load_pack<STRIP_SIZE>(at.slot);   \
        else store_pack(at.slot, packs.slot);                          \
    }
        GPU_ADAM_SLOTS(MOVE_PACK)
#undef MOVE_PACK
        return;
    }
    for (int r = 0; r < strip.rows.count(); ++r) {
        const Slots at = slots.at(strip.firsts[r]);
        const int begin = strip.rows.begin(r);
#pragma unroll
        for (int k = 0; k < STRIP_SIZE; ++k) {
            if (k >= strip.rows.columns) break;
#define MOVE_ELEMENT(slot, Memory, Register, present)                  \
    if constexpr (present) {                                           \
        if constexpr (LOADS) packs.slot.x[begin + k] = at.slot[k];     \
        else at.slot[k] = packs.slot.x[begin + k];                     \
    }
            GPU_ADAM_SLOTS(MOVE_ELEMENT)
#undef MOVE_ELEMENT
        }
    }
}

// Take the missed steps of a strip and, with a gradient, a step with it.
__device__ inline void update_strip(const DeferredTable& table, Strip& strip, const LoggedStep* log,
                                    const SummedGradient& gradient, const StepScalars& step) {
    alignas(64) SlotPacks<STRIP_SIZE> packs = {};
    move_lanes<true>(packs, table.slots, strip);
    replay(packs, strip.rows, strip.firsts, log, table.place, table.at_once);
    if (gradient.values) {
        alignas(64) Value sum[STRIP_SIZE];
        for (int k = 0; k < STRIP_SIZE; ++k) sum[k] = value(Gradient{});
        const int columns = strip.rows.columns;
        const unsigned long long noise = noise_of(step.noise, table.place);
        for (int r = 0; r < strip.rows.count(); ++r) {
            Value* const own = sum + strip.rows.begin(r);
            gradient.add(own, strip.keys[r], strip.column, columns, step);
            step_lanes<true>(packs, strip.rows.begin(r), strip.rows.end(r), step, noise, strip.firsts[r],
                             [&](int lane) { return sum[lane]; });
        }
    }
    move_lanes<false>(packs, table.slots, strip);
}

// The keys of a tile, those first whose rows have missed least: rows that share a strip, or a warp, wait for each other, and
// so hardly do. (profiling/README.md has what that brings on the host.) In shared memory.
struct RowOrder {
    int number;
    int keys[TILE];  // from the tile's first one on
    int from[TILE];  // logged steps that the key's row has taken; -1 for a key that begins no row

    // By all threads of a block; ends with a barrier. A thread counts for each of its keys how many come before.
    __device__ void fill_together(const DeferredTable& table, const TouchedRows& touched, long long begin, long long end) {
        const int count = static_cast<int>(end - begin);
        for (int k = threadIdx.x; k < count; k += blockDim.x) {
            from[k] = touched.begins(begin + k) ? table.last_step[touched.row(begin + k)] : -1;
        }
        __syncthreads();
        for (int k = threadIdx.x; k < count; k += blockDim.x) {
            int rank = 0;
            for (int j = 0; j < count; ++j) rank += from[j] > from[k] || (from[j] == from[k] && j < k);
            keys[rank] = k;
        }
        if (threadIdx.x == 0) number = count;
        __syncthreads();
    }

    // By the only thread of a block, in the host's fast mode. On the way the rows are fetched.
    __device__ void fill(const DeferredTable& table, const TouchedRows& touched, long long begin, long long end) {
        number = 0;
        for (long long k = begin; k < end; ++k) {
            if (!touched.begins(k)) continue;
            const long long row = touched.row(k);
            keys[number] = static_cast<int>(k - begin);
            from[number++] = table.last_step[row];
            const Slots at = table.slots.at(row * table.row_size);
#define FETCH(slot, Memory, Register, present)              \
    if constexpr (present) {                                \
        GPU_ADAM_FETCH(at.slot);                            \
        GPU_ADAM_FETCH(at.slot + table.row_size - 1);       \
    }
            GPU_ADAM_SLOTS(FETCH)
#undef FETCH
        }
        for (int gap = number / 2; gap > 0; gap /= 2) {  // Shell sort
            for (int i = gap; i < number; ++i) {
                const int own = from[i], key = keys[i];
                int j = i;
                for (; j >= gap && from[j - gap] < own; j -= gap) {
                    from[j] = from[j - gap];
                    keys[j] = keys[j - gap];
                }
                from[j] = own;
                keys[j] = key;
            }
        }
    }
};

// Update the rows that begin among the keys [begin, end).
__device__ inline void update_tile(const DeferredTable& table, const TouchedRows& touched, long long begin, long long end,
                                   long long now, const SummedGradient& gradient, const StepScalars& step,
                                   RowOrder& order) {
    const long long size = table.row_size;
    const long long strips = (size + STRIP_SIZE - 1) / STRIP_SIZE;
    const int together = STRIP_ROWS == 1 || size > STRIP_SIZE ? 1 : static_cast<int>(STRIP_SIZE / size);
    const bool ordered = STRIP_ROWS == 1 ? strips < 32 : together > 1;
    if constexpr (STRIP_ROWS == 1) {
        if (ordered) order.fill_together(table, touched, begin, end);
    } else {
        if (ordered) order.fill(table, touched, begin, end);
    }
    const long long count = ordered ? order.number : end - begin;
    const long long items = (count + together - 1) / together * strips;
    for (long long item = threadIdx.x; item < items; item += blockDim.x) {
        Strip strip;
        strip.rows = {};
        strip.column = item % strips * STRIP_SIZE;
        strip.rows.columns = static_cast<int>(size - strip.column < STRIP_SIZE ? size - strip.column : STRIP_SIZE);
        strip.rows.now = now;
        const long long first = item / strips * together;
        for (int k = 0; k < together && first + k < count; ++k) {
            const long long key = begin + (ordered ? order.keys[first + k] : first + k);
            if (!touched.begins(key)) continue;
            const long long row = touched.row(key);
            const int r = STRIP_ROWS == 1 ? 0 : strip.rows.rows;
            ++strip.rows.rows;
            strip.rows.from[r] = table.last_step[row];
            strip.keys[r] = key;
            strip.firsts[r] = row * size + strip.column;
        }
        if (strip.rows.rows) update_strip(table, strip, table.log->steps, gradient, step);
    }
}

// The log's next entry, behind `count` others.
__device__ inline void append(LoggedStep* steps, long long count, const StepScalars& step) {
    LoggedStep next = {};
    next.scalars = step;
    Real alpha = magnitude(real(step.alpha)), epsilon = real(step.epsilon), decay = real(step.decay);
    next.decays = !equal(decay, real(static_cast<StoredReal>(1)));
    next.penalized = !(step.l2 == 0);
    decay = decay < real(static_cast<StoredReal>(1)) ? decay : real(static_cast<StoredReal>(1));
    next.steady_since = count;
    if (count) {
        const LoggedStep& before = steps[count - 1];
        alpha = maximum(alpha, real(before.largest_alpha));
        if (real(before.smallest_epsilon) < epsilon) epsilon = real(before.smallest_epsilon);
        if (real(before.smallest_decay) < decay) decay = real(before.smallest_decay);
        next.decays |= before.decays;
        next.penalized |= before.penalized;
        const StepScalars& old = before.scalars;
        if (old.one_minus_beta_1 == step.one_minus_beta_1 && old.one_minus_beta_2 == step.one_minus_beta_2) {
            next.steady_since = before.steady_since;
        }
    }
    store(next.largest_alpha, alpha);
    store(next.smallest_epsilon, epsilon);
    store(next.smallest_decay, decay);
    steps[count] = next;
}

// Let the rows from `first` on, or with keys these, take the steps that they have missed; where `steps` is 1, and not 0,
// also this one. (Values tell nothing: those of no rows may be null.)
extern "C" __global__ void __launch_bounds__(256)
deferred(const DeferredTable table, const Indices indices, const Keys keys, const long long first, const long long steps,
         const Gradient* values, const double* factors, const StepScalars scalars, const StepScalars* staged,
         IndexErrors* errors) {
    const StepScalars step = scalars_of(0, scalars, staged, nullptr);
    if (blockIdx.x == 0 && threadIdx.x == 0) record_first(errors, indices);
    if (STAGED && steps && step.apply == 0) return;
    const long long now = table.log->count;
    const TouchedRows touched = {keys, first, indices.count, table.rows};
    const SummedGradient gradient = {keys, indices.count, table.row_size, values, Factor(factors ? *factors : 1.0)};
    const long long each = table.rows_per_tile;
    __shared__ RowOrder order;
    for (long long begin = blockIdx.x * each; begin < touched.count; begin += gridDim.x * each) {
        const long long end = begin + each < touched.count ? begin + each : touched.count;
        update_tile(table, touched, begin, end, now, gradient, step, order);
        __syncthreads();  // all have read what follows changes
        for (long long k = begin + threadIdx.x; k < end; k += blockDim.x) {
            if (touched.begins(k)) table.last_step[touched.row(k)] = static_cast<int>(now + steps);
        }
    }
    if (!steps || threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(&table.log->blocks, 1ULL) + 1 != gridDim.x) return;
    append(table.log->steps, now, step);
    table.log->blocks = 0;
    table.log->count = now + 1;
}

// Let all rows, which are up to date, be so with respect to an empty log.
extern "C" __global__ void __launch_bounds__(256)
restart_log(const DeferredTable table) {
    const long long all = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; row < table.rows; row += all) {
        table.last_step[row] = 0;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) table.log->count = 0;
}
