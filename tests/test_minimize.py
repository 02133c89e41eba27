"""Adam.minimize, get_gradients and get_updates: what they call, update and return, and that mistakes change nothing."""

import copy
import gc
import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_adam import Adam, ArgumentTypeError, ArgumentValueError, IndexedSlices, Variable
from gpu_adam.devices import Device


@pytest.fixture
def w(device: Device) -> Variable:
    return Variable(np.array([1.0, -2.0, 3.0]), name="w")


@pytest.fixture
def b(device: Device) -> Variable:
    return Variable(np.array(0.5), name="b")


def state(optimizer: Adam, *variables: Variable) -> list[Any]:
    """All that a step could change."""
    weights = [(weight.name, weight.numpy().tobytes()) for weight in optimizer.weights]
    return [weights, list(optimizer.get_slot_names()), [variable.numpy().tobytes() for variable in variables]]


def momentum(optimizer: Adam, variable: Variable) -> np.ndarray:
    """The gradient of the only step done, as it was applied: m = (1 - beta_1) g."""
    return optimizer.get_slot(variable, "m").numpy() / 0.1


# -- minimize
def test_minimize_is_apply_gradients_of_the_gradients(w: Variable, b: Variable) -> None:
    by_hand, optimizer = Adam(0.1), Adam(0.1)
    u, c = copy.deepcopy(w), copy.deepcopy(b)
    for step in range(1, 4):
        assert optimizer.minimize(lambda: np.sum(w * w) * b, [w, b]) == step
        by_hand.apply_gradients([(2 * u * c, u), (np.sum(u * u), c)])
    np.testing.assert_allclose(w.numpy(), u.numpy(), rtol=1e-14)
    np.testing.assert_allclose(b.numpy(), c.numpy(), rtol=1e-14)
    assert int(optimizer.iterations) == 3


def test_the_loss_is_called_once_per_step(w: Variable) -> None:
    calls: list[int] = []

    def loss() -> Any:
        calls.append(1)
        return np.sum(w)

    optimizer = Adam()
    optimizer.minimize(loss, w, name="ignored")
    assert len(calls) == 1
    optimizer.get_gradients(loss, [w])
    assert len(calls) == 2
    optimizer.get_updates(loss, [w])
    assert len(calls) == 3


@pytest.mark.parametrize("loss", [lambda w: w * w, lambda w: [np.sum(w[:2] ** 2), w[2] ** 2], lambda w: (w * w)[None]])
def test_losses_of_any_shape_are_summed(w: Variable, loss: Callable[[Variable], Any]) -> None:
    optimizer, slope = Adam(), 2 * w.numpy()
    optimizer.minimize(lambda: loss(w), [w])
    np.testing.assert_allclose(momentum(optimizer, w), slope)


@pytest.mark.parametrize(
    "form",
    [
        lambda w, b: [w, b],
        lambda w, b: (w, b),
        lambda w, b: [[w], (b,)],
        lambda w, b: {"y": w, "z": {"inner": [b]}},
        lambda w, b: once([w, b]),
    ],
)
def test_forms_of_var_list(w: Variable, b: Variable, form: Callable[..., Any]) -> None:
    optimizer = Adam()
    optimizer.minimize(lambda: np.sum(w) * b, form(w, b))
    assert momentum(optimizer, w).tolist() == pytest.approx([0.5] * 3)
    assert momentum(optimizer, b) == pytest.approx(2)
    assert [weight.name for weight in optimizer.weights[1:3]] == ["Adam/w/m", "Adam/b/m"]


def once(variables: list[Variable]) -> Callable[[], list[Variable]]:
    """A function that must not be called twice."""
    left = [variables]
    return left.pop


def test_a_single_variable(w: Variable) -> None:
    optimizer = Adam()
    optimizer.minimize(lambda: np.sum(w), w)
    assert momentum(optimizer, w).tolist() == pytest.approx([1, 1, 1])


def test_dicts_count_in_the_order_of_their_keys(w: Variable, b: Variable) -> None:
    optimizer = Adam()
    optimizer.minimize(lambda: np.sum(w) * b, {"z": w, "a": b})
    assert [weight.name for weight in optimizer.weights[1:3]] == ["Adam/b/m", "Adam/w/m"]


@pytest.mark.parametrize("method", ["minimize", "get_gradients", "get_updates"])
def test_a_callable_var_list_is_evaluated_after_the_loss(device: Device, method: str) -> None:
    made: list[Variable] = []

    def loss() -> Any:
        if not made:
            made.append(Variable(np.ones(2), name="made"))
        return np.sum(made[0] * 3)

    getattr(Adam(), method)(loss, lambda: made)
    assert len(made) == 1


def test_the_same_variable_twice_is_updated_twice(w: Variable) -> None:
    twice, u = Adam(), copy.deepcopy(w)
    twice.minimize(lambda: np.sum(w * w), [w, w])
    by_hand = Adam()
    gradient = 2 * u
    by_hand.apply_gradients([(gradient, u), (gradient, u)])
    assert int(twice.iterations) == 1
    np.testing.assert_array_equal(w.numpy(), u.numpy())


def test_grad_loss_multiplies(w: Variable, device: Device) -> None:
    start = w.numpy()
    for cotangent in (0.5, np.float32(0.5), device.array(np.array([1.0, 0.0, -2.0]))):
        optimizer, u = Adam(), copy.deepcopy(w)
        optimizer.minimize(lambda u=u: u * u, [u], grad_loss=cotangent)  # type: ignore[misc]
        factor = device.numpy(cotangent) if hasattr(cotangent, "shape") and cotangent.shape else cotangent
        np.testing.assert_allclose(momentum(optimizer, u), 2 * start * factor)


def test_variables_without_a_gradient_stay_with_a_warning(w: Variable, b: Variable) -> None:
    optimizer = Adam()
    with pytest.warns(UserWarning, match="no gradient for the variables.*'b'"):
        optimizer.minimize(lambda: np.sum(w), [w, b])
    assert b.numpy() == 0.5
    assert (w.numpy() != [1, -2, 3]).all()


# -- gradients by other means
def test_grad_fn_takes_the_place_of_the_loss(w: Variable, b: Variable, device: Device) -> None:
    def loss() -> Any:
        raise AssertionError("the loss must not be called")

    gradients = device.array(np.array([1.0, 2.0, 3.0])), device.array(np.array(4.0))
    for function in (loss, None):
        optimizer = Adam()
        optimizer.minimize(function, [w, b], grad_fn=lambda: gradients)
        np.testing.assert_allclose(momentum(optimizer, w), [1, 2, 3])
        np.testing.assert_allclose(momentum(optimizer, b), 4)


def test_grad_fn_may_leave_gradients_out_and_give_rows(w: Variable, b: Variable, device: Device) -> None:
    rows = IndexedSlices(device.array(np.array([5.0, 1.0])), device.array(np.array([2, 2])))
    optimizer = Adam()
    with pytest.warns(UserWarning, match="'b'"):
        optimizer.minimize(None, lambda: [w, b], grad_fn=lambda: [rows, None])
    np.testing.assert_allclose(momentum(optimizer, w), [0, 0, 6])


# -- get_gradients and get_updates
def test_get_gradients_changes_nothing(w: Variable, b: Variable, device: Device) -> None:
    optimizer = Adam(clipvalue=1e-3, global_clipnorm=1e-3)
    before = state(optimizer, w, b)
    found = optimizer.get_gradients(lambda: np.sum(w * w) * b, [w, b])
    assert [device.numpy(gradient).tolist() for gradient in found] == [[1, -2, 3], 14]
    assert state(optimizer, w, b) == before
    assert [device.numpy(gradient).tolist() for gradient in optimizer.get_gradients(lambda: np.sum(w), w)] == [
        [1, 1, 1]
    ]


@pytest.mark.parametrize(
    ("clip", "applied"),
    [
        ({"clipvalue": 2.0}, [2, -2, 2]),
        ({"clipnorm": 5.0}, [5 / np.sqrt(3), -5 / np.sqrt(3), 5 / np.sqrt(3)]),
        ({"global_clipnorm": 1.0}, [6 / 12, -6 / 12, 6 / 12]),
    ],
)
def test_minimize_and_get_updates_clip(device: Device, clip: dict[str, Any], applied: list[float]) -> None:
    for method in ("minimize", "get_updates"):
        w, u = (Variable(np.ones(3)) for _ in range(2))
        optimizer = Adam(**clip)
        sign = device.array(np.array([6.0, -6.0, 6.0]))
        # The second gradient only counts in the global norm: (3 * 36 + 36)^½ = 12.
        getattr(optimizer, method)(lambda w=w, u=u, sign=sign: np.sum(w * sign) + 6 * u[0], [w, u])
        np.testing.assert_allclose(momentum(optimizer, w), applied)


def test_get_updates_updates(w: Variable, b: Variable) -> None:
    u, c = copy.deepcopy(w), copy.deepcopy(b)
    one, other = Adam(), Adam()
    assert one.get_updates(lambda: np.sum(w * w) * b, [w, b]) == [1]
    assert one.get_updates(lambda: np.sum(w * w) * b, lambda: (w, b)) == [2]
    for _ in range(2):
        other.minimize(lambda: np.sum(u * u) * c, [u, c])
    assert state(one, w, b)[2] == state(other, u, c)[2]


# -- rows
def test_taken_rows_update_as_the_dense_gradient_does(device: Device) -> None:
    rows = device.array(np.array([3, 1, 3, 3]))
    factor = device.array(np.arange(8.0).reshape(4, 2))
    start = np.random.default_rng(0).normal(size=(6, 2))
    sparse, dense = Variable(start, name="table"), Variable(start, name="table")
    optimizer, other = Adam(0.1), Adam(0.1)

    def loss(table: Variable) -> Any:
        return np.sum(np.take(table, rows, axis=0) * factor)

    (gradient,) = optimizer.get_gradients(lambda: loss(sparse), [sparse])
    assert isinstance(gradient, IndexedSlices)
    (gradient,) = optimizer.get_gradients(lambda: loss(dense) + 0 * np.sum(dense), [dense])
    assert not isinstance(gradient, IndexedSlices)
    for _ in range(3):
        optimizer.minimize(lambda: loss(sparse), [sparse])
        other.minimize(lambda: loss(dense) + 0 * np.sum(dense), [dense])
    assert state(optimizer, sparse) == state(other, dense)
    assert (sparse.numpy() == start).all(axis=1).tolist() == [True, False, True, False, True, True]


# -- mistakes
def overwriting(w: Variable) -> Any:
    """A loss that assigns to its variable."""
    w.assign(w.numpy() * 2)
    return np.sum(w)


def failing() -> Any:
    """A loss with a mistake of its own."""
    raise ZeroDivisionError("in the loss")


def two_losses_deep(w: Variable) -> Any:
    """A loss that minimizes."""
    Adam().minimize(lambda: np.sum(w), w)
    return np.sum(w)


def anything(value: Any) -> Any:
    """The value, whatever its type."""
    return value


N = Variable(np.array([1, 2, 3]), name="n", device="host")

MISTAKES: list[tuple[type[Exception], str, Callable[[Adam, Variable, Variable], Any]]] = [
    (ArgumentTypeError, "not callable", lambda o, w, b: o.minimize(np.sum(w), [w])),
    (ArgumentTypeError, "not callable", lambda o, w, b: o.minimize(None, [w])),
    (ArgumentTypeError, "not callable", lambda o, w, b: o.get_gradients(np.sum(w), [w])),
    (ArgumentTypeError, "a str", lambda o, w, b: o.minimize(lambda: "loss", [w])),
    (ArgumentTypeError, "None", lambda o, w, b: o.minimize(lambda: None, [w])),
    (ArgumentValueError, "no gradients provided", lambda o, w, b: o.minimize(lambda: 3, [w])),
    (ArgumentValueError, "depends on the variables", lambda o, w, b: o.minimize(lambda: np.sum(b), [w])),
    (ArgumentValueError, "depends on the variables", lambda o, w, b: o.minimize(lambda: 1.5, [w, b])),
    (ArgumentValueError, "got no pairs", lambda o, w, b: o.minimize(lambda: np.sum(w), [])),
    (ArgumentValueError, "Variables only", lambda o, w, b: o.minimize(lambda: np.sum(w), [w, w.value])),
    (ArgumentValueError, "Variables only", lambda o, w, b: o.minimize(lambda: np.sum(w), None)),
    (ArgumentValueError, "Variables only", lambda o, w, b: o.minimize(lambda: np.sum(w), lambda: (x for x in [3]))),
    (ArgumentTypeError, "has no order", lambda o, w, b: o.minimize(lambda: np.sum(w), {w, b})),
    (ArgumentTypeError, "can be sorted", lambda o, w, b: o.minimize(lambda: np.sum(w), {1: w, "b": b})),
    (ArgumentTypeError, "variable 'n' must be of real", lambda o, w, b: o.minimize(lambda: np.sum(w), [w, N])),
    (ArgumentValueError, "Variables only", lambda o, w, b: o.get_updates(lambda: np.sum(w), [w, "b"])),
    (ArgumentValueError, "grad_loss", lambda o, w, b: o.minimize(lambda: w * w, [w], grad_loss=np.ones(2))),
    (ArgumentValueError, "overwritten", lambda o, w, b: o.minimize(lambda: overwriting(w), [w])),
    (ZeroDivisionError, "in the loss", lambda o, w, b: o.minimize(failing, [w])),
    (ZeroDivisionError, "in the loss", lambda o, w, b: o.minimize(lambda: np.sum(w), failing)),
    (NotImplementedError, "ediff1d", lambda o, w, b: o.minimize(lambda: np.ediff1d(w), [w])),
    (NotImplementedError, "Gradients of gradients", lambda o, w, b: o.minimize(lambda: two_losses_deep(w), [w])),
    (ArgumentValueError, "'b'", lambda o, w, b: o.get_gradients(lambda: np.sum(w), [w, b])),
    (ArgumentValueError, "'b'", lambda o, w, b: o.get_updates(lambda: np.sum(w), [w, b])),
    (
        ArgumentValueError,
        r"grad_fn .* 2 variables \(got 1\)",
        lambda o, w, b: o.minimize(None, [w, b], grad_fn=lambda: [b]),
    ),
    (ArgumentValueError, "shape", lambda o, w, b: o.minimize(None, [b], grad_fn=lambda: [w.value])),
    (ArgumentTypeError, "grad_fn", lambda o, w, b: o.minimize(None, [w], grad_fn=anything([w.value]))),
    (ArgumentTypeError, "grad_fn", lambda o, w, b: o.minimize(None, [w], grad_fn=anything(lambda: None))),
    (ArgumentValueError, "grad_loss", lambda o, w, b: o.minimize(None, [w], 2.0, grad_fn=lambda: [w.value])),
]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("error", "message", "mistake"), MISTAKES)
def test_mistakes_change_nothing(
    w: Variable, b: Variable, error: type[Exception], message: str, mistake: Callable[..., Any], known: bool
) -> None:
    optimizer = Adam()
    if known:
        optimizer.minimize(lambda: np.sum(w * w) * b, [w, b])
    before = state(optimizer, w, b)
    with pytest.raises(error, match=message):
        mistake(optimizer, w, b)
    assert state(optimizer, w, b) == before
    optimizer.minimize(lambda: np.sum(w * w) * b, [w, b])  # and nothing is left behind that would stop the next step
    assert int(optimizer.iterations) == known + 1


# -- complex variables
def system(device: Device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [12, 4] and z [4], complex, and A z."""
    generator = np.random.default_rng(1)
    real, imag = generator.normal(size=(2, 13, 4))
    a, z = real[:12] + 1j * imag[:12], real[12] + 1j * imag[12]
    return a, z, a @ z


def fit(device: Device, a: np.ndarray, data: np.ndarray, steps: int, **options: Any) -> list[np.ndarray]:
    """The z after each step of a least-squares fit of a z to the data, from 0."""
    z = Variable(np.zeros(a.shape[1], complex), name="z")
    matrix, target = device.array(a), device.array(data)
    optimizer = Adam(**options)
    path = []
    for _ in range(steps):
        # Sums of products: CuPy's @ would need cuBLAS.
        optimizer.minimize(lambda: np.sum(np.abs((matrix * z).sum(1) - target) ** 2), [z])
        path.append(z.numpy())
    return path


def test_complex_least_squares_converges(device: Device) -> None:
    a, z, data = system(device)
    path = fit(device, a, data, 400, learning_rate=0.1)
    assert np.linalg.norm(path[-1] - z) < 1e-5 * np.linalg.norm(z)


def test_rotating_the_data_rotates_the_path(device: Device) -> None:
    a, _, data = system(device)
    turn = np.exp(0.7j)
    plain, turned = (np.array(fit(device, a, d, 20, learning_rate=0.1)) for d in (data, data * turn))
    np.testing.assert_allclose(turned, plain * turn, rtol=1e-11)
    apart = [np.array(fit(device, a, d, 20, learning_rate=0.1, complex_mode="real_imag")) for d in (data, data * turn)]
    assert abs(apart[1] - apart[0] * turn).max() > 0.01


def test_real_imag_equals_torch(device: Device) -> None:
    torch = pytest.importorskip("torch")
    a, _, data = system(device)
    # So small an epsilon that it does not matter on which side of the bias correction it is added.
    path = fit(device, a, data, 20, learning_rate=0.1, epsilon=1e-300, complex_mode="real_imag")
    z = torch.zeros(4, dtype=torch.complex128, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.1, eps=1e-300)
    for expected in path:
        optimizer.zero_grad()
        ((torch.tensor(a) @ z - torch.tensor(data)).abs() ** 2).sum().backward()
        optimizer.step()
        np.testing.assert_allclose(z.detach().numpy(), expected, rtol=1e-10)


# -- memory
def test_the_tape_is_gone_after_the_step(w: Variable) -> None:
    seen: list[weakref.ref[Any]] = []

    def loss() -> Any:
        product = w * w
        seen.append(weakref.ref(product))
        seen.append(weakref.ref(product.value))
        return np.sum(product)

    optimizer = Adam()
    enabled = gc.isenabled()
    gc.disable()  # what is gone must not have needed the collector
    try:
        optimizer.minimize(loss, [w])
        optimizer.get_gradients(loss, [w])
        with pytest.raises(ArgumentValueError):
            optimizer.minimize(lambda: (loss(), 3)[1], [w])
        assert [ref() for ref in seen] == [None] * 6
    finally:
        if enabled:
            gc.enable()


def resident() -> int:
    """KiB of memory that the process holds now, not its largest ever: other tests may have needed more."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


@pytest.mark.long
def test_ten_thousand_steps_do_not_grow_the_process(device: Device) -> None:
    x = device.array(np.random.default_rng(0).normal(size=(50, 4)))
    w, table = Variable(np.ones(4)), Variable(np.ones((9, 4)))
    rows = device.array(np.array([1, 5, 5]))
    optimizer = Adam()
    sizes = []
    for _ in range(4):
        for _ in range(2_500):
            optimizer.minimize(lambda: np.sum(np.tanh(x * w)) + np.sum(np.take(table, rows, axis=0) * w), [w, table])
        optimizer.synchronize()
        gc.collect()
        sizes.append(resident())  # the first quarter has paid for the caches
    # Of a kept tape the values of x * w and its tanh alone would be 8 MB, each time. What other tests have left to the
    # process may grow once.
    assert min(np.diff(sizes)) < 4_000
