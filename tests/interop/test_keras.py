"""States of Keras 3, in memory and in a file, and of tf.keras, as recorded: the same bits, and the same next step.

Keras computes with NumPy here, in which it has no float64.
"""

from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
from test_golden import CASES, Replay, is_exact

import gpu_adam
from gpu_adam import ArgumentTypeError, ArgumentValueError, CosineDecay
from gpu_adam.devices import Device
from gpu_adam.interop.keras import export_state, import_state

from . import cases

# Keras 3.15's own variables, under NumPy 2.5.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "averages": {"use_ema": True, "ema_momentum": 0.75},
    "amsgrad, averages, decay": {"amsgrad": True, "use_ema": True, "ema_momentum": 0.75, "weight_decay": 0.25},
}
NAMES = {"m": "momentum", "v": "velocity", "vhat": "velocity_hat", "average": "average"}


class Theirs:
    """An optimizer of Keras that has made no step, and its variables."""

    def __init__(self, keras: Any, values: cases.Arrays, rate: Any = cases.LR, **config: Any) -> None:
        self.optimizer = keras.optimizers.Adam(rate, epsilon=2.0**-20, **cases.EXACT, **config)
        names = cases.SHAPES
        self.variables = [keras.Variable(x, name=n, dtype=str(x.dtype)) for x, n in zip(values, names, strict=True)]
        self.optimizer.build(self.variables)

    def step_on(self, grads: cases.Arrays) -> None:
        """Make a step."""
        self.optimizer.apply_gradients(list(zip(grads, self.variables, strict=True)))

    def values(self) -> cases.Arrays:
        """The variables."""
        return [np.array(variable.value) for variable in self.variables]

    def slots(self, name: str) -> cases.Arrays:
        """Keras's arrays for the slots of a name here."""
        by_name = {variable.name: np.array(variable.value) for variable in self.optimizer.variables}
        return [by_name[f"{variable}_{NAMES[name]}"] for variable in cases.SHAPES]


def stepped(keras: Any, **config: Any) -> Theirs:
    theirs = Theirs(keras, cases.arrays(0), **config)
    for step in range(cases.STEPS):
        theirs.step_on(cases.gradients(step))
    return theirs


def assert_same_state(adam: Any, variables: list[Any], theirs: Theirs) -> None:
    assert int(theirs.optimizer.iterations) == adam.iterations
    assert len(adam.get_slot_names()) == len(adam.weights) // len(variables)
    for name in adam.get_slot_names():
        cases.assert_same(theirs.slots(name), cases.slots(adam, variables, name))


def assert_same_next_step(adam: Any, variables: list[Any], theirs: Theirs) -> None:
    before, grads = theirs.values(), cases.gradients(50)
    cases.assert_same([v.numpy() for v in variables], before)
    theirs.step_on(grads)
    cases.step_on(adam, variables, grads)
    cases.assert_near([v.numpy() for v in variables], theirs.values(), before)
    for name in adam.get_slot_names():
        near = cases.assert_slots_near if name != "average" else cases.assert_near
        near(cases.slots(adam, variables, name), theirs.slots(name), before if name == "average" else grads)


@pytest.mark.parametrize("choice", CHOICES)
def test_to_keras(keras: Any, device: Device, choice: str) -> None:
    adam, variables = cases.stepped(**CHOICES[choice])
    theirs = Theirs(keras, [v.numpy() for v in variables], 0.5, **CHOICES[choice])
    theirs.optimizer.load_own_variables(export_state(adam, variables))
    assert float(theirs.optimizer.learning_rate) == cases.LR, "Keras's state has it, and so it comes along"
    assert_same_state(adam, variables, theirs)
    assert_same_next_step(adam, variables, theirs)


@pytest.mark.parametrize("choice", CHOICES)
def test_from_keras(keras: Any, device: Device, choice: str) -> None:
    theirs, store = stepped(keras, **CHOICES[choice]), dict[str, Any]()
    theirs.optimizer.save_own_variables(store)
    adam, variables = cases.built(values=theirs.values(), **CHOICES[choice])
    import_state(adam, store, variables)
    assert adam.iterations == cases.STEPS
    assert_same_state(adam, variables, theirs)
    assert_same_next_step(adam, variables, theirs)


def test_a_learning_rate_that_is_a_schedule_is_no_array(keras: Any) -> None:
    theirs, store = stepped(keras, rate=keras.optimizers.schedules.CosineDecay(0.1, 100)), dict[str, Any]()
    theirs.optimizer.save_own_variables(store)
    adam, variables = cases.built(values=theirs.values())
    import_state(adam, store, variables)
    assert_same_state(adam, variables, theirs)
    adam.learning_rate = CosineDecay(0.1, 100)
    cases.assert_same(list(export_state(adam, variables).values())[1:], list(store.values())[1:])
    theirs.optimizer.load_own_variables(export_state(adam, variables))
    assert_same_next_step(adam, variables, theirs)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_files_of_keras(keras: Any, dtype: str, tmp_path: Path) -> None:
    """What a model saves, with its optimizer: both ways, and from the dtypes of its variables into the slots'."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (extra: peers)")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype=dtype)])
    model.compile(optimizer=keras.optimizers.Adam(**cases.EXACT), loss="mse")
    model.optimizer.build(model.trainable_variables)
    grads = [np.full(v.shape, 1 + n) for n, v in enumerate(model.trainable_variables)]
    for _ in range(3):
        model.optimizer.apply_gradients(list(zip(grads, model.trainable_variables, strict=True)))
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)

    variables = [gpu_adam.Variable(np.array(v.value)) for v in model.trainable_variables]
    adam = gpu_adam.Adam()
    adam.build(variables)
    with h5py.File(path) as file:
        import_state(adam, file["optimizer/vars"], variables)
    assert adam.iterations == 3
    saved = [np.array(v.value).astype(np.float32) for v in model.optimizer.variables[2:]]
    cases.assert_same([adam.get_slot(v, slot).numpy() for v in variables for slot in ("m", "v")], saved)

    cases.step_on(adam, variables, [np.asarray(g, np.float32) for g in grads])
    with h5py.File(path, "a") as file:
        del file["optimizer/vars"]
        file.create_group("optimizer/vars").update(export_state(adam, variables))
    model.load_weights(path)
    assert int(model.optimizer.iterations) == 4
    assert {str(v.dtype) for v in model.optimizer.variables[2:]} == {dtype}
    rounded = [adam.get_slot(v, slot).numpy().astype(np.array(v.value).dtype) for v in variables for slot in ("m", "v")]
    cases.assert_same([np.array(v.value) for v in model.optimizer.variables[2:]], rounded)


def test_slots_of_bfloat16_are_stored_as_float32(keras: Any, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (extra: peers)")
    adam, variables = cases.stepped(slot_dtype="bfloat16")
    theirs = Theirs(keras, cases.arrays(0))
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file.update(export_state(adam, variables))
        theirs.optimizer.load_own_variables(file)
    for name in ("m", "v"):
        cases.assert_same(theirs.slots(name), [x.astype(np.float32) for x in cases.slots(adam, variables, name)])


def test_states_of_keras_that_have_no_counterpart(keras: Any) -> None:
    theirs, good = stepped(keras), dict[str, Any]()
    theirs.optimizer.save_own_variables(good)
    adam, variables = cases.stepped()
    before = adam.get_weights()
    wrong: list[tuple[Any, type[Exception], str]] = [
        (dict(list(good.items())[:-2]), ArgumentValueError, "state must hold 7 or 8 for these variables"),
        ({**good, "8": 0, "9": 0, "10": 0}, ArgumentValueError, "with the amsgrad and use_ema of Keras's"),
        ({f"vars/{n}": x for n, x in good.items()}, ArgumentValueError, "must have the keys '0', '1'.*no '0'"),
        ({**good, "0": np.float32(0.5)}, ArgumentValueError, r"state\['0'\] must be a whole number"),
        ({**good, "2": np.float64(1)}, ArgumentValueError, r"state\['2'\] must fit into float32 .*without loss"),
        ({**good, "5": good["2"]}, ArgumentValueError, r"state\['5'\] must have shape \(7,\)"),
        ("optimizer/vars", ArgumentTypeError, "must be a mapping of Keras 3, or a list"),
        (None, ArgumentTypeError, "must be a mapping"),
    ]
    for state, error, message in wrong:
        with pytest.raises(error, match=message):
            import_state(adam, state, variables)
        cases.assert_same(adam.get_weights(), before)


def test_averages_before_the_first_step(keras: Any) -> None:
    store = dict[str, Any]()
    Theirs(keras, cases.arrays(0), use_ema=True).optimizer.save_own_variables(store)
    adam, variables = cases.built(use_ema=True)
    with pytest.raises(ArgumentValueError, match=r"state\['0'\] must be > 0 with use_ema"):
        import_state(adam, store, variables)


RECORDED = [case for case in CASES if is_exact(case[0]) and "events" not in case[0] and len(case[0]["checkpoints"]) > 1]


def test_there_are_recorded_cases() -> None:
    assert len(RECORDED) >= 10
    assert any(case["config"].get("amsgrad") for case, *_ in RECORDED)


@pytest.mark.parametrize("recorded", RECORDED, ids=[case["name"] for case, *_ in RECORDED])
def test_recorded_weights_of_tensorflow(recorded: Any, device: Device) -> None:
    """From its weights and variables in the middle of a recording on to its end, as if the steps had been made here."""
    case, inputs, first, later = recorded
    outputs: golden.Arrays = first if later is None else later
    middle, end = case["checkpoints"][-2:]
    if end - middle > 20 and getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: so many steps take minutes where kernels are interpreted")
    weights = [outputs[f"w/{middle}/{number}"] for number in range(len(case["weight_names"]))]
    replay = Replay(case, inputs, device)
    adam, variables = replay.optimizer, replay.variables
    adam.build(variables)
    import_state(adam, weights, variables)
    cases.assert_same(export_state(adam, variables, legacy=True), weights)
    cases.assert_same(adam.get_weights(), weights)
    for number, variable in enumerate(variables):
        variable.assign(outputs[f"v/{middle}/{number}"])
    replay.done = middle
    while replay.done < end:
        replay.step()
    expected = [outputs[f"w/{end}/{number}"] for number in range(len(weights))]
    cases.assert_same(export_state(adam, variables, legacy=True), expected)


def test_lists_of_tensorflow_that_do_not_fit() -> None:
    adam, variables = cases.stepped()
    good = export_state(adam, variables, legacy=True)
    before = adam.get_weights()
    for state in (good[:-1], [*good, *good[-3:]], []):
        with pytest.raises(ArgumentValueError, match="state must hold 7 for these variables"):
            import_state(adam, state, variables)
    with pytest.raises(ArgumentValueError, match=r"state\[3\] must have shape \(3, 5\)"):
        import_state(adam, [good[0], good[1], good[2], good[2], *good[4:]], variables)
    cases.assert_same(adam.get_weights(), before)


def test_complex_variables_have_no_counterpart() -> None:
    adam, variables = cases.stepped(np.complex64)
    with pytest.raises(ArgumentValueError, match=r"must be real, as keras.optimizers.Adam updates complex ones"):
        export_state(adam, variables)
