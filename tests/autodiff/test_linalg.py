"""Products and linear algebra."""

import itertools
from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.autodiff_seam import current_tracer
from gpu_adam.devices import Device

from .cases import Case, DerivativeTests, both, case, of_matrix, random, regular


class TestProducts(DerivativeTests):
    """Products and diagonals."""

    cases = (
        *(
            one
            for label, shapes in {
                "2-2": ((3, 4), (4, 2)),
                "1-1": ((4,), (4,)),
                "1-2": ((4,), (4, 2)),
                "2-1": ((3, 4), (4,)),
                "3-2": ((2, 3, 4), (4, 2)),
                "2-3": ((3, 4), (2, 4, 2)),
                "3-1": ((2, 3, 4), (4,)),
                "1-3": ((4,), (2, 4, 3)),
                "broadcast": ((2, 1, 3, 4), (3, 4, 2)),
                "zero-size": ((3, 0), (0, 2)),
            }.items()
            for one in both(
                f"matmul-{label}", lambda np, a, b: np.matmul(a, b) + a @ b, *shapes, hips=label != "zero-size"
            )
        ),
        *(
            one
            for shapes in (((3, 4), (4, 2)), ((4,), (4,)), ((3, 4), ()), ((2, 3, 4), (4,)), ((2, 3, 4), (5, 4, 2)))
            for one in both(f"dot-{len(shapes[0])}-{len(shapes[1])}", lambda np, a, b: np.dot(a, b), *shapes)
        ),
        *both("inner", lambda np, a, b: np.inner(a, b), (2, 4), (3, 4)),
        *both("dot-method", lambda np, a, b: (a * 1).dot(b), (2, 3), (3,), hips=False),
        *both("outer", lambda np, a, b: np.outer(a, b), (3,), (2,)),
        *both("cross", lambda np, a, b: np.cross(a, b) + np.linalg.cross(b, a * a), (2, 3), (3,), hips=False),
        *both("cross-axes", lambda np, a, b: np.cross(a, b, 0, 1, 0), (3, 2), (2, 3), hips=False),
        *both("cross-axis", lambda np, a, b: np.cross(a, b, axis=0), (3, 2), (3, 2), hips=False),
        *both("outer-flattens", lambda np, a, b: np.outer(a, b), (3,), (2, 2), hips=False),
        *both("multiply-outer", lambda np, a, b: np.multiply.outer(a, b), (3,), (2, 2), hips=False),
        *both("vdot", lambda np, a, b: np.vdot(a, b), (3, 2), (3, 2), hips=False),
        *(
            [  # since NumPy 2.2
                *both("matvec", lambda np, a, b: np.matvec(a, b), (2, 3, 4), (4,), hips=False),
                *both("vecmat", lambda np, a, b: np.vecmat(a, b), (3,), (2, 3, 4), hips=False),
            ]
            if hasattr(np, "matvec")
            else []
        ),
        *both("vecdot", lambda np, a, b: np.vecdot(a, b), (3, 2), (2,), hips=False),
        *both("kron", lambda np, a, b: np.kron(a, b), (2, 3), (3, 2)),
        *both("tensordot", lambda np, a, b: np.tensordot(a, b), (2, 3, 4), (3, 4, 5)),
        *both("tensordot-0", lambda np, a, b: np.tensordot(a, b, 0), (2,), (3,)),
        *both("tensordot-axes", lambda np, a, b: np.tensordot(a, b, axes=([2, 0], [0, -1])), (2, 3, 4), (4, 5, 2)),
        *both("trace", lambda np, x: np.trace(x) + np.trace(x, 1) * (x * 2).trace(), (3, 4)),
        *both("trace-axes", lambda np, x: np.trace(x, -1, 2, 0), (3, 2, 4), hips=False),
        *both("diagonal", lambda np, x: np.diagonal(x, 1) * (x * 2).diagonal(-1)[..., :1], (4, 3), hips=False),
        *both("diagonal-axes", lambda np, x: np.diagonal(x, 0, -1, 0), (3, 2, 4), hips=False),
        *both("diag", lambda np, x: np.diag(np.diag(x, 1), -1), (3, 4), hips=False),
        *both(
            "multi_dot",
            lambda np, *arrays: np.linalg.multi_dot(arrays),
            *((5, 2), (2, 6), (6, 3), (3, 4)),
            hips=False,
        ),
        *both("multi_dot-vectors", lambda np, *arrays: np.linalg.multi_dot(arrays), (2,), (2, 6), (6,), hips=False),
        *both(
            "of-linalg",
            lambda np, x, y: (
                np.linalg.diagonal(x, offset=1)
                + np.linalg.trace(x, offset=-1)[:, None]
                + np.linalg.cross(y, x[..., :3])[:, 0, :2]
                + np.linalg.cross(np.linalg.matrix_transpose(y), x[0, :3, :3], axis=-2)[:, 0, :2]
                + np.linalg.vecdot(y, y)[:, :2]
                + np.linalg.matmul(y, x)[:, 1, :2]
                + np.linalg.tensordot(y, x, axes=([1, 2], [2, 1]))[:, :1]
                + np.linalg.outer(x[0, 0], y[0, 0])[:2, :2]
            ),
            (2, 3, 3),
            (2, 3, 3),
            hips=False,
        ),
    )


class TestLinearAlgebra(DerivativeTests):
    """On one matrix and on stacks."""

    cases = (
        *of_matrix("inv", lambda np, a: np.linalg.inv(a)),
        *of_matrix("det", lambda np, a: np.linalg.det(a)),
        *of_matrix("slogdet", lambda np, a: np.linalg.slogdet(a)[1], hips=False),
        *of_matrix("slogdet-sign", lambda np, a: np.linalg.slogdet(a)[0] * np.linalg.slogdet(a)[1], hips=False),
        *of_matrix("solve", lambda np, a, b: np.linalg.solve(a, b), random((3, 2)), hips=False),
        case("solve-vector", lambda np, a, b: np.linalg.solve(a, b), regular(3, 3), (3,)),
        Case(
            "solve-complex",
            lambda np, a, b: np.linalg.solve(a, b),
            (regular(2, 3, 3, is_complex=True), random((2, 3, 2), True)),
        ),
        *of_matrix(
            "matrix_power", lambda np, a: np.linalg.matrix_power(a, 5) + np.linalg.matrix_power(a, -2), hips=False
        ),
        *(
            Case(f"pinv-{label}{'-complex' * c}", function, (random(shape, c, "pinv"),), hips=False)
            for label, shape in {"tall": (5, 3), "wide": (3, 5), "stack": (2, 4, 3)}.items()
            for function in (lambda np, a: np.linalg.pinv(a, rcond=1e-6),)
            for c in (False, True)
        ),
        *of_matrix("pinv-rtol", lambda np, a: np.linalg.pinv(a, rtol=None) + np.linalg.pinv(a, rtol=1e-5), hips=False),
        # A product of two narrow matrices has their rank however they change.
        *both("pinv-rank-2", lambda np, a, b: np.linalg.pinv(np.matmul(a, b), 1e-5), (5, 2), (2, 4), hips=False),
        *both(
            "lstsq",
            lambda np, a, b: np.sum(np.linalg.lstsq(a, b)[0] ** 2) + np.sum(np.linalg.lstsq(a, b)[1] ** 2),
            (5, 3),
            (5, 2),
            hips=False,
        ),
        *both(
            "lstsq-vector",
            lambda np, a, b: np.linalg.lstsq(a, b)[0] * np.linalg.lstsq(a, b, -1)[1] + np.linalg.lstsq(a, b, 1e-3)[3],
            (5, 3),
            (5,),
            hips=False,
        ),
        *both("lstsq-wide", lambda np, a, b: np.linalg.lstsq(a, b)[0], (3, 5), (3,), hips=False),
    )


def test_determinant_of_singular_matrices(device: Device) -> None:
    """The gradient is the matrix of cofactors; of rank n - 2 it is 0."""
    start = np.stack([np.arange(9.0).reshape(3, 3) + np.eye(3), np.diag([2.0, 0.0, 3.0]), np.diag([0.0, 0.0, 3.0])])
    a = Variable(start)
    with np.errstate(all="raise"):
        _, gradient = value_and_grad(lambda: np.sum(np.linalg.det(a)), a)
    expected = [np.linalg.det(start[0]) * np.linalg.inv(start[0]).T, np.diag([0.0, 6.0, 0.0]), np.zeros((3, 3))]
    np.testing.assert_allclose(device.numpy(gradient), expected, atol=1e-12)


@pytest.mark.parametrize("is_complex", [False, True])
def test_determinant_of_a_singular_matrix_in_any_position(device: Device, is_complex: bool) -> None:
    """A row of zeros: its determinant is 0 to the last bit, and so is none of its cofactors."""
    start = random((4, 4), is_complex)
    start[2] = 0
    a = Variable(start)
    _, gradient = value_and_grad(lambda: np.linalg.det(a).real, a)
    rest = [np.delete(np.delete(start, 2, 0), column, 1) for column in range(4)]
    expected = np.zeros((4, 4), start.dtype)
    expected[2] = [(-1) ** column * np.conj(np.linalg.det(minor)) for column, minor in enumerate(rest)]
    np.testing.assert_allclose(device.numpy(gradient), expected, atol=1e-12)


def test_determinant_below_the_range(device: Device) -> None:
    """Not of a singular matrix: its product of diagonal elements is too small for a number, its cofactors are not."""
    a = Variable(1e-120 * np.eye(3))
    value, gradient = value_and_grad(lambda: np.linalg.det(a), a)
    assert float(value) == 0
    np.testing.assert_allclose(device.numpy(gradient), 1e-240 * np.eye(3), rtol=1e-12)


@pytest.mark.parametrize("is_complex", [False, True])
def test_logarithms_of_determinants_that_are_0(device: Device, is_complex: bool) -> None:
    """Not a number where the loss looks at it, 0 where it does not; the other matrices are not concerned."""
    start = np.stack([np.diag([2.0, 0.0]), np.diag([2.0, 4.0])]).astype(complex if is_complex else float)
    a = Variable(start)

    def chosen() -> Any:
        sign, logarithm = np.linalg.slogdet(a)
        return np.sum(np.where(np.abs(sign) == 0, 0, logarithm) + sign.real)

    _, gradient = value_and_grad(chosen, a)
    np.testing.assert_allclose(device.numpy(gradient), [np.zeros((2, 2)), np.diag([0.5, 0.25])])
    _, gradient = value_and_grad(lambda: np.sum(np.linalg.slogdet(a)[1]), a)
    found = device.numpy(gradient)
    assert np.isnan(found[0]).any()
    np.testing.assert_allclose(found[1], np.diag([0.5, 0.25]))


@pytest.mark.parametrize("shapes", [((5, 3), (5,)), ((5, 3), (5, 2)), ((3, 5), (3,)), ((3, 5), (3, 2))])
def test_least_squares_returns_what_numpy_does(device: Device, shapes: Any) -> None:
    """Shapes too: there are residuals only of more equations than unknowns."""
    a, b = (Variable(random(shape, seed=shapes)) for shape in shapes)
    found: list[Any] = []

    def loss() -> Any:
        found.extend(np.linalg.lstsq(a, b))
        return np.sum(found[0])

    value_and_grad(loss, [a, b])
    for result, expected in zip(found, np.linalg.lstsq(a.numpy(), b.numpy()), strict=True):
        assert np.shape(result) == np.shape(expected)
        plain = result.value if hasattr(result, "value") else result
        np.testing.assert_allclose(getattr(plain, "get", lambda: plain)(), expected)  # noqa: B023  # called at once


def test_chains_of_matrices_are_multiplied_in_the_cheapest_order(device: Device) -> None:
    """No product in between is larger than need be."""
    sizes = [30, 35, 15, 5, 10, 20, 25]  # of the example in the book
    matrices = [Variable(random((m, n))) for m, n in itertools.pairwise(sizes)]
    shapes: list[Any] = []

    def loss() -> Any:
        result = np.linalg.multi_dot(matrices)
        tape: Any = current_tracer.get()
        shapes.extend(node.shape for node in tape.nodes)
        return np.sum(result)

    value_and_grad(loss, matrices)
    assert sorted(shapes) == [(5, 20), (5, 25), (30, 5), (30, 25), (35, 5)]


@pytest.mark.filterwarnings("ignore:Arrays of 2-dimensional vectors")
def test_cross_products_of_vectors_in_a_plane(device: Device) -> None:
    """Of two of them the one number across, of a mixed pair a vector; numpy.linalg.cross takes neither."""
    a, b, c = (Variable(random(shape, seed=shape)) for shape in ((4, 2), (2,), (4, 3)))
    _, (of_a, of_b) = value_and_grad(lambda: np.sum(np.cross(a, b)), [a, b])
    np.testing.assert_allclose(device.numpy(of_a), np.tile([b.numpy()[1], -b.numpy()[0]], (4, 1)))
    np.testing.assert_allclose(device.numpy(of_b), [-a.numpy()[:, 1].sum(), a.numpy()[:, 0].sum()])
    value, (of_b, of_c) = value_and_grad(lambda: np.sum(np.cross(b, c)), [b, c])
    assert float(value) == pytest.approx(np.sum(np.cross(np.append(b.numpy(), 0), c.numpy())))
    (x, y), total = b.numpy(), c.numpy().sum(axis=0)
    np.testing.assert_allclose(device.numpy(of_c), np.tile([-y, x, y - x], (4, 1)))
    np.testing.assert_allclose(device.numpy(of_b), [total[1] - total[2], total[2] - total[0]])
    with pytest.raises(ValueError, match=r"vectors of 3 numbers \(got 2 and 3\)"):
        value_and_grad(lambda: np.sum(np.linalg.cross(b, c)), b)
