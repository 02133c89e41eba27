"""Arrays as variables without a Variable: updated where they lie, recognised again by their memory."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from reference import Array, assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
G = np.linspace(2, -3, 6, dtype=np.float32).reshape(2, 3)


class Interface:
    """Memory of a NumPy array behind nothing but an array interface."""

    def __init__(self, array: Array) -> None:
        self._array = array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return dict(self._array.__array_interface__)


def oracle_after(steps: int) -> Array:
    oracle = reference.Adam([X], 0.1)
    for _ in range(steps):
        oracle.step([G])
    return oracle.variables[0]


def test_an_array_is_updated_where_it_lies(device: Device) -> None:
    raw = device.array(X)
    optimizer, g = gpu_adam.Adam(0.1), device.array(G)
    for step in (1, 2, 3):
        assert optimizer.apply_gradients([(g, raw)]) == step
        assert_same_bits(device.numpy(raw), oracle_after(step))
    assert len(optimizer.weights) == 3
    assert optimizer.get_slot(raw, "m") is optimizer.weights[1]
    assert optimizer.weights[1].name == "Adam/Variable/m"


def test_it_is_recognised_by_its_memory(device: Device) -> None:
    """Another array object over the same memory is the same variable; a copy is not."""
    raw, g = device.array(X), device.array(G)
    optimizer = gpu_adam.Adam(0.1)
    for step, again in enumerate((raw, raw[:], raw.view(), raw.reshape(2, 3), raw), 1):
        optimizer.apply_gradients([(g, again)])
        assert_same_bits(device.numpy(raw), oracle_after(step))
    assert len(optimizer.weights) == 3
    copied = raw.copy()
    optimizer.apply_gradients([(g, copied)])
    assert len(optimizer.weights) == 5
    optimizer.build([raw[:], copied[:]])
    assert len(optimizer.weights) == 5


def test_a_variable_and_its_array_are_one(device: Device) -> None:
    variable, g = Variable(X), device.array(G)
    for order in ((variable, variable.value), (variable.value, variable)):
        optimizer = gpu_adam.Adam(0.1)
        for target in order:
            optimizer.apply_gradients([(g, target)])
        assert len(optimizer.weights) == 3
        assert optimizer.get_slot(variable, "m") is optimizer.get_slot(variable.value, "m")


def test_parts_of_one_array(device: Device) -> None:
    """The flat parameters of a model as views, made anew at every step."""
    flat, g = device.array(np.concatenate([X.ravel(), X.ravel()])), device.array(G)
    optimizer = gpu_adam.Adam(0.1)
    for step in (1, 2, 3):
        optimizer.apply_gradients([(g, flat[6:].reshape(2, 3)), (g, flat[:6].reshape(2, 3))])
        expected = np.tile(oracle_after(step).ravel(), 2)
        assert_same_bits(device.numpy(flat), expected)
    assert len(optimizer.weights) == 5


def test_views_do_not_pile_up(device: Device) -> None:
    """What a step is given anew each time is not kept for ever."""
    raw, g = device.array(X), device.array(G)
    optimizer, views = gpu_adam.Adam(0.1), []
    for _ in range(40):
        view = raw[:]
        views.append(weakref.ref(view))
        optimizer.apply_gradients([(g, view)])
    del view
    gc.collect()
    assert sum(ref() is not None for ref in views) <= 20
    assert_same_bits(device.numpy(raw), oracle_after(40))


def test_variables_without_elements(device: Device) -> None:
    first, second = (device.array(np.zeros((0, 3), np.float32)) for _ in range(2))
    optimizer = gpu_adam.Adam()
    for _ in range(2):
        optimizer.apply_gradients([(device.array(np.zeros((0, 3), np.float32)), x) for x in (first, second)])
    assert len(optimizer.weights) == 5


@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shapes_and_dtypes(device: Device, shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, g = (np.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    raw, oracle = device.array(x), reference.Adam([x])
    optimizer = gpu_adam.Adam()
    for _ in range(2):
        optimizer.apply_gradients([(device.array(g), raw)])
        oracle.step([g])
    assert_same_bits(device.numpy(raw), oracle.variables[0])


def test_arrays_that_are_not_contiguous(device: Device) -> None:
    base, good = device.array(np.zeros((4, 6), np.float32)), device.array(X)
    optimizer = gpu_adam.Adam()
    for strided in (base[::2, :3], base.T, base[:, ::2], base[::-1]):
        message = r"the variable of grads_and_vars\[1\] must be C-contiguous \(got strides"
        with unchanged(optimizer, good, base), pytest.raises(ArgumentValueError, match=message):
            optimizer.apply_gradients(
                [(device.array(G), good), (device.array(np.zeros(strided.shape, np.float32)), strided)]
            )
    assert optimizer.apply_gradients([(device.array(np.zeros((2, 6), np.float32)), base[2:])]) == 1


def test_arrays_that_may_not_be_written() -> None:
    frozen = X.copy()
    frozen.flags.writeable = False
    optimizer = gpu_adam.Adam()
    for array in (frozen, np.broadcast_to(np.float32(1), ()), Interface(frozen), np.frombuffer(bytes(24), np.float32)):
        with unchanged(optimizer), pytest.raises((ArgumentValueError, ArgumentTypeError), match="must be writeable"):
            optimizer.apply_gradients([(G, array)])
    assert_same_bits(frozen, X)


@pytest.mark.parametrize("dtype", [">f4", ">f8"])
def test_the_other_byte_order(dtype: str) -> None:
    """Kernels read this processor's: such an array cannot be updated in place."""
    raw = X.astype(dtype)
    with pytest.raises(ArgumentValueError):
        gpu_adam.Adam().apply_gradients([(G.astype(dtype), raw)])
    assert_same_bits(raw.astype("=f4"), X)


def test_a_subclass_of_numpys_array() -> None:
    masked = np.ma.MaskedArray(X.copy())
    gpu_adam.Adam(0.1).apply_gradients([(G, masked)])
    assert_same_bits(masked.data, oracle_after(1))


def test_an_array_at_an_odd_address() -> None:
    """A processor reads it; a GPU would not, and kernels are the same."""
    memory = np.zeros(4 * X.size + 1, np.uint8)
    raw = memory[1:].view(np.float32).reshape(X.shape)
    optimizer = gpu_adam.Adam()
    with unchanged(optimizer, memory), pytest.raises(ArgumentValueError, match="must begin at a multiple of 4 bytes"):
        optimizer.apply_gradients([(G, raw)])


def test_an_array_interface_alone() -> None:
    memory = X.copy()
    holder = Interface(memory)
    optimizer = gpu_adam.Adam(0.1)
    for step, target in enumerate((holder, holder, Interface(memory), memory), 1):
        optimizer.apply_gradients([(Interface(G), target)])
        assert_same_bits(memory, oracle_after(step))
    assert len(optimizer.weights) == 3


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    tensor, g = torch.tensor(X), torch.tensor(G)
    optimizer = gpu_adam.Adam(0.1)
    for step, target in enumerate((tensor, tensor, tensor[:], tensor.detach()), 1):
        optimizer.apply_gradients([(g, target)])
        assert_same_bits(tensor.numpy(), oracle_after(step))
    assert len(optimizer.weights) == 3
    message = r"must share its memory .*; detach it"
    with unchanged(optimizer), pytest.raises(ArgumentTypeError, match=message):
        optimizer.apply_gradients([(g, torch.nn.Parameter(torch.tensor(X)) * 1)])
    for wrong in (torch.tensor(X).T, torch.zeros(2, 6)[:, ::2]):
        with pytest.raises(ArgumentValueError, match="must be C-contiguous"):
            optimizer.apply_gradients([(torch.zeros(tuple(wrong.shape)), wrong)])
    with pytest.raises(ArgumentValueError, match="must have one of the dtypes"):
        optimizer.apply_gradients([(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))])


@pytest.mark.parametrize("passed", [lambda p: p, lambda p: p.detach(), lambda p: p.detach()[:]])
def test_a_leaf_of_torch_is_updated_as_by_its_own_optimizers(passed: Any) -> None:
    """It stays a leaf, and a graph that needs its old elements refuses to go backward."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    leaf, optimizer = torch.nn.Parameter(torch.tensor(X)), gpu_adam.Adam(0.1)
    target = passed(leaf)
    for step in (1, 2, 3):
        loss, before = (leaf * leaf).sum(), leaf._version
        optimizer.apply_gradients([(torch.tensor(G), target)])
        assert_same_bits(leaf.detach().numpy(), oracle_after(step))
        assert (leaf.is_leaf, leaf.requires_grad) == (True, True)
        assert leaf._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    copied = copy.deepcopy(optimizer)
    assert copied.iterations == 3


def test_a_failed_step_raises_no_version_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    leaf, optimizer = torch.nn.Parameter(torch.tensor(X)), gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(torch.tensor(G), leaf)])
    before, gradients = leaf._version, [(torch.tensor(G), leaf), (torch.ones(1), torch.ones(2))]
    with pytest.raises(ArgumentValueError):
        optimizer.apply_gradients(gradients)
    assert leaf._version == before


def test_inference_tensors_of_torch_count_no_versions() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    with torch.inference_mode():
        tensor = torch.tensor(X)
    gpu_adam.Adam(0.1).apply_gradients([(torch.tensor(G), tensor)])
    assert_same_bits(tensor.numpy(), oracle_after(1))


def test_an_older_torch_counts_versions_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    increment = torch._C._increment_version

    def of_one(tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError
        increment([tensor])

    monkeypatch.setattr(torch._C, "_increment_version", of_one)
    tensors = [torch.tensor(X), torch.tensor(X)]
    gpu_adam.Adam(0.1).apply_gradients([(torch.tensor(G), tensor) for tensor in tensors])
    assert [tensor._version for tensor in tensors] == [1, 1]


LAZY: dict[str, Callable[[Any], Any]] = {
    "negated": lambda torch: torch._neg_view(torch.tensor(-G)),
    "negated and strided": lambda torch: torch.complex(torch.zeros(G.shape), torch.tensor(-G)).conj().imag,
}


@pytest.mark.parametrize("lazy", LAZY)
def test_elements_that_torch_has_still_to_negate(lazy: str) -> None:
    """DLPack knows nothing of it."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    gradient = LAZY[lazy](torch)
    assert gradient.is_neg()
    assert (gradient.numpy(force=True) == G).all()
    variable, optimizer = Variable(X, device="host"), gpu_adam.Adam(0.1)
    rows = Variable(X, device="host")
    for step in (1, 2):
        slices = gpu_adam.IndexedSlices(gradient, torch.arange(len(G)))
        optimizer.apply_gradients([(gradient, variable), (slices, rows)])
        assert_same_bits(variable.numpy(), oracle_after(step))
        assert_same_bits(rows.numpy(), oracle_after(step))
    assert_same_bits(variable.assign(gradient).numpy(), G)
    with pytest.raises(ArgumentTypeError, match=r"memory holds its elements .*; pass its resolve_conj\(\)"):
        optimizer.apply_gradients([(G, gradient)])


def test_elements_that_torch_has_still_to_conjugate() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    values = np.array([1 + 2j, 3 - 1j], np.complex64)
    found, expected = (Variable(np.zeros(2, np.complex64), device="host") for _ in range(2))
    gpu_adam.Adam(0.1).apply_gradients([(torch.tensor(values).conj(), found)])
    gpu_adam.Adam(0.1).apply_gradients([(values.conj(), expected)])
    assert_same_bits(found.numpy(), expected.numpy())


UNREADABLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "sparse": (lambda torch: torch.tensor(G).to_sparse(), r"must be a dense tensor .*sparse_coo.*to_dense"),
    "compressed": (lambda torch: torch.tensor(G).to_sparse_csr(), r"must be a dense tensor .*sparse_csr.*to_dense"),
    "on the device meta": (lambda torch: torch.tensor(G, device="meta"), r"must have memory .*device meta"),
    "of 8 bits": (lambda torch: torch.tensor(G).to(torch.float8_e4m3fn), r"must have a dtype .*float8_e4m3fn"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_of_torch_that_cannot_be_read(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    make, message = UNREADABLE[kind]
    tensor, variable, optimizer = make(torch), Variable(X, device="host"), gpu_adam.Adam(0.1)
    slices = gpu_adam.IndexedSlices(tensor, torch.arange(len(G)))
    for pair in ((tensor, variable), (slices, variable), (torch.tensor(G), tensor)):
        with unchanged(optimizer), pytest.raises(ArgumentTypeError, match=message):
            optimizer.apply_gradients([pair])
    assert_same_bits(variable.numpy(), X)
    with pytest.raises((ArgumentTypeError, ArgumentValueError)):
        variable.assign(tensor)


def test_slices_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    variable, expected = Variable(X, device="host"), Variable(X, device="host")
    slices = gpu_adam.IndexedSlices(torch.tensor(G), torch.tensor([1, 1]))
    gpu_adam.Adam().apply_gradients([(slices, variable)])
    gpu_adam.Adam().apply_gradients([(gpu_adam.IndexedSlices(G, np.array([1, 1])), expected)])
    assert_same_bits(variable.numpy(), expected.numpy())


def test_arrays_of_jax_cannot_be_written() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed (extra: peers)")
    array = jax.numpy.asarray(X)
    with pytest.raises(ArgumentValueError, match="must be writeable"):
        gpu_adam.Adam().apply_gradients([(G, array)])
    variable = Variable(X, device="host")
    gpu_adam.Adam(0.1).apply_gradients([(jax.numpy.asarray(G), variable)])
    assert_same_bits(variable.numpy(), oracle_after(1))
