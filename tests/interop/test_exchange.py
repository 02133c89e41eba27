"""What every exchange asks of an optimizer and of its variables, and libraries that are not there."""

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gpu_adam import (
    Adam,
    ArgumentTypeError,
    ArgumentValueError,
    DeviceError,
    GpuAdamError,
    LossScale,
    SlotNotFoundError,
    Variable,
)
from gpu_adam.devices import Device
from gpu_adam.interop import keras, optax, torch

from . import cases

PAPER: dict[str, Any] = {"epsilon_form": "paper", "complex_mode": "real_imag"}
UNSHARED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "hat for torch": (
        torch,
        {},
        "epsilon_form='paper', as torch.optim.Adam adds epsilon .*bias-corrected v .got 'hat'",
    ),
    "hat for Optax": (optax, {}, "epsilon_form='paper', as optax.adam adds epsilon .*bias-corrected v .got 'hat'"),
    "paper for Keras": (keras, {"epsilon_form": "paper"}, "epsilon_form='hat', as keras.optimizers.Adam adds"),
    "averages for torch": (torch, {**PAPER, "use_ema": True}, "use_ema=False, as torch.optim.Adam keeps no averages"),
    "averages for Optax": (optax, {**PAPER, "use_ema": True}, "use_ema=False, as optax.adam keeps no averages"),
    "masters": (torch, {**PAPER, "master_weights": True}, "master_weights=False, as .* keeps no masters"),
    "masters for Keras": (keras, {"master_weights": True}, "master_weights=False, as .* keeps no masters"),
    "a loss scale": (keras, {"loss_scale": LossScale()}, "loss_scale=None, as .* keeps no loss scale"),
    "maximize for Keras": (keras, {"maximize": True}, "maximize=False, as keras.optimizers.Adam only minimizes"),
    "maximize for Optax": (optax, {**PAPER, "maximize": True}, "maximize=False, as optax.adam only minimizes"),
}


def both(library: ModuleType, adam: Any, variables: Any) -> list[Callable[[], object]]:
    """The two calls, for a state that is not looked at."""
    if library is optax:
        pytest.importorskip("jax", reason="JAX is not installed (extra: jax)")
        pytest.importorskip("optax", reason="Optax is not installed (extra: peers)")
    return [
        lambda: library.export_state(adam, variables),
        lambda: library.import_state(adam, {}, variables),
    ]


@pytest.mark.parametrize("case", UNSHARED)
def test_what_a_library_does_not_keep(case: str) -> None:
    library, config, message = UNSHARED[case]
    adam, variables = cases.stepped("float16" if "master_weights" in config else "float32", **config)
    for call in both(library, adam, variables):
        with pytest.raises(ArgumentValueError, match=f"adam must have {message}"):
            call()


LIBRARIES = pytest.mark.parametrize(("library", "config"), [(keras, {}), (torch, PAPER), (optax, PAPER)])


@LIBRARIES
def test_variables_that_are_not_all(library: ModuleType, config: dict[str, Any]) -> None:
    adam, variables = cases.stepped(**config)
    before = adam.get_weights()
    wrong: list[tuple[Any, type[Exception], str]] = [
        (variables[:2], ArgumentValueError, "must be all that the optimizer has slots for.*'Adam/kernel/m' besides"),
        ({"a": variables[0], "b": variables[0]}, ArgumentValueError, "must name each variable once"),
        ([*variables, Variable(1.0)], SlotNotFoundError, "call build"),
        (None, ArgumentTypeError, "variables must be"),
        ("scale", ArgumentTypeError, "variables must be"),
    ]
    for each, error, message in wrong:
        given = list(each.values()) if isinstance(each, dict) and library is not optax else each
        for call in both(library, adam, given):
            with pytest.raises(error, match=message):
                call()
    cases.assert_same(adam.get_weights(), before)
    adam.add_slot(variables[0], "note")
    for call in both(library, adam, variables):
        with pytest.raises(ArgumentValueError, match=r"none but m, v .got 'Adam/scale/note' besides"):
            call()


@LIBRARIES
def test_an_optimizer_without_slots_stays_so(library: ModuleType, config: dict[str, Any]) -> None:
    adam, variables = Adam(**config), [Variable(1.0)]
    for call in both(library, adam, variables):
        with pytest.raises(GpuAdamError, match="call build"):
            call()
    assert adam.weights == []
    for call in both(library, object(), variables):
        with pytest.raises(ArgumentTypeError, match=r"adam must be a gpu_adam.Adam .got object"):
            call()


def test_raw_arrays_are_variables_too(device: Device) -> None:
    arrays = [device.array(np.ones(3, np.float32)), device.array(np.ones(2, np.float32))]
    adam = Adam(0.5)
    adam.apply_gradients([(device.array(np.ones(len(array), np.float32)), array) for array in arrays])
    state = keras.export_state(adam, arrays)
    assert [array.shape for array in state.values()] == [(), (), (3,), (3,), (2,), (2,)]
    twin = Adam(0.5)
    twin.build(arrays[::-1])  # in which order the slots lie makes no difference
    keras.import_state(twin, state, arrays)
    for array in arrays:
        cases.assert_same([twin.get_slot(array, "m").numpy()], [adam.get_slot(array, "m").numpy()])


def test_an_import_copies(device: Device) -> None:
    """What a state holds afterwards, and the arrays of an optimizer's own state, are not the slots' memory."""
    adam, variables = cases.stepped()
    own = [adam.iterations, *(adam.get_slot(v, name) for name in ("v", "m") for v in variables)]
    expected = [weight.numpy() for weight in own]
    keras.import_state(adam, own, variables)  # m and v change places
    cases.assert_same(keras.export_state(adam, variables, legacy=True), expected)


@pytest.mark.parametrize(("name", "library"), [("torch", torch), ("optax", optax)])
def test_a_library_that_is_not_installed(name: str, library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    adam, variables = cases.stepped(epsilon_form="paper")
    if name == "optax":
        pytest.importorskip("jax", reason="JAX is not installed (extra: jax)")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match=f"a state for {name} needs the library .*install it: pip install"):
        library.export_state(adam, variables)


def test_no_library_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, gpu_adam\n"
        "assert 'gpu_adam.interop' not in sys.modules\n"
        "assert gpu_adam.interop.torch.export_state and gpu_adam.interop.optax.import_state\n"
        "assert not {'torch', 'jax', 'optax', 'keras', 'h5py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
