"""pyroflows: the normalizing-flow library of Pyro.

Every layer is a Pyro ``TransformModule``, found by name through an entry point; one object serves as a density
model, as a prior or likelihood inside a Pyro model, and as a variational guide.

Importing this module loads nothing else: each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyroflows import (
        archive,
        diagnostics,
        distributions,
        errors,
        guides,
        nets,
        numerics,
        plugins,
        testing,
        training,
        transforms,
    )
    from pyroflows.archive import load, save
    from pyroflows.distributions import Flow, FlowDistribution
    from pyroflows.guides import AutoFlow
    from pyroflows.numerics.record import recorded
    from pyroflows.plugins import available, flow, get, guide, transform
    from pyroflows.testing import check
    from pyroflows.training.fit import FitResult, fit
    from pyroflows.transforms import FlowTransform

__version__ = "0.1.0"

_HOME = {
    "AutoFlow": "guides",
    "FitResult": "training",
    "Flow": "distributions",
    "FlowDistribution": "distributions",
    "FlowTransform": "transforms",
    "available": "plugins",
    "check": "testing",
    "fit": "training",
    "flow": "plugins",
    "get": "plugins",
    "guide": "plugins",
    "load": "archive",
    "recorded": "numerics.record",
    "save": "archive",
    "transform": "plugins",
}
_PACKAGES = (
    "archive",
    "diagnostics",
    "distributions",
    "errors",
    "guides",
    "nets",
    "numerics",
    "plugins",
    "testing",
    "training",
    "transforms",
)

__all__ = [
    "AutoFlow",
    "FitResult",
    "Flow",
    "FlowDistribution",
    "FlowTransform",
    "archive",
    "available",
    "check",
    "diagnostics",
    "distributions",
    "errors",
    "fit",
    "flow",
    "get",
    "guide",
    "guides",
    "load",
    "nets",
    "numerics",
    "plugins",
    "recorded",
    "save",
    "testing",
    "training",
    "transform",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"pyroflows.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"pyroflows.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyroflows' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
