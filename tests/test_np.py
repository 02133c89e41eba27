"""gpu_adam.np: losses written with it run on every device, and what they make lies where the variables do."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest

import gpu_adam
from gpu_adam import Variable, np, value_and_grad
from gpu_adam.devices import Device

START = numpy.arange(9.0).reshape(3, 3) + 2 * numpy.eye(3)

LOSSES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    # The loss, and its gradient by hand.
    "arange": (lambda w: w * np.arange(3), lambda w: numpy.ones((3, 3)) * [0, 1, 2]),
    "zeros, where": (lambda w: np.where(w > 2, w, np.zeros(3)), lambda w: w > 2),
    "ones, concatenate": (lambda w: np.concatenate([w, np.ones((1, 3))]) ** 2, lambda w: 2 * w),
    "full, stack": (lambda w: np.stack([w, np.full((3, 3), 2.0)]), lambda w: numpy.ones((3, 3))),
    "linspace, matmul": (lambda w: np.matmul(w, np.linspace(0, 1, 3)), lambda w: numpy.ones((3, 1)) * [0, 0.5, 1]),
    "eye, einsum": (lambda w: np.einsum("ij,jk->ik", w, np.eye(3) * 3), lambda w: numpy.full((3, 3), 3.0)),
    "fft": (lambda w: np.abs(np.fft.fft2(w)) ** 2, lambda w: 18 * w),
    "fftfreq": (lambda w: w * np.fft.fftfreq(3), lambda w: numpy.ones((3, 1)) * [0, 1 / 3, -1 / 3]),
    "linalg": (lambda w: np.linalg.slogdet(w)[1], lambda w: numpy.linalg.inv(w).T),
    "asarray of a list": (lambda w: np.asarray([1.0, 2.0, 3.0]) * w, lambda w: numpy.ones((3, 3)) * [1, 2, 3]),
    "asarray of an array": (lambda w: np.asarray(START) * w, lambda w: START),
    "asarray of a variable": (lambda w: np.asarray(w) * np.asarray(+w), lambda w: 2 * w),
    "asarray with a dtype": (lambda w: np.asarray(w, np.float32), lambda w: numpy.ones((3, 3))),
    "array of a variable": (lambda w: np.array(w) * np.array(w * 2, copy=False), lambda w: 4 * w),
}


@pytest.mark.parametrize(("loss", "expected"), LOSSES.values(), ids=LOSSES)
def test_losses(device: Device, loss: Callable[[Any], Any], expected: Callable[[Any], Any]) -> None:
    w = Variable(START)
    _, gradient = value_and_grad(lambda: np.sum(loss(w)), w)
    assert type(gradient) is device.xp.ndarray
    numpy.testing.assert_allclose(device.numpy(gradient), expected(START), atol=1e-12)


def test_makers_work_outside_a_loss(device: Device) -> None:
    made = (
        np.zeros(3),
        np.arange(3),
        np.asarray(START),
        np.array([1, 2]),
        np.identity(2),
        np.hanning(4),
        np.fft.rfftfreq(4),
    )
    assert {type(array) for array in made} == {device.xp.ndarray}
    w = Variable(START)
    assert type(np.asarray(w)) is type(np.exp(w)) is device.xp.ndarray
    assert np.array(w) is not w.value


def test_where_an_array_lies_decides(device: Device) -> None:
    w = Variable(START)
    for like in (w, w.value):
        assert type(np.zeros(3, like=like)) is device.xp.ndarray
    assert type(np.linspace(w.value[0], w.value[1], 3)) is device.xp.ndarray


def test_the_rest_is_numpy() -> None:
    assert np.exp is numpy.exp
    assert np.fft.fft is numpy.fft.fft
    assert np.float32 is numpy.float32
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        np.nonesuch  # noqa: B018


def test_is_an_attribute_of_the_package_imported_when_asked_for() -> None:
    assert gpu_adam.np is np
    code = "import sys, gpu_adam; assert 'gpu_adam.np' not in sys.modules; gpu_adam.np.exp(1.0)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- NumPy's own functions with `like`
MAKERS = {
    "array": lambda like: numpy.array([1.0, 2.0], like=like),
    "asarray": lambda like: numpy.asarray([1.0, 2.0], like=like),
    "arange": lambda like: numpy.arange(1.0, 3.0, like=like),
    "zeros": lambda like: numpy.zeros(2, like=like),
    "ones": lambda like: numpy.ones(2, like=like),
    "full": lambda like: numpy.full(2, 3.0, like=like),
    "eye": lambda like: numpy.eye(2, like=like),
    "identity": lambda like: numpy.identity(2, like=like),
    "tri": lambda like: numpy.tri(2, like=like),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_like_a_variable_or_a_recorded_value(device: Device, make: Callable[[Any], Any]) -> None:
    w = Variable(numpy.array([3.0, 4.0]))
    made = []

    def loss() -> Any:
        made.extend([make(w), make(w * 2)])
        return np.sum(w * made[0])

    _, gradient = value_and_grad(loss, w)
    made.append(make(w))
    assert {type(array) for array in made} == {device.xp.ndarray}
    expected = numpy.asarray(make(None))
    for array in made:
        numpy.testing.assert_array_equal(device.numpy(array), expected)
    numpy.testing.assert_array_equal(device.numpy(gradient), expected if expected.ndim == 1 else expected.sum(0))
