"""Memory that moves behind an object the optimizer knows: found in every step, used where it fits, else refused.

What an optimizer that trusts its old addresses would do is write to freed memory. Such tests run in processes of their
own, so that a crash is a failed test.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import processes
import pytest
import reference
from reference import Array, assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import GpuAdamError, IndexedSlices, SlotNotFoundError
from gpu_adam.devices import Device

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
G = np.linspace(2, -3, 6, dtype=np.float32).reshape(2, 3)
STEPS = pytest.mark.parametrize("before", [1, 2, 3, 5])
"""Steps before the memory moves: a first step, a second, and those of the fast path."""


class Movable:
    """An object with an array interface whose memory can be exchanged; it lies on the host.

    The object keeps all memory that it has had: an optimizer that writes to the old one fails a test and no more.
    """

    def __init__(self, values: Array) -> None:
        self._memories = [values]

    @property
    def values(self) -> Array:
        """What the object shows now."""
        return self._memories[-1]

    @values.setter
    def values(self, values: Array) -> None:
        self._memories.append(values)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return dict(self.values.__array_interface__)


def oracle_after(steps: int, gradient: Array = G) -> reference.Adam:
    oracle = reference.Adam([X], 0.1)
    for _ in range(steps):
        oracle.step([gradient])
    return oracle


@STEPS
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("config", [{}, {"clipnorm": 1e6}], ids=["plain", "clipnorm"])
def test_an_interface_with_other_memory(before: int, sparse: bool, config: dict[str, Any]) -> None:
    """Same shape and dtype: the object keeps its slots, the new memory moves, the old one stays as it is."""
    variable, optimizer = Movable(X.copy()), gpu_adam.Adam(0.1, **config)
    oracle = oracle_after(0)
    gradient: Any = IndexedSlices(G, np.array([0, 1])) if sparse else G
    pairs = [(gradient, variable)]

    def step() -> None:
        optimizer.apply_gradients(pairs)
        oracle.step([G])
        assert np.allclose(variable.values, oracle.variables[0], rtol=1e-6)
        if not config:
            assert_same_bits(variable.values, oracle.variables[0])

    for _ in range(before):
        step()
    for _ in range(2):
        old = variable.values
        kept = old.copy()
        variable.values = old + np.float32(5)
        oracle.variables[0] = variable.values.copy()
        for _ in range(3):
            step()
        assert_same_bits(old, kept)
    assert len(optimizer.weights) == 3
    assert optimizer.iterations == before + 6


@STEPS
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_other_memory_at_any_address(before: int, offset: int) -> None:
    """A variable's slots lie as far from a 16-byte boundary as the variable: in the new place too."""
    values = np.linspace(-1, 1, 40, dtype=np.float32)
    g = np.cos(values)
    variable, optimizer, oracle = Movable(values.copy()), gpu_adam.Adam(0.1), reference.Adam([values], 0.1)
    for number in range(before + 3):
        if number == before:
            place = np.zeros(40 + offset, np.float32)[offset:]
            place[:] = variable.values
            variable.values = place
        optimizer.apply_gradients([(g, variable)])
        oracle.step([g])
        assert_same_bits(variable.values, oracle.variables[0])


@STEPS
def test_objects_that_exchange_their_memory(before: int) -> None:
    """Each keeps its slots."""
    one, other, optimizer = Movable(X.copy()), Movable(X + 1), gpu_adam.Adam(0.1)
    pairs, oracle = [(G, one), (-G, other)], reference.Adam([X, X + 1], 0.1)
    for number in range(before + 3):
        if number == before:
            one.values, other.values = other.values, one.values
            oracle.variables.reverse()
        optimizer.apply_gradients(pairs)
        oracle.step([G, -G])
        for variable, expected in zip((one, other), oracle.variables, strict=True):
            assert_same_bits(variable.values, expected)
    assert len(optimizer.weights) == 5


@STEPS
def test_memory_of_another_variable(before: int) -> None:
    one, other, optimizer = Movable(X.copy()), Movable(X + 1), gpu_adam.Adam(0.1)
    pairs = [(G, one), (G, other)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    kept, one.values = one.values, other.values
    with unchanged(optimizer, kept, other.values), pytest.raises(GpuAdamError):
        optimizer.apply_gradients(pairs)
    one.values = kept
    assert optimizer.apply_gradients(pairs) == before + 1
    assert_same_bits(one.values, oracle_after(before + 1).variables[0])


def test_memory_that_was_left_is_no_variables(device: Device) -> None:
    """Another object may have it now, which is a variable of its own."""
    if device.xp is not np:
        pytest.skip("the object lies on the host")
    variable, optimizer = Movable(X.copy()), gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(G, variable)])
    old, variable.values = variable.values, variable.values.copy()
    optimizer.apply_gradients([(G, variable)])
    with pytest.raises(SlotNotFoundError):
        optimizer.get_slot(old, "m")
    assert optimizer.get_slot(variable, "m") is optimizer.weights[1]
    assert optimizer.get_slot(variable.values, "m") is optimizer.weights[1]
    optimizer.apply_gradients([(G, variable), (G, old)])
    assert len(optimizer.weights) == 5


def frozen(values: Array) -> Array:
    values = values.copy()
    values.flags.writeable = False
    return values


OTHERS: dict[str, Callable[[Array], Array]] = {
    "shape": lambda x: x.reshape(3, 2).copy(),
    "the same memory in another shape": lambda x: x.reshape(3, 2),
    "fewer rows": lambda x: x[:1].copy(),
    "no rows": lambda x: x[:0].copy(),
    "more rows": lambda x: np.concatenate([x, x]),
    "float64": lambda x: x.astype(np.float64),
    "int32": lambda x: x.astype(np.int32),
    "the same memory in another dtype": lambda x: x.view(np.int32),
    "byte order": lambda x: x.astype(">f4"),
    "strides": lambda x: np.zeros((2, 6), np.float32)[:, ::2],
    "the order of Fortran": np.asfortranarray,
    "the same memory reversed": lambda x: x[::-1],
    "read-only": frozen,
    "read-only, the same memory": lambda x: np.broadcast_to(x, x.shape),
    "odd address": lambda x: np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3),
}


@STEPS
@pytest.mark.parametrize("kind", OTHERS)
def test_memory_that_does_not_fit(before: int, kind: str) -> None:
    """A sentence, and nothing has changed; where the old memory is back, the next step goes on."""
    variable, optimizer = Movable(X.copy()), gpu_adam.Adam(0.1)
    pairs = [(G, variable)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    old = variable.values
    variable.values = OTHERS[kind](old)
    for _ in range(2):
        with unchanged(optimizer, old, variable.values), pytest.raises(GpuAdamError, match="must"):
            optimizer.apply_gradients(pairs)
    variable.values = old
    assert optimizer.apply_gradients(pairs) == before + 1
    assert_same_bits(old, oracle_after(before + 1).variables[0])


@STEPS
def test_an_array_that_has_become_read_only(before: int) -> None:
    variable, optimizer = X.copy(), gpu_adam.Adam(0.1)
    pairs = [(G, variable)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    variable.flags.writeable = False
    for _ in range(2):
        with unchanged(optimizer, variable), pytest.raises(GpuAdamError, match="must be writeable"):
            optimizer.apply_gradients(pairs)
    variable.flags.writeable = True
    assert optimizer.apply_gradients(pairs) == before + 1
    assert_same_bits(variable, oracle_after(before + 1).variables[0])


@STEPS
@pytest.mark.parametrize("attribute", ["shape", "dtype"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, where an array is reshaped in place
def test_a_variable_reshaped_in_place(before: int, attribute: str) -> None:
    variable, optimizer = X.copy(), gpu_adam.Adam(0.1)
    pairs = [(G, variable)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    kept = getattr(variable, attribute)
    setattr(variable, attribute, {"shape": (3, 2), "dtype": np.int32}[attribute])
    for _ in range(2):
        with unchanged(optimizer, variable), pytest.raises(GpuAdamError, match="must"):
            optimizer.apply_gradients(pairs)
    setattr(variable, attribute, kept)
    assert optimizer.apply_gradients(pairs) == before + 1
    assert_same_bits(variable, oracle_after(before + 1).variables[0])


@STEPS
@pytest.mark.parametrize("attribute", ["shape", "dtype", "strides"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_gradient_changed_in_place(before: int, attribute: str) -> None:
    """Checked again although it is the same object, in the same list of pairs."""
    variable, g, optimizer = gpu_adam.Variable(X, device="host"), G.copy(), gpu_adam.Adam(0.1)
    pairs = [(g, variable)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    kept = getattr(g, attribute)
    setattr(g, attribute, {"shape": (3, 2), "dtype": np.int32, "strides": (4, 8)}[attribute])
    if attribute == "strides":  # the transposed order: what it shows is what the step must use
        expected = oracle_after(before)
        expected.step([g])
        assert optimizer.apply_gradients(pairs) == before + 1
        assert_same_bits(variable.numpy(), expected.variables[0])
        return
    for _ in range(2):
        with unchanged(optimizer, variable, g), pytest.raises(GpuAdamError, match="must have"):
            optimizer.apply_gradients(pairs)
    setattr(g, attribute, kept)
    assert optimizer.apply_gradients(pairs) == before + 1
    assert_same_bits(variable.numpy(), oracle_after(before + 1).variables[0])


@STEPS
def test_a_gradient_with_other_memory(before: int) -> None:
    variable, g, optimizer = gpu_adam.Variable(X, device="host"), Movable(G.copy()), gpu_adam.Adam(0.1)
    pairs, oracle = [(g, variable)], oracle_after(0)
    for number in range(before + 3):
        if number == before:
            g.values = g.values * 2
        optimizer.apply_gradients(pairs)
        oracle.step([g.values])
        assert_same_bits(variable.numpy(), oracle.variables[0])


# Where memory is freed: in processes of their own.

PRELUDE = """
import numpy as np, gpu_adam
gpu_adam.set_device("host")
N = 100_000

def refused(optimizer, pairs, message="must"):
    before = [(w.name, w.shape, w.numpy().tobytes()) for w in optimizer.weights]
    for _ in range(2):
        try:
            optimizer.apply_gradients(pairs)
        except gpu_adam.GpuAdamError as error:
            assert message in str(error), str(error)
        else:
            raise AssertionError("a step over memory that does not fit")
    assert [(w.name, w.shape, w.numpy().tobytes()) for w in optimizer.weights] == before, "slots have changed"

def twin(steps, start, size=N):
    "One step after another from these values: what each element becomes."
    variable, optimizer = gpu_adam.Variable(np.float32(1)), gpu_adam.Adam(0.1)
    for number in range(steps):
        if number in start:
            variable.assign(np.float32(start[number]))
        optimizer.apply_gradients([(np.ones((), np.float32), variable)])
    return float(variable)
"""

NUMPY = """
for before in (1, 2, 4):
    w, g = np.ones(N, np.float32), np.ones(N, np.float32)
    optimizer = gpu_adam.Adam(0.1)
    pairs = [(g, w)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    try:
        w.resize(10 * N, refcheck=False)
    except ValueError:  # NumPy refuses to move memory that someone else looks at
        continue
    others = [np.full(N, 7, np.float32) for _ in range(8)]  # may get the memory that w has left
    refused(optimizer, pairs)
    w.resize(3, refcheck=False)
    refused(optimizer, pairs)
    w.resize(N, refcheck=False)
    w[:] = 5
    for _ in range(3):
        optimizer.apply_gradients(pairs)
    assert (w == np.float32(twin(before + 3, {before: 5}))).all(), w
    assert all((other == 7).all() for other in others), "memory of others was written"
    assert len(optimizer.weights) == 3 and int(optimizer.iterations) == before + 3
print("done")
"""

TORCH_DATA = """
import torch
for before in (1, 2, 4):
    p, g = torch.ones(N), torch.ones(N)
    optimizer = gpu_adam.Adam(0.1)
    pairs = [(g, p)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    p.data = torch.full((N,), 5.0)
    others = [torch.full((N,), 7.0) for _ in range(8)]
    for _ in range(3):
        optimizer.apply_gradients(pairs)
    assert (p == twin(before + 3, {before: 5})).all(), p
    assert all((other == 7).all() for other in others), "memory of others was written"
    assert len(optimizer.weights) == 3 and int(optimizer.iterations) == before + 3
    for wrong in (torch.ones(N + 1), torch.ones(2, N // 2), torch.ones(N, dtype=torch.float64), torch.ones(2 * N)[::2]):
        kept = p.data
        try:
            p.data = wrong
        except RuntimeError:  # torch's own check of types
            continue
        refused(optimizer, pairs)
        p.data = kept
    optimizer.apply_gradients(pairs)
    assert int(optimizer.iterations) == before + 4
print("done")
"""

TORCH_LOST = """
import torch
for before in (1, 2, 4):
    p, g = torch.ones(N), torch.ones(N)
    optimizer = gpu_adam.Adam(0.1)
    pairs = [(g, p)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    LOSE
    others = [torch.full((N,), 7.0) for _ in range(8)]
    refused(optimizer, pairs)
    REGAIN
    p.fill_(5)
    for _ in range(3):
        optimizer.apply_gradients(pairs)
    assert (p == twin(before + 3, {before: 5})).all(), p
    assert all((other == 7).all() for other in others), "memory of others was written"
    assert len(optimizer.weights) == 3 and int(optimizer.iterations) == before + 3
print("done")
"""
TORCH_RESIZE = TORCH_LOST.replace("LOSE", "p.resize_(10 * N)").replace("REGAIN", "p.resize_(N)")
# As FSDP does between steps: the shape stays, the memory goes.
TORCH_STORAGE = TORCH_LOST.replace("LOSE", "p.untyped_storage().resize_(0)").replace(
    "REGAIN", "p.untyped_storage().resize_(4 * N)"
)

TORCH_GRADIENT = """
import torch
for before in (1, 2, 4):
    p, g = torch.ones(N), torch.ones(N)
    optimizer = gpu_adam.Adam(0.1)
    pairs = [(g, p)]
    for _ in range(before):
        optimizer.apply_gradients(pairs)
    g.resize_(10 * N)
    refused(optimizer, pairs)
    g.resize_(N).fill_(1)
    optimizer.apply_gradients(pairs)
    g.data = torch.ones(N)
    optimizer.apply_gradients(pairs)
    g.untyped_storage().resize_(0)
    refused(optimizer, pairs)
    g.untyped_storage().resize_(4 * N)
    g.fill_(1)
    optimizer.apply_gradients(pairs)
    assert (p == twin(before + 3, {})).all(), p
    p.resize_(2, N // 2)
    refused(optimizer, pairs)
print("done")
"""


def test_an_array_resized_in_place() -> None:
    assert processes.run(PRELUDE + NUMPY) == "done"


@pytest.mark.parametrize("program", ["TORCH_DATA", "TORCH_RESIZE", "TORCH_STORAGE", "TORCH_GRADIENT"])
def test_tensors_of_torch(program: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    assert processes.run(PRELUDE + globals()[program]) == "done"


def test_memory_of_a_tensor_is_kept_until_the_next_step() -> None:
    """`p.data = other` frees nothing that the optimizer may still use, and no more than that is kept."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    p, g = torch.ones(6), torch.ones(6)
    optimizer, oracle = gpu_adam.Adam(0.1), reference.Adam([np.ones(6, np.float32)], 0.1)
    for number in range(4):
        old = p.detach()
        p.data = torch.full((6,), float(number))
        kept = old.clone()
        oracle.variables[0] = np.full(6, number, np.float32)
        optimizer.apply_gradients([(g, p)])
        oracle.step([np.ones(6, np.float32)])
        assert_same_bits(p.numpy(), oracle.variables[0])
        assert torch.equal(old, kept)
