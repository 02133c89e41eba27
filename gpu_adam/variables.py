"""Variables: arrays on a device that are updated in place, and gradients for some of a variable's rows."""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from gpu_adam.arrays import add_at, gather
from gpu_adam.autodiff_seam import adapter, check_overwrite, operand, shown
from gpu_adam.behind import Behind
from gpu_adam.conversion import as_numbers, cast, copied_to, on_host, place_of
from gpu_adam.devices import Array, Device, find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SparseIndexError
from gpu_adam.kernels import dtype_named
from gpu_adam.rules import truth_value

_PYTHON_DTYPES = {"f": np.dtype(np.float32), "i": np.dtype(np.int32)}
"""The dtypes of Python's floats and integers, as in TensorFlow."""


def _in_place(ufunc: np.ufunc) -> Any:
    def operator(self: Variable, other: Any) -> Variable:
        check_overwrite(self)
        self._change(lambda array: ufunc(array, _plain(other), out=array))
        return self

    return operator


def _of_array(operation: Callable[[Any, Any], Any]) -> Any:
    def operator(self: Variable, other: Any) -> Any:
        with self._device.activate():
            return operation(operand(self), _plain(other))

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
        device: "host", "cuda", "cuda:N" or a device, to which a value on another one is copied; default: where
            `initial_value` lies if it lies on a CUDA device, else the default device.
        constraint: a function that takes the variable and returns what it is to be, an array of its shape, such as
            ``lambda v: np.maximum(v, 0)``. An optimizer assigns that after each of its updates. By NumPy's or CuPy's
            functions it is computed on the variable's device, without a wait.

    Raises:
        ArgumentTypeError, ArgumentValueError: the value does not make an array, or the device is unknown.
        DeviceError: the device is not there.
    """

    # Arrays leave mixed expressions to the variable.
    __array_priority__ = 200

    _master: weakref.ref[Variable] | None = None
    _changed: Callable[[], object] | None = None  # called after something was assigned; gpu_adam/distributed sets it

    _storage: Array  # for its place, shape and dtype; whose contents may be behind
    _behind: Behind | None = None

    def __init__(
        self,
        initial_value: Any,
        trainable: bool = True,
        name: str | None = None,
        dtype: Any = None,
        device: str | Device | None = None,
        constraint: Any = None,
    ) -> None:
        if constraint is not None and not callable(constraint):
            got = type(constraint).__name__
            raise ArgumentTypeError("constraint", "must be a callable of the variable", got, "pass a function or None")
        if callable(initial_value) and not hasattr(initial_value, "dtype"):
            initial_value = initial_value()
        if isinstance(initial_value, Variable):
            initial_value = initial_value.value
        if name is not None and not isinstance(name, str):
            raise ArgumentTypeError("name", "must be a str", type(name).__name__, "pass a str or None")
        place = place_of(initial_value)
        if device is None and place is not None and place.xp is not np:
            device = place
        self._device = find_device(device)
        array = as_numbers(initial_value, "initial_value")
        if dtype is not None:
            wanted = as_dtype(dtype)
        else:
            wanted = (
                array.dtype if hasattr(initial_value, "dtype") else _PYTHON_DTYPES.get(array.dtype.kind, array.dtype)
            )
        array = cast(array, wanted.newbyteorder("="), "initial_value")
        self._storage = copied_to(self._device, array)
        self._name = "Variable" if name is None else name
        self.trainable = truth_value("trainable", trainable)
        self._constraint: Callable[[Variable], Any] | None = constraint

    @classmethod
    def over(cls, array: Array, device: Device, name: str | None = None, trainable: bool = True) -> Variable:
        """A variable over an array's own memory, without a copy. The array must be C-contiguous and writeable."""
        self = cls.__new__(cls)
        self._device, self._storage = device, array
        self._name = "Variable" if name is None else name
        self.trainable = trainable
        self._constraint = None
        return self

    def _follow(self, master: Variable) -> None:
        """Be the rounding of another variable of the same shape and device as long as it lives.

        Whatever is assigned to this variable is assigned to the master too. (What is written into `value` is not.)
        """
        self._master = weakref.ref(master)

    def _check_updatable(self) -> None:
        """Raise where optimizers of this process must not update the variable: a kernel would write to its memory.

        Raises:
            ArgumentValueError: the memory can only be read.
        """
        if not getattr(self._storage.flags, "writeable", True):
            rule, remedy = "must have memory that can be written", "wrap a copy in gpu_adam.Variable"
            raise ArgumentValueError(f"variable {self._name!r}", rule, "a read-only array", remedy)

    @property
    def _has_master(self) -> bool:
        """Whether the variable is the rounding of another one."""
        return self._master is not None and self._master() is not None

    def _change(self, operation: Callable[[Array], object]) -> None:
        """Let an operation write into the array; where there is a master into that one, which is then rounded."""
        master = None if self._master is None else self._master()
        with self._device.activate():
            if master is None:
                operation(self._value)
            else:
                operation(master._value)
                self._value[...] = master._value
            if self._changed is not None:
                self._changed()

    def _move_to(self, array: Array) -> None:
        """Stand for another array of the same shape and dtype: a variable follows the object whose memory it shows."""
        self._storage = array

    @property
    def _value(self) -> Array:
        """The array, all rows of which are up to date: what contents are read from, and written to."""
        if self._behind is not None:
            self._behind.settle()
        return self._storage

    @property
    def value(self) -> Array:
        """The live array: NumPy on the host, CuPy on a CUDA device. Shares memory with the variable.

        While a loss is being differentiated, which must not change its variables, a read-only view of that array on the
        host and a copy on a CUDA device.
        """
        return shown(self)

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
        return tuple(self._storage.shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array."""
        dtype: np.dtype = self._storage.dtype
        return dtype

    @property
    def constraint(self) -> Callable[[Variable], Any] | None:
        """The function given at construction, whose value an optimizer assigns after each update; or None."""
        return self._constraint

    def constrain(self) -> None:
        """Assign what the constraint gives, if there is one.

        Raises:
            ArgumentTypeError, ArgumentValueError: it gives no array of the variable's shape and kind of numbers.
            Whatever the constraint raises. The variable is as it was then.
        """
        if self._constraint is not None:
            with self._device.activate():
                projected = self._constraint(self)
            self._assign(projected, "the constraint's value")

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self._storage.size)

    def numpy(self) -> np.ndarray:
        """A copy in host memory. Waits for the device."""
        return self._device.numpy(self._value)

    def assign(self, value: Any) -> Variable:
        """Overwrite the contents, cast to the variable's dtype.

        Args:
            value: what converts to an array of exactly the variable's shape; also an array on another device.

        Returns:
            The variable.

        Raises:
            ArgumentTypeError: no numbers, or none that the variable's dtype has a place for.
            ArgumentValueError: another shape; in host memory, a number outside of the dtype's range. (On a CUDA device
                looking would be a wait: it becomes infinite, or any whole number.)
        """
        self._assign(value, "assign's value")
        return self

    def _assign(self, value: Any, argument: str) -> None:
        converted = self._converted(value, argument)
        self._change(lambda array: operator.setitem(array, ..., converted))

    def assign_add(self, delta: Any) -> Variable:
        """Add `delta`, of exactly the variable's shape, in place. Returns the variable."""
        converted = self._converted(delta, "assign_add's delta")
        self._change(lambda array: np.add(array, converted, out=array))
        return self

    def assign_sub(self, delta: Any) -> Variable:
        """Subtract `delta`, of exactly the variable's shape, in place. Returns the variable."""
        converted = self._converted(delta, "assign_sub's delta")
        self._change(lambda array: np.subtract(array, converted, out=array))
        return self

    def _converted(self, value: Any, argument: str) -> Array:
        check_overwrite(self)
        argument = f"{argument} for variable {self._name!r}"
        array = as_numbers(value.value if isinstance(value, Variable) else value, argument)
        if tuple(array.shape) != self.shape:
            rule = f"must have the variable's shape {self.shape}"
            raise ArgumentValueError(argument, rule, tuple(array.shape), "reshape it")
        rounded = cast(array, self.dtype, argument)
        master = None if self._master is None else self._master()
        array = rounded if master is None else cast(array, master.dtype, argument)
        if self._device.xp is np:
            return on_host(array)
        place = place_of(array)
        return array if place is self._device else self._device.array(array)

    # The protocols of arrays; through `operand`, by which a loss that is being differentiated records what it computes.

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and self._device.xp is not np:
            raise ValueError("a variable on a CUDA device cannot be viewed by NumPy; use .numpy() for a copy")
        value = operand(self)
        if isinstance(value, self._device.xp.ndarray) and (copy or self._device.xp is not np):
            value = self.numpy()
        return np.asarray(value, dtype)

    def __getattr__(self, name: str) -> Any:
        # Interfaces that exist on one kind of device only, and must be absent on the other; and the methods of arrays.
        public = not name.startswith("_") or name in ("__array_interface__", "__cuda_array_interface__")
        if public and "_storage" in self.__dict__:
            device = self._device
            if device.xp is np:
                return getattr(operand(self), name)
            with device.activate():
                found = getattr(operand(self), name)
            return functools.partial(_called_on, device, found) if callable(found) else found
        if name == "__cupy_get_ndarray__" and "_storage" in self.__dict__ and self._device.xp is not np:
            value = operand(self)
            if value is self._storage:  # a recorded value is no array of CuPy
                return functools.partial(_itself, value)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __jax_array__(self) -> Any:
        return adapter("jax").view(self)

    def __dlpack__(self, **options: Any) -> Any:
        with self._device.activate():
            return operand(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._storage.__dlpack_device__()
        return int(kind), int(index)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        value = operand(self)
        with self._device.activate():
            # What is recorded takes the call, and what stands for the other variables.
            if not isinstance(value, self._device.xp.ndarray):
                return value.__array_ufunc__(ufunc, method, *inputs, **options)
            if "out" in options:
                options["out"] = _plain(options["out"])
            return getattr(ufunc, method)(*_plain(inputs), **options)

    def __cupy_override_elementwise_kernel__(self, kernel: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with self._device.activate():
            return kernel(*_plain(inputs), **options)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, options: Any) -> Any:
        with self._device.activate():
            if function in MAKERS:
                return make(function, self._device.xp, args, options)
            if function is np.take and len(args) == 2 and args[0] is self and options == {"axis": 0}:
                index = _plain(args[1])
                return function(self._operand_at(index), index, **options)
            return function(*_plain(args), **{key: _plain(option) for key, option in options.items()})

    def __getitem__(self, index: Any) -> Array:
        index = _plain(index)
        with self._device.activate():
            return self._operand_at(index)[index]

    def _operand_at(self, index: Any) -> Any:
        """What to index: where an array or a list of row numbers is the index, only these rows are brought up to date.

        Among these are the indices of which a loss makes `IndexedSlices`.
        """
        if self._behind is None or not self.ndim or not len(self):
            return operand(self)
        xp = self._device.xp
        if isinstance(index, (list, np.ndarray, xp.ndarray)):
            rows = xp.asarray(index)
            if rows.dtype.kind in "iu":
                # Negative ones count from the end; of others NumPy raises, and CuPy takes them modulo the rows too.
                self._behind.bring_up_to_date(rows.reshape(-1).astype(np.int64) % len(self))
                return operand(self, self._storage)
        return operand(self)

    def gather(self, indices: Any) -> Array:
        """The rows at some indices, for the forward pass of an embedding.

            result[a, b, ...] = variable[indices[a, b, ...]]

        Inside a loss that is being differentiated the gradient is an `IndexedSlices` of these rows.

        Args:
            indices: whole numbers in [0, rows) of any shape: a number, a list, an array of any device. Negative ones do
                not count from the end.

        Returns:
            An array of its own, [*indices.shape, *row], on the variable's device. Where the indices lie in device
            memory, in which to look at them would be a wait, a row out of range comes as NaN, in a variable of whole
            numbers as 0. The updates leave it out of a gradient of `IndexedSlices` and note it: see
            `Adam.check_errors`.

        Raises:
            ArgumentTypeError: no whole numbers.
            ArgumentValueError: a variable without rows, for it has no dimensions.
            SparseIndexError: an index in host memory, or for a variable on the host, lies outside [0, rows).
        """
        rows = self._row_numbers(indices, f"gather's indices for variable {self._name!r}")
        with self._device.activate():
            if self._behind is not None:
                self._behind.bring_up_to_date(rows.reshape(-1))
            value = operand(self, self._storage)
            return gather(value, rows) if isinstance(value, self._device.xp.ndarray) else value.gather(rows)

    def _row_numbers(self, indices: Any, argument: str) -> Array:
        """Indices as a C-contiguous array of int32 or int64 on the device; those in host memory lie in [0, rows)."""
        if not self.ndim:
            raise ArgumentValueError(
                f"variable {self._name!r}", "must have rows", "shape ()", "compute with it as it is"
            )
        array = as_numbers(_plain(indices), argument, "pass the numbers of rows")
        if self._device.xp is np:
            array = on_host(array)
        if array.size and array.dtype.kind not in "iu":
            raise ArgumentTypeError(argument, "must be whole numbers", f"numbers of {array.dtype}", "cast with astype")
        if isinstance(array, np.ndarray) and array.size and not 0 <= array.min() <= array.max() < len(self):
            place = np.argwhere((array < 0) | (array >= len(self)))[0].tolist()
            rule, got = f"must lie in [0, {len(self)})", int(array[tuple(place)])
            raise SparseIndexError(f"{argument}, at {place}," if place else argument, rule, got, "check the indices")
        dtype = array.dtype if array.dtype in (np.int32, np.int64) else np.dtype(np.int64)
        with self._device.activate():
            if place_of(array) is not self._device:
                return self._device.array(array, dtype)
            return self._device.xp.ascontiguousarray(array, dtype).reshape(array.shape)

    def __setitem__(self, index: Any, value: Any) -> None:
        check_overwrite(self)
        self._change(lambda array: operator.setitem(array, _plain(index), _plain(value)))

    def __len__(self) -> int:
        return len(self._storage)

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

    def __round__(self, digits: int | None = None) -> Any:
        value = operand(self)
        is_recorded = not isinstance(value, self._device.xp.ndarray)
        return round(value if is_recorded else self._number("round's argument"), digits)

    def __format__(self, form: str) -> str:
        return format(self._number("a variable with a format"), form) if form else repr(self)

    def _number(self, argument: str) -> Any:
        """The only element, for which the host waits."""
        if self.ndim:
            raise ArgumentTypeError(argument, "must be one number", repr(self), "pass one of its elements")
        return self.numpy()[()]

    def __repr__(self) -> str:
        return f"<Variable {self._name!r} shape={self.shape} dtype={self.dtype} device={self._device.name}>"

    # An array leaves these to a sparse matrix on its right, of which NumPy's functions would make an array of objects.

    __matmul__ = _of_array(operator.matmul)
    __mul__ = _of_array(operator.mul)

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
        state = {"value": value, "device": self._device, "name": self._name, "trainable": self.trainable}
        return state if self._constraint is None else {**state, "constraint": self._constraint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._device, self._name, self.trainable = state["device"], state["name"], state["trainable"]
        value = state["value"]
        self._storage = value if self._device.xp is np else self._device.array(value)
        self._constraint = state.get("constraint")

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        copied = Variable.over(self._device.array(self._value), self._device, self._name, self.trainable)
        memo[id(self)] = copied  # first, for the constraint may know its variable
        copied._constraint = copy.deepcopy(self._constraint, memo)
        return copied


class IndexedSlices:
    """A gradient for some rows of a variable, as of an embedding look-up; rows not named have gradient 0.

    Rows named several times add up, in order of occurrence.

    Args:
        values: array [n, ...row], the rows' gradients, with the variable's dtype, on its device.
        indices: int32 or int64 array [n], the rows, 0 <= index < rows.
        dense_shape: the variable's shape, where it is known: `shape`, `dense` and `numpy` tell it and need it; an
            update does not look at it.

    What `dense`, `numpy` and `norm` raise:
        ArgumentTypeError, ArgumentValueError: values or indices are no arrays of numbers, or do not fit each other or
            the shape.
        SparseIndexError: an index out of range, on the host. On a CUDA device, where looking would be a wait, such a
            row is left out.
    """

    _joined: Any = None  # the values of all ranks, of which these are some; gpu_adam/distributed sets it

    def __init__(self, values: Any, indices: Any, dense_shape: Any = None) -> None:
        self.values, self.indices, self.dense_shape = values, indices, dense_shape

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The variable's shape; None where it was not given."""
        return None if self.dense_shape is None else as_shape(self.dense_shape)

    def dense(self, shape: Any = None) -> Array:
        """The same gradient written out, on the device of the values: repeated rows summed, 0 in the others.

        Args:
            shape: the variable's, where `dense_shape` was not given.

        Raises:
            ArgumentValueError: the shape is not known.
        """
        shape = self.shape if shape is None else as_shape(shape)
        if shape is None:
            got, remedy = "no dense_shape", "pass the variable's shape: dense(variable.shape)"
            raise ArgumentValueError("the shape of IndexedSlices", "must be known", got, remedy)
        device, values, indices = self._checked(shape)
        with device.activate():
            total = device.zeros(shape, values.dtype)
            if shape[0]:
                add_at(total, indices, values)
        return total

    def numpy(self, shape: Any = None) -> np.ndarray:
        """`dense` as a copy in host memory. Waits for the device."""
        dense = self.dense(shape)
        device = place_of(dense)
        assert device is not None
        return device.numpy(dense)

    def norm(self) -> Array:
        """The L2 norm of the dense gradient, 0-d, on the device of the values; summed in float64.

        sqrt(sum over rows of |sum of the row's values|^2). Takes memory for the values once more, not for the variable.
        """
        device, values, indices = self._checked(self.shape)
        xp = device.xp
        with device.activate():
            total = device.zeros(values.shape, values.dtype)
            if indices.size:
                # Each row that is named gets a place among as many as there are values.
                order = xp.argsort(indices)
                ordered = indices[order]
                places = xp.zeros_like(indices)
                places[order[1:]] = xp.cumsum(ordered[1:] != ordered[:-1])
                add_at(total, places, values)
            size = xp.absolute(total)
            wide = size.astype(np.float64)
            return xp.asarray(xp.sqrt(xp.sum(wide * wide)), np.float64 if size.dtype.kind in "iu" else size.dtype)

    def _checked(self, shape: tuple[int, ...] | None) -> tuple[Device, Array, Array]:
        """The device of the values, the values, and there the indices; all that fits, where the shape is known."""
        values = as_numbers(_plain(self.values), "IndexedSlices.values")
        indices = as_numbers(_plain(self.indices), "IndexedSlices.indices")
        device = place_of(values)
        assert device is not None
        if indices.size and indices.dtype.kind not in "iu":
            rule, remedy = "must be whole numbers", "cast them with astype"
            raise ArgumentTypeError("IndexedSlices.indices", rule, f"numbers of {indices.dtype}", remedy)
        if indices.ndim != 1:
            rule, got = "must be one-dimensional", f"shape {tuple(indices.shape)}"
            raise ArgumentValueError("IndexedSlices.indices", rule, got, "ravel them")
        row = tuple(values.shape[1:]) if shape is None else shape[1:]
        if tuple(values.shape) != (indices.size, *row) or shape == ():
            wanted = "a dimension for the rows" if shape == () else f"shape {(indices.size, *row)}"
            got = f"shape {tuple(values.shape)}" + ("" if shape is None else f" for a variable of shape {shape}")
            raise ArgumentValueError("IndexedSlices.values", f"must have {wanted}", got, "give each index its row")
        with device.activate():
            if place_of(indices) is not device:
                indices = device.array(on_host(indices))
            indices = indices.astype(np.int64)
            inside = (indices >= 0) & (indices < (np.inf if shape is None else shape[0]))
            if not device.checks_indices:
                fitting = inside.reshape(-1, *[1] * len(row))
                return device, device.xp.where(fitting, values, 0).astype(values.dtype), indices * inside
        if not inside.all():
            position = int(np.argmin(inside))
            rule = "must be >= 0" if shape is None else f"must lie in [0, {shape[0]})"
            argument, remedy = f"IndexedSlices.indices[{position}]", "check the indices, or the shape"
            raise SparseIndexError(argument, rule, int(indices[position]), remedy)
        return device, values, indices

    def __repr__(self) -> str:
        return f"IndexedSlices(values={self.values!r}, indices={self.indices!r})"


MAKERS = frozenset(
    getattr(np, name)
    for name in (
        *("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray"),
        *("arange", "empty", "eye", "full", "identity", "ones", "tri", "zeros"),
    )
)
"""The functions of NumPy that make an array on the device of another one, their argument `like`."""


def make(function: Callable[..., Any], xp: Any, args: Any, options: Any) -> Array:
    """A new array by one of the `MAKERS`, with the function of that name of an array module.

    NumPy's functions do the same for arrays, but pass `device`, which most of CuPy's functions do not take.
    """
    given = {key: value for key, value in options.items() if value is not None}
    return getattr(xp, function.__name__)(*args, **given)


def _itself(array: Array) -> Array:
    return array


def _called_on(device: Device, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a method of a device's array returns, called while that device is current."""
    with device.activate():
        return method(*_plain(args), **{key: _plain(option) for key, option in kwargs.items()})


def as_dtype(dtype: Any) -> np.dtype:
    """`dtype` as NumPy's; ArgumentTypeError where it is none."""
    try:
        found: np.dtype = dtype_named(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    except TypeError as error:
        raise ArgumentTypeError("dtype", "must be a NumPy dtype", repr(dtype), "pass 'float32', say") from error
    return found


def as_shape(shape: Any) -> tuple[int, ...]:
    """`shape` as a tuple; ArgumentTypeError where it is neither a whole number nor a sequence or array of such."""
    sizes: tuple[int, ...]
    try:
        given = shape.tolist() if hasattr(shape, "tolist") else shape
        sizes = tuple(map(operator.index, [given] if hasattr(given, "__index__") else given))
    except TypeError:
        sizes = (-1,)
    if min(sizes, default=0) < 0:
        rule = "must be a number >= 0, or a tuple of such"
        raise ArgumentTypeError("shape", rule, repr(shape), "pass (3, 4), say")
    return sizes


def _plain(obj: Any) -> Any:
    """`obj` with variables replaced by their arrays, inside tuples and lists too."""
    if isinstance(obj, Variable):
        return operand(obj)
    if type(obj) in (tuple, list):
        return type(obj)(_plain(item) for item in obj)
    return obj
