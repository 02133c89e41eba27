// A guarded step: its scalars depend on numbers that only the device knows, and it may turn out to change nothing.
//
//     guard_begin            the scalars of the step that is due, among those of all steps that may be
//     the pass of norm.cu    counts the elements of the gradients that are not finite
//     guard_end              whether the step is applied; counts it, and lets the loss scale follow
//     the updates            with GPU_ADAM_STAGED, which look at `apply`
//     copies of averages     by the kernel of sums, which looks at an `apply` of its own: 1 in the rows of steps that
//                            end with the averages in the variables' places
//     add_square_sum         of norm.cu, twice, where the updates measure
//
// The host computes the scalars, as powers computed here would have other bits than the reference. How many steps were
// left out it learns late, so that it sends a row of scalars for every number of steps that may have been done.
//
// Launch   one block of at most 256 threads in x, one launch after the other.
// Order    no sums. A reciprocal is a float64 quotient, rounded once more where the scalars are float32.

// Numbers of an optimizer's steps on one device. Mirrored by gpu_adam.kernels.GUARD.
struct Guard {
    long long count;           // steps done
    long long number;          // of the last step that began, as the host numbers them
    long long counts;          // whether the step at work is counted: 0 for one that is repeated
    long long skipped;         // steps that changed nothing
    long long not_finite;      // elements of the last step's gradients
    double scale;              // of the last step's gradients
    double norm;               // of the last step's gradients, where it was asked for
    unsigned long long found;  // not_finite of the step at work
    double square_sum;         // norm^2 of the step at work
    double update_squares;     // of the last step's updates, 0 if it was left out
    double theta_squares;      // of the variables as the last step left them that was not left out; NaN before
};

// Where one of the structs StepScalars has its members, in bytes from the beginning of the row; `size` is that of a member.
// Mirrored by gpu_adam.kernels.GUARD_PLACE.
struct GuardPlace {
    long long unscale, apply, size;
};

// What the host knows of the steps done before this one; behind it lie rows of scalars, one for each number that may be.
// In memory, where each replay of a graph finds another one. Mirrored by gpu_adam.kernels.CANDIDATES.
struct Candidates {
    long long first;   // the number of steps done for the first row
    long long rows;    // how many there are; where there is one, the host knows the number, else guard->count has it
    long long number;  // of the step, as the host numbers them
    long long chosen;  // the row that a launch has taken; -1 before the first one
};

// Mirrored by gpu_adam.kernels.GUARD_ROWS.
struct GuardRows {
    Candidates* candidates;
    Candidates* frozen;           // taken as long as there are no rows of candidates; else it may be null
    long long* row;               // that of the step at work, from which the updates read
    const GuardPlace* places;
    long long words;              // of a row
    long long count;              // of the places
};

// A scale that follows what it sees; `scale` is null where there is none. Mirrored by gpu_adam.kernels.LOSS_SCALE.
struct LossScale {
    float* scale;
    long long* good;      // steps since it changed
    long long interval;   // steps after which it doubles
};

__device__ inline void put(long long* row, long long place, long long size, double x) {
    char* const to = reinterpret_cast<char*>(row) + place;
    if (size == sizeof(float)) {
        *reinterpret_cast<float*>(to) = static_cast<float>(x);
    } else {
        *reinterpret_cast<double*>(to) = x;
    }
}

// The gradients are to be divided by `given` times what `scale` points to, a double where it is `wide`, else a float; by
// `given` alone where it is null.
extern "C" __global__ void __launch_bounds__(256)
guard_begin(Guard* guard, const GuardRows rows, const void* scale, const long long wide, const double given) {
    Candidates* const candidates = rows.candidates->rows ? rows.candidates : rows.frozen;
    // A graph may be launched again before the host sends other rows: the step is then repeated, and not counted again.
    const bool is_new = candidates->chosen < 0;
    const long long last = candidates->rows - 1, due = last == 0 ? 0 : guard->count - candidates->first;
    const long long chosen = !is_new ? candidates->chosen : due < 0 ? 0 : due > last ? last : due;
    const long long* const candidate = reinterpret_cast<const long long*>(candidates + 1) + chosen * rows.words;
    double divisor = given;
    if (scale) divisor *= wide ? *static_cast<const double*>(scale) : *static_cast<const float*>(scale);
    for (long long i = threadIdx.x; i < rows.words; i += blockDim.x) rows.row[i] = candidate[i];
    __syncthreads();  // all threads have read what follows changes
    for (long long i = threadIdx.x; i < rows.count; i += blockDim.x) {
        put(rows.row, rows.places[i].unscale, rows.places[i].size, 1.0 / divisor);
    }
    if (threadIdx.x != 0) return;
    if (is_new) {
        candidates->chosen = chosen;
        guard->count = candidates->first + chosen;
        guard->number = candidates->number;
    }
    guard->counts = is_new;
    guard->scale = divisor;
}

// The smallest normal number and its reciprocal: within them scale and reciprocal are normal numbers.
constexpr float SMALLEST_SCALE = 1.17549435e-38f, LARGEST_SCALE = 8.50705917e37f;

// Half the scale after a bad step, twice the scale after `interval` good ones in a row, between these two.
__device__ inline void follow(const LossScale& loss, bool is_bad) {
    const bool grows = !is_bad && *loss.good + 1 >= loss.interval;
    *loss.good = is_bad || grows ? 0 : *loss.good + 1;
    const float halved = *loss.scale * 0.5f, doubled = *loss.scale * 2.0f;
    if (is_bad && halved >= SMALLEST_SCALE) *loss.scale = halved;
    if (grows && doubled <= LARGEST_SCALE) *loss.scale = doubled;
}

// The step is left out where its gradients hold what is not finite, if it `skips` such steps, or where `found_inf` points
// to something else than 0, if it is not null.
extern "C" __global__ void __launch_bounds__(256)
guard_end(Guard* guard, const GuardRows rows, const long long skips, const float* found_inf, const LossScale loss) {
    const bool is_bad = (skips && guard->found != 0) || (found_inf && *found_inf != 0);
    if (is_bad) {
        for (long long i = threadIdx.x; i < rows.count; i += blockDim.x) {
            put(rows.row, rows.places[i].apply, rows.places[i].size, 0);
        }
    }
    __syncthreads();  // all threads have read what follows changes
    if (threadIdx.x != 0) return;
    guard->count += guard->counts && !is_bad;
    guard->skipped += is_bad;
    guard->not_finite = static_cast<long long>(guard->found);
    guard->norm = sqrt(guard->square_sum);
    guard->found = 0;
    guard->square_sum = 0;
    guard->update_squares = 0;  // behind the updates their sums are added, zeros where they are left out
    if (!is_bad) guard->theta_squares = 0;
    if (loss.scale) follow(loss, is_bad);
}
