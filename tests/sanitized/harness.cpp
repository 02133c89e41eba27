// The kernels in faithful mode under AddressSanitizer and UndefinedBehaviorSanitizer: odd sizes, arrays at every offset
// from a 16-byte boundary, buffers that end where the arrays end, all launch shapes. Every result is compared, bit for
// bit, with a reference written here the simple way.
//
//     harness MUTANT TEST...    TEST: dense, sparse, sort, norm; exit status 0: all is well
//
// Built by tests/test_sanitized.py with the definitions of a row of the dtype table. MUTANT is 0, or in a build of
// copies of the kernels with mistakes in them, the number of the mistake to make.
#include <math.h>
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

// The shim fills shared memory between and over the guards that the compiler may have put around shared arrays.
__attribute__((no_sanitize("address"))) static void* fill(void* memory, int byte, size_t size) {
    for (volatile char* p = static_cast<volatile char*>(memory); size > 0; --size) *p++ = static_cast<char>(byte);
    return memory;
}
#define memset fill
#include "faithful.h"
#undef memset

[[maybe_unused]] static int mutant = 0;

#include "dense.cu"
#include "norm.cu"
#include "sort.cu"
#include "sparse.cu"

static const int BLOCK_SIZES[] = {1, 32, 96, 160};
static const long long GRIDS[] = {1, 2, 97};
static int launches = 0, compared = 0;

// The shapes come by turns: each is met with many sizes and offsets.
template <typename T> struct Same { using type = T; };
template <typename... P>
static void launch(long long wanted, void (*kernel)(P...), typename Same<P>::type... values) {
    const int turn = launches++;
    const long long grid = GRIDS[turn % 3], most = wanted == 1 ? 1 : wanted + 1;  // a block too many at most
    const long long blocks = grid < most ? grid : most;
    void* arguments[] = {static_cast<void*>(&values)...};
    run_blocks(kernel, arguments, 0, blocks, blocks, BLOCK_SIZES[turn % 4]);
}

// n elements, `offset` elements behind a 64-byte boundary, and not a byte more.
template <typename T>
struct Buffer {
    T* data;
    long long size;

    explicit Buffer(long long n, int offset = 0) : size(n) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, sizeof(T) * static_cast<size_t>(n + offset))) abort();
        ASAN_POISON_MEMORY_REGION(memory, sizeof(T) * static_cast<size_t>(offset));
        data = static_cast<T*>(memory) + offset;
    }
    ~Buffer() {
        char* const memory = reinterpret_cast<char*>(reinterpret_cast<size_t>(data) / 64 * 64);
        ASAN_UNPOISON_MEMORY_REGION(memory, static_cast<size_t>(reinterpret_cast<char*>(data) - memory));
        free(memory);
    }
    Buffer(const Buffer&) = delete;
    T& operator[](long long i) { return data[i]; }
};

template <typename T>
static void compare(const T& actual, const T& expected, const char* what, long long size, long long index) {
    ++compared;
    if (memcmp(&actual, &expected, sizeof(T)) == 0) return;
    fprintf(stderr, "wrong result: %s of %lld, element %lld:", what, size, index);
    for (const T* x : {&actual, &expected}) {
        unsigned char bytes[sizeof(T)];
        memcpy(bytes, x, sizeof(T));
        fprintf(stderr, x == &actual ? " got " : ", expected ");
        for (size_t i = sizeof(T); i-- > 0;) fprintf(stderr, "%02x", bytes[i]);
    }
    fprintf(stderr, "\n");
    exit(1);
}

static unsigned long long state = 1;
static unsigned long long random_bits() {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return state >> 33;
}
static double random_number() { return static_cast<double>(random_bits()) / (1LL << 30) - 1.0; }

static void randomize(float& x) { x = static_cast<float>(random_number()); }
static void randomize(double& x) { x = random_number(); }
static void randomize(Float16& x) { narrow(x, static_cast<float>(random_number())); }
static void randomize(BFloat16& x) { narrow(x, static_cast<float>(random_number())); }
template <typename T> static void randomize(Complex<T>& x) { randomize(x.re), randomize(x.im); }
template <typename T> static void randomize(Buffer<T>& buffer) {
    for (long long i = 0; i < buffer.size; ++i) randomize(buffer[i]);
}

// Numbers of 16 bits are computed with in float. (Their conversions have tests of their own, beside NumPy's.)
template <typename T> static T wide(T x) { return x; }
static float wide(Float16 x) { return widened(x); }
static float wide(BFloat16 x) { return widened(x); }
template <typename T> static void keep(T& place, T x) { place = x; }
static void keep(Float16& place, float x) { narrow(place, x); }
static void keep(BFloat16& place, float x) { narrow(place, x); }

template <typename T, typename X> static void keep_by_chance(T& place, X x, unsigned) { keep(place, x); }
static void keep_by_chance(BFloat16& place, float x, unsigned noise) {
    STOCHASTIC ? narrow_stochastically(place, x, noise) : narrow(place, x);
}

// What is clipped by value. (The rule for complex numbers has tests of its own; here they are left as they are.)
constexpr bool CLIPS_BY_VALUE = BOUNDED && sizeof(Wide) == sizeof(StoredReal);
static const StoredReal CLIP_VALUE = static_cast<StoredReal>(CLIPS_BY_VALUE ? 0.75 : INFINITY);

template <typename T> static T bounded(T x) { return x < -CLIP_VALUE ? -CLIP_VALUE : x > CLIP_VALUE ? CLIP_VALUE : x; }
template <typename T> static Complex<T> bounded(Complex<T> x) { return x; }

static const StepScalars STEP = {12345, StoredReal(0.01), StoredReal(0.1), StoredReal(0.001), StoredReal(1e-7), StoredReal(-1),
                                 StoredReal(0.25), StoredReal(0.875), StoredReal(0.7), StoredReal(0.3), CLIP_VALUE,
                                 StoredReal(1), StoredReal(1)};
static const StepScalars NOTHING = {0, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN};
static const long long PLACE = 3;  // of every variable among all

// How a kernel is given them: a staged one must not look at the argument, another one not at the pointer.
static const StepScalars SCALARS = STAGED ? NOTHING : STEP;
static const StepScalars GROUPS[] = {NOTHING, STEP};  // tensors are of the second
static const StepScalars* const STAGED_GROUPS = STAGED ? GROUPS : nullptr;
static const StepScalars* const STAGED_STEP = STAGED ? &STEP : nullptr;

template <typename T> static T times(T x, double factor) { return x * static_cast<T>(factor); }
template <typename T> static Complex<T> times(Complex<T> x, double f) { return {times(x.re, f), times(x.im, f)}; }

static Wide clipped_reference(Gradient g, double factor) {
    return CLIPS ? times(bounded(wide(g)), factor) : wide(g);
}

template <typename T> static T norm_squared(T x) { return x * x; }
template <typename T> static T norm_squared(Complex<T> x) { return x.re * x.re + x.im * x.im; }
template <typename T> static void average(T& m, T g, StoredReal rate) { m += (g - m) * rate; }
template <typename T> static void average(Complex<T>& m, Complex<T> g, StoredReal rate) {
    average(m.re, g.re, rate), average(m.im, g.im, rate);
}
template <typename T> static void descend(T& theta, T m, StoredReal divisor) {
    if (ADJUSTS) theta *= STEP.decay;
    theta -= m * STEP.alpha / divisor;
}
template <typename T> static void descend(Complex<T>& theta, Complex<T> m, StoredReal divisor) {
    descend(theta.re, m.re, divisor), descend(theta.im, m.im, divisor);
}

template <typename T> static T penalized(T g, T theta) { return g * STEP.sign + theta * STEP.l2; }
template <typename T> static Complex<T> penalized(Complex<T> g, Complex<T> theta) {
    return {penalized(g.re, theta.re), penalized(g.im, theta.im)};
}
template <typename T> static T smoothed(T old, T theta) { return old * STEP.momentum + theta * STEP.one_minus_momentum; }
template <typename T> static Complex<T> smoothed(Complex<T> old, Complex<T> theta) {
    return {smoothed(old.re, theta.re), smoothed(old.im, theta.im)};
}

static double term(float x) { return static_cast<double>(x) * static_cast<double>(x); }
static double term(double x) { return x * x; }
template <typename T> static double term(Complex<T> x) { return term(x.re) + term(x.im); }

// A variable with its slots, updated by the kernel, and the same one updated here.
struct Pair {
    Buffer<Stored> theta, expected_theta;
    Buffer<Slot> m, expected_m;
    Buffer<SlotReal> v, vhat, expected_v, expected_vhat;
    Buffer<Wide> averaged, master, expected_averaged, expected_master;
    Buffer<double> update_squares, theta_squares;

    Pair(long long n, int offset)
        : theta(n, offset), expected_theta(n), m(n, offset), expected_m(n), v(n, offset), vhat(n, offset), expected_v(n),
          expected_vhat(n), averaged(n, offset), master(n, offset), expected_averaged(n), expected_master(n),
          update_squares(n), theta_squares(n) {
        randomize(theta), randomize(m), randomize(v), randomize(vhat), randomize(averaged), randomize(master);
        for (long long i = 0; i < n; ++i) {
            keep(v[i], fabs_of(wide(v[i])));
            keep(vhat[i], fabs_of(wide(vhat[i])));
            expected_theta[i] = theta[i], expected_m[i] = m[i], expected_v[i] = v[i], expected_vhat[i] = vhat[i];
            expected_averaged[i] = averaged[i], expected_master[i] = master[i];
        }
    }

    static StoredReal fabs_of(StoredReal x) { return x < 0 ? -x : x; }

    void update(long long i, Wide g) {
        Wide updated = MASTER ? expected_master[i] : wide(expected_theta[i]), mean = wide(expected_m[i]);
        const Wide before = updated;
        StoredReal second_moment = wide(expected_v[i]);
        if (ADJUSTS) g = penalized(g, updated);
        average(mean, g, STEP.one_minus_beta_1);
        average(second_moment, norm_squared(g), STEP.one_minus_beta_2);
        keep(expected_m[i], mean), keep(expected_v[i], second_moment);
        if (AMSGRAD) {
            if (second_moment < wide(expected_vhat[i])) second_moment = wide(expected_vhat[i]);
            keep(expected_vhat[i], second_moment);
        }
        // The root of a float in float64 and rounded is the float nearest to the root.
        descend(updated, mean, static_cast<StoredReal>(sqrt(second_moment)) + STEP.epsilon);
        update_squares[i] = term(updated - before);
        if (MASTER) expected_master[i] = updated;
        keep_by_chance(expected_theta[i], updated, noise_at(noise_of(STEP.noise, PLACE), i, 0));
        if (!MASTER) updated = wide(expected_theta[i]);
        theta_squares[i] = term(updated);
        if (EMA) expected_averaged[i] = smoothed(expected_averaged[i], updated);
    }

    Slots slots() {
        return {theta.data, m.data, v.data, AMSGRAD ? vhat.data : nullptr, EMA ? averaged.data : nullptr,
                MASTER ? master.data : nullptr};
    }

    void check(const char* what) {
        for (long long i = 0; i < theta.size; ++i) {
            compare(theta[i], expected_theta[i], what, theta.size, i);
            compare(m[i], expected_m[i], what, theta.size, i);
            compare(v[i], expected_v[i], what, theta.size, i);
            compare(vhat[i], expected_vhat[i], what, theta.size, i);
            compare(averaged[i], expected_averaged[i], what, theta.size, i);
            compare(master[i], expected_master[i], what, theta.size, i);
        }
    }
};

// Room for the sums of `count` chunks or tiles, none where the kernel must not write any.
struct Sums {
    Buffer<double> update, theta;

    explicit Sums(long long count) : update(MEASURES ? count : 0), theta(MEASURES ? count : 0) {
        for (long long i = 0; i < update.size; ++i) update[i] = theta[i] = NAN;
    }
    MeasuredSums places() { return {update.data, theta.data}; }

    // Sum number `index` is that of elements [begin, begin + size) of a pair, in some order.
    void check(long long index, Pair& pair, long long begin, long long size, const char* what) {
        if (!MEASURES) return;
        double squares[2] = {};
        for (long long i = begin; i < begin + size; ++i) {
            squares[0] += pair.update_squares[i], squares[1] += pair.theta_squares[i];
        }
        compare(fabs(update[index] - squares[0]) <= 1e-12 * squares[0], true, what, size, index);
        compare(fabs(theta[index] - squares[1]) <= 1e-12 * squares[1], true, what, size, index);
    }
};

static const double FACTORS[] = {1.0, 0.7, 0.375};

static const long long SIZES[] = {1, 2, 3, 5, 8, 1023, 1025, 4095, 4096, 4097, 10001};
constexpr int TENSORS = sizeof SIZES / sizeof *SIZES;

// The table of tensors of these sizes, with their gradients; the caller adds the rest.
struct Tensors {
    Buffer<Tensor> tensors{TENSORS};
    Buffer<const Gradient*> gradient_pointers{TENSORS};
    Buffer<int>* chunk_tensor;
    Buffer<long long> ends{TENSORS};
    Buffer<Gradient>* gradients[TENSORS];
    TensorTable table;

    explicit Tensors(int shift) {
        long long chunks = 0;
        for (int t = 0; t < TENSORS; ++t) {
            gradients[t] = new Buffer<Gradient>(SIZES[t], (t + 2 * shift + 1) % 4);
            randomize(*gradients[t]);
            gradient_pointers[t] = gradients[t]->data;
            tensors[t] = {{}, SIZES[t], chunks, 1, PLACE};
            chunks += (SIZES[t] + GPU_ADAM_CHUNK - 1) / GPU_ADAM_CHUNK;
            ends[t] = chunks;
        }
        chunk_tensor = new Buffer<int>(chunks);
        for (int t = 0; t < TENSORS; ++t) {
            for (long long c = tensors[t].first_chunk; c < ends[t]; ++c) (*chunk_tensor)[c] = t;
        }
        table = {tensors.data, gradient_pointers.data, chunk_tensor->data, chunks};
    }
    ~Tensors() {
        for (Buffer<Gradient>* gradient : gradients) delete gradient;
        delete chunk_tensor;
    }
};

static void test_dense() {
    for (int shift = 0; shift < 4; ++shift) {
        Tensors all(shift);
        Pair* pairs[TENSORS];
        Buffer<double> factors(shift % 2 ? TENSORS : 1);
        for (long long f = 0; f < factors.size; ++f) factors[f] = FACTORS[f % 3];
        for (int t = 0; t < TENSORS; ++t) {
            Pair& pair = *(pairs[t] = new Pair(SIZES[t], (t + shift) % 4));
            all.tensors[t].slots = pair.slots();
            const double factor = shift == 0 ? 1.0 : factors[shift % 2 ? t : 0];
            for (long long i = 0; i < SIZES[t]; ++i) pair.update(i, clipped_reference((*all.gradients[t])[i], factor));
        }
        Sums sums(all.table.chunks);
        launch(all.table.chunks, dense, all.table, shift == 0 ? nullptr : factors.data, shift % 2, SCALARS, STAGED_GROUPS,
               sums.places());
        for (int t = 0; t < TENSORS; ++t) {
            for (long long c = all.tensors[t].first_chunk, begin = 0; c < all.ends[t]; ++c, begin += GPU_ADAM_CHUNK) {
                const long long left = SIZES[t] - begin;
                sums.check(c, *pairs[t], begin, left < GPU_ADAM_CHUNK ? left : GPU_ADAM_CHUNK, "sums of dense");
            }
        }
        for (Pair* pair : pairs) pair->check("dense"), delete pair;
    }
    launch(2, dense, TensorTable{nullptr, nullptr, nullptr, 0, nullptr}, nullptr, 0, SCALARS, STAGED_GROUPS,
           MeasuredSums{nullptr, nullptr});
}

static const IndexErrors NO_ERRORS = {0, ~0ULL, 0, 0};

// Rows that an embedding might ask for: duplicates, and unless all are `valid` some out of range.
template <typename T>
static void make_indices(Buffer<T>& indices, long long rows, bool valid) {
    for (long long i = 0; i < indices.size; ++i) {
        indices[i] = static_cast<T>(static_cast<long long>(random_bits()) % rows);
        if (!valid && random_bits() % 8 == 0) indices[i] = static_cast<T>(random_bits() % 2 ? rows + i : -1 - i);
    }
}

static void test_table(long long rows, long long row_size, long long count, int offset, bool valid) {
    Pair pair(rows * row_size, offset);
    Buffer<Gradient> values(count * row_size, (offset + 1) % 4);
    randomize(values);
    Buffer<int> indices(count);
    make_indices(indices, rows, valid);
    const double* const factor = launches % 2 ? &FACTORS[2] : nullptr;

    // Sorted by hand: for every row its occurrences in order, and behind them what is out of range.
    Buffer<long long> sorted_rows(count), positions(count);
    long long filled = 0;
    IndexErrors expected = NO_ERRORS;
    for (long long row = 0; row <= rows; ++row) {
        Buffer<Wide> sums(row_size);
        for (long long c = 0; c < row_size; ++c) sums[c] = Wide{};
        for (long long i = 0; i < count; ++i) {
            const bool inside = 0 <= indices[i] && indices[i] < rows;
            if (inside ? indices[i] != row : row != rows) continue;
            sorted_rows[filled] = row, positions[filled++] = i;
            if (!inside && expected.count++ == 0) expected.first_position = i, expected.first_index = indices[i];
            for (long long c = 0; c < row_size; ++c) {
                const Wide g = clipped_reference(values[i * row_size + c], factor ? *factor : 1.0);
                store(sums[c], value(sums[c]) + value(g));
            }
        }
        for (long long c = 0; row < rows && c < row_size; ++c) pair.update(row * row_size + c, sums[c]);
    }
    Buffer<IndexErrors> errors(1);
    errors[0] = expected, errors[0].first_index = 0;
    expected.recorded = expected.count > 0;

    const long long pieces = (row_size + GPU_ADAM_TILE - 1) / GPU_ADAM_TILE;
    const long long rows_per_tile = pieces > 1 ? 1 : GPU_ADAM_TILE / row_size;
    const long long tiles = pieces * ((rows + rows_per_tile - 1) / rows_per_tile);
    const EmbeddingTable table = {pair.slots(), rows, row_size, rows_per_tile, pieces, tiles, PLACE};
    Sums sums(tiles);
    launch(tiles + 1, sparse, table, Indices{indices.data, 0, count, rows}, Keys{sorted_rows.data, positions.data},
           values.data, factor, SCALARS, STAGED_STEP, errors.data, sums.places());
    for (long long tile = 0, begin = 0; tile < tiles; ++tile) {
        const long long end = pieces > 1 ? tile / pieces * row_size + (tile % pieces + 1) * GPU_ADAM_TILE
                                         : (tile + 1) * rows_per_tile * row_size;
        const long long most = pieces > 1 ? (tile / pieces + 1) * row_size : rows * row_size;
        const long long size = (end < most ? end : most) - begin;
        sums.check(tile, pair, begin, size, "sums of sparse");
        begin += size;
    }
    pair.check("sparse");
    compare(errors[0], expected, "errors of sparse", count, 0);
}

static void test_sparse() {
    int offset = 0;
    for (const long long count : {0, 1, 9, 300}) {
        for (const bool valid : {true, false}) {
            test_table(1, 3, count, offset++ % 4, valid);
            test_table(301, 1, count, offset++ % 4, valid);
            test_table(50, 7, count, offset++ % 4, valid);
            if (count < 10) test_table(3, GPU_ADAM_TILE + 3, count, offset++ % 4, valid);
            test_table(1100, GPU_ADAM_TILE / 512 + 1, count, offset++ % 4, valid);
        }
    }
}

template <typename T>
static void test_sort_of(long long count, long long rows, bool valid) {
    Buffer<T> numbers(count, static_cast<int>(count % 2));
    make_indices(numbers, rows, valid);
    const Indices indices = {numbers.data, sizeof(T) == 8, count, rows};
    int passes = 1;
    while (rows >> DIGIT_BITS * passes) ++passes;
    const long long runs = (count + GPU_ADAM_SORT_RUN - 1) / GPU_ADAM_SORT_RUN;
    const bool fits_a_block = count <= GPU_ADAM_SORT_RUN && rows < GPU_ADAM_SORT_ROWS;
    for (int way = fits_a_block ? 0 : 1; way < 2; ++way) {
        Buffer<long long> row_a(count), position_a(count), row_b(count), position_b(count);
        Buffer<long long> starts(DIGITS * (runs + 1));
        Buffer<IndexErrors> errors(1);
        errors[0] = NO_ERRORS;
        Keys from = {row_a.data, position_a.data}, to = {row_b.data, position_b.data};
        if (way == 0) launch(1, sort_rows, indices, from, passes, errors.data);
        if (way == 1) launch(2, sort_keys, indices, from, errors.data);
        for (int pass = 0; way == 1 && pass < passes; ++pass) {
            launch(2, sort_count, from, count, DIGIT_BITS * pass, starts.data);
            launch(3, sort_scan, starts.data, runs);
            launch(2, sort_scatter, from, to, count, DIGIT_BITS * pass, starts.data);
            const Keys swapped = from;
            from = to, to = swapped;
        }
        // Ascending, equal rows by position, every key where it came from: then each position is there once.
        IndexErrors expected = NO_ERRORS;
        for (long long i = 0; i < count; ++i) {
            const long long position = from.position[i];
            compare(0 <= position && position < count, true, "a position of sort", count, i);
            const bool inside = 0 <= numbers[position] && numbers[position] < rows;
            compare(from.row[i], inside ? static_cast<long long>(numbers[position]) : rows, "a row of sort", count, i);
            const bool ordered = i == 0 || from.row[i - 1] < from.row[i] ||
                                 (from.row[i - 1] == from.row[i] && from.position[i - 1] < position);
            compare(ordered, true, "the order of sort", count, i);
            if (!inside && expected.count++ == 0) expected.first_position = static_cast<unsigned long long>(position);
        }
        compare(errors[0], expected, "errors of sort", count, 0);
    }
}

static void test_sort() {
    for (const long long count : {1, 2, 33}) {
        test_sort_of<int>(count, 15, true);
        test_sort_of<long long>(count, 16, false);
    }
    test_sort_of<int>(257, 70000, false);
    test_sort_of<int>(300, GPU_ADAM_SORT_ROWS - 1, false);
    test_sort_of<long long>(100, 1LL << 40, false);
    test_sort_of<int>(GPU_ADAM_SORT_RUN, 15, true);
    test_sort_of<int>(GPU_ADAM_SORT_RUN + 1, 15, true);
    for (const long long rows : {16, 300, 70000, 300}) test_sort_of<long long>(2 * GPU_ADAM_SORT_RUN + 3, rows, false);
}

static double plain(double x) { return x; }

// The sum in the order that norm.cu states.
template <typename T, typename Term>
static double lane_sum(const T* x, long long n, Term term_of) {
    double lanes[1024] = {};
    for (long long i = 0; i < n; ++i) lanes[i % 1024] += term_of(x[i]);
    for (int half = 512; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

static double factor_of(const double* sums, long long count, double limit) {
    const double norm = sqrt(lane_sum(sums, count, plain));
    return norm > limit ? limit / norm : 1.0;
}

static void test_norm() {
    for (int shift = 0; shift < 2; ++shift) {
        Tensors all(shift);
        const long long chunks = all.table.chunks;
        Buffer<double> sums(chunks), factors(TENSORS), factor(1);
        Buffer<unsigned long long> found(1), written(TENSORS);
        found[0] = 0;
        for (int t = 0; t < TENSORS; ++t) written[t] = 0;
        const Norm one = {factor.data, written.data, 0, 2.0}, each = {factors.data, written.data, 1, 2.0}, none = {};
        launch(chunks, square_sums, all.table, SCALARS, STAGED_STEP, sums.data, found.data, one);
        compare(factor[0], factor_of(sums.data, chunks, 2.0), "the norm of square_sums", chunks, 0);
        launch(chunks, square_sums, all.table, SCALARS, STAGED_STEP, sums.data, found.data, each);
        for (int t = 0; t < TENSORS; ++t) {
            const long long first = all.tensors[t].first_chunk;
            const double expected = factor_of(sums.data + first, all.ends[t] - first, 2.0);
            compare(factors[t], expected, "the norms of square_sums", TENSORS, t);
            compare(static_cast<double>(written[t]), 0.0, "written", TENSORS, t);
        }
        launch(1, clip_by_global_norm, sums.data, chunks, 2.0, factor.data);
        compare(factor[0], factor_of(sums.data, chunks, 2.0), "clip_by_global_norm", chunks, 0);
        for (int t = shift; t < TENSORS; t += 2) {
            const Buffer<Gradient>& gradient = *all.gradients[t];
            const long long first = all.tensors[t].first_chunk;
            Buffer<double> alone(all.ends[t] - first);
            const Norm& norm = t < 2 ? none : one;
            launch(alone.size, square_sums_of, gradient.data, gradient.size, SCALARS, STAGED_STEP, alone.data, found.data,
                   norm);
            for (long long c = 0; c < alone.size; ++c) {
                const long long left = gradient.size - c * GPU_ADAM_CHUNK;
                const long long size = left < GPU_ADAM_CHUNK ? left : GPU_ADAM_CHUNK;
                const Gradient* const chunk = gradient.data + c * GPU_ADAM_CHUNK;
                const double sum = lane_sum(chunk, size, [](Gradient x) { return term(bounded(wide(x))); });
                compare(sums[first + c], sum, "square_sums", gradient.size, c);
                compare(alone[c], sum, "square_sums_of", gradient.size, c);
            }
            if (norm.factors) {
                compare(factor[0], factor_of(alone.data, alone.size, 2.0), "the norm of square_sums_of", gradient.size, 0);
            }
        }
        compare(static_cast<double>(found[0]), 0.0, "found", chunks, 0);
    }
    // More sums than lanes, and none.
    Buffer<double> many(2 * 1024 + 77), none(0);
    for (long long i = 0; i < many.size; ++i) many[i] = random_number() + 1.0;
    Buffer<double> factor(1);
    launch(1, clip_by_global_norm, many.data, many.size, 1e-3, factor.data);
    compare(factor[0], factor_of(many.data, many.size, 1e-3), "clip_by_global_norm", many.size, 0);
    launch(1, clip_by_global_norm, none.data, 0, 2.0, factor.data);
    compare(factor[0], 1.0, "clip_by_global_norm", 0, 0);
    const Norm norm = {factor.data, nullptr, 0, 2.0};
    launch(2, square_sums, TensorTable{nullptr, nullptr, nullptr, 0, nullptr}, SCALARS, STAGED_STEP, nullptr, nullptr, norm);
    launch(2, square_sums_of, nullptr, 0, SCALARS, STAGED_STEP, nullptr, nullptr, norm);
}

int main(int count, char** arguments) {
    if (count < 3) return 2;
    mutant = atoi(arguments[1]);
    for (int i = 2; i < count; ++i) {
        const char* const test = arguments[i];
        if (strcmp(test, "dense") == 0) test_dense();
        else if (strcmp(test, "sparse") == 0) test_sparse();
        else if (strcmp(test, "sort") == 0) test_sort();
        else if (strcmp(test, "norm") == 0) test_norm();
        else return 2;
    }
    printf("%d launches, %d comparisons\n", launches, compared);
    return 0;
}
