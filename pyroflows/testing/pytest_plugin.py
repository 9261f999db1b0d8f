"""What pyroflows adds to pytest: two options and the parameters of ``pyroflows.testing.suite``.

pytest imports this module in every run of every package, so it imports nothing but pytest until the suite is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

__all__ = ["pytest_addoption", "pytest_generate_tests"]

_CASE = "pyroflows_case"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--pyroflows-names`` and ``--pyroflows-all``."""
    group = parser.getgroup("pyroflows", "the laws of pyroflows")
    group.addoption(
        "--pyroflows-names",
        default="",
        metavar="NAMES",
        help="registered names to check, separated by commas; every third-party name by default",
    )
    group.addoption("--pyroflows-all", action="store_true", help="check the names that come with pyroflows as well")


def pytest_generate_tests(metafunc: Any) -> None:
    """Gives the suite one test for each registered name and variant."""
    if _CASE not in metafunc.fixturenames or metafunc.module.__name__ != "pyroflows.testing.suite":
        return
    from pyroflows.testing.suite import cases

    wanted, everything = (metafunc.config.getoption(f"--pyroflows-{o}") for o in ("names", "all"))
    found = cases([name.strip() for name in wanted.split(",") if name.strip()], everything)
    metafunc.parametrize(_CASE, found, ids=[case.label for case in found])
