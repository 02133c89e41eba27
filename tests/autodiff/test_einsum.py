"""numpy.einsum."""

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.autodiff.einsum import explicit
from gpu_adam.devices import Device

from .cases import DerivativeTests, both

SUBSCRIPTS = {
    "ij,jk->ik": ((3, 4), (4, 2)),
    "ij,jk": ((3, 4), (4, 2)),
    "i,i": ((4,), (4,)),
    "i,j->ij": ((3,), (2,)),
    "bij,bjk->bik": ((2, 3, 4), (2, 4, 2)),
    "...ij,...jk->...ik": ((2, 3, 4), (4, 2)),
    "i...->...": ((3, 4),),
    "ij->ji": ((3, 4),),
    "ij->i": ((3, 4),),
    "ij->": ((3, 4),),
    "ij,k->i": ((3, 4), (2,)),
    "ii": ((3, 3),),
    "ii->i": ((3, 3),),
    "iij->j": ((3, 3, 2),),
    "iii->i": ((2, 2, 2),),
    "ij,j,i->": ((3, 4), (4,), (3,)),
    "a b, b c -> a c": ((2, 3), (3, 2)),
    "ij,ij->ij": ((1, 4), (3, 4)),
    "ij,ik->jk": ((0, 4), (0, 3)),
}
# HIPS autograd knows neither repeated letters nor stretched axes, and fails at empty ones.
IN_HIPS = ("ij,jk->ik", "i,i", "i,j->ij", "bij,bjk->bik", "ij->ji", "ij->i", "ij,k->i", "ij,j,i->")


class TestEinsum(DerivativeTests):
    """All kinds of subscripts."""

    cases = (
        *(
            one
            for subscripts, shapes in SUBSCRIPTS.items()
            for one in both(
                subscripts, lambda np, *a, s=subscripts: np.einsum(s, *a), *shapes, hips=subscripts in IN_HIPS
            )
        ),
        *both(
            "optimised", lambda np, *a: np.einsum("ij,jk,kl->il", *a, optimize=True), (2, 3), (3, 4), (4, 2), hips=False
        ),
    )


def test_explicit_form(device: Device) -> None:
    assert explicit("...ij, ...jk", [4, 2]) == (["abij", "jk"], "abik")
    assert explicit("b...,a...->...", [2, 1]) == (["bc", "a"], "c")


def test_sublist_form_is_refused(device: Device) -> None:
    x = Variable(np.ones((2, 2)))
    with pytest.raises(TypeError, match="subscripts as a string"):
        value_and_grad(lambda: np.sum(np.einsum(x, [0, 1])), x)
