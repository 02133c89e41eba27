"""How a step's pairs are recognised: what the readers in C, in Python and of torch's tensors say of each gradient."""

import gc
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import Device, HostDevice, native_pairs, native_tensors
from gpu_adam.devices.pair_reader import ExpectedPairs, PairReader
from gpu_adam.devices.placement import placement_of
from gpu_adam.devices.places import Places
from gpu_adam.devices.torch_tensors import TorchReader
from gpu_adam.step.overlap import Intervals

SHAPES: list[tuple[int, ...]] = [(), (3,), (2, 3), (2, 1, 3), (0, 2)]
READERS = ("C", "Python")


def array(device: Device, shape: Any, dtype: Any = np.float32) -> Any:
    return device.array(np.ones(shape, dtype))


def reader_of(kind: str, device: Device, expected: ExpectedPairs) -> PairReader:
    """The reader of a device that reads objects in C, or the other one."""
    if kind == "Python":
        return Device.pair_reader(device, expected)
    reader = device.pair_reader(expected)
    assert isinstance(reader, native_pairs.NativePairReader)
    return reader


@pytest.fixture(params=READERS)
def in_python(request: pytest.FixtureRequest, device: Device, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the device under test reads no object in C."""
    if request.param == "Python":
        if isinstance(device, HostDevice):
            monkeypatch.setattr(importlib.import_module("gpu_adam.devices.host"), "numpy_is_read_in_c", lambda: False)
        else:
            cuda = importlib.import_module("gpu_adam.devices.cuda")
            monkeypatch.setattr(cuda, "cupy_is_read_in_c", lambda cupy: False)
    return bool(request.param == "Python")


@pytest.fixture
def variables(device: Device) -> list[Variable]:
    return [Variable(np.ones(shape, np.float32)) for shape in SHAPES]


@pytest.fixture
def reader(in_python: bool, device: Device, variables: list[Variable]) -> PairReader:
    dtypes = [variable.dtype for variable in variables]
    nothing: list[Any] = [None] * len(SHAPES)
    return reader_of("Python" if in_python else "C", device, ExpectedPairs(variables, nothing, nothing, SHAPES, dtypes))


def addresses_of(device: Device, gradients: list[Any]) -> list[int]:
    return [device.address(gradient) if gradient.size else -1 for gradient in gradients]


def read(reader: PairReader, pairs: Any) -> np.ndarray:
    found = reader(pairs)
    assert found is not None
    return found


def test_the_same_and_new_gradients(device: Device, variables: list[Variable], reader: PairReader) -> None:
    """The same array object where nothing differs, which the launches compare with; an empty gradient has a place."""
    first, second = ([array(device, shape) for shape in SHAPES] for _ in range(2))
    one = read(reader, list(zip(first, variables, strict=True)))
    assert one.all()
    assert [a for a, size in zip(one.tolist(), map(np.prod, SHAPES), strict=True) if size] == [
        address for address in addresses_of(device, first) if address >= 0
    ]
    kept = one.copy()
    assert reader(list(zip(first, variables, strict=True))) is one
    two = read(reader, list(zip(second, variables, strict=True)))
    assert two is not one
    assert addresses_of(device, second)[:-1] == two.tolist()[:-1]
    assert (one == kept).all()
    assert read(reader, list(zip(first, variables, strict=True))).tolist() == kept.tolist()


WRONG: dict[str, Callable[[Device], Any]] = {
    "another shape": lambda device: array(device, (3, 2)),
    "one dimension more": lambda device: array(device, (2, 3, 1)),
    "another dtype": lambda device: array(device, (2, 3), np.float64),
    "an integer dtype of the same size": lambda device: array(device, (2, 3), np.int32),
    "columns first": lambda device: array(device, (3, 2)).T,
    "every second column": lambda device: array(device, (2, 6))[:, ::2],
    "not aligned": lambda device: array(device, 25, np.uint8)[1:].view(np.float32).reshape(2, 3),
    "a list": lambda device: [[1.0, 2.0, 3.0]] * 2,
    "nothing": lambda device: None,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("before", [False, True], ids=["at once", "later"])
def test_what_does_not_fit_has_no_address(
    device: Device, variables: list[Variable], reader: PairReader, wrong: str, before: bool
) -> None:
    gradients = [array(device, shape) for shape in SHAPES]
    if before:
        read(reader, list(zip(gradients, variables, strict=True)))
    gradients[2] = WRONG[wrong](device)
    one = read(reader, list(zip(gradients, variables, strict=True)))
    assert (one == 0).tolist() == [False, False, True, False, False]
    # Nothing is known of such an object, so that the next step must not pass for the same one.
    assert reader(list(zip(gradients, variables, strict=True))) is not one


def test_an_array_on_another_device_has_no_address(
    device: Device, variables: list[Variable], reader: PairReader
) -> None:
    if isinstance(device, HostDevice) or device.xp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs a real GPU, or an emulated one, and another beside it")
    gradients = [array(device, shape) for shape in SHAPES]
    gradients[2] = array(gpu_adam.devices.find_device("cuda:1"), SHAPES[2])
    addresses = read(reader, list(zip(gradients, variables, strict=True)))
    assert np.flatnonzero(addresses == 0).tolist() == [2]


def test_a_shape_assigned_in_place_is_noticed(device: Device, variables: list[Variable], reader: PairReader) -> None:
    gradients = [array(device, shape) for shape in SHAPES]
    for number, shape in ((1, (3, 1)), (2, (3, 2)), (3, (1, 2, 3))):
        pairs = list(zip(gradients, variables, strict=True))
        assert read(reader, pairs).all()
        before = gradients[number].shape
        _assign_shape(gradients[number], shape)
        assert read(reader, pairs)[number] == 0
        _assign_shape(gradients[number], before)
        assert read(reader, pairs).all()


def _assign_shape(target: Any, shape: tuple[int, ...]) -> None:
    target.shape = shape


@pytest.mark.parametrize(
    "others", ["a tuple", "a list as pair", "three in a pair", "one pair less", "another variable"]
)
def test_other_pairs_are_not_recognised(
    device: Device, variables: list[Variable], reader: PairReader, others: str
) -> None:
    gradients = [array(device, shape) for shape in SHAPES]
    pairs: list[Any] = list(zip(gradients, variables, strict=True))
    assert reader(pairs) is not None
    other: Any = {
        "a tuple": tuple(pairs),
        "a list as pair": [list(pairs[0]), *pairs[1:]],
        "three in a pair": [(*pairs[0], 1), *pairs[1:]],
        "one pair less": pairs[1:],
        "another variable": [(gradients[0], Variable(np.ones((), np.float32))), *pairs[1:]],
    }[others]
    assert reader(other) is None


@pytest.mark.usefixtures("in_python")
def test_an_array_as_variable_that_changes_its_shape(device: Device) -> None:
    target, g = array(device, (2, 3)), array(device, (2, 3))
    optimizer = gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(g, target)])
    moments = device.numpy(optimizer.get_slot(target, "m"))
    optimizer.apply_gradients([(g, target)])
    assert not (device.numpy(optimizer.get_slot(target, "m")) == moments).all()
    _assign_shape(target, (3, 2))
    with pytest.raises(gpu_adam.GpuAdamError):
        optimizer.apply_gradients([(g, target)])


def test_the_layout_is_found_out(device: Device) -> None:
    """The reader in C is what these tests run; one that does not know the layout would go unnoticed otherwise."""
    if isinstance(device, HostDevice):
        assert native_pairs.numpy_is_read_in_c()
    else:
        assert native_pairs.cupy_is_read_in_c(device.xp)


def test_a_foreign_layout_is_not_read(device: Device) -> None:
    if isinstance(device, HostDevice):
        pytest.skip("needs a real GPU, or an emulated one: about CuPy's objects")
    check = native_pairs._library().cupy_layout_is_known
    made = array(device, (2, 3))
    shape, other = np.array([2, 3]), np.array([3, 2])
    right = [made, id(type(made)), 6, 2, shape.ctypes.data, 1, id(made.dtype), id(made.data), made.data.ptr, 0]
    assert check(*right)
    wrong = {1: id(int), 2: 7, 3: 1, 4: other.ctypes.data, 5: 0, 6: id(np.dtype(int)), 7: id(int), 8: 64, 9: 1}
    for place, value in wrong.items():
        assert not check(*right[:place], value, *right[place + 1 :]), place


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_what_a_glance_tells_of_an_array(device: Device, wrong: str | None) -> None:
    """Of slices' arrays, whose shape is looked at apart."""
    plain = wrong in (None, "another shape", "one dimension more")
    obj = array(device, (2, 3)) if wrong is None else WRONG[wrong](device)
    assert device.is_plain(obj, np.dtype(np.float32)) is plain


@pytest.mark.parametrize("count", [3, 8, 9, 40])
def test_overlaps_are_found_in_few_and_in_many(count: int) -> None:
    """With and without NumPy, beside the definition."""
    rng = np.random.default_rng(count)
    for _ in range(50):
        memory, asked = rng.integers(1, 60, (5, 2)), rng.integers(1, 60, (count, 2))
        memory[:, 1], asked[:, 1] = memory[:, 0] + memory[:, 1] % 6, asked[:, 1] % 4
        expected = [
            number
            for number, (begin, size) in enumerate(asked.tolist())
            if any(max(begin, low) < min(begin + size, high) for low, high in memory.tolist())
        ]
        begins, sizes = asked.astype(np.uint64).T
        assert (Intervals(memory.astype(np.uint64)).overlapped(begins, sizes) or []) == expected


# torch.


@pytest.fixture(params=READERS)
def torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose tensors are read in C where it can be, or in Python."""
    module = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    if request.param == "Python":
        monkeypatch.setattr(native_tensors, "is_available", lambda torch: False)
    elif not native_tensors.is_available(module):
        pytest.skip("this torch does not offer DLPack's C functions")
    return module


def torch_reader(torch: Any, shapes: list[tuple[int, ...]], dtype: str, place: str | None = "cpu") -> TorchReader:
    nothing: list[Any] = [None] * len(shapes)
    expected = ExpectedPairs(nothing, nothing, nothing, shapes, [np.dtype(dtype)] * len(shapes))
    return TorchReader(expected, lambda torch: None if place is None else torch.device(place))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_a_plain_tensor_is_read(torch: Any, dtype: str) -> None:
    tensor, empty = torch.ones(2, 3, dtype=getattr(torch, dtype)), torch.ones(0, 2, dtype=getattr(torch, dtype))
    view = torch.ones(5, 3, dtype=getattr(torch, dtype))[2:4]
    addresses = np.array([0, 0, 7, 0], np.uint64)
    pairs = [(g, None) for g in (tensor, empty, None, view)]
    assert torch_reader(torch, [(2, 3), (0, 2), (1,), (2, 3)], dtype).read(pairs, addresses)
    assert addresses.tolist() == [tensor.data_ptr(), 1, 7, view.data_ptr()]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_many_plain_tensors_are_read_at_once(torch: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they can be: then none is looked at by itself."""
    shapes: list[tuple[int, ...]] = [(), (2, 3), (0, 2), (2, 1, 3), (2, 3)]
    tensors = [torch.ones(shape, dtype=getattr(torch, dtype)) for shape in shapes]
    tensors[4] = torch.ones(5, 3, dtype=getattr(torch, dtype))[2:4]
    reader, addresses = torch_reader(torch, shapes, dtype), np.zeros(5, np.uint64)
    if native_tensors.is_available(torch):
        monkeypatch.setattr(reader, "_each", pytest.fail)
    assert reader.read([(tensor, None) for tensor in tensors], addresses)
    assert addresses.tolist() == [tensor.data_ptr() or 1 for tensor in tensors]


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "other memory": lambda torch, p: torch.ones(2, 3),
    "another shape": lambda torch, p: p.detach().reshape(3, 2),
    "another order": lambda torch, p: p.detach().as_strided((2, 3), (1, 2)),
    "no memory": lambda torch, p: p.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("kind", ["Parameter", "Tensor"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_whose_memory_has_changed_is_noticed(torch: Any, kind: str, change: str) -> None:
    tensors = [torch.ones(shape) for shape in [(3,), (2, 3), (0, 2), ()]]
    objects = [torch.nn.Parameter(each) if kind == "Parameter" else each for each in tensors]
    placements = [placement for each in objects if (placement := placement_of(each)) is not None]
    kept = Places(objects, placements, [np.dtype(np.float32)] * 4)
    assert kept.are_kept()
    before = objects[1].data
    found = CHANGES[change](torch, objects[1])
    if isinstance(found, torch.Tensor):
        objects[1].data = found
    assert not kept.are_kept()
    if change != "no memory":
        objects[1].data = before
        assert kept.are_kept()


def _shrunk(torch: Any) -> Any:
    tensor = torch.ones(2, 3)
    tensor.untyped_storage().resize_(20)
    return tensor


def _unaligned(torch: Any) -> Any:
    return torch.frombuffer(bytearray(25), dtype=torch.float32, offset=1, count=6).reshape(2, 3)


ODD: dict[str, Callable[[Any], Any]] = {
    "another shape": lambda torch: torch.ones(3, 2),
    "another dtype": lambda torch: torch.ones(2, 3, dtype=torch.float64),
    "bfloat16": lambda torch: torch.ones(2, 3, dtype=torch.bfloat16),
    "a leaf": lambda torch: torch.ones(2, 3, requires_grad=True),
    "a parameter": lambda torch: torch.nn.Parameter(torch.ones(2, 3), requires_grad=False),
    "a negated view": lambda torch: torch.ones(2, 3, dtype=torch.complex64).conj().imag,
    "negated and contiguous": lambda torch: torch._neg_view(torch.ones(2, 3)),
    "not contiguous": lambda torch: torch.ones(3, 2).T,
    "expanded": lambda torch: torch.ones(3).expand(2, 3),
    "sparse": lambda torch: torch.ones(2, 3).to_sparse(),
    "compressed": lambda torch: torch.ones(2, 3).to_sparse_csr(),
    "on the device meta": lambda torch: torch.ones(2, 3, device="meta"),
    "without its storage": _shrunk,
    "not aligned": _unaligned,
    "no tensor": lambda torch: [[1.0] * 3] * 2,
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_an_odd_tensor_is_not_read(torch: Any, odd: str) -> None:
    plain, addresses = torch.ones(2, 3), np.zeros(2, np.uint64)
    reader = torch_reader(torch, [(2, 3), (2, 3)], "float32")
    assert not reader.read([(plain, None), (ODD[odd](torch), None)], addresses)
    assert addresses[1] == 0


def test_a_conjugated_tensor_is_not_read(torch: Any) -> None:
    addresses = np.zeros(1, np.uint64)
    conjugated = torch.ones(2, 3, dtype=torch.complex64).conj()
    assert conjugated.is_contiguous()
    assert not torch_reader(torch, [(2, 3)], "complex64").read([(conjugated, None)], addresses)
    assert addresses[0] == 0


def test_no_tensor_is_read_where_the_device_says_so(torch: Any) -> None:
    addresses = np.zeros(1, np.uint64)
    assert not torch_reader(torch, [(3,)], "float32", None).read([(torch.ones(3), None)], addresses)
    assert addresses[0] == 0


def test_a_tensor_of_vmap_is_not_read(torch: Any) -> None:
    """Its class is torch's own, but it has no memory."""
    reader, found = torch_reader(torch, [(3,)], "float32"), []

    def look(tensor: Any) -> Any:
        addresses = np.zeros(1, np.uint64)
        found.append(reader.read([(tensor, None)], addresses) or int(addresses[0]))
        return tensor

    torch.vmap(look)(torch.ones(2, 3))
    assert found == [0]


@pytest.mark.parametrize("kind", READERS)
def test_gradients_of_torch(torch: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are the same as with arrays; no array is made of a tensor after the first step."""
    if kind == "Python":
        monkeypatch.setattr(importlib.import_module("gpu_adam.devices.host"), "numpy_is_read_in_c", lambda: False)
    ours, theirs = ([Variable(np.ones(shape, np.float32), device="host") for shape in SHAPES] for _ in range(2))
    by_tensor, by_array = gpu_adam.Adam(0.1), gpu_adam.Adam(0.1)
    arrays = [np.full(shape, 0.5, np.float32) for shape in SHAPES]
    tensors = [torch.tensor(each) for each in arrays]
    for step in range(5):
        if step == 1:
            monkeypatch.setattr(importlib.import_module("gpu_adam.step.groups"), "as_array", pytest.fail)
        if step == 3:
            tensors = [tensor.clone() for tensor in tensors]
        if step == 4:
            tensors[2].data = torch.tensor(arrays[2] * 3)
            arrays[2] *= 3
        by_tensor.apply_gradients(list(zip(tensors, ours, strict=True)))
        by_array.apply_gradients([(each.copy(), variable) for each, variable in zip(arrays, theirs, strict=True)])
        for one, other in zip(ours, theirs, strict=True):
            assert_same_bits(one.numpy(), other.numpy(), f"step {step}")


def test_pairs_of_parameters_that_have_a_gradient(torch: Any) -> None:
    """Enough of them for what is fetched ahead, a class of the user's among them."""

    class Own(torch.nn.Parameter):  # type: ignore[misc]
        pass

    params = [(Own if n == 20 else torch.nn.Parameter)(torch.ones(2)) for n in range(40)]
    with_gradient = [param for n, param in enumerate(params) if n % 3]
    for param in with_gradient:
        param.grad = torch.ones(2)
    found = native_tensors.pairs_with_gradients(torch, params)
    assert [type(pair) for pair in found] == [tuple] * len(with_gradient)
    assert all(gradient is param.grad for gradient, param in found)
    assert all(one is other for (_, one), other in zip(found, with_gradient, strict=True))
    assert native_tensors.pairs_with_gradients(torch, []) == []


def test_what_a_parameter_raises_comes_through(torch: Any) -> None:
    class Broken(torch.nn.Parameter):  # type: ignore[misc]
        @property
        def grad(self) -> Any:
            raise LookupError("no gradient here")

    with pytest.raises(LookupError, match="no gradient here"):
        native_tensors.pairs_with_gradients(torch, [torch.nn.Parameter(torch.ones(2)), Broken(torch.ones(2))])


def test_a_parameter_may_go_while_it_is_asked(torch: Any) -> None:
    """By a property of its class, which empties the list."""

    class Fleeting(torch.nn.Parameter):  # type: ignore[misc]
        @property
        def grad(self) -> Any:
            params.clear()
            gc.collect()
            return torch.ones(2)

    params = [Fleeting(torch.ones(2)) for _ in range(20)]
    ((gradient, parameter),) = native_tensors.pairs_with_gradients(torch, params)
    assert gradient.tolist() == [1, 1]
    assert type(parameter) is Fleeting


@pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError])
def test_what_a_mode_raises_comes_through(torch: Any, error: type[BaseException]) -> None:
    """It is not taken for a tensor without an answer."""

    class Mode(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise error("here")

    reader, addresses = torch_reader(torch, [(3,)] * 2, "float32"), np.zeros(2, np.uint64)
    pairs = [(torch.ones(3), None)] * 2
    with Mode(), pytest.raises(error, match="here"):
        reader.read(pairs, addresses)
    assert reader.read(pairs, np.zeros(2, np.uint64))


def test_what_is_no_tensor_is_read_with_care(torch: Any) -> None:
    """Also further on in a list, where memory is fetched ahead."""
    odd: list[Any] = [object(), None, 1, 0.5, "x", [], torch.nn.Parameter(torch.ones(3))]
    gradients = [torch.ones(3)] * 20 + odd * 6 + [torch.ones(3)]
    addresses = np.zeros(len(gradients), np.uint64)
    reader = torch_reader(torch, [(3,)] * len(gradients), "float32")
    assert not reader.read([(gradient, None) for gradient in gradients], addresses)
    assert [bool(address) for address in addresses] == [type(each) is torch.Tensor for each in gradients]


def test_objects_that_are_the_same(torch: Any) -> None:
    """Equal ones are others."""
    objects = [float(1000), [], torch.ones(2)]
    assert native_tensors.are_same(torch, objects, list(objects))
    assert native_tensors.are_same(torch, tuple(objects), objects)
    assert native_tensors.are_same(torch, [], [])
    for others in (objects[:2], [*objects, None], [1.0 * 1000, *objects[1:]], [*objects[:2], torch.ones(2)]):
        assert not native_tensors.are_same(torch, objects, others)
        assert not native_tensors.are_same(torch, tuple(objects), others)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda dicts: dicts["a"].update(x=1.0 * 1000),
        lambda dicts: dicts["a"].pop("y"),
        lambda dicts: dicts["b"].update(z=None),
        lambda dicts: dicts.pop("b"),
        lambda dicts: dicts.update(c={"x": 1}),
        lambda dicts: dicts.update(a=dict(reversed(dicts["a"].items()))),
        lambda dicts: dicts["30"].update(x=None),
        lambda dicts: dicts.update(b=None),
    ],
)
def test_dicts_that_hold_other_objects(at_once: bool, change: Callable[[Any], Any]) -> None:
    """Equal ones are others, too."""
    objects = [float(1000), [], {}]
    dicts: dict[str, Any] = {"a": dict(zip("xy", objects[:2], strict=True)), "empty": {}, "b": {"x": objects[2]}}
    dicts |= {"no dict": 1, **{str(n): {"x": objects[0]} for n in range(40)}}
    contents = native_tensors.Contents(dicts, at_once=at_once)
    assert contents.are_in({key: dict(each) if isinstance(each, dict) else each for key, each in dicts.items()})
    change(dicts)
    assert not contents.are_in(dicts)
