"""The laws that every transform, flow and guide must hold, as functions and as a pytest plugin.

pytest loads `pyroflows.testing.pytest_plugin` in every run, so nothing is imported here before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyroflows.testing.laws import check, check_distribution, check_guide, check_transform
    from pyroflows.testing.report import Report

__all__ = ["Report", "check", "check_distribution", "check_guide", "check_transform"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "report" if name == "Report" else "laws"
        return getattr(importlib.import_module(f"pyroflows.testing.{home}"), name)
    raise AttributeError(f"module 'pyroflows.testing' has no attribute {name!r}")
