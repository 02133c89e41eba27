"""When pushes become steps, and what becomes of them when a client is lost, or the optimizer is paused."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

from gpu_adam import Adam, CheckpointManager, IndexedSlices, Variable
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, ServiceError
from gpu_adam.service.policies import AllOf, Every, OnPush, Push, policy_named
from service.running import InThread, until
from service.test_steps import config, gradient

Serve = Callable[..., InThread]


def pushed(pool: ThreadPoolExecutor, main: Any, gradient: np.ndarray) -> Future[Any]:
    return pool.submit(main.apply_gradients, [(gradient, main.variables["w"])])


def waiting(main: Any) -> int:
    return int(main.describe()["waiting"])


def until_waiting(main: Any, pushes: int) -> None:
    """Until so many pushes wait for their step."""
    until(lambda: waiting(main) == pushes)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_mean_over_clients_has_the_same_bits_whoever_comes_first(serve: Serve, sparse: bool) -> None:
    service = serve(config("all_of=3", "clipnorm = 0.5, amsgrad = true"))
    names = ["actor-2", "actor-0", "actor-1"]
    clients = {name: service.optimizer(name) for name in names}
    w = Variable(np.zeros((6, 4), np.float32), device="host")
    adam, rng = Adam(clipnorm=0.5, amsgrad=True), random.Random(0)

    def own(step: int, name: str) -> Any:
        g = gradient(step * 10 + int(name[-1]), (6, 4)) * 10.0 ** rng.randrange(-3, 3)
        return IndexedSlices(g.astype(np.float32)[:5], [0, 3, 0, 5, 3]) if sparse else g.astype(np.float32)

    with ThreadPoolExecutor(3) as pool:
        for step in range(1, 11):
            gradients = {name: own(step, name) for name in sorted(names)}
            rng.shuffle(names)
            begun = []
            for number, name in enumerate(names):
                begun.append(pushed(pool, clients[name], gradients[name]))
                if number < 2:
                    until_waiting(clients[names[2]], number + 1)
            assert [each.result() for each in begun] == [step] * 3
            for name in sorted(names):
                adam.accumulate([(gradients[name], w)])
            adam.apply_gradients()
            for main in clients.values():
                assert_same_bits(main.variables["w"].numpy(), w.numpy())


def test_one_client_too_many_is_refused(serve: Serve) -> None:
    service = serve(config("all_of=2"))
    first, second, third = (service.optimizer(name) for name in ("a", "b", "c"))
    g = np.ones((6, 4), np.float32)
    with ThreadPoolExecutor() as pool:
        one = pushed(pool, first, g)
        until_waiting(third, 1)
        assert pushed(pool, second, g).result() == one.result() == 1
        with pytest.raises(ServiceError, match="client 'c' must be one of the 2 clients that push: a, b"):
            third.apply_gradients([(g, third.variables["w"])])
        second._client.close()
        until(lambda: third.describe()["clients"] == ["a", "c"])
        one = pushed(pool, first, g)
        until_waiting(third, 1)
        assert pushed(pool, third, g).result() == one.result() == 2


def test_a_lost_client_fails_the_step(serve: Serve) -> None:
    service = serve(config("all_of=3"))
    a, b, c = (service.optimizer(name) for name in "abc")
    g = np.ones((6, 4), np.float32)
    with ThreadPoolExecutor() as pool:
        begun = [pushed(pool, a, g), pushed(pool, b, g)]
        until_waiting(c, 2)
        service.server.call(lambda: service.server._drop(_of(service, "b"))).result()
        with pytest.raises(ServiceError, match="client 'b' must stay until the step is made"):
            begun[0].result()
        assert c.iterations == 0
        assert not c.variables["w"].numpy().any()
        # The client comes back by itself, and pushes again what cannot be part of the state.
        until_waiting(c, 1)
        begun += [pushed(pool, a, g), pushed(pool, c, g)]
        assert [each.result() for each in begun[1:]] == [1] * 3


def _of(service: InThread, name: str) -> Any:
    return next(each for each in service.server._connections.values() if each.name == name)


def test_a_step_goes_on_without_a_lost_client(serve: Serve) -> None:
    text = config("all_of=3").replace('policy = "all_of=3"', 'policy = "all_of=3"\nlost_client = "continue"')
    service = serve(text)
    a, b, c = (service.optimizer(name) for name in "abc")
    d = service.optimizer("d")
    gradients = {name: gradient(n, (6, 4)) for n, name in enumerate("abcd")}
    w = Variable(np.zeros((6, 4), np.float32), device="host")
    adam = Adam(0.01)

    def expect(names: str) -> None:
        for name in names:
            adam.accumulate([(gradients[name], w)])
        adam.apply_gradients()
        assert_same_bits(d.variables["w"].numpy(), w.numpy())

    with ThreadPoolExecutor() as pool:
        begun = [pushed(pool, main, gradients[name]) for main, name in ((a, "a"), (b, "b"), (c, "c"))]
        assert [each.result() for each in begun] == [1] * 3
        expect("abc")
        begun = [pushed(pool, a, gradients["a"]), pushed(pool, b, gradients["b"])]
        until_waiting(d, 2)
        c._client.close()
        assert [each.result() for each in begun] == [2] * 2
        expect("ab")
        begun = [pushed(pool, b, gradients["b"])]
        until_waiting(d, 1)
        b._client.close()  # with what it had pushed
        until_waiting(d, 0)
        assert pushed(pool, a, gradients["a"]).result() == 3
        expect("a")
        begun = [pushed(pool, d, gradients["d"])]
        until_waiting(a, 1)
        assert pushed(pool, a, gradients["a"]).result() == begun[0].result() == 4
        expect("ad")


def test_pushes_within_a_time_are_one_step(serve: Serve) -> None:
    service = serve(config("every=0.05"))
    main, other = service.optimizer(), service.optimizer()
    w, adam = Variable(np.zeros((6, 4), np.float32), device="host"), Adam(0.01)
    gradients = [gradient(n, (6, 4)) for n in range(3)]
    main.pause()
    time.sleep(0.1)
    with ThreadPoolExecutor() as pool:
        begun = []
        for number, g in enumerate(gradients):
            begun.append(pushed(pool, service.optimizer(), g))
            until_waiting(main, number + 1)
        main.resume()  # takes them one after the other, between two steps
        assert {each.result() for each in begun} == {1}
    until(lambda: main.iterations == 1)
    for g in gradients:
        adam.accumulate([(g, w)])
    adam.apply_gradients()
    assert_same_bits(other.variables["w"].numpy(), w.numpy())
    time.sleep(0.15)
    assert main.iterations == 1, "a time without pushes is no step"


def test_a_service_that_ends_makes_the_step_that_it_promised(serve: Serve) -> None:
    service = serve(config("every=1000") + "x = {shape = [1]}\n")
    main = service.optimizer()
    assert main.apply_gradients([(np.ones((6, 4), np.float32), main.variables["w"])]) == 1
    assert main.iterations == 0
    service.end()
    assert main.iterations == 1, "the page of the sequence counter outlives the service"
    assert (main.variables["w"].live < 0).all()


@pytest.mark.parametrize("policy", ["on_push", "all_of=1", "every=0.01"])
def test_paused(serve: Serve, policy: str) -> None:
    service = serve(config(policy))
    main, other = service.optimizer(), service.optimizer()
    main.pause()
    with ThreadPoolExecutor() as pool:
        begun = pushed(pool, main, np.ones((6, 4), np.float32))
        until_waiting(other, 1)
        time.sleep(0.05)
        assert other.iterations == 0
        assert other.describe()["paused"]
        other.resume()
        assert begun.result() == 1
    until(lambda: other.iterations == 1)


def test_a_client_that_is_lost_while_paused_pushes_nothing(serve: Serve) -> None:
    service = serve()
    main, other = service.optimizer(), service.optimizer("other")
    main.pause()
    pushing = threading.Thread(target=_push_and_fail, args=(other,))
    pushing.start()
    until_waiting(main, 1)
    other._client.close()
    pushing.join()
    until_waiting(main, 0)
    main.resume()
    assert main.iterations == 0


def _push_and_fail(main: Any) -> None:
    with pytest.raises(ServiceError, match="the client must be open"):
        main.apply_gradients([(np.ones((6, 4), np.float32), main.variables["w"])])


def test_a_pause_is_one_for_what_a_lost_client_brings_about(serve: Serve) -> None:
    text = config("all_of=2").replace('"all_of=2"', '"all_of=2"\nlost_client = "continue"')
    service = serve(text)
    a, b, watching = (service.optimizer(name) for name in ("a", "b", "watching"))
    g = np.ones((6, 4), np.float32)
    with ThreadPoolExecutor() as pool:
        both = [pushed(pool, main, g) for main in (a, b)]
        assert [each.result() for each in both] == [1, 1]
        begun = pushed(pool, a, g)
        until_waiting(watching, 1)
        watching.pause()
        b._client.close()
        until(lambda: watching.describe()["clients"] == ["a", "watching"])
        assert watching.iterations == 1, "not while it is paused"
        watching.resume()
        assert begun.result() == 2


def test_a_pause_is_one_for_checkpoints_of_sums(serve: Serve) -> None:
    text = config("every=1000").replace('"every=1000"', '"every=1000"\ncheckpoint = {directory = "run"}')
    main = serve(text).optimizer()
    main.apply_gradients([(np.ones((6, 4), np.float32), main.variables["w"])])
    main.pause()
    with pytest.raises(ServiceError, match="must not be paused while gradients wait for their step"):
        main.save()
    assert main.iterations == 0
    main.resume()
    assert main.save().name == "step-000000001.npz"


def test_after_all_clients_have_gone_it_begins_anew() -> None:
    policy, log = AllOf(2, "continue"), Recorded()
    for client in "ab":
        policy.take(log.push(client), log)
    policy.lose("a", log)
    policy.lose("b", log)
    policy.take(log.push("c"), log)
    assert log.steps == [["a", "b"]]
    policy.take(log.push("d"), log)
    assert log.steps == [["a", "b"], ["c", "d"]]


class Recorded:
    """What a policy asks for."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []

    def push(self, client: str) -> Push:
        """A push of nothing."""
        return Push(client, [], None, None, None, lambda: None, lambda answer: None)

    def step(self, pushes: Sequence[Push]) -> None:
        """Note the clients of a step."""
        self.steps.append([push.client for push in pushes])

    def add(self, push: Push) -> None:
        """Not asked for."""
        raise AssertionError

    def step_of_sums(self) -> None:
        """Not asked for."""
        raise AssertionError

    def refuse(self, push: Push, error: ServiceError) -> None:
        """Nothing is answered."""


@pytest.mark.parametrize("policy", ["on_push", "every=1000"])
def test_a_checkpoint_that_fails_is_logged_and_nothing_else(
    serve: Serve, policy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = config(policy).replace(f'"{policy}"', f'"{policy}"\ncheckpoint = {{directory = "run", every_steps = 1}}')
    service = serve(text)
    main = service.optimizer()

    def fail(self: Any) -> None:
        raise MemoryError("no memory for a snapshot")

    monkeypatch.setattr(CheckpointManager, "step", fail)
    assert main.apply_gradients([(np.ones((6, 4), np.float32), main.variables["w"])]) == 1
    if policy != "on_push":
        service.server.call(service.server.optimizers["main"].tick).result()
    assert main.iterations == 1
    assert main.learning_rate == 0.01, "the next answer is that of the next question"
    assert "no memory for a snapshot" in caplog.text


def test_a_step_of_sums_that_fails_is_logged_and_forgotten(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = serve(config("every=1000"))
    main = service.optimizer()
    g = np.ones((6, 4), np.float32)
    main.apply_gradients([(g, main.variables["w"])])
    adam = service.server.optimizers["main"].adam
    monkeypatch.setattr(adam, "apply_gradients", lambda: _raise(ArgumentValueError("beta_1", "must", 2, "do")))
    service.server.call(service.server.optimizers["main"].tick).result()
    monkeypatch.undo()
    assert "that pushes were promised was not made" in caplog.text
    main.apply_gradients([(2 * g, main.variables["w"])])
    service.end()
    w, local = Variable(np.zeros((6, 4), np.float32), device="host"), Adam(0.01)
    local.apply_gradients([(2 * g, w)])
    assert_same_bits(main.variables["w"].numpy(), w.numpy())


def _raise(error: Exception) -> None:
    raise error


def test_staleness(serve: Serve) -> None:
    service = serve()
    slow, fast = service.optimizer(), service.optimizer()
    g = np.ones((6, 4), np.float32)
    seen = [slow.staleness]
    slow.apply_gradients([(g, slow.variables["w"])])
    seen.append(slow.staleness)  # it has not looked yet
    slow.variables["w"].numpy()
    for _ in range(3):
        fast.apply_gradients([(g, fast.variables["w"])])
    assert slow.apply_gradients([(g, slow.variables["w"])]) == 5
    seen.append(slow.staleness)
    slow.variables["b"].numpy()
    slow.apply_gradients([(g, slow.variables["w"])])
    seen.append(slow.staleness)
    assert seen == [None, None, 3, 0]
    assert slow.describe()["staleness"] == 3


def test_names_of_policies() -> None:
    assert isinstance(policy_named("policy", "on_push", "fail"), OnPush)
    assert isinstance(policy_named("policy", "all_of=8", "fail"), AllOf)
    assert isinstance(policy_named("policy", "every=.5", "fail"), Every)
    for text in ("", "all_of", "all_of=0", "all_of=-1", "all_of=1.5", "every=0", "every=-1", "every=inf", "on_push "):
        with pytest.raises(ArgumentValueError, match=r'policy must be "on_push", "all_of=N" or "every=SECONDS"'):
            policy_named("policy", text, "fail")
    with pytest.raises(ArgumentTypeError):
        policy_named("policy", 3, "fail")
