"""Variables: arrays on a device that are updated in place, and gradients for some of a variable's rows."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from gpu_adam.devices import Array, Device, device_of, find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.tracing import adapter, check_overwrite, operand


def _in_place(ufunc: np.ufunc) -> Any:
    def operator(self: Variable, other: Any) -> Variable:
        check_overwrite(self)
        with self._device.current():
            ufunc(self._value, _plain(other), out=self._value)
        return self

    return operator


class Variable(NDArrayOperatorsMixin):
    """An array on a device whose memory never moves: updates and assignments happen in place.

    Behaves in expressions as its array does: ``2 * v``, ``v[1:]``, ``numpy.exp(v)`` give plain arrays.

    Args:
        initial_value: numbers, a (nested) list, a NumPy or CuPy array, or a callable without arguments that returns one
            of these. It is copied.
        trainable: a mark for the user's own code; optimizers update what they are given.
        name: for messages, slot names and checkpoints; need not be unique. Default "Variable".
        dtype: default: the array's own; float32 for Python floats, int32 for Python integers, as in TensorFlow.
        device: "host", "cuda", "cuda:N" or a device; default: where `initial_value` lies if it is a CuPy array, else
            the default device.

    Raises:
        ArgumentTypeError, ArgumentValueError: the value does not make an array, or the device is unknown.
        DeviceError: the device is not there.
    """

    # Arrays leave mixed expressions to the variable.
    __array_priority__ = 200

    def __init__(
        self,
        initial_value: Any,
        trainable: bool = True,
        name: str | None = None,
        dtype: Any = None,
        device: str | Device | None = None,
    ) -> None:
        if callable(initial_value) and not hasattr(initial_value, "dtype"):
            initial_value = initial_value()
        if isinstance(initial_value, Variable):
            initial_value = initial_value.value
        if name is not None and not isinstance(name, str):
            raise ArgumentTypeError("name", "must be a str", type(name).__name__, "pass a str or None")
        if device is None and hasattr(initial_value, "__cuda_array_interface__"):
            device = device_of(initial_value)
        self._device = find_device(device)
        wanted = _initial_dtype(initial_value, dtype)
        try:
            self._value = self._device.array(initial_value, wanted)
        except (TypeError, ValueError) as error:
            raise ArgumentValueError(
                "initial_value", "must be convertible to an array of numbers", error, "pass numbers or an array"
            ) from error
        if self._value.dtype.kind in "OSUMm":
            raise ArgumentTypeError(
                "initial_value", "must consist of numbers", type(initial_value).__name__, "pass numbers or an array"
            )
        self._name = "Variable" if name is None else name
        self.trainable = bool(trainable)

    @classmethod
    def over(cls, array: Array, device: Device, name: str | None = None, trainable: bool = True) -> Variable:
        """A variable over an array's own memory, without a copy. The array must be C-contiguous and writeable."""
        self = cls.__new__(cls)
        self._device, self._value = device, array
        self._name = "Variable" if name is None else name
        self.trainable = trainable
        return self

    @property
    def value(self) -> Array:
        """The live array: NumPy on the host, CuPy on a CUDA device. Shares memory with the variable."""
        return self._value

    @property
    def name(self) -> str:
        """The name given at construction."""
        return self._name

    @property
    def device(self) -> Device:
        """Where the memory lies."""
        return self._device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self._value.shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array."""
        dtype: np.dtype = self._value.dtype
        return dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self._value.size)

    def numpy(self) -> np.ndarray:
        """A copy in host memory. Waits for the device."""
        return self._device.numpy(self._value)

    def assign(self, value: Any) -> Variable:
        """Overwrite the contents, cast to the variable's dtype.

        Args:
            value: what converts to an array of exactly the variable's shape; on a CUDA device also a host array.

        Returns:
            The variable.

        Raises:
            ArgumentValueError: another shape, or no numbers.
        """
        converted = self._converted(value, "assign's value")
        with self._device.current():
            self._value[...] = converted
        return self

    def assign_add(self, delta: Any) -> Variable:
        """Add `delta`, of exactly the variable's shape, in place. Returns the variable."""
        converted = self._converted(delta, "assign_add's delta")
        with self._device.current():
            self._value[...] += converted
        return self

    def assign_sub(self, delta: Any) -> Variable:
        """Subtract `delta`, of exactly the variable's shape, in place. Returns the variable."""
        converted = self._converted(delta, "assign_sub's delta")
        with self._device.current():
            self._value[...] -= converted
        return self

    def _converted(self, value: Any, argument: str) -> Array:
        check_overwrite(self)
        array = value.value if isinstance(value, Variable) else value
        try:
            if not isinstance(array, self._device.xp.ndarray):
                array = self._device.array(np.asarray(array))
            if tuple(array.shape) == self.shape:
                return array.real.astype(self.dtype) if self.dtype.kind != "c" else array.astype(self.dtype)
        except (TypeError, ValueError) as error:
            raise ArgumentValueError(
                argument, f"must be numbers for variable {self._name!r}", error, "cast it"
            ) from error
        raise ArgumentValueError(
            f"{argument} for variable {self._name!r}",
            f"must have the variable's shape {self.shape}",
            tuple(array.shape),
            "reshape it",
        )

    # The protocols of arrays; through `operand`, by which a loss that is being differentiated records what it computes.

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and self._device.xp is not np:
            raise ValueError("a variable on a CUDA device cannot be viewed by NumPy; use .numpy() for a copy")
        value = operand(self)
        if value is self._value and (copy or self._device.xp is not np):
            value = self.numpy()
        return np.asarray(value, dtype)

    def __getattr__(self, name: str) -> Any:
        # Interfaces that exist on one kind of device only, and must be absent on the other; and the methods of arrays.
        public = not name.startswith("_") or name in ("__array_interface__", "__cuda_array_interface__")
        if public and "_value" in self.__dict__:
            return getattr(operand(self), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __jax_array__(self) -> Any:
        return adapter("jax").view(self)

    def __dlpack__(self, **options: Any) -> Any:
        return operand(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._value.__dlpack_device__()
        return int(kind), int(index)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        value = operand(self)
        if value is not self._value:  # recorded: it takes the call, and what stands for the other variables
            return value.__array_ufunc__(ufunc, method, *inputs, **options)
        if "out" in options:
            options["out"] = _plain(options["out"])
        return getattr(ufunc, method)(*_plain(inputs), **options)

    def __cupy_override_elementwise_kernel__(self, kernel: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        return kernel(*_plain(inputs), **options)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, options: Any) -> Any:
        return function(*_plain(args), **{key: _plain(option) for key, option in options.items()})

    def __getitem__(self, index: Any) -> Array:
        return operand(self)[_plain(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        check_overwrite(self)
        self._value[_plain(index)] = _plain(value)

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Array]:
        return iter(operand(self))

    def __bool__(self) -> bool:
        return bool(operand(self))

    def __float__(self) -> float:
        return float(operand(self))

    def __int__(self) -> int:
        return int(operand(self))

    def __complex__(self) -> complex:
        return complex(operand(self))

    def __index__(self) -> int:
        return operator.index(self.numpy())

    def __repr__(self) -> str:
        return f"<Variable {self._name!r} shape={self.shape} dtype={self.dtype} device={self._device.name}>"

    # In-place operators change the memory, where the mixin's would replace the object by an array.

    __iadd__ = _in_place(np.add)
    __isub__ = _in_place(np.subtract)
    __imul__ = _in_place(np.multiply)
    __itruediv__ = _in_place(np.true_divide)
    __ifloordiv__ = _in_place(np.floor_divide)
    __imod__ = _in_place(np.remainder)
    __ipow__ = _in_place(np.power)

    # Two variables are the same if they are one object; `==` compares elements, as arrays do.

    __hash__ = object.__hash__

    def __getstate__(self) -> dict[str, Any]:
        value = self._value if self._device.xp is np else self.numpy()
        return {"value": value, "device": self._device, "name": self._name, "trainable": self.trainable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._device, self._name, self.trainable = state["device"], state["name"], state["trainable"]
        value = state["value"]
        self._value = value if self._device.xp is np else self._device.array(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        copied = Variable.over(self._device.array(self._value), self._device, self._name, self.trainable)
        memo[id(self)] = copied
        return copied


class IndexedSlices:
    """A gradient for some rows of a variable, as of an embedding look-up; rows not named have gradient 0.

    Rows named several times add up, in order of occurrence.

    Args:
        values: array [n, ...row], the rows' gradients, with the variable's dtype, on its device.
        indices: int32 or int64 array [n], the rows, 0 <= index < rows.
        dense_shape: ignored, for compatibility with TensorFlow.
    """

    def __init__(self, values: Any, indices: Any, dense_shape: Any = None) -> None:
        self.values, self.indices, self.dense_shape = values, indices, dense_shape

    def __repr__(self) -> str:
        return f"IndexedSlices(values={self.values!r}, indices={self.indices!r})"


def _initial_dtype(value: Any, dtype: Any) -> np.dtype | None:
    """The dtype that the constructor's arguments mean; None leaves it to NumPy."""
    found: np.dtype | None = None
    if dtype is not None:
        found = as_dtype(dtype)
    elif hasattr(value, "dtype"):
        found = np.dtype(value.dtype)
    else:
        with contextlib.suppress(TypeError, ValueError):
            found = np.asarray(value).dtype
            found = {"f": np.dtype(np.float32), "i": np.dtype(np.int32)}.get(found.kind, found)
    return None if found is None else found.newbyteorder("=")


def as_dtype(dtype: Any) -> np.dtype:
    """`dtype` as NumPy's; ArgumentTypeError where it is none."""
    try:
        found: np.dtype = np.dtype(dtype)
    except TypeError as error:
        raise ArgumentTypeError("dtype", "must be a NumPy dtype", repr(dtype), "pass 'float32', say") from error
    return found


def _plain(obj: Any) -> Any:
    """`obj` with variables replaced by their arrays, inside tuples and lists too."""
    if isinstance(obj, Variable):
        return operand(obj)
    if type(obj) in (tuple, list):
        return type(obj)(_plain(item) for item in obj)
    return obj


class Registry:
    """The variables an optimizer has met. Raw arrays are recognised again by their memory.

    Attributes:
        known: the variable of each object met, by the object's id.
    """

    def __init__(self) -> None:
        self.known: dict[int, Variable] = {}
        self._objects: list[Any] = []  # keeps them alive, so that their ids stay theirs
        self._by_memory: dict[Any, Variable] = {}

    def find(self, obj: Any, argument: str) -> Variable:
        """The variable for `obj`: itself, or one over a raw array's memory.

        Raises:
            ArgumentTypeError: no variable, and no array of a device.
            ArgumentValueError: an array that cannot be updated in place.
        """
        variable = self.known.get(id(obj))
        if variable is None:
            variable = obj if isinstance(obj, Variable) else over_raw_array(obj, argument)
            known = self._by_memory.get(_memory_key(variable))
            if known is not None:
                return known  # another object over the same memory; not kept, or a new view in every step would pile up
            self._by_memory[_memory_key(variable)] = variable
            self._add(obj, variable)
        return variable

    def _add(self, obj: Any, variable: Variable) -> None:
        self._objects.append(obj)
        self.known[id(obj)] = variable

    def forget(self, count: int) -> None:
        """Keep only the first `count` objects: what a rejected call has brought is dropped again."""
        for obj in self._objects[count:]:
            del self._by_memory[_memory_key(self.known.pop(id(obj)))]
        del self._objects[count:]

    def __len__(self) -> int:
        return len(self._objects)

    def copied(self) -> Registry:
        """Another registry of the same variables."""
        new = Registry()
        new.__setstate__(self.__getstate__())
        return new

    def __getstate__(self) -> list[tuple[Any, Variable]]:
        return [(obj, self.known[id(obj)]) for obj in self._objects]

    def __setstate__(self, state: list[tuple[Any, Variable]]) -> None:
        self.__init__()  # type: ignore[misc]
        for obj, variable in state:
            if not isinstance(obj, Variable):
                # Pickled apart from its variable, whose array may be a view: share memory again.
                view = variable.device.view(obj)
                variable._value = variable._value if view is None else view
            self._add(obj, variable)
            self._by_memory[_memory_key(variable)] = variable


def _memory_key(variable: Variable) -> Any:
    if variable.size == 0:
        return id(variable)
    return variable.device, variable.device.address(variable.value), variable.shape, variable.dtype


def over_raw_array(obj: Any, argument: str) -> Variable:
    """A variable over the memory of a raw array: NumPy, CuPy, or what speaks DLPack or an array interface."""
    device = None if isinstance(obj, np.generic) else device_of(obj)
    if device is None:
        raise ArgumentTypeError(
            argument,
            "must be a Variable or a writeable device array",
            type(obj).__name__,
            "wrap the value in gpu_adam.Variable",
        )
    try:
        array = device.view(obj)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentTypeError(
            argument, "must share its memory", error, "detach it, or wrap a copy in gpu_adam.Variable"
        ) from error
    if array is None:
        raise ArgumentTypeError(
            argument, f"must lie on {device.name}", type(obj).__name__, "wrap it in gpu_adam.Variable"
        )
    flags = array.flags
    if not flags.c_contiguous:
        raise ArgumentValueError(
            argument, "must be C-contiguous", f"strides {array.strides}", "pass a contiguous array"
        )
    if not array.dtype.isnative:
        raise ArgumentValueError(argument, "must have the machine's byte order", array.dtype.str, "use astype")
    if array.size and device.address(array) % array.dtype.itemsize:
        rule = f"must begin at a multiple of {array.dtype.itemsize} bytes"
        raise ArgumentValueError(argument, rule, hex(device.address(array)), "wrap a copy in gpu_adam.Variable")
    if device.xp is np and not flags.writeable:
        raise ArgumentValueError(
            argument, "must be writeable", "a read-only array", "pass a writeable array, or a Variable"
        )
    return Variable.over(array, device)
