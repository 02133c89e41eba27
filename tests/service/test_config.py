"""What a service is to own, from a TOML file: values, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.service.config import read_config
from service.running import PLAIN


def written(directory: Path, text: str) -> Path:
    path = directory / "service.toml"
    path.write_text(text)
    return path


def test_everything(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", np.arange(3.0))
    text = """
    device = "host"
    client_memory = 1_000_000
    [optimizer.main]
    policy = "all_of=2"
    lost_client = "continue"
    checkpoint = {directory = "run", every_steps = 1000, every_seconds = 60.0, keep = 3}
    [optimizer.main.config]
    amsgrad = true
    weight_decay = 0.01
    [optimizer.main.config.learning_rate]
    class_name = "ExponentialDecay"
    config = {initial_learning_rate = 0.1, decay_steps = 10, decay_rate = 0.5}
    [optimizer.main.variables]
    w = {shape = [4, 2], dtype = "bfloat16"}
    z = {shape = [], dtype = "complex64"}
    b = {initial = "b.npy"}
    c = {initial = "b.npy", dtype = "float16"}
    [optimizer.other.variables]
    w = {shape = 3}
    """
    found = read_config(written(tmp_path, text))
    assert found.device.name == "host"
    assert found.client_memory == 1_000_000
    main, other = found.optimizers.values()
    assert main.adam.amsgrad
    assert main.adam.get_config()["learning_rate"]["class_name"] == "ExponentialDecay"
    assert main.policy.text == "all_of=2"
    assert main.checkpoint == {"directory": tmp_path / "run", "every_steps": 1000, "every_seconds": 60.0, "keep": 3}
    kinds = {name: (value.dtype.name, value.shape) for name, value in main.values.items()}
    assert kinds == {
        "w": ("bfloat16", (4, 2)),
        "z": ("complex64", ()),
        "b": ("float64", (3,)),
        "c": ("float16", (3,)),
    }
    np.testing.assert_array_equal(main.values["b"], [0, 1, 2])
    assert other.policy.text == "on_push"
    assert other.checkpoint is None
    assert {name: (value.dtype.name, value.shape) for name, value in other.values.items()} == {"w": ("float32", (3,))}


V = "[optimizer.main.variables]\nw = "


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must have an optimizer"),
        ("x = ", "must be TOML"),
        ("[optimizers.main]", "must have no other entries than device, client_memory, optimizer (got optimizers)"),
        ("optimizer = 3", "optimizer must be a table (got 3)"),
        ("[optimizer]\nmain = 3", "optimizer.main must be a table"),
        ("[optimizer.main]", "optimizer.main.variables must be a table (got nothing)"),
        ("[optimizer.main.variables]", "must name one at least"),
        ("[optimizer.main]\npolicies = 3\n" + V + "{shape = [1]}", "must have no other entries than config, policy"),
        ("[optimizer.main]\nconfig = {rate = 3}\n" + V + "{shape = [1]}", "keyword 'rate' must be one of"),
        ("[optimizer.main]\nconfig = {beta_1 = 2}\n" + V + "{shape = [1]}", "beta_1 must lie in [0, 1)"),
        (
            '[optimizer.main]\nconfig = {sparse_update = "deferred"}\n' + V + "{shape = [1]}",
            'sparse_update must be "dense"',
        ),
        (
            "[optimizer.main.config.loss_scale]\ninitial = 1024.0\n" + V + "{shape = [1]}",
            "config",
        ),
        (
            '[optimizer.main.config.learning_rate]\nclass_name = "CosineDecay"\n' + V + "{shape = [1]}",
            "optimizer.main.config",
        ),
        (V + "{shape = [100_000_000_000_000]}", "variables.w must be what this machine can make"),
        (V + "{shape = [4_611_686_018_427_387_904, 4]}", "variables.w must be what this machine can make"),
        (
            "".join(
                f'[optimizer.{n}]\ncheckpoint = {{directory = "x"}}\n[optimizer.{n}.variables]\nw = {{shape = [1]}}\n'
                for n in "ab"
            ),
            "must have a checkpoint.directory for each optimizer",
        ),
        ('[optimizer.main]\npolicy = "each"\n' + V + "{shape = [1]}", 'policy must be "on_push", "all_of=N" or'),
        ('[optimizer.main]\nlost_client = "x"\n' + V + "{shape = [1]}", "lost_client must be one of fail, continue"),
        ("client_memory = 0\n" + V + "{shape = [1]}", "client_memory must be a number of bytes >= 1"),
        ('client_memory = "1"\n' + V + "{shape = [1]}", "client_memory must be a number of bytes >= 1"),
        ("[optimizer.main]\ncheckpoint = 3\n" + V + "{shape = [1]}", "checkpoint must be a table"),
        ("[optimizer.main]\ncheckpoint = {}\n" + V + "{shape = [1]}", "directory must be the path of a directory"),
        (
            '[optimizer.main]\ncheckpoint = {folder = "x"}\n' + V + "{shape = [1]}",
            "must have no other entries than dir",
        ),
        (V + "3", "variables.w must be a table"),
        (V + "{}", "must have either shape or initial"),
        (V + '{shape = [1], initial = "b.npy"}', "must have either shape or initial"),
        (V + "{shape = [-1]}", "shape must be a number >= 0"),
        (V + '{shape = "x"}', "shape must be a number >= 0"),
        (V + '{shape = [1], dtype = "float12"}', "dtype must be a NumPy dtype"),
        (V + '{shape = [1], dtype = "object"}', "must have a dtype of float16, bfloat16"),
        (V + '{shape = [1], dtype = "U3"}', "must have a dtype of float16, bfloat16"),
        (V + "{initial = 3}", "initial must be the path of a file"),
        (V + '{initial = "service.toml"}', "initial must be a file of numpy.save"),
        (V + '{initial = "objects.npy"}', "initial must be a file of numpy.save"),
        (V + '{initial = "several.npz"}', "initial must be a file of numpy.save"),
        ('device = "tpu"\n' + V + "{shape = [1]}", "device must be 'auto', 'host', 'cuda' or 'cuda:N'"),
    ],
)
def test_refusals(tmp_path: Path, text: str, rule: str) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", np.zeros(3))
    with pytest.raises((ArgumentTypeError, ArgumentValueError)) as refused:
        read_config(written(tmp_path, text))
    assert rule in str(refused.value)


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "service.toml")
    with pytest.raises(FileNotFoundError, match=r"nonesuch\.npy"):
        read_config(written(tmp_path, V + '{initial = "nonesuch.npy"}'))


def test_the_device_of_the_command_wins(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, 'device = "tpu"\n' + PLAIN), "host").device.name == "host"
