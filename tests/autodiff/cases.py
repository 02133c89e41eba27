"""How a derivative is tested: finite differences, HIPS autograd, dtypes, and staying on the device."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest

from gpu_adam import IndexedSlices, Variable
from gpu_adam.arrays import add_at
from gpu_adam.autodiff import gradients, tape
from gpu_adam.autodiff.rules import fit
from gpu_adam.devices import device_of, find_device


@dataclass(frozen=True)
class Case:
    """An operation at one point.

    Args:
        name: for the test's id.
        function: called as function(np, *arrays), where np is numpy or autograd.numpy.
        inputs: float64 or complex128 arrays.
        hips: whether HIPS autograd has the operation and agrees on it.
        narrow: whether it works in float32 without leaving it.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    hips: bool = True
    narrow: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def cotangent(self) -> Any:
        """A gradient of the result, the same in each run."""
        result = np.asarray(self.function(np, *self.inputs))
        return random(result.shape, result.dtype.kind == "c", seed=self.name + "cotangent")


def random(shape: Any, is_complex: bool = False, seed: object = 0) -> Any:
    """Normally distributed numbers, reproducible by seed."""
    generator = np.random.default_rng(zlib.crc32(repr((seed, shape)).encode()))
    real = generator.standard_normal(shape)
    return np.asarray(real + 1j * generator.standard_normal(shape) if is_complex else real)


def case(name: str, function: Callable[..., Any], *shapes: Any, **options: Any) -> Case:
    """A real case; `shapes` may also be arrays."""
    inputs = [s if isinstance(s, np.ndarray) else random(s, seed=(name, i)) for i, s in enumerate(shapes)]
    return Case(name, function, tuple(inputs), **options)


def both(name: str, function: Callable[..., Any], *shapes: Any, **options: Any) -> list[Case]:
    """The same operation on real and on complex arrays."""
    complex_inputs = tuple(random(s, True, seed=(name, i)) for i, s in enumerate(shapes))
    return [case(name, function, *shapes, **options), Case(f"{name}-complex", function, complex_inputs, **options)]


def regular(*shape: int, is_complex: bool = False) -> Any:
    """Well-conditioned matrices."""
    return random(shape, is_complex, "regular") + 4 * np.eye(shape[-1])


def of_matrix(name: str, function: Any, *more: Any, **options: Any) -> list[Case]:
    """One matrix and a stack of them, real and complex."""
    return [
        Case(
            f"{name}{'-stack' * (len(shape) > 2)}{'-complex' * c}",
            function,
            (regular(*shape, is_complex=c), *more),
            **options,
        )
        for shape in ((3, 3), (2, 3, 3))
        for c in (False, True)
    ]


def differentiate(case: Case, arrays: Any, cotangent: Any) -> list[Any]:
    """The gradients by the tape, dense."""
    variables = [variable(a) for a in arrays]
    _, pairs = gradients(lambda: case.function(np, *variables), variables, cotangent)
    return [dense(gradient, v.value) for gradient, v in pairs]


def variable(array: Any) -> Variable:
    """A variable over any kind of array."""
    return Variable.over(array, device_of(array) or find_device("host"))


def dense(gradient: Any, like: Any) -> Any:
    """A gradient as an array: 0 where there is none, summed where it is sparse."""
    total = np.zeros_like(like)
    if gradient is None:
        return total
    if not isinstance(gradient, IndexedSlices):
        assert gradient.shape == like.shape
        assert gradient.dtype == like.dtype
        assert type(gradient) is type(like)
        return gradient
    add_at(total, gradient.indices, gradient.values)
    return total


def finite_differences(case: Case, step: float = 1e-6) -> list[Any]:
    """Central differences of Re(sum(conj(cotangent) * result)), real and imaginary part of each element."""
    cotangent = np.conj(case.cotangent)

    def loss(position: int, moved: Any) -> float:
        arrays = [moved if i == position else a for i, a in enumerate(case.inputs)]
        return float(np.sum(cotangent * case.function(np, *arrays)).real)

    gradients = []
    for position, array in enumerate(case.inputs):
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            for direction in (1, 1j) if array.dtype.kind == "c" else (1,):
                delta = np.zeros_like(array)
                delta[index] = step * direction
                slope = (loss(position, array + delta) - loss(position, array - delta)) / (2 * step)
                gradient[index] += direction * slope
        gradients.append(gradient)
    return gradients


class DerivativeTests:
    """What every derivative must satisfy; a subclass gives the `cases`, see conftest.py."""

    cases: Sequence[Case] = ()

    def test_finite_differences(self, case: Case) -> None:
        """Central differences in float64."""
        found = differentiate(case, case.inputs, case.cotangent)
        for gradient, expected in zip(found, finite_differences(case), strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=2e-6, atol=2e-7)

    def test_hips_autograd(self, case: Case) -> None:
        """HIPS autograd, to rounding."""
        _, pullback = hips(case)
        found = differentiate(case, case.inputs, case.cotangent)
        # Its gradients, and the cotangents that it wants, are the complex conjugates.
        for gradient, expected in zip(found, pullback(np.conj(case.cotangent)), strict=True):
            np.testing.assert_allclose(gradient, np.conj(expected), rtol=1e-10, atol=1e-10)

    def test_device(self, case: Case, to_device: Callable[[Any], Any]) -> None:
        """On arrays that refuse NumPy, every gradient is such an array again, and the same."""
        found = differentiate(case, [to_device(a) for a in case.inputs], to_device(case.cotangent))
        for gradient, expected in zip(found, differentiate(case, case.inputs, case.cotangent), strict=True):
            np.testing.assert_allclose(gradient.get(), expected, rtol=1e-12, atol=1e-12)

    def test_single_precision(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """float32 and complex64 throughout: nothing computed on the way was wider."""
        wide = differentiate(case, case.inputs, case.cotangent)
        seen: set[Any] = set()

        def watched(gradient: Any, value: Any) -> Any:
            seen.update((gradient.dtype, value.dtype))
            return fit(gradient, value)

        monkeypatch.setattr(tape, "fit", watched)
        arrays = [narrowed(a) for a in case.inputs]
        found = differentiate(case, arrays, narrowed(case.cotangent))
        for gradient, expected in zip(found, wide, strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=2e-4)
        assert seen <= {np.dtype(np.float32), np.dtype(np.complex64)}


def narrowed(array: Any) -> Any:
    """The array in single precision."""
    return array.astype({"f": np.float32, "c": np.complex64}.get(array.dtype.kind, array.dtype))


def hips(case: Case) -> tuple[Any, Any]:
    """The same case differentiated by HIPS autograd: the result, and the pullback to all arguments."""
    argnums = tuple(range(len(case.inputs)))
    pullback, result = autograd.make_vjp(lambda *args: case.function(anp, *args), argnums)(*case.inputs)
    return result, pullback
