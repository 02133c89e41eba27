"""Runs every test that asks for a `case` on each case of its class."""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.cls.cases, ids=str)  # type: ignore[union-attr]
