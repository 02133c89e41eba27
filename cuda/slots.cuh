// Slots: the arrays that an update reads and writes, element beside element. theta is the variable; an optimizer keeps
// the others beside the variable.
//
// GPU_ADAM_SLOTS is the one list of slots in C++. The structs below, and every load, store and prefetch of memory.cuh,
// follow from this list, in its order. The list is gpu_adam.kernels.SLOT_SPECS again, behind theta; tests compare.
#pragma once
#include "numbers.cuh"

constexpr bool AMSGRAD = GPU_ADAM_AMSGRAD;
constexpr bool ACCUMULATES = GPU_ADAM_ACCUMULATE;  // theta is a sum of gradients, and nothing else is kept
constexpr bool EMA = GPU_ADAM_EMA;        // an exponential moving average of the variable
constexpr bool MASTER = GPU_ADAM_MASTER;  // theta before it was rounded to 16 bits
constexpr bool MEASURES = GPU_ADAM_MEASURE;  // squares of theta and of what is added to it (memory.cuh)

using Slot = GPU_ADAM_SLOT;
using SlotReal = GPU_ADAM_SLOT_REAL;

// A row: the slot's name, its type in memory, its type while computed with, whether this kernel has the slot. A macro,
// because C++17 has no other way to go over the members of a struct by name; its users are five lines each.
#define GPU_ADAM_SLOTS(SLOT)                        \
    SLOT(theta, Stored, Value, true)                \
    SLOT(m, Slot, Value, !ACCUMULATES)              \
    SLOT(v, SlotReal, Real, !ACCUMULATES)           \
    SLOT(vhat, SlotReal, Real, AMSGRAD)             \
    SLOT(average, Wide, Value, EMA)                 \
    SLOT(master, Wide, Value, MASTER)

// The pointer `p`, which comes out of a table. Without this hint the compiler could not see that `p` points to global
// memory, and would load through the slower generic path.
template <typename T>
__device__ inline T* in_global_memory(T* p) {
    __builtin_assume(__isGlobal(p));
    return p;
}

// Where the slots of one variable begin; a slot that this kernel has not is null. Every kernel has the same struct.
// Mirrored by gpu_adam.kernels.SLOT_POINTERS.
struct Slots {
#define POINTER(slot, Memory, Register, present) Memory* __restrict__ slot;
    GPU_ADAM_SLOTS(POINTER)
#undef POINTER

    // The same slots from element `offset` on.
    __device__ Slots at(long long offset) const {
        Slots moved = {};
#define MOVE(slot, Memory, Register, present) \
    if constexpr (present) moved.slot = in_global_memory(slot) + offset;
        GPU_ADAM_SLOTS(MOVE)
#undef MOVE
        return moved;
    }
};

// One element of every slot, while computed with.
struct Element {
#define NUMBER(slot, Memory, Register, present) Register slot;
    GPU_ADAM_SLOTS(NUMBER)
#undef NUMBER
    Value moved;     // theta_t - theta_{t-1}, where MEASURES
    Stored rounded;  // theta_t, where ROUNDS_AT_ONCE
};
