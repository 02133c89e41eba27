// The multi-tensor table: any number of tensors of one dtype in one launch.
//
// Tensors are cut into chunks of GPU_ADAM_CHUNK consecutive elements, numbered through all tensors; the last chunk of a
// tensor may be shorter. Tensors of no elements have no chunk and no entry. The table lies in device memory, because
// kernel arguments end at 4 KB. A new set of variables gets a new table; a step rewrites the gradient pointers only.
#pragma once
#include "slots.cuh"

// Mirrored by gpu_adam.kernels.TENSOR.
struct Tensor {
    Slots slots;
    long long size;         // elements, > 0
    long long first_chunk;
    long long group;        // which of the staged scalars are its own
    long long place;        // among the variables, in the order in which they got their slots
};

struct StepScalars;  // of adam_math.cuh

// Mirrored by gpu_adam.kernels.TENSOR_TABLE.
struct TensorTable {
    const Tensor* tensors;
    const Gradient* const* gradients;  // one pointer per tensor
    const int* chunk_tensor;           // the tensor of each chunk
    long long chunks;
    const StepScalars* frozen;       // see scalars_of
};

struct Chunk {
    int tensor;
    long long begin;  // first element within the tensor
    int size;         // 1 to GPU_ADAM_CHUNK
};

// Which elements chunk number `index` holds.
__device__ inline Chunk chunk_at(const TensorTable& table, long long index) {
    const int t = table.chunk_tensor[index];
    const long long begin = (index - table.tensors[t].first_chunk) * GPU_ADAM_CHUNK;
    const long long left = table.tensors[t].size - begin;
    return {t, begin, static_cast<int>(left < GPU_ADAM_CHUNK ? left : GPU_ADAM_CHUNK)};
}
