"""The laws as a test module: ``pytest --pyargs pyroflows.testing.suite``.

Without options it checks every registered name of other packages; ``--pyroflows-names a,b`` names some,
``--pyroflows-all`` adds those of pyroflows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pyroflows import plugins
from pyroflows.errors import UnknownPlugin
from pyroflows.testing.laws import check_distribution, check_guide, check_transform

__all__ = ["SuiteCase", "cases", "test_laws"]

_CHECKS: Mapping[str, Any] = {
    "pyroflows.transforms": check_transform,
    "pyroflows.distributions": check_distribution,
    "pyroflows.guides": check_guide,
}


class SuiteCase(NamedTuple):
    """One variant of one registered name."""

    group: str
    name: str
    variant: int

    @property
    def label(self) -> str:
        """What pytest calls it."""
        short = self.group.removeprefix("pyroflows.")
        return f"{short}-{self.name}" + (f"-{self.variant}" if self.variant else "")


def cases(names: Sequence[str] = (), everything: bool = False) -> list[SuiteCase]:
    """Every variant of the names asked for, or of all third-party names.

    Raises:
        UnknownPlugin: a name is not registered.
    """
    infos = [info for info in plugins.report() if info.status != "BLOCKED"]
    chosen = [info for info in infos if everything or info.status != "BUILT-IN"]
    if names:
        chosen = [info for info in infos if info.name in names or info.address in names]
        missing = set(names) - {info.name for info in chosen} - {info.address for info in chosen}
        if missing:
            known = ", ".join(sorted({info.name for info in infos}))
            raise UnknownPlugin(f"no plugin {', '.join(sorted(missing))}. Installed: {known}.")
    return [
        SuiteCase(info.group, info.name, variant)
        for info in chosen
        for variant in range(_variants(info.group, info.name))
    ]


def _variants(group: str, name: str) -> int:
    """How many variants a name has; 1 for one that cannot be imported, whose test will say why."""
    try:
        return len(getattr(plugins.get(group, name), "variants", ({},)))
    except Exception:
        return 1


def test_laws(pyroflows_case: SuiteCase) -> None:
    """A registered name keeps every law."""
    group, name, variant = pyroflows_case
    variants: Sequence[Mapping[str, Any]] = getattr(plugins.get(group, name), "variants", ({},))
    _CHECKS[group](name, variants=(variants[variant],))
