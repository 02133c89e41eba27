"""Steps through a service have the bits of a local optimizer's, by every way of pushing; and so do errors."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

import gpu_adam
from gpu_adam import Adam, IndexedSlices, Variable
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError, ServiceError, SparseIndexError
from service.running import PLAIN, InThread

Serve = Callable[..., InThread]

KINDS = ["float32", "float64", "float16", "bfloat16", "complex64"]


def config(policy: str = "on_push", adam: str = "learning_rate = 0.01", dtype: str = "float32") -> str:
    return f"""
    [optimizer.main]
    config = {{{adam}}}
    policy = "{policy}"
    [optimizer.main.variables]
    w = {{shape = [6, 4], dtype = "{dtype}"}}
    b = {{shape = [4], dtype = "{dtype}"}}
    """


class Twin:
    """A local optimizer with variables like those of `config`."""

    def __init__(self, dtype: str = "float32", **arguments: Any) -> None:
        self.adam = Adam(**{"learning_rate": 0.01, **arguments})
        self.w = Variable(np.zeros((6, 4)), dtype=dtype, device="host", name="w")
        self.b = Variable(np.zeros(4), dtype=dtype, device="host", name="b")

    def assert_equal(self, main: Any) -> None:
        """The service's optimizer has done the same."""
        assert_same_bits(main.variables["w"].numpy(), self.w.numpy())
        assert_same_bits(main.variables["b"].numpy(), self.b.numpy())
        assert main.iterations == int(self.adam.iterations)


def gradient(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        values = values + 1j * rng.standard_normal(shape)
    return values.astype(Variable(0.0, dtype=dtype, device="host").dtype)


@pytest.mark.parametrize("dtype", KINDS)
def test_pushes_are_steps(serve: Serve, dtype: str) -> None:
    main, twin = serve(config(dtype=dtype)).optimizer(), Twin(dtype)
    for step in range(1, 6):
        g, h = gradient(step, (6, 4), dtype), gradient(-step % 97, (4,), dtype)
        with main.gradients() as given:
            given["w"][...], given["b"][...] = g, h
        twin.adam.apply_gradients([(g, twin.w), (h, twin.b)])
        assert main.apply_gradients([(g, main.variables["w"])]) == 2 * step
        twin.adam.apply_gradients([(g, twin.w)])
        twin.assert_equal(main)


def test_gradients_may_come_as_a_local_step_takes_them(serve: Serve) -> None:
    main, twin = serve().optimizer(), Twin()
    ways: list[Any] = [
        gradient(1, (6, 4)).tolist(),
        gradient(2, (6, 4)).astype(np.float16),
        gradient(3, (4, 6)).T,
        IndexedSlices(gradient(4, (3, 4)), [5, 0, 5]),
        IndexedSlices(gradient(5, (0, 4)), np.zeros(0, np.int32)),
        IndexedSlices(gradient(6, (9, 4)), np.arange(9) % 6),
        Variable(gradient(7, (6, 4)), device="host"),
    ]
    for way in ways:
        main.apply_gradients([(way, main.variables["w"])])
        twin.adam.apply_gradients([(way, twin.w)])
        twin.assert_equal(main)


def test_what_was_not_asked_for_is_not_pushed(serve: Serve) -> None:
    main, twin = serve().optimizer(), Twin()
    for names in (["w", "b"], ["b"], ["w"]):
        with main.gradients() as given:
            for name in names:
                given[name][...] = 1
        twin.adam.apply_gradients([(np.ones(getattr(twin, n).shape, np.float32), getattr(twin, n)) for n in names])
        twin.assert_equal(main)


def test_a_block_that_raises_pushes_nothing(serve: Serve) -> None:
    main = serve().optimizer()
    with pytest.raises(ZeroDivisionError), main.gradients() as given:
        given["w"][...] = 1 / 0
    assert main.iterations == 0
    assert not main.variables["w"].numpy().any()


def test_a_scale_divides(serve: Serve) -> None:
    main, twin = serve().optimizer(), Twin()
    g = gradient(1, (6, 4))
    main.apply_gradients([(g, main.variables["w"])], grad_scale=1024.0)
    twin.adam.apply_gradients([(g, twin.w)], grad_scale=1024.0)
    with main.gradients(grad_scale=3.0) as given:
        given["w"][...] = g
    twin.adam.apply_gradients([(g, twin.w)], grad_scale=3.0)
    twin.assert_equal(main)


def loss(w: Any, b: Any) -> Any:
    return ((w + b - 1) ** 2).mean()


def test_losses(serve: Serve) -> None:
    main, twin = serve().optimizer(), Twin()
    w, b = main.variables["w"], main.variables["b"]
    for step in range(1, 4):
        assert main.minimize(functools.partial(loss, w, b), [w, b]) == step
        twin.adam.minimize(functools.partial(loss, twin.w, twin.b), [twin.w, twin.b])
        twin.assert_equal(main)
    assert 0 < main.describe()["loss"] < 1, "it began at 1"


def test_hyperparameters(serve: Serve) -> None:
    main, twin = serve().optimizer(), Twin()
    schedule = gpu_adam.ExponentialDecay(0.1, 2, 0.5)
    values = [("learning_rate", 0.5), ("beta_1", 0.8), ("clipnorm", 0.1), ("clipnorm", None), ("amsgrad", True)]
    for name, value in [*values, ("learning_rate", schedule), ("weight_decay", 0.01)]:
        setattr(main, name, value)
        setattr(twin.adam, name, value)
        for step in range(2):
            g = gradient(step, (6, 4))
            main.apply_gradients([(g, main.variables["w"])])
            twin.adam.apply_gradients([(g, twin.w)])
        twin.assert_equal(main)
        read, local = getattr(main, name), getattr(twin.adam, name)
        assert read == local or read.get_config() == local.get_config()
    assert main.get_config() == twin.adam.get_config()


def bad_pushes(adam: Any, w: Any, b: Any) -> list[Callable[[], object]]:
    """Calls that a local optimizer refuses."""
    return [
        lambda: adam.apply_gradients([(np.zeros(4, np.float32), w)]),
        lambda: adam.apply_gradients([(np.zeros((6, 4)), w)]),
        lambda: adam.apply_gradients([(np.zeros((6, 4), np.int64), w)]),
        lambda: adam.apply_gradients([("x", w)]),
        lambda: adam.apply_gradients([]),
        lambda: adam.apply_gradients(3),
        lambda: adam.apply_gradients([(b, "w", 1)]),
        lambda: adam.apply_gradients([(IndexedSlices(np.zeros((1, 4), np.float32), [6]), w)]),
        lambda: adam.apply_gradients([(IndexedSlices(np.zeros((1, 4), np.float32), [-1]), w)]),
        lambda: adam.apply_gradients([(IndexedSlices(np.zeros((2, 4), np.float32), [1]), w)]),
        lambda: adam.apply_gradients([(IndexedSlices(np.zeros((1, 4), np.float32), [1.0]), w)]),
        lambda: adam.apply_gradients([(np.zeros((6, 4), np.float32), w)], grad_scale=-1.0),
        lambda: adam.apply_gradients([(np.zeros((6, 4), np.float32), w)], grad_scale=float("nan")),
        lambda: setattr(adam, "learning_rate", float("inf")),
        lambda: setattr(adam, "learning_rate", "x"),
        lambda: setattr(adam, "beta_1", 1),
        lambda: setattr(adam, "clipnorm", 0),
        lambda: setattr(adam, "amsgrad", 7),
    ]


@pytest.mark.parametrize("policy", ["on_push", "all_of=1", "every=1000"])
def test_errors_are_those_of_a_local_step(serve: Serve, policy: str) -> None:
    service = serve(config(policy))
    main, twin = service.optimizer(), Twin()
    remote = bad_pushes(main, main.variables["w"], main.variables["b"])
    local = bad_pushes(twin.adam, twin.w, twin.b)
    for there, here in zip(remote, local, strict=True):
        with pytest.raises(GpuAdamError) as expected:
            here()
        with pytest.raises(type(expected.value)) as got:
            there()
        assert str(got.value) == str(expected.value)
        assert type(got.value) is type(expected.value)
    assert main.iterations == 0
    assert not main.variables["w"].numpy().any()
    service.end()
    assert int(service.server.optimizers["main"].adam.iterations) == 0, "no step of nothing"


def test_a_missing_gradient_warns_as_a_local_step(serve: Serve) -> None:
    main, twin = serve().optimizer(), Twin()
    g = gradient(1, (6, 4))
    with pytest.warns(UserWarning, match="no gradient for the variables") as local:
        twin.adam.apply_gradients([(g, twin.w), (None, twin.b)])
    with pytest.warns(UserWarning, match="no gradient for the variables") as remote:
        main.apply_gradients([(g, main.variables["w"]), (None, main.variables["b"])])
    assert str(remote[0].message) == str(local[0].message)
    assert remote[0].filename == __file__
    twin.assert_equal(main)


def test_what_a_client_must_not_do(serve: Serve) -> None:
    service = serve()
    main, other = service.optimizer(), service.optimizer()
    w = main.variables["w"]
    with pytest.raises(ServiceError, match="variable 'w' must be changed by steps"):
        w.assign(np.ones((6, 4)))
    with pytest.raises(ServiceError, match="must be changed by steps"):
        w += 1
    with pytest.raises(ArgumentValueError, match="must have a variable of optimizer 'main'"):
        main.apply_gradients([(np.zeros((6, 4), np.float32), other.variables["w"])])
    with pytest.raises(ArgumentValueError, match="must have a variable of optimizer 'main'"):
        main.apply_gradients([(np.zeros(4, np.float32), Variable(np.zeros(4), device="host", name="b"))])
    with pytest.raises(AttributeError, match="no attribute 'momentum' that can be assigned"):
        main.momentum = 0.5
    with pytest.raises(AttributeError, match="no attribute 'momentum'"):
        _ = main.momentum
    with pytest.raises(ArgumentTypeError, match="learning_rate must be a number or a schedule"):
        main.learning_rate = object()
    with pytest.raises(ValueError, match="read-only"):
        w.live[...] = 1
    with pytest.raises(ArgumentValueError, match=r"the optimizer must be one of main \(got 'other'\)"):
        service.connect().optimizer("other")
    for call in (Adam().build, lambda variables: Adam().apply_gradients([(np.ones((6, 4), np.float32), *variables)])):
        with pytest.raises(ServiceError, match="variable 'w' must be updated by its service"):
            call([w])
    with pytest.raises(ServiceError, match="optimizer 'main' must have an entry checkpoint"):
        main.save()
    with pytest.raises(SparseIndexError, match=r"must lie in \[0, 6\)"):
        w.gather([6])
    assert main.iterations == 0


def test_several_optimizers(serve: Serve) -> None:
    service = serve(PLAIN + PLAIN.replace("main", "other").replace("0.01", "0.5"))
    client = service.connect()
    assert client.optimizers == ["main", "other"]
    main, other = map(client.optimizer, client.optimizers)
    assert client.optimizer("main") is main
    ones = np.ones(4, np.float32)
    other.apply_gradients([(ones, other.variables["b"])])
    assert main.iterations == 0
    assert other.iterations == 1
    assert not main.variables["b"].numpy().any()
    np.testing.assert_allclose(other.variables["b"].numpy(), -0.5, rtol=1e-5)


def test_many_shapes_of_pushes_use_few_bindings(serve: Serve) -> None:
    text = "".join(f"v{n} = {{shape = [{n + 1}]}}\n" for n in range(40))
    main = serve("[optimizer.main]\n[optimizer.main.variables]\n" + text).optimizer()
    for step in range(200):
        chosen = [main.variables[f"v{n}"] for n in range(step % 40 + 1)]
        assert main.apply_gradients([(np.ones(v.shape, np.float32), v) for v in chosen]) == step + 1


def test_a_client_in_several_threads(serve: Serve) -> None:
    service = serve()
    client = service.connect()
    main = client.optimizer("main")
    barrier, b = threading.Barrier(4), main.variables["b"]

    def read() -> None:
        barrier.wait()
        for _ in range(100):
            assert main.learning_rate == 0.01
            assert b.numpy().shape == (4,)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_to_ask_whether_there_is_a_gradient_pushes_none(serve: Serve) -> None:
    main = serve().optimizer()
    with main.gradients() as given:
        given["w"][...] = 1
    w = main.variables["w"].numpy()
    with main.gradients() as given:
        assert "w" in given
        assert "x" not in given
        assert list(given) == ["w", "b"]
        given["b"][...] = 1
    assert_same_bits(main.variables["w"].numpy(), w)
    assert main.variables["b"].numpy().any()


def test_nothing_else_is_pushed_while_gradients_are_written(serve: Serve) -> None:
    main = serve().optimizer()
    b = main.variables["b"]
    with main.gradients() as given:
        given["w"][...] = 1
        for push in (
            lambda: main.apply_gradients([(np.full(4, -5, np.float32), b)]),
            lambda: main.minimize(lambda: (b * b).sum() + 0, [b]),
            main.gradients().__enter__,
        ):
            with pytest.raises(ServiceError, match=r"the block of gradients\(\) must end before anything else"):
                push()
        assert (given["w"] == 1).all()
    assert main.iterations == 1
    with pytest.raises(ZeroDivisionError), main.gradients():
        _ = 1 / 0
    assert main.apply_gradients([(np.ones(4, np.float32), b)]) == 2, "after the block anything is pushed"


def test_steps_that_are_left_out_are_not_counted(serve: Serve) -> None:
    main, twin = (
        serve(config(adam="learning_rate = 0.01, skip_nonfinite = true")).optimizer(),
        Twin(skip_nonfinite=True),
    )
    w = main.variables["w"]
    for number, bad in enumerate([False, True, True, False, True]):
        g = np.full((6, 4), np.nan if bad else number + 1, np.float32)
        before = w.value
        assert main.apply_gradients([(g, w)]) is None
        twin.adam.apply_gradients([(g, twin.w)])
        assert bad == np.array_equal(w.value, before)
        twin.assert_equal(main)
    assert main.iterations == 2


def test_many_optimizers_of_one_client(serve: Serve) -> None:
    names = [f"o{n}" for n in range(6)]
    variables = "".join(f"v{n} = {{shape = [1]}}\n" for n in range(20))
    service = serve("".join(f"[optimizer.{name}]\n[optimizer.{name}.variables]\n{variables}" for name in names))
    client = service.connect()
    for name in names:
        optimizer = client.optimizer(name)
        for number in range(20):
            optimizer.apply_gradients([(np.ones(1, np.float32), optimizer.variables[f"v{number}"])])
        assert optimizer.iterations == 20


def test_threads_of_one_client_push_their_own_gradients(serve: Serve) -> None:
    service = serve()
    main = service.optimizer()

    def push(name: str, value: float) -> None:
        variable = main.variables[name]
        for _ in range(150):
            main.apply_gradients([(np.full(variable.shape, value, np.float32), variable)])

    threads = [threading.Thread(target=push, args=arguments) for arguments in (("w", 1.0), ("b", -1.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert main.iterations == 300
    w, b = main.variables["w"].numpy(), main.variables["b"].numpy()
    assert (w < -0.1).all(), "each step of w was one of 1"
    assert (b > 0.1).all()


def test_copies_of_variables_are_local_ones(serve: Serve) -> None:
    main = serve().optimizer()
    w = main.variables["w"]
    for made in (copy.copy(w), copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert type(made) is Variable
        assert made.name == "w"
        made.assign_add(np.ones((6, 4)))
    assert not w.numpy().any()
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ServiceError, match="optimizer 'main' must stay in the process that connected"):
            act(main)


def test_arrays_of_an_earlier_block_may_be_pushed(serve: Serve) -> None:
    main, twin = serve().optimizer(), Twin()
    with main.gradients() as given:
        given["w"], given["b"] = gradient(1, (6, 4)), gradient(2, (4,))
        kept = given["b"], given["w"]
    twin.adam.apply_gradients([(gradient(1, (6, 4)), twin.w), (gradient(2, (4,)), twin.b)])
    main.apply_gradients(zip(kept, (main.variables["b"], main.variables["w"]), strict=True))
    twin.adam.apply_gradients([(gradient(2, (4,)), twin.b), (gradient(1, (6, 4)), twin.w)])
    twin.assert_equal(main)


def test_gradients_may_be_assigned(serve: Serve) -> None:
    main, twin = serve().optimizer(), Twin()
    with main.gradients() as given:
        given["w"] = np.arange(4)
        given["w"] += 1
    twin.adam.apply_gradients([(np.tile(np.arange(1, 5, dtype=np.float32), (6, 1)), twin.w)])
    twin.assert_equal(main)
    main.amsgrad = np.True_
    assert main.amsgrad is True
    with pytest.raises(ArgumentTypeError, match="loss must be a real number"):
        main.apply_gradients([(np.ones(4, np.float32), main.variables["b"])], loss="x")
