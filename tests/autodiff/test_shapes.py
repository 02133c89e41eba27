"""Operations that move elements about."""

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import DerivativeTests, both, case


class TestShapes(DerivativeTests):
    """Each function, and the methods."""

    cases = (
        *both("reshape", lambda np, x: np.reshape(x, (4, -1)) * x.reshape(4, 3), (3, 4)),
        *both("reshape-fortran", lambda np, x: np.reshape(x, (4, 3), order="F"), (3, 4)),
        *both("reshape-method", lambda np, x: (x * 2).reshape((2, 6)) + (x * 2).reshape(2, -1), (3, 4)),
        *both("ravel", lambda np, x: np.ravel(x) * (x * 2).ravel() * (x * 2).flatten(), (3, 4), hips=False),
        *both("transpose", lambda np, x: np.transpose(x) * (x * 2).T, (3, 4)),
        *both(
            "transpose-axes",
            lambda np, x: np.transpose(x, (2, 0, 1)) + (x * 2).transpose(-1, 0, 1),
            (2, 3, 4),
            hips=False,
        ),
        *both("swapaxes", lambda np, x: np.swapaxes(x, 0, 2) + (x * 2).swapaxes(-1, 0), (2, 3, 4)),
        *both("moveaxis", lambda np, x: np.moveaxis(x, 0, -1), (2, 3, 4)),
        *both("moveaxis-two", lambda np, x: np.moveaxis(x, (0, 2), (1, 0)), (2, 3, 4), hips=False),
        *both("matrix_transpose", lambda np, x: np.matrix_transpose(x) + (x * 2).mT, (2, 3, 4), hips=False),
        *both("expand-squeeze", lambda np, x: np.squeeze(np.expand_dims(x, 1), 1) * (x * 2)[:, None].squeeze(), (3, 4)),
        *both("atleast", lambda np, x: np.atleast_1d(x) + np.atleast_2d(x) + np.atleast_3d(x), ()),
        *both("broadcast_to", lambda np, x: np.broadcast_to(x, (2, 3, 4)), (3, 1), hips=False),
        *both("broadcast_arrays", lambda np, a, b: np.multiply(*np.broadcast_arrays(a, b)), (3, 1), (4,), hips=False),
        *both("flip", lambda np, x: np.flip(x, 0) * np.flipud(x) * np.fliplr(x), (3, 4), hips=False),
        *both("flip-all", lambda np, x: np.flip(x) * np.flip(x, (0, 1)), (3, 4), hips=False),
        *(one for k in range(4) for one in both(f"rot90-{k}", lambda np, x, k=k: np.rot90(x, k), (3, 4), hips=k > 0)),
        *both("roll", lambda np, x: np.roll(x, 2) * np.roll(x, 1, axis=0), (3, 4)),
        *both("roll-two", lambda np, x: np.roll(x, (1, -2), axis=(0, 1)), (3, 4), hips=False),
        *both("add-outer", lambda np, a, b: np.add.outer(a, b) * np.multiply.outer(a, b), (2, 3), (4,), hips=False),
        case(
            "divide-outer",
            lambda np, a: np.divide.outer(a, [1.0, 2.0]) + np.power.outer(2.0, a)[:, None],
            (3,),
            hips=False,
            narrow=False,
        ),
        *both("concatenate", lambda np, a, b: np.concatenate([a, b, a], axis=1), (2, 3), (2, 2)),
        *both("concatenate-flat", lambda np, a, b: np.concatenate((a, b), axis=None), (2, 3), (2, 2), hips=False),
        *both("append", lambda np, a, b: np.append(a, b, axis=0), (1, 3), (2, 3)),
        *both("stack", lambda np, a, b: np.stack([a, b], axis=-1), (2, 3), (2, 3), hips=False),
        *both("vstack", lambda np, a, b: np.vstack([a, b]), (3,), (2, 3)),
        *both("hstack", lambda np, a, b: np.hstack([a, b]), (2, 1), (2, 3)),
        *both("hstack-vectors", lambda np, a, b: np.hstack([a, b]), (1,), (3,)),
        *both("dstack", lambda np, a, b: np.dstack([a, b]), (2, 3), (2, 3), hips=False),
        *both("column_stack", lambda np, a, b: np.column_stack([a, b]), (2,), (2, 3)),
        *both("split", lambda np, x: np.split(x, 3, axis=1)[1] * np.split(x, [1, 2], axis=1)[0], (2, 3)),
        *both("array_split", lambda np, x: np.array_split(x, 3)[1], (5, 2)),
        *both(
            "vhd-split",
            lambda np, x: np.vsplit(x, 2)[0] * np.dsplit(x, 2)[1][:2] + np.hsplit(x, 2)[1][:2, :1],
            (4, 4, 2),
            hips=False,
        ),
        *both("unpacked", lambda np, x: sum(row * row for row in +x), (3, 4), hips=False),
        *both("repeat", lambda np, x: np.repeat(x, 2, axis=1) * (x * 2).repeat(2, 1), (3, 4)),
        *both("repeat-flat", lambda np, x: np.repeat(x, 2), (3, 4)),
        case("repeat-each", lambda np, x: np.repeat(x, [1, 0, 3], axis=0), (3, 4), hips=False),
        *both("delete", lambda np, x: np.delete(x, [0, -1, 0], axis=1) * np.delete(x, slice(2), 1), (3, 4), hips=False),
        *both("delete-flat", lambda np, x: np.delete(x, 5), (3, 4), hips=False),
        *both("insert", lambda np, x, v: np.insert(x, 1, v, axis=1), (3, 4), (3,), hips=False),
        *both("insert-each", lambda np, x, v: np.insert(x, [0, 3, 3], v, axis=0), (3, 4), (3, 1), hips=False),
        *both("insert-many", lambda np, x, v: np.insert(x, [2], v, axis=-1), (3, 4), (3, 2), hips=False),
        *both(
            "insert-flat", lambda np, x, v: np.insert(x, -2, v) + np.insert(x, slice(1, 2), 7), (2, 3), (), hips=False
        ),
        case("insert-into-constants", lambda np, v: np.insert([1.0, 2.0], [1, 2], v), (2,), hips=False, narrow=False),
        *both("tile", lambda np, x: np.tile(x, (2, 1, 3)) + np.tile(x, 3), (3, 4), hips=False),
        *both("tril-triu", lambda np, x: np.tril(x) * 2 + np.triu(x, 1), (3, 4)),
        *both("pad", lambda np, x: np.pad(x, ((1, 2), (0, 3)), "constant"), (3, 4)),
        case("pad-value", lambda np, x: np.pad(x, 2, constant_values=3.0), (3, 4), hips=False),
        *(
            case(f"pad-{mode}", lambda np, x, mode=mode: np.pad(x, ((2, 1), (0, 3)), mode=mode), (3, 4), hips=False)
            for mode in ("edge", "reflect", "symmetric", "wrap")
        ),
        *both(
            "zero-size", lambda np, x: np.concatenate([np.transpose(x), x.reshape(4, 0)], axis=1), (0, 4), hips=False
        ),
    )


def test_unsupported_padding_says_what_to_do(device: Device) -> None:
    x = Variable(np.ones(3))
    with pytest.raises(NotImplementedError, match=r'numpy\.pad with mode="mean".*register_vjp.*grad_fn'):
        value_and_grad(lambda: np.sum(np.pad(x, 2, mode="mean")), x)


def test_uneven_split(device: Device) -> None:
    x = Variable(np.ones(5))
    with pytest.raises(ValueError, match="equal division"):
        value_and_grad(lambda: np.sum(np.split(x, 2)[0]), x)


def test_types_of_joined_parts(device: Device) -> None:
    x, y = Variable(np.ones(2, np.float32)), Variable(np.ones(2))
    _, gradients = value_and_grad(lambda: np.sum(np.concatenate([x, y, np.ones(1, like=y)]) ** 2), [x, y])
    assert [g.dtype for g in gradients] == [np.float32, np.float64]
