"""Entry points of installed packages: one of our names each, imported when it is asked for.

Names come from package metadata, read once, at first use. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from threading import RLock
from typing import Any, Literal, NamedTuple

from pyroflows.errors import PluginConfigError, PluginContractError, PluginLoadError

__all__ = [
    "API_VERSION",
    "GROUPS",
    "KINDS",
    "Entry",
    "PluginInfo",
    "address_of",
    "forget",
    "nearest",
    "normalise",
    "registry",
]

GROUPS = ("pyroflows.transforms", "pyroflows.distributions", "pyroflows.guides")
API_VERSION = 1
Status = Literal["OK", "BUILT-IN", "CONFLICT", "BLOCKED", "BROKEN"]


class Kind(NamedTuple):
    """What the entries of a group are called, look like, must build and are checked by."""

    noun: str
    head: str
    law: str
    needs: tuple[str, ...]


_HEAD = "factory(input_dim, *, context_dim=0, **options)"
_MAP = ("forward_and_log_det", "inverse_and_log_det", "domain", "codomain", "condition")
_FLOW = ("transform", "base", "forward", "state_dict", "context_dim")
KINDS = {
    GROUPS[0]: Kind("transform", _HEAD, "check_transform", (*_MAP, "context_dim", "parameters")),
    GROUPS[1]: Kind("flow", _HEAD, "check_distribution", _FLOW),
    GROUPS[2]: Kind("guide", "Guide(model, **options)", "check_guide", ("__call__", "setup")),
}


def address_of(distribution: str, name: str) -> str:
    """``package:name``, of a name that may have a package already."""
    return name if ":" in name else f"{distribution}:{name}"


@dataclass(frozen=True)
class PluginInfo:
    """One registered name, as ``pyroflows plugins list`` shows it.

    Attributes:
        group: the entry-point group.
        name: the name to ask for and to block by: ``package:name`` where the bare name is contested.
        distribution: the package that registers it, spelled as in PEP 503.
        version: that package's version.
        value: the import path behind the name.
        status: ``OK``, ``BUILT-IN``, ``CONFLICT``, ``BLOCKED`` or ``BROKEN``.
        reason: what lies behind the status.
    """

    group: str
    name: str
    distribution: str
    version: str
    value: str
    status: Status
    reason: str = ""

    @property
    def address(self) -> str:
        """``package:name``, which is never ambiguous."""
        return address_of(self.distribution, self.name)


# --- one entry -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Entry:
    """A registered name: who registers it, what stands against it, and the memo of its import."""

    point: metadata.EntryPoint
    distribution: str
    version: str
    flaw: str = ""  # what is wrong with the metadata itself
    blocked: str = ""  # the environment variable that switches it off
    conflict: str = ""  # who else claims the name
    loaded: Any = None
    failure: tuple[type[PluginLoadError], str, BaseException | None] | None = None
    # One lock an entry and not one for all: a plugin may ask for another one while it is being imported.
    lock: Any = field(default_factory=RLock)

    def __post_init__(self) -> None:
        if self.flaw:
            self.failure = (PluginContractError, self.flaw, None)

    def __str__(self) -> str:
        return f'{self.kind.noun} "{self.point.name}" of {self.distribution} {self.version}'

    @property
    def kind(self) -> Kind:
        return KINDS[self.point.group]

    @property
    def builtin(self) -> bool:
        return self.distribution == "pyroflows"

    @property
    def address(self) -> str:
        return f"{self.distribution}:{self.point.name}"

    @property
    def shown(self) -> str:
        return self.address if self.conflict or self.flaw else self.point.name

    def info(self) -> PluginInfo:
        status: Status = "BUILT-IN" if self.builtin else "OK"
        reason = ""
        if self.blocked:
            status, reason = "BLOCKED", self.blocked
        elif self.failure:
            status, reason = "BROKEN", self.failure[1]
        elif self.conflict:
            status, reason = "CONFLICT", self.conflict
        group, value = self.point.group, self.point.value
        return PluginInfo(group, self.shown, self.distribution, self.version, value, status, reason)

    def error(self, kind: type[PluginLoadError], reason: str) -> PluginLoadError:
        fault = "breaks the contract" if kind is PluginContractError else "cannot be imported"
        name, package, version = self.point.name, self.distribution, self.version
        return kind(f"{self} {fault}: {reason}.", plugin=name, distribution=package, version=version)

    def load(self) -> Any:
        """Imports the entry once. A failure is remembered, and raised as a new exception each time."""
        with self.lock:
            if self.loaded is None and self.failure is None:
                self._import()
        if self.failure is not None:
            kind, reason, cause = self.failure
            raise self.error(kind, reason) from cause
        return self.loaded

    def _import(self) -> None:
        try:
            loaded = self.point.load()
            wrong = self._breach(loaded)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")
            self.failure = (PluginLoadError, reason, error)
        else:
            self.loaded = None if wrong else loaded
            self.failure = (PluginContractError, wrong, None) if wrong else None

    def _breach(self, loaded: Any) -> str:
        """Says how an imported entry breaks the contract, or nothing."""
        home = sys.modules.get(self.point.module)
        declared = getattr(loaded, "__pyroflows_api__", getattr(home, "__pyroflows_api__", 1))
        bounds = declared if isinstance(declared, tuple) else (declared, declared)
        if len(bounds) != 2 or any(type(bound) is not int for bound in bounds):
            return f"__pyroflows_api__ is an int or a pair (low, high) of ints; got {declared!r}"
        low, high = bounds
        if not low <= API_VERSION <= high:
            ours, theirs = "pyroflows", self.distribution
            newer, older = (ours, theirs) if low > API_VERSION else (theirs, ours)
            written = f"{low}" if low == high else f"{low} to {high}"
            remedy = f"upgrade {newer} or install an older {older}"
            return f"written for API {written}, this is API {API_VERSION}: {remedy}"
        if not callable(loaded):
            return f"{self.point.value} is of type {type(loaded).__name__}; expected {self.kind.head}"
        return ""


# --- the scan --------------------------------------------------------------------------------------------

_lock = RLock()


def registry() -> dict[str, list[Entry]]:
    """All entries by group, from metadata that is read once."""
    with _lock:
        return _scan()


def forget() -> None:
    """Has the next look at the registry read the metadata again."""
    with _lock:
        importlib.invalidate_caches()
        _scan.cache_clear()


@functools.cache
def _scan() -> dict[str, list[Entry]]:
    """Reads all metadata; of two copies of a package, the first on ``sys.path`` counts, as for Python."""
    packages: dict[str, list[Entry]] = {}
    for package in metadata.distributions():
        if declared := _declared(package):
            packages.setdefault(declared[0].distribution, declared)
    entries = [entry for declared in packages.values() for entry in declared]
    entries.sort(key=lambda entry: (entry.point.name, entry.distribution))
    _apply_environment(entries)
    groups = {group: [entry for entry in entries if entry.point.group == group] for group in GROUPS}
    for entry in entries:
        entry.conflict = _conflict(entry, groups[entry.point.group])
    return groups


def _declared(package: metadata.Distribution) -> list[Entry]:
    """The entries of one package; none if its metadata cannot be read, which is no one else's trouble."""
    try:
        found: dict[tuple[str, str], dict[str, metadata.EntryPoint]] = {}
        for point in package.entry_points:
            if point.group in KINDS:
                found.setdefault((point.group, point.name), {})[point.value] = point
        if not found:
            return []
        distribution = normalise(package.metadata.get_all("Name", [])[0])
        version = package.metadata.get_all("Version", ["?"])[0]
    except Exception:
        return []
    entries = []
    for (_, name), points in found.items():
        flaw = f"registered {len(points)} times: {', '.join(sorted(points))}" if len(points) > 1 else ""
        if not re.fullmatch(r"[\w.-]+", name):
            flaw = "a name is made of letters, digits, '_', '-' and '.'"
        entries.append(Entry(points[min(points)], distribution, version, flaw))
    return entries


def normalise(distribution: str) -> str:
    """The name of a package as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _conflict(entry: Entry, group: list[Entry]) -> str:
    """Says who else claims an entry's name: a built-in always wins, what is blocked claims nothing."""
    rivals = [other for other in group if other is not entry and other.point.name == entry.point.name]
    if entry.builtin:
        return ""
    if any(rival.builtin for rival in rivals):
        return "the bare name is the built-in's"
    claims = [rival.distribution for rival in rivals if entry.blocked or not rival.blocked]
    return f"also registered by {', '.join(claims)}" if claims else ""


def _apply_environment(entries: list[Entry]) -> None:
    """Marks what the environment variables switch off; built-ins are always on."""
    disabled = _switch("PYROFLOWS_DISABLE_PLUGINS")
    blocked, allowed = _named("PYROFLOWS_BLOCK", entries), _named("PYROFLOWS_ALLOW", entries)
    for entry in entries:
        if entry.builtin:
            continue
        if disabled:
            entry.blocked = "PYROFLOWS_DISABLE_PLUGINS is set"
        elif entry in blocked:
            entry.blocked = "PYROFLOWS_BLOCK names it"
        elif allowed and entry not in allowed:
            entry.blocked = "PYROFLOWS_ALLOW does not name it"


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "").strip()
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("", "0", "false", "no", "off"):
        return False
    raise PluginConfigError(f"{variable} is 1, true, yes, on or 0, false, no, off; got {value!r}.")


def _named(variable: str, entries: list[Entry]) -> set[Entry]:
    """The entries that a variable lists by name, by ``package:name`` or by package."""
    named: set[Entry] = set()
    for item in filter(None, map(str.strip, os.environ.get(variable, "").split(","))):
        package, colon, name = item.partition(":")
        full = normalise(package) + colon + name
        matched = {e for e in entries if item == e.point.name or full in (e.address, e.distribution)}
        if not matched:
            known = {word for e in entries for word in (e.point.name, e.address, e.distribution)}
            raise PluginConfigError(f'{variable} names "{item}", which is not installed{nearest(item, known) or "."}')
        if variable == "PYROFLOWS_BLOCK" and all(entry.builtin for entry in matched):
            raise PluginConfigError(f'{variable} names "{item}", which is built in and cannot be blocked.')
        named |= matched
    return named


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean "..."?`` where a known word is like this one, or nothing."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""
