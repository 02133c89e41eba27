"""The sum over ranks in their order, of which every device and every number of processes makes the same bits."""

from __future__ import annotations

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array, Device


def ordered_sum(device: Device, rows: Array, total: Array) -> None:
    """Enqueue ``total = ((rows[0] + rows[1]) + rows[2]) + ...``, each addition rounded once.

    The kernel is the one that accumulates gradients over several calls (cuda/dense.cu), so that W ranks have the bits
    of one process that accumulates W gradients. CuPy's and NumPy's own additions would differ in denormal numbers.

    Args:
        device: of the arrays.
        rows: shape (n, size) with n >= 1, C-contiguous; one of the dtypes of variables.
        total: shape (size,), C-contiguous, apart from the rows; float32 where rows are of 16 bits, else their dtype.
    """
    size, count = int(total.size), len(rows)
    if size == 0:
        return
    chunks = -(-size // kernels.CHUNK)
    tensor = np.zeros(1, kernels.TENSOR)
    tensor["slots"]["theta"], tensor["size"] = device.address(total), size
    addresses = device.address(rows) + np.arange(count, dtype=np.uint64) * np.uint64(rows.nbytes // count)
    with device.activate():
        memory = [device.array(x) for x in (tensor.view(np.uint8), addresses, np.zeros(chunks, np.int32))]
    tensors, gradients, chunk_tensor = map(device.address, memory)
    table = kernels.struct(kernels.TENSOR_TABLE, tensors, gradients, chunk_tensor, chunks, 0)
    scalars = np.zeros(1, kernels.step_scalars(kernels.DTYPES[total.dtype.name].real_dtype))
    nowhere, stride = kernels.pointer(0), kernels.scalar(0)
    launch = device.prepare(
        kernels.dense(total.dtype.name, kernels.ACCUMULATION, gradient=rows.dtype.name),
        [table, nowhere, stride, scalars, nowhere, kernels.struct(kernels.MEASURED_SUMS, 0, 0)],
    )
    for number in range(count):
        table["gradients"] = gradients + addresses.itemsize * number
        scalars["decay"] = number > 0  # 0 begins the sum
        launch(chunks)
