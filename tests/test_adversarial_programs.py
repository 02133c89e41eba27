"""By behaviour: small programs that tried to break a step or the state, and did.

Programs that may crash run in an interpreter of their own.
"""

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from gpu_adam import Adam, ArgumentTypeError, Variable
from gpu_adam.devices.host import HostDevice

_PRELUDE = "import copy, gc, pickle, numpy as np\nfrom gpu_adam import *\nset_device('host')\n"


def _run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"


def test_expanded_torch_gradient_is_taken() -> None:
    """The gradient of a sum has one element of memory and strides of 0."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    parameter = torch.ones(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(parameter.sum(), parameter)
    assert Adam().apply_gradients([(gradient, Variable(np.ones(5, np.float32), device="host"))]) == 1


def test_list_of_pairs_emptied_by_a_callable_does_not_free_gradients() -> None:
    """The step keeps the gradients alive until its launches have read them."""
    size = 5_000_000
    variable, optimizer, others = Variable(np.ones(size, np.float32), device="host"), Adam(0.1), []
    optimizer.apply_gradients([(np.ones(size, np.float32), variable)])
    pairs = [(np.ones(size, np.float32), variable)]

    def rate() -> float:
        pairs.clear()
        others.append(np.full(size, -7, np.float32))
        return 0.1

    optimizer.learning_rate = rate
    optimizer.apply_gradients(pairs)
    np.testing.assert_allclose(optimizer.get_slot(variable, "m").numpy(), 0.19, rtol=1e-5)


@pytest.mark.parametrize("twin", ["copy.deepcopy(o)", "pickle.dumps(o)"])
@pytest.mark.parametrize("change", ["p.data = torch.ones(n)", "p.untyped_storage().resize_(0)"])
def test_copy_does_not_read_memory_that_a_tensor_left(twin: str, change: str) -> None:
    """A copy looks where the tensor lies now; it may refuse, in words."""
    pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    _run(
        "import torch\nn = 5_000_000\np = torch.ones(n)\no = Adam(0.1)\no.apply_gradients([(torch.ones(n), p)])\n"
        f"{change}\ngc.collect()\ntry:\n    {twin}\nexcept GpuAdamError:\n    pass\n"
    )


@pytest.mark.parametrize("twin", ["copy.deepcopy([p, o])", "pickle.loads(pickle.dumps([p, o]))"])
def test_copy_of_a_resized_array_is_refused_by_the_next_step(twin: str) -> None:
    """As the array itself is: its slots have the old size."""
    _run(
        "p = np.ones(10, np.float32)\no = Adam(0.1)\no.apply_gradients([(np.ones(10, np.float32), p)])\n"
        "n = 5_000_000\np.resize(n, refcheck=False)\n"
        f"try:\n    q, o2 = {twin}\nexcept GpuAdamError:\n    raise SystemExit\n"
        "try:\n    o2.apply_gradients([(np.ones(n, np.float32), q)])\nexcept GpuAdamError:\n    raise SystemExit\n"
        "raise AssertionError('a step over slots that are too small')\n"
    )


def test_tensors_as_weights() -> None:
    """Of torch too; one that requires a gradient is refused, in words."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    variable, optimizer = Variable(np.ones(3, np.float32), device="host"), Adam()
    optimizer.build([variable])
    optimizer.set_weights([torch.tensor(3), torch.full((3,), 2.0), torch.ones(3)])
    assert [weight.tolist() for weight in optimizer.get_weights()] == [3, [2.0] * 3, [1.0] * 3]
    with pytest.raises(ArgumentTypeError, match="detach"):
        optimizer.set_weights([4, torch.ones(3, requires_grad=True), torch.ones(3)])
    assert int(optimizer.iterations) == 3


def test_shallow_copy_does_not_write_to_dropped_slots() -> None:
    """`copy.copy` shares the state; what one copy forgets the other must not launch with."""
    _run(
        "n = 300_000\nv = Variable(np.ones(n, np.float32))\ng = np.ones(n, np.float32)\no = Adam(0.1)\n"
        "o.apply_gradients([(g, v)])\no2 = copy.copy(o)\no2.apply_gradients([(g, v)])\no.forget(v)\ngc.collect()\n"
        "o2.apply_gradients([(g, v)])\n"
    )


def test_tensor_of_another_shape_can_be_forgotten() -> None:
    """The error of a step tells to call `forget`, which must then work."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    parameter, optimizer = torch.ones(4), Adam()
    optimizer.apply_gradients([(torch.ones(4), parameter)])
    parameter.data = torch.ones(8)
    optimizer.forget(parameter)
    assert optimizer.apply_gradients([(torch.ones(8), parameter)]) == 2


def test_gradient_in_memory_that_another_device_object_writes_is_copied_first() -> None:
    """Two host devices share one memory."""
    results = []
    for device in ("host", HostDevice(threads=1)):
        one = Variable(np.arange(1, 4, dtype=np.float32), device="host")
        other = Variable(np.ones(3, np.float32), device=device)
        Adam(0.5).apply_gradients([(np.ones(3, np.float32), one), (one, other)])
        results.append(other.numpy())
    np.testing.assert_array_equal(results[0], results[1])


def test_counter_read_by_another_thread_during_the_first_step_is_one_counter() -> None:
    """Reading `iterations` creates the counter, and must not do so twice."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            optimizer, variable = Adam(), Variable(np.ones(3, np.float32), device="host")
            barrier = threading.Barrier(2)

            def read(optimizer: Adam = optimizer, barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                for _ in range(3):
                    int(optimizer.iterations)

            reader = threading.Thread(target=read)
            reader.start()
            barrier.wait()
            optimizer.apply_gradients([(np.ones(3, np.float32), variable)])
            reader.join()
            assert (len(optimizer.weights), int(optimizer.iterations)) == (3, 1)
    finally:
        sys.setswitchinterval(before)


def test_variables_and_raw_arrays_in_one_first_step_are_looked_at_a_few_times_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each raw array was compared with each new Variable once: 3000 of each took 47 s."""
    count, looked, address = 100, list[None](), HostDevice.address

    def counted(device: HostDevice, array: Any) -> int:
        looked.append(None)
        return address(device, array)

    monkeypatch.setattr(HostDevice, "address", counted)
    variables = [Variable(np.ones(2, np.float32), device="host") for _ in range(count)]
    raw = [np.ones(2, np.float32) for _ in range(count)]
    Adam().apply_gradients([(np.ones(2, np.float32), target) for target in [*variables, *raw]])
    assert len(looked) < 20 * count
