"""The demos without display: gradients, learning, and resuming bit for bit."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpu_adam
from gpu_adam.__main__ import main
from gpu_adam.demos import Demo, digits, product, words
from gpu_adam.demos.digits import CLASSES, Digits
from gpu_adam.demos.words import Words
from gpu_adam.devices import Device
from gpu_adam.errors import CheckpointError
from gpu_adam.state import checkpoint

DEMOS = pytest.mark.parametrize("kind", [Digits, Words])
CHOICES = pytest.mark.parametrize(
    ("dtype", "master"),
    [("float16", False), ("float16", True), ("bfloat16", False), ("bfloat16", True), ("float64", False)],
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step of `words` take a tenth of its time."""
    monkeypatch.setattr(words, "BATCH", 96)


class Recorder:
    """Takes an optimizer's place and keeps the gradients."""

    def apply_gradients(self, pairs: Any) -> None:
        """Keep the pairs."""
        self.pairs = list(pairs)


def state(demo: Demo) -> dict[str, bytes]:
    """The bits of the optimizer's state and of the variables, by name."""
    arrays = {**demo.optimizer.export(), **{f"{v.name}/value": v.numpy() for v in demo.variables}}
    return {name: array.tobytes() for name, array in arrays.items()}


def gradients(demo: Demo, monkeypatch: pytest.MonkeyPatch, dtype: str = "float32") -> list[np.ndarray]:
    """The gradients of the demo's next step, dense, in the order of its variables."""
    recorder = Recorder()
    monkeypatch.setattr(demo, "optimizer", recorder)
    demo.train()
    dense = []
    for gradient, variable in recorder.pairs:
        if hasattr(gradient, "indices"):
            sums = np.zeros(variable.shape)
            np.add.at(sums, demo.device.numpy(gradient.indices), demo.device.numpy(gradient.values))
            dense.append(sums)
        else:
            assert gradient.dtype == dtype
            dense.append(demo.device.numpy(gradient))
    assert [variable for _, variable in recorder.pairs] == list(demo.variables)
    return dense


def check_slopes(loss: Callable[..., float], values: Sequence[np.ndarray], slopes: Sequence[np.ndarray]) -> None:
    """Compare gradients with central differences of a float64 loss, at some places of every variable."""
    generator = np.random.default_rng(0)
    for value, slope in zip(values, slopes, strict=True):
        steepest = np.abs(slope).argmax()
        for place in (steepest, *generator.integers(value.size, size=5)):
            at = np.unravel_index(place, value.shape)
            kept, ends = value[at], []
            for change in (1e-5, -1e-5):
                value[at] = kept + change
                ends.append(loss(*values))
            value[at] = kept
            assert slope[at] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")],
)
def test_digits_gradients_are_the_slopes_of_the_loss(
    device: Device, monkeypatch: pytest.MonkeyPatch, dtype: str, computed: str
) -> None:
    demo = Digits(seed=3, dtype=dtype)
    x, labels = demo.batch(demo.generator(1))

    def loss(w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray) -> float:
        logits = np.maximum(x @ w1 + b1, 0) @ w2 + b2
        of_label = logits[np.arange(len(labels)), labels]
        return float((np.log(np.exp(logits).sum(1)) - of_label).mean())

    values = [variable.numpy().astype(np.float64) for variable in demo.variables]
    check_slopes(loss, values, gradients(demo, monkeypatch, computed))
    assert demo.measure().loss == pytest.approx(loss(*values), rel=1e-5)


def test_words_gradients_are_the_slopes_of_the_loss(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Words(seed=3)
    for variable in demo.variables:
        variable.assign(np.random.default_rng(4).normal(0, 0.3, variable.shape).astype(np.float32))
    numbers, others = demo.batch(demo.generator(1))

    def loss(centre: np.ndarray, context: np.ndarray) -> float:
        z = (centre[numbers][:, None] * context[others]).sum(2)
        z[:, 0] *= -1
        return float(np.log1p(np.exp(z)).sum(1).mean())

    values = [variable.numpy().astype(np.float64) for variable in demo.variables]
    check_slopes(loss, values, gradients(demo, monkeypatch))
    assert demo.measure().loss == pytest.approx(loss(*values), rel=1e-5)


@DEMOS
def test_resuming_continues_bit_for_bit(device: Device, kind: type[Demo], tmp_path: Path) -> None:
    whole, half = kind(seed=5), kind(seed=5)
    for _ in range(2):
        half.train()
    half.save(tmp_path / "state")
    half = kind.resume(tmp_path / "state")
    assert (half.seed, half.step) == (5, 2)
    while half.step < 4:
        half.train()
    for _ in range(4):
        whole.train()
    assert half.measure() == whole.measure()
    assert state(half) == state(whole)
    assert half.result() == whole.result()


@CHOICES
def test_digits_of_other_dtypes_continue_bit_for_bit(device: Device, dtype: str, master: bool, tmp_path: Path) -> None:
    whole, half = (Digits(seed=5, dtype=dtype, master=master) for _ in range(2))
    for _ in range(2):
        half.train()
    half.save(tmp_path / "state")
    half = Digits.resume(tmp_path / "state")
    for demo in (half, whole):
        while demo.step < 4:
            demo.train()
    assert half.choices == {"dtype": dtype, "master": master}
    assert {variable.dtype.name for variable in half.variables} == {dtype}
    # Otherwise the files would not say more than the variables do.
    assert ("w1/master" in state(half)) is master
    assert state(half) == state(whole)


@pytest.mark.long
@CHOICES
def test_digits_of_other_dtypes_learn_as_much(device: Device, dtype: str, master: bool) -> None:
    """Within a point of float32, three of the 357 images."""
    plain, demo = Digits(), Digits(dtype=dtype, master=master)
    for each in (plain, demo):
        while each.step < 1000:
            each.train()
    assert plain.accuracy() > 0.95
    assert demo.accuracy() >= plain.accuracy() - 0.01


@DEMOS
def test_the_seed_makes_the_training(device: Device, kind: type[Demo]) -> None:
    demos = [kind(seed) for seed in (1, 1, 2)]
    for demo in demos:
        demo.train()
    first, again, other = (demo.variables[0].numpy().tobytes() for demo in demos)
    assert first == again != other


def test_digits_learns(device: Device) -> None:
    demo = Digits()
    before = demo.accuracy()
    for _ in range(60):
        demo.train()
    assert before < 0.3
    assert demo.accuracy() > 0.7
    assert demo.measure().loss < 1.2  # log(10) = 2.3 at the start


@pytest.mark.parametrize(("replicated", "kind"), [(False, "ShardedAdam"), (True, "DataParallelAdam")])
def test_the_mean_over_ranks_is_the_gradient_of_the_batch(
    device: Device, monkeypatch: pytest.MonkeyPatch, replicated: bool, kind: str
) -> None:
    """Of shares of 22, 21 and 21 images."""
    whole = gradients(Digits(dtype="float64"), monkeypatch, "float64")
    monkeypatch.setattr(digits, kind, lambda ranks, *arguments, **keywords: gpu_adam.Adam(*arguments, **keywords))
    ranks: list[Any] = [SimpleNamespace(rank=rank, size=3) for rank in range(3)]
    shares = [gradients(Digits(0, each, replicated, dtype="float64"), monkeypatch, "float64") for each in ranks]
    for expected, *found in zip(whole, *shares, strict=True):
        np.testing.assert_allclose(np.mean(found, 0), expected, rtol=0, atol=1e-7)
        assert not np.allclose(found[0], expected, rtol=0, atol=1e-4)


def test_words_learns(device: Device) -> None:
    demo = Words()
    demo.train()
    # The context table starts with zeros: six decisions by the toss of a coin, and no score above another.
    assert demo.measure().loss == pytest.approx(6 * np.log(2))
    assert demo.measure().score == 0
    for _ in range(50):
        demo.train()
    assert demo.measure().loss < 4


def test_words_have_the_same_bits_when_rows_are_deferred(device: Device) -> None:
    losses: list[list[object]] = []
    states = []
    for sparse in ("dense", "deferred"):
        demo = Words(sparse=sparse)
        assert demo.optimizer.flavour.sparse_update == sparse
        losses.append([])
        for _ in range(20):
            demo.train()
            losses[-1].append(demo.measure())
        arrays = [*(variable.numpy() for variable in demo.variables), *demo.optimizer.export().values()]
        states.append([array.tobytes() for array in arrays])
    assert losses[0] == losses[1]
    assert states[0] == states[1]


def test_digits_holds_out_a_fifth_of_every_class(device: Device) -> None:
    demo = Digits()
    assert len(demo.labels) + len(demo.test_labels) == 1797
    assert len(demo.test_labels) == 357
    assert np.bincount(demo.test_labels, minlength=CLASSES).min() >= 30
    held_out = {image.tobytes() for image in demo.test_images}
    assert not held_out & {image.tobytes() for image in demo.images}


def test_digits_batches_are_moved_by_at_most_a_pixel(device: Device) -> None:
    demo = Digits()
    pixels, labels = demo.batch(demo.generator(1))
    unmoved = {image[1:9, 1:9].tobytes() for image in demo.images}
    share = np.mean([image.tobytes() in unmoved for image in pixels])
    assert 0.4 < share < 0.9  # 0.8 * 0.8 on average
    assert pixels.shape == (64, 64)
    assert pixels.max() == 1
    assert labels.shape == (64,)


def test_words_pairs_are_neighbours(device: Device) -> None:
    demo = Words()
    numbers, others = demo.batch(demo.generator(1))
    known = set(map(tuple, demo.pairs.tolist()))
    assert all((word, other) in known for word, other in zip(numbers.tolist(), others[:, 0].tolist(), strict=True))
    assert all((b, a) in known for a, b in known)
    assert 0 <= others.min() <= others.max() < len(demo.words)


def test_words_nearest_are_those_at_the_smallest_angle(device: Device) -> None:
    demo = Words()
    vectors = np.random.default_rng(0).normal(size=demo.variables[0].shape).astype(np.float32)
    for i, word in enumerate(("list", "tuple", "dict")):
        vectors[demo.words.index(word)] = 10.0**i * (np.arange(vectors.shape[1]) + i)
    demo.variables[0].assign(vectors)
    assert demo.nearest("list", 2) == ["tuple", "dict"]
    assert ("near list", ", ".join(demo.nearest("list"))) in demo.result()


def test_product_is_the_matrix_product(device: Device) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5, 5))
    result = device.numpy(product(device.array(a[:3]), device.array(b[:, :4])))
    np.testing.assert_allclose(result, a[:3] @ b[:, :4], rtol=1e-13)


@DEMOS
def test_files_of_another_kind_are_refused(device: Device, kind: type[Demo], tmp_path: Path) -> None:
    other = Words if kind is Digits else Digits
    other().save(tmp_path / "other")
    checkpoint.write(tmp_path / "plain", {"a": np.zeros(3)}, {})
    with pytest.raises(CheckpointError, match=rf"must hold a training of the demo {kind.name} \(got {other.name}\)"):
        kind.resume(tmp_path / "other")
    with pytest.raises(CheckpointError, match=rf"must hold a training of the demo {kind.name} \(got another"):
        kind.resume(tmp_path / "plain")
    with pytest.raises(FileNotFoundError):
        kind.resume(tmp_path / "none")


@DEMOS
def test_files_that_do_not_fit_are_refused(device: Device, kind: type[Demo], tmp_path: Path) -> None:
    kind().save(tmp_path / "good")
    arrays, note = checkpoint.read(tmp_path / "good")
    first = next(name for name in arrays if name.endswith("/value"))
    unfit = [
        arrays | {first: arrays[first][1:]},
        {name: array for name, array in arrays.items() if name != first},
        arrays | {"more": np.zeros(1)},
    ]
    for damaged in unfit:
        checkpoint.write(tmp_path / "bad", damaged, note)
        with pytest.raises(CheckpointError, match=rf"{first}|more"):
            kind.resume(tmp_path / "bad")


def test_words_of_another_python_are_refused(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Words().save(tmp_path / "state")
    assert Words.resume(tmp_path / "state").step == 0
    data = Words.data
    monkeypatch.setattr(Words, "data", lambda demo: data(demo)[::-1])
    with pytest.raises(CheckpointError, match="must fit this demo's data"):
        Words.resume(tmp_path / "state")


@DEMOS
def test_a_demos_file_is_one_of_any_optimizer(
    device: Device, capsys: pytest.CaptureFixture[str], kind: type[Demo], tmp_path: Path
) -> None:
    demo = kind(seed=5)
    demo.train()
    demo.save(tmp_path / "state")
    note = checkpoint.read(tmp_path / "state")[1]
    variables = [gpu_adam.Variable(np.zeros(v.shape), dtype=v.dtype, name=v.name) for v in demo.variables]
    adam = gpu_adam.Adam.from_config(note["config"])
    adam.build(variables)
    adam.load(tmp_path / "state", variables=True)
    assert {name: array.tobytes() for name, array in adam.export().items()}.items() <= state(demo).items()
    assert [v.numpy().tobytes() for v in variables] == [v.numpy().tobytes() for v in demo.variables]
    adam.save(tmp_path / "again", variables=True, user=note["user"])
    assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(tmp_path / "state")])
    shown = capsys.readouterr().out
    assert re.search(rf'^user.demo +"{kind.name}"$', shown, re.M)
    assert all(f"{v.name}/value" in shown for v in demo.variables)
