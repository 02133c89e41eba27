"""States of Keras: the arrays that optimizers of Keras 3 save, and the weight lists of tf.keras.

Both mean what slots mean here, with ``epsilon_form="hat"``, the default. Complex variables have no counterpart: g² is
not |g|². A state says neither which optimizer of Keras it is of nor which array is which: that follows from their order
alone. One with gradient_accumulation_steps, whose sums lie among them, must not be imported.

References:
    https://github.com/keras-team/keras/blob/v3.15.0/keras/src/optimizers/base_optimizer.py (`save_own_variables`)
    https://github.com/tensorflow/tensorflow/blob/r2.0/tensorflow/python/keras/optimizer_v2/adam.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np

from gpu_adam.adam import Adam
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.interop.exchange import HAT, NOT_KEPT, Convention, Exchange, Given, check_count, learning_rate
from gpu_adam.kernels import dtype_named
from gpu_adam.schedules import LearningRateSchedule

_SETTINGS: dict[str, tuple[Any, str]] = {**NOT_KEPT, "epsilon_form": HAT, "maximize": (False, "only minimizes")}
_LEGACY = Convention("tf.keras.optimizers.Adam", None, _SETTINGS)
_KERAS = Convention("keras.optimizers.Adam", None, {name: _SETTINGS[name] for name in _SETTINGS if name != "use_ema"})


@overload
def export_state(adam: Adam, variables: Sequence[Any], *, legacy: Literal[False] = False) -> dict[str, Any]: ...
@overload
def export_state(adam: Adam, variables: Sequence[Any], *, legacy: Literal[True]) -> list[Any]: ...
def export_state(adam: Adam, variables: Sequence[Any], *, legacy: bool = False) -> dict[str, Any] | list[Any]:
    """The state as Keras takes it.

    Keras casts the arrays to the dtypes of its own, those of its variables. With a schedule as learning rate there is
    no array for it, as in Keras, which refuses another number of arrays than it has, with a warning alone. ::

        optimizer.load_own_variables(export_state(adam, variables))  # after optimizer.build
        file.create_group("optimizer/vars").update(export_state(adam, variables))  # an h5py.File

    Args:
        adam: with ``epsilon_form="hat"``; it is not changed. Waits for the device.
        variables: all its variables, in the order of Keras's.
        legacy: whether for tf.keras.

    Returns:
        Keras 3: {"0": iterations, "1": the learning rate of the next step, ...}, then with ``use_ema`` every average,
        m and v of each variable, and with AMSGrad every vhat; those of bfloat16 as float32. tf.keras: [iterations,
        every m, every v, every vhat].

    Raises:
        ArgumentTypeError, ArgumentValueError, SlotNotFoundError: as `exchange.Exchange`.
    """
    exchange = Exchange(adam, variables, _LEGACY if legacy else _KERAS)
    iterations, arrays = exchange.export()
    listed: list[Any] = [np.asarray(iterations, np.int64)]
    if not (legacy or isinstance(adam.learning_rate, LearningRateSchedule)):
        listed.append(np.asarray(learning_rate(adam), np.float32))
    listed += [arrays[slot][place] for slot, place in _order(arrays, len(exchange.variables), legacy)]
    return listed if legacy else {str(number): _storable(array) for number, array in enumerate(listed)}


def import_state(adam: Adam, state: Mapping[str, Any] | Sequence[Any], variables: Sequence[Any]) -> None:
    """Go on from a state of Keras; hyperparameters, the learning rate among them, stay as they are.

    In memory, and from a file, with h5py::

        optimizer.save_own_variables(store := {})
        import_state(adam, store, variables)
        import_state(adam, file["optimizer/vars"], variables)  # file: an h5py.File of .weights.h5

    Args:
        adam: with ``epsilon_form="hat"``, and the amsgrad and use_ema of Keras's; `build` has made its slots.
        state: a mapping as Keras 3 saves it, with or without a learning rate, which may be a group of an HDF5 file; or
            the list that `get_weights` of tf.keras returns.
        variables: all variables of `adam`, in the order of Keras's.

    Raises:
        ArgumentTypeError, ArgumentValueError, SlotNotFoundError: as `exchange.Exchange`; another number of arrays,
            other shapes or wider dtypes; averages before the first step, which Keras begins with the variables after
            it, and `Adam` before. Nothing has changed then.
    """
    legacy = not isinstance(state, Mapping)
    exchange = Exchange(adam, variables, _LEGACY if legacy else _KERAS)
    if legacy and not isinstance(state, (list, tuple)):
        rule, remedy = "must be a mapping of Keras 3, or a list of tf.keras", "pass what save_own_variables stored"
        raise ArgumentTypeError("state", rule, type(state).__name__, remedy)
    given = _listed(state)
    order = _order(exchange.slots, len(exchange.variables), legacy)
    remedy = "pass all variables, and construct the optimizer with the amsgrad and use_ema of Keras's"
    check_count("state", len(given), [len(order) + before for before in ((1,) if legacy else (1, 2))], remedy)
    if "average" in exchange.slots and int(given[0].value[()]) == 0:
        rule = "must be > 0 with use_ema, as averages begin before the first step here, and in Keras after it"
        raise ArgumentValueError(given[0].argument, rule, 0, "leave it out: a new optimizer begins anew")
    arrays: dict[str, list[Given]] = {slot: [] for slot in exchange.slots}
    for (slot, _), each in zip(order, given[len(given) - len(order) :], strict=True):
        arrays[slot].append(each)
    exchange.restore(given[0], arrays)


def _order(slots: Collection[str], count: int, legacy: bool) -> list[tuple[str, int]]:
    """Which slot of which variable Keras's arrays are, after iterations and learning rate."""
    blocks = (("m",), ("v",), ("vhat",)) if legacy else (("average",), ("m", "v"), ("vhat",))
    return [(slot, place) for block in blocks for place in range(count) for slot in block if slot in slots]


def _listed(state: Mapping[str, Any] | Sequence[Any]) -> list[Given]:
    """The arrays of a state in order."""
    if not isinstance(state, Mapping):
        return [Given(f"state[{number}]", value) for number, value in enumerate(state)]
    names = [str(number) for number in range(len(state))]
    missing = next((name for name in names if name not in state), None)
    if missing is not None:
        rule, remedy = "must have the keys '0', '1', ...", "pass the group optimizer/vars of a file"
        raise ArgumentValueError("state", rule, f"no {missing!r}", remedy)
    return [Given(f"state[{name!r}]", _stored(state[name])) for name in names]


def _storable(array: np.ndarray) -> np.ndarray:
    """An array as HDF5 takes it, which would make raw bytes of bfloat16: as float32, which holds the same numbers."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _stored(value: Any) -> Any:
    """An array of a store; Keras puts bfloat16 into HDF5 as raw bytes, and says so in an attribute."""
    if getattr(value, "attrs", {}).get("dtype") == "bfloat16":
        return np.asarray(value).view(dtype_named("bfloat16"))
    return np.asarray(value)
