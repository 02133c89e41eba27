"""Adam: what a user constructs, steps, configures and saves. The surface of tf.keras.optimizers.Adam."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam import checkpoint, schedules
from gpu_adam.controller import Controller
from gpu_adam.devices import find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from gpu_adam.hyperparameters import (
    DEFAULT_EPSILON,
    NO_CLIPPING,
    Bound,
    Hyperparameter,
    as_number,
    checked,
    evaluated,
)
from gpu_adam.kernels import COMPLEX_MODES
from gpu_adam.schedules import LearningRateSchedule
from gpu_adam.slots import Slots, initialized
from gpu_adam.tracing import current_tracer
from gpu_adam.variables import Variable, as_dtype

_KEYWORDS = ("clipnorm", "clipvalue", "global_clipnorm", "lr", "decay", "complex_mode")


class Adam:
    r"""The Adam optimizer, and AMSGrad.

    Step t, for every variable θ with gradient g (each operation rounded in the variable's dtype)::

        m    = m + (g - m) (1 - beta_1)
        v    = v + (g² - v) (1 - beta_2)             AMSGrad: vhat = max(vhat, v) takes the place of v below
        θ    = θ - α_t m / (√v + epsilon)            α_t = learning_rate √(1 - beta_2^t) / (1 - beta_1^t)

    Args:
        learning_rate: finite; a number, a 0-d array or variable, a callable without arguments, or a schedule.
        beta_1: in [0, 1); decay of the mean of gradients. A number, 0-d array, variable or callable.
        beta_2: in [0, 1); decay of the mean of squared gradients. As beta_1.
        epsilon: >= 0; added to the root, "epsilon hat" of the paper. As beta_1. None and 0 mean 1e-7.
        amsgrad: whether to divide by the maximum of v over the past.
        name: begins the names of the slots. Default "Adam".
        **kwargs: ``clipvalue`` > 0 bounds every element of a gradient; ``clipnorm`` > 0 then bounds each gradient's L2
            norm, or ``global_clipnorm`` > 0 the L2 norm over all of them; ``decay`` >= 0 divides the learning rate by
            1 + decay (t - 1); ``lr`` >= 0 is an old name of learning_rate and wins over it; ``complex_mode`` is how
            complex variables are updated: "abs2" (default) with real v following |g|², so that rotating the phase of
            all gradients rotates the steps, or "real_imag", the real and the imaginary part each as a real element.

    Callables and schedules are evaluated once per step; a schedule gets t - 1.

    Raises:
        ArgumentTypeError: an argument of the wrong kind, or an unknown keyword.
        ArgumentValueError: a value outside its range; ``clipnorm`` together with ``global_clipnorm``.

    References:
        Kingma & Ba, ICLR 2015, https://arxiv.org/abs/1412.6980; Reddi, Kale & Kumar, ICLR 2018,
        https://arxiv.org/abs/1904.09237; https://www.tensorflow.org/versions/r2.0/api_docs/python/tf/keras/optimizers/Adam
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = DEFAULT_EPSILON,
        amsgrad: Any = False,
        name: str | None = "Adam",
        **kwargs: Any,
    ) -> None:
        for keyword in kwargs:
            if keyword not in _KEYWORDS:
                known = ", ".join(_KEYWORDS)
                raise ArgumentTypeError(
                    f"keyword {keyword!r}", f"must be one of {known}", "another", "correct or drop it"
                )
        if name is not None and not isinstance(name, str):
            raise ArgumentTypeError("name", "must be a str", type(name).__name__, "pass a str or None")
        if kwargs.get("lr") is not None:
            warnings.warn("lr is an old name: use learning_rate", DeprecationWarning, stacklevel=2)
            learning_rate = kwargs["lr"]
            if not callable(learning_rate) and as_number("learning_rate", learning_rate) < 0:
                raise ArgumentValueError("lr", "must be >= 0", learning_rate, "use learning_rate for a negative rate")
        decay = kwargs.get("decay", 0.0)
        self._name = name or type(self).__name__
        self._hyper: dict[str, Any] = {
            "learning_rate": checked("learning_rate", learning_rate),
            "beta_1": checked("beta_1", beta_1),
            "beta_2": checked("beta_2", beta_2),
            "epsilon": DEFAULT_EPSILON if epsilon is None or _is_zero(epsilon) else checked("epsilon", epsilon),
            "decay": checked("decay", decay),
        }
        self.amsgrad = amsgrad
        self._clip = NO_CLIPPING
        for keyword in ("clipvalue", "clipnorm", "global_clipnorm"):
            setattr(self, keyword, kwargs.get(keyword))
        complex_mode = kwargs.get("complex_mode", COMPLEX_MODES[0])
        if complex_mode not in COMPLEX_MODES:
            rule = f"must be one of {', '.join(COMPLEX_MODES)}"
            raise ArgumentValueError("complex_mode", rule, repr(complex_mode), "pass one of them")
        self._slots = Slots(complex_mode)
        self._controller = Controller(self._slots, self._name)

    # Stepping.

    def apply_gradients(self, grads_and_vars: Iterable[Any], name: str | None = None) -> int:
        """Update variables by their gradients, in place.

        Everything is enqueued on the current stream; the host does not wait for the device.

        Args:
            grads_and_vars: (gradient, variable) pairs. A variable is a Variable, or a writeable C-contiguous array of a
                device (NumPy, CuPy, or anything with DLPack or an array interface), which is recognised again by its
                memory. A gradient has its variable's shape, dtype and device, or is an IndexedSlices, or None: then its
                variable stays as it is, with a UserWarning. A variable that comes twice is updated twice, in order,
                with the same t.
            name: ignored, for compatibility with Keras.

        Returns:
            The steps done, this one included.

        Raises:
            ArgumentTypeError: no pairs, or not of arrays.
            ArgumentValueError: no gradients at all; a shape, dtype or device that does not fit; variables that overlap;
                a hyperparameter's value outside its range.
            SparseIndexError: on the host, an index outside its variable. (On CUDA see `check_errors`.)
            Whatever it raises, nothing has changed.
        """
        if current_tracer.get() is not None:
            rule = "must not be called while a loss is being differentiated"
            raise ArgumentValueError("apply_gradients", rule, "a call inside the loss", "move it behind the loss")
        return self._controller.step(grads_and_vars, self._hyper, amsgrad=bool(self.amsgrad), clip=self._clip)

    def minimize(
        self,
        loss: Callable[[], Any] | None,
        var_list: Any,
        grad_loss: Any = None,
        name: str | None = None,
        *,
        grad_fn: Callable[[], Sequence[Any]] | None = None,
    ) -> int:
        """Differentiate a loss and update variables by its gradients.

        Args:
            loss: a function without arguments that computes with variables by NumPy or CuPy calls, or by PyTorch's or
                JAX's; called once. What it returns is summed.
            var_list: a Variable, any nesting of lists, tuples and dicts of them, or a function that returns such and is
                called after the loss.
            grad_loss: multiplies the gradient: a number, or an array of the loss's shape; None is 1. Not with
                `grad_fn`.
            name: ignored, for compatibility with Keras.
            grad_fn: a function without arguments that returns the gradients of the variables in their order, computed
                by other means; then the loss is not called and may be None.

        Returns:
            The steps done, this one included.

        Raises:
            ArgumentTypeError: the loss is not callable, or returns no numbers; `grad_fn` is not, or returns no list.
            ArgumentValueError: as `apply_gradients`; something else than Variables in `var_list`; no variable that the
                loss depends on. Nothing has changed then.
            NotImplementedError: the loss uses an operation whose derivative is not known.
        """
        if grad_fn is None:
            _, pairs = _autodiff().gradients(loss, var_list, grad_loss)
        else:
            gradients = _given_gradients(grad_fn, grad_loss)
            variables = _autodiff().flatten(var_list() if callable(var_list) else var_list)
            if len(gradients) != len(variables):
                rule = f"must return one gradient for each of the {len(variables)} variables"
                raise ArgumentValueError("grad_fn", rule, len(gradients), "return None where there is no gradient")
            pairs = list(zip(gradients, variables, strict=True))
        return self.apply_gradients(pairs, name)

    def get_gradients(self, loss: Callable[[], Any], params: Any) -> list[Any]:
        """The gradients of a loss, unclipped, in the order of the variables; no state changes.

        Args:
            loss: as for `minimize`.
            params: as `var_list` of `minimize`.

        Raises:
            ArgumentValueError: the loss does not depend on one of the variables.
            And as `minimize`.
        """
        return [gradient for gradient, _ in _all_gradients(loss, params)]

    def get_updates(self, loss: Callable[[], Any], params: Any) -> list[int]:
        """Differentiate a loss and update every variable: a list of the one result of `apply_gradients`.

        Raises:
            As `get_gradients` and `apply_gradients`.
        """
        return [self.apply_gradients(_all_gradients(loss, params))]

    def build(self, var_list: Iterable[Any]) -> None:
        """Create the slots of variables ahead of their first step, so that `set_weights` and `load` fit.

        Args:
            var_list: variables as in `apply_gradients`, or one Variable.

        Raises:
            ArgumentTypeError, ArgumentValueError: what is no variable, or cannot be updated; nothing has changed then.
        """
        self._controller.build([var_list] if isinstance(var_list, Variable) else var_list, amsgrad=bool(self.amsgrad))

    def synchronize(self) -> None:
        """Wait until all steps are done."""
        for device in {weight.device for weight in self._slots.weights}:
            device.synchronize()

    def check_errors(self) -> None:
        """Wait for the device and raise what it could not say earlier.

        Raises:
            SparseIndexError: on CUDA, an index outside its variable since the last check; such rows were left out.
        """
        self._controller.check_errors()

    # Hyperparameters: each reads as its present value and may be assigned at any time.

    @property
    def name(self) -> str:
        """The optimizer's name."""
        return self._name

    learning_rate = Hyperparameter(
        "learning_rate",
        "The learning rate: a float, the schedule, the 0-d array or variable, or what a callable returns now.",
    )
    lr = Hyperparameter("learning_rate", "Another name of learning_rate.")
    beta_1 = Hyperparameter("beta_1", "Decay of the mean of gradients, in [0, 1).")
    beta_2 = Hyperparameter("beta_2", "Decay of the mean of squared gradients, in [0, 1).")
    epsilon = Hyperparameter("epsilon", "Added to the root of v, >= 0. Assigned here, 0 is 0.")
    decay = Hyperparameter("decay", "The learning rate is divided by 1 + decay (t - 1); >= 0.")
    clipvalue = Bound("clipvalue", "Bound of every gradient element's absolute value, > 0, or None.")
    clipnorm = Bound("clipnorm", "Bound of each gradient's L2 norm, > 0, or None. Applied after clipvalue.")
    global_clipnorm = Bound(
        "global_clipnorm", "Bound of the L2 norm over all gradients of a step, > 0, or None. Applied after clipvalue."
    )

    @property
    def complex_mode(self) -> str:
        """How complex variables are updated: "abs2" or "real_imag"."""
        return self._slots.complex_mode

    # State.

    @property
    def iterations(self) -> Variable:
        """The counter of steps done, an int64 Variable on the host. Assigning an int sets it."""
        return self._slots.iterations(self._name)

    @iterations.setter
    def iterations(self, value: Any) -> None:
        if isinstance(value, Variable):
            self._slots.adopt_iterations(value)
            return
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ArgumentTypeError(
                "iterations", "must be an int", type(value).__name__, "pass the number of steps done"
            )
        if value < 0:
            raise ArgumentValueError("iterations", "must be >= 0", value, "pass the number of steps done")
        self.iterations.assign(np.int64(value))

    @property
    def weights(self) -> list[Variable]:
        """The live list of iterations and slots, in order of creation."""
        return self._slots.weights

    def variables(self) -> list[Variable]:
        """The same list as `weights`."""
        return self._slots.weights

    def get_slot_names(self) -> list[str]:
        """Names of the slots in order of first creation."""
        return self._slots.names

    def get_slot(self, var: Any, slot_name: str) -> Variable:
        """The slot of a variable.

        Raises:
            SlotNotFoundError: the variable has no such slot.
            ArgumentTypeError: `var` is no variable.
        """
        return self._slots.get(self._controller.registry.find(var, "var"), slot_name)

    def add_slot(self, var: Any, slot_name: str, initializer: Any = "zeros") -> Variable:
        """Create a slot of a variable, or return it where it exists.

        Args:
            var: the variable.
            slot_name: "m", "v" and "vhat" are what steps use; others are the caller's.
            initializer: "zeros", "ones", a callable(shape=, dtype=) or the value itself.

        Raises:
            ArgumentTypeError, ArgumentValueError: what is no variable, or no initializer.
        """
        variable = self._controller.registry.find(var, "var")
        return self._slots.add(variable, slot_name, initializer, f"{self._name}/{variable.name}/{slot_name}")

    def add_weight(
        self,
        name: str,
        shape: Any,
        dtype: Any = None,
        initializer: Any = "zeros",
        trainable: bool | None = None,
        synchronization: str = "auto",
        aggregation: str = "none",
    ) -> Variable:
        """Create a variable on the default device; it is not part of `weights`.

        Args:
            name: its name.
            shape: an int or a tuple.
            dtype: default float32.
            initializer: as in `add_slot`; a value must have that shape.
            trainable: default True, with synchronization "on_read" False.
            synchronization: "auto", "none", "on_write" or "on_read": TensorFlow's, only "on_read" has a meaning here.
            aggregation: ignored, for compatibility with Keras.

        Raises:
            ArgumentValueError: "on_read" for a trainable variable; another shape.
        """
        on_read = str(synchronization).lower().endswith("on_read")
        if on_read and trainable:
            rule = "must be 'auto', 'none' or 'on_write' for a trainable variable"
            raise ArgumentValueError("synchronization", rule, synchronization, "pass trainable=False")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        array = initialized(initializer, shape, as_dtype("float32" if dtype is None else dtype), find_device(None))
        if tuple(array.shape) != shape:
            raise ArgumentValueError("initializer", f"must give shape {shape}", tuple(array.shape), "reshape it")
        return Variable.over(array, find_device(None), name, not on_read if trainable is None else bool(trainable))

    def get_weights(self) -> list[Any]:
        """NumPy copies of `weights`, the first a np.int64. Waits for the device; raises as `check_errors`."""
        self.check_errors()
        return [weight.numpy()[()] for weight in self.weights]

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Overwrite `weights` by arrays of the same shapes, cast to their dtypes.

        Args:
            weights: as many arrays as there are weights, in their order: see `build`. The list of an AMSGrad optimizer
                (3n + 1 arrays for n variables) also fits the same optimizer without AMSGrad.

        Raises:
            ArgumentValueError: another number of arrays or other shapes; nothing has changed then.
        """
        arrays, slots = list(weights), self.weights
        variables = self._slots.variable_count
        if len(slots) == 2 * variables + 1 and len(arrays) == 3 * variables + 1:
            arrays = arrays[: len(slots)]
        if len(arrays) != len(slots):
            rule = f"must hold {len(slots)} arrays for optimizer {self._name!r}"
            raise ArgumentValueError(
                "weights", rule, f"{len(arrays)}", "call build(variables) first, or pass the full list"
            )
        for number, (array, slot) in enumerate(zip(arrays, slots, strict=True)):
            try:
                dtype = getattr(array, "dtype", None) or np.asarray(array).dtype
            except ValueError:  # a ragged list
                dtype = np.dtype(object)
            if dtype.kind in "OSUMm":
                what = f"{type(array).__name__} of {dtype}"
                raise ArgumentTypeError(
                    f"weights[{number}]", "must consist of numbers", what, "pass get_weights()'s arrays"
                )
            shape = tuple(np.shape(array))
            if shape != slot.shape:
                rule = f"must have shape {slot.shape} for {slot.name!r}"
                raise ArgumentValueError(
                    f"weights[{number}]", rule, shape, "pass the arrays in the order of get_weights()"
                )
        for array, slot in zip(arrays, slots, strict=True):
            slot.assign(array)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write iterations, slots and configuration to one `.npz` file, replaced atomically.

        Raises:
            OSError: the file system refuses.
            SparseIndexError: as `check_errors`.
        """
        names = [weight.name for weight in self.weights]
        arrays = {f"weights/{n}": np.asarray(array) for n, array in enumerate(self.get_weights())}
        checkpoint.write(path, arrays, {"kind": "Adam", "names": names, "config": self.get_config()})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read iterations and slots that `save` wrote; the slots must exist: see `build`.

        Hyperparameters stay as they are. ``gpu_adam.checkpoint.read(path)[1]["config"]`` is the saved configuration.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: no checkpoint of Adam, or of other variables; nothing has changed then.
        """
        arrays, meta = checkpoint.read(path)
        if meta.get("kind") != "Adam":
            raise CheckpointError(str(path), "must be written by Adam.save", meta.get("kind"), "pass another file")
        names = [weight.name for weight in self.weights] or "none: no variable is known yet"
        if meta["names"] != names:
            rule = f"must hold this optimizer's weights {names}"
            raise CheckpointError(
                str(path), rule, meta["names"], "call build(variables) with the same variables, in order"
            )
        try:
            self.set_weights([arrays[f"weights/{n}"] for n in range(len(names))])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(str(path), "must fit this optimizer", error, "pass its own checkpoint") from error

    # Configuration.

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-serialisable values; a callable counts as what it returns now."""
        clips = {"clipnorm": self.clipnorm, "clipvalue": self.clipvalue, "global_clipnorm": self.global_clipnorm}
        return {
            "name": self._name,
            **{name: bound for name, bound in clips.items() if bound is not None},
            **{
                name: _serialized(name, self._hyper[name])
                for name in ("learning_rate", "decay", "beta_1", "beta_2", "epsilon")
            },
            "amsgrad": bool(self.amsgrad),
            **({} if self.complex_mode == COMPLEX_MODES[0] else {"complex_mode": self.complex_mode}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Adam:
        """An optimizer with this configuration, without its state. The config is left as it is.

        Args:
            config: what `get_config` returns.
            custom_objects: schedule classes of the caller's own, by name.

        Raises:
            ArgumentTypeError, ArgumentValueError: as the constructor; a schedule of unknown name.
        """
        arguments = dict(config)
        if "lr" in arguments:
            arguments["learning_rate"] = arguments.pop("lr")
        if isinstance(arguments.get("learning_rate"), Mapping):
            arguments["learning_rate"] = schedules.deserialize(arguments["learning_rate"], custom_objects)
        return cls(**arguments)

    # Copies.

    def __deepcopy__(self, memo: dict[int, Any]) -> Adam:
        """An optimizer with slots of its own, bound to the same variables."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(self.__dict__)
        new._hyper = dict(self._hyper)
        new._slots = self._slots.copied(memo)
        new._controller = Controller(new._slots, self._name)
        new._controller.registry = self._controller.registry.copied()
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        controller = state.pop("_controller")
        return {**state, "registry": controller.registry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        registry = state.pop("registry")
        self.__dict__.update(state)
        self._controller = Controller(self._slots, self._name)
        self._controller.registry = registry


def _autodiff() -> Any:
    """The package of derivatives, imported with the first loss: a process that brings its gradients starts faster."""
    return importlib.import_module("gpu_adam.autodiff")


def _given_gradients(grad_fn: Any, grad_loss: Any) -> list[Any]:
    """What `grad_fn` returns, checked to be a list or tuple: an array is one gradient, not one for each of its rows."""
    if not callable(grad_fn):
        got = type(grad_fn).__name__
        raise ArgumentTypeError("grad_fn", "must be a callable without arguments", got, "pass a function")
    if grad_loss is not None:
        rule = "must be left out together with grad_fn"
        raise ArgumentValueError("grad_loss", rule, type(grad_loss).__name__, "multiply the gradients by it yourself")
    gradients = grad_fn()
    if not isinstance(gradients, (list, tuple)):
        got = type(gradients).__name__
        raise ArgumentTypeError("grad_fn()", "must return a list or tuple of gradients", got, "return them in a list")
    return list(gradients)


def _all_gradients(loss: Callable[[], Any], params: Any) -> list[tuple[Any, Variable]]:
    """(gradient, variable) pairs; raises where a variable has no gradient."""
    _, pairs = _autodiff().gradients(loss, params)
    without = [variable.name for gradient, variable in pairs if gradient is None]
    if without:
        rule = "must be differentiable with respect to every variable"
        raise ArgumentValueError("loss", rule, f"no gradient for {without}", "leave those variables out of params")
    return list(pairs)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and value == 0


def _serialized(name: str, value: Any) -> Any:
    if isinstance(value, LearningRateSchedule):
        return schedules.serialize(value)
    return value if type(value) is float else evaluated(name, value)
