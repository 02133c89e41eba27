"""What laziness costs: LazyAdam moves the rows that it should, and the curves are those of the trainings."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import gpu_adam
from gpu_adam.demos.words import Words
from profiling import laziness
from profiling.laziness import LAZY, MEAN, LazyAdam


def test_lazy_adam_is_adam_in_the_rows_with_a_gradient_and_nothing_in_the_others() -> None:
    gpu_adam.set_device("host")
    random = np.random.default_rng(0)
    start = random.standard_normal((5, 3), np.float32)
    ours, theirs = gpu_adam.Variable(start), gpu_adam.Variable(start)
    adam, lazy = gpu_adam.Adam(0.1), LazyAdam(lambda step: 0.1, [theirs])
    for _ in range(4):
        rows = gpu_adam.IndexedSlices(random.standard_normal((4, 3), np.float32), np.array([3, 1, 3, 0]))
        adam.apply_gradients([(rows, ours)])
        lazy.apply_gradients([(rows, theirs)])
    np.testing.assert_allclose(theirs.numpy(), ours.numpy(), rtol=1e-5)
    assert (theirs.numpy()[[2, 4]] == start[[2, 4]]).all()
    assert (theirs.numpy()[[0, 1, 3]] != start[[0, 1, 3]]).all()
    before = theirs.numpy()
    one = gpu_adam.IndexedSlices(np.ones((1, 3), np.float32), np.array([1]))
    adam.apply_gradients([(one, ours)])
    lazy.apply_gradients([(one, theirs)])
    assert (theirs.numpy()[[0, 3]] == before[[0, 3]]).all()
    assert (ours.numpy()[[0, 3]] != before[[0, 3]]).all()


def test_the_picture_is_of_the_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image", reason="the extra demo brings it")
    laziness.main(["--steps", str(2 * MEAN), "--results", str(tmp_path)])
    found = json.loads((tmp_path / "laziness.json").read_text())
    assert found["steps"] == [MEAN, 2 * MEAN]
    demo = Words(sparse="deferred")
    losses = []
    for _ in range(2 * MEAN):
        demo.train()
        losses.append(demo.measure().loss)
    assert found["losses"]["deferred"] == found["losses"]["dense"] == laziness.curve(np.array(losses, np.float32))
    assert found["losses"][LAZY] != found["losses"]["dense"]
    assert capsys.readouterr().out == laziness.cost(found) + "\n"
    pictures = []
    for change in (0, 0.1):
        found["losses"][LAZY][1] += change
        laziness.draw(found, tmp_path / "again.png")
        pictures.append(image.imread(tmp_path / "again.png"))
    assert (pictures[0] == image.imread(tmp_path / "laziness.png")).all()
    assert (pictures[1] != pictures[0]).any()


def test_a_bit_between_dense_and_deferred_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(sparse: str, steps: int) -> np.ndarray:
        return np.full(steps, 2 if sparse == "dense" else np.nextafter(np.float32(2), np.float32(3)), np.float32)

    monkeypatch.setattr(laziness, "losses", losses)
    with pytest.raises(SystemExit, match="dense and deferred"):
        laziness.main(["--steps", str(MEAN), "--results", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_committed_curve_says_what_the_readme_says() -> None:
    """The lazy curve is above the exact one from end to end, and ends above it at every rate."""
    found = json.loads((laziness.RESULTS / "laziness.json").read_text())
    exact, lazy = (np.array(found["losses"][sparse]) for sparse in ("deferred", LAZY))
    assert found["losses"]["dense"] == found["losses"]["deferred"]
    assert (lazy > exact).all()
    assert (np.array(found["last losses"][LAZY]) > found["last losses"]["dense"]).all()
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    there, all_steps = re.findall(r"after (\d+) of (\d+) steps", laziness.cost(found))[0]
    assert f"LazyAdam leaves them alone, and here needs {all_steps} steps for Adam's {there}" in readme
