// Dense update: every variable of one dtype in one launch.
//
// Scalars  of the step: by value, and `staged` is null; or, with GPU_ADAM_STAGED, those of the tensor's group from the
//          array that `staged` points to: see scalars_of. Where their `apply` is 0, the tensor stays as it is.
// Launch   any grid, any block of at most 256 threads in x; blocks stride over chunks, threads over a chunk's elements.
// Memory   all slots of one tensor (slots.cuh) lie at one offset from a 16-byte boundary; no two tensors of a launch
//          overlap. A gradient may equal, but not partly overlap, an array of its own tensor; it must not
//          overlap another tensor's.
// Order    no sums: the bits of an element depend on its own inputs only, not on the launch.
// Sums     with GPU_ADAM_MEASURE those of each chunk (memory.cuh), zeros where the tensor stays as it is. They are no part
//          of the update: their order, and so their last bits, depend on the block and on the device's packs.
// chunks=0 nothing happens. NaN and infinity follow IEEE rules; see adam_math.cuh for vhat.
// Traffic  per element: reads every slot and g, writes every slot: 28 bytes in float32 for theta, m and v.
#include "memory.cuh"
#include "tensor_table.cuh"

extern "C" __global__ void __launch_bounds__(256)
dense(const TensorTable table, const double* factors, const long long factor_stride, const StepScalars scalars,
      const StepScalars* staged, const MeasuredSums sums) {
    __shared__ BlockMeasures block;
    for (long long index = blockIdx.x; index < table.chunks; index += gridDim.x) {
        const Chunk chunk = chunk_at(table, index);
        const Tensor tensor = table.tensors[chunk.tensor];
        const StepScalars step = scalars_of(tensor.group, scalars, staged, table.frozen);
        if (STAGED && step.apply == 0) {
            write_measures(sums, index, {}, block);
            continue;
        }
        const Range range = {tensor.slots.at(chunk.begin), chunk.size, chunk.begin, noise_of(step.noise, tensor.place)};
        const Gradient* const g = in_global_memory(table.gradients[chunk.tensor]) + chunk.begin;
        // One factor per tensor (stride 1), or one for all (stride 0, the global norm).
        const Factor factor(factors ? factors[chunk.tensor * factor_stride] : 1.0);
        // Two loops: one that chooses at every pack takes up to 18 registers more.
        const Measures own = aligned(g + head_size(range.slots.theta, chunk.size))
                                 ? update_range(range, GlobalGradient<true>{g, factor}, step)
                                 : update_range(range, GlobalGradient<false>{g, factor}, step);
        write_measures(sums, index, own, block);
    }
}
