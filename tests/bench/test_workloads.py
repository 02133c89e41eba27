"""What is measured: the list of workloads, shapes of real models, and their values."""

import math

import numpy as np
import pytest

from gpu_adam import kernels
from gpu_adam.bench import shapes
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.workloads import Workload, many, named, workloads


@pytest.mark.parametrize(
    ("name", "variables", "elements"),
    [("gpt2", 148, 124_439_808), ("resnet50", 161, 25_557_032), ("dlrm_tables", 26, 33_762_577 * 16)],
)
def test_models_have_the_published_size(name: str, variables: int, elements: int) -> None:
    found = getattr(shapes, name)()
    assert len(found) == variables
    assert sum(math.prod(shape) for shape in found) == elements


def test_every_dtype_of_the_kernels_has_its_rows() -> None:
    found = workloads()
    for dtype in kernels.DTYPES:
        mine = [workload for workload in found if workload.dtype == dtype]
        assert {workload.amsgrad for workload in mine} == {False, True}
        assert any(workload.indices for workload in mine)
    assert {w.complex_mode for w in found if w.dtype == "complex64"} == set(kernels.COMPLEX_MODES)


def test_names_are_distinct_and_found() -> None:
    names = [workload.name for workload in workloads()]
    assert len(set(names)) == len(names)
    assert all(named(name) is not None for name in names)
    assert named("no such") is None


def test_values_are_nonzero_and_the_same_every_time() -> None:
    for dtype in kernels.DTYPES:
        one, again, other = (Inputs(Workload("w", many(2, 300, 5), dtype), number) for number in (0, 0, 1))
        assert one.theta(0).shape == one.gradient(1).shape == (300, 5)
        assert one.theta(0).dtype == kernels.dtype_named(dtype)
        assert np.abs(one.gradient(0)).min() >= 0.09
        assert (one.theta(1) == again.theta(1)).all()
        for its in (other.theta(0), one.gradient(0), one.theta(1)):
            assert (one.theta(0) != its).any()


def test_values_longer_than_a_block_repeat_it() -> None:
    assert Inputs(Workload("w", many(1, 2**21 + 5)), 3).theta(0).shape == (2**21 + 5,)


@pytest.mark.parametrize("zipf", [False, True])
def test_indices_lie_in_the_variable(zipf: bool) -> None:
    inputs = Inputs(Workload("w", many(2, 10_000, 4), indices=4096, zipf=zipf), 0)
    indices = inputs.indices(0)
    assert indices.dtype == np.int64
    assert indices.shape == (4096,)
    assert 0 <= indices.min() <= indices.max() < 10_000
    assert inputs.values(0).shape == (4096, 4)
    repeated = 4096 - len(np.unique(indices))
    assert repeated > 2000 if zipf else repeated < 1500
