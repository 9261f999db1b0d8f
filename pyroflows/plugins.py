"""The registry: every transform, flow and guide is found by name among the installed packages' entry points.

Names come from package metadata, read once, at first use. A plugin is imported when it is asked for by name,
and one that fails breaks nothing but itself. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import operator
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pyroflows.errors import (
    AmbiguousPlugin,
    OptionError,
    PluginBlocked,
    PluginConfigError,
    PluginContractError,
    PluginLoadError,
    UnknownPlugin,
)

if TYPE_CHECKING:
    from pyroflows.distributions import Flow
    from pyroflows.transforms import FlowTransform

__all__ = [
    "API_VERSION",
    "GROUPS",
    "Config",
    "PluginInfo",
    "available",
    "build",
    "flow",
    "get",
    "guide",
    "refresh",
    "report",
    "transform",
]

GROUPS = ("pyroflows.transforms", "pyroflows.distributions", "pyroflows.guides")
API_VERSION = 1
Status = Literal["OK", "BUILT-IN", "CONFLICT", "BLOCKED", "BROKEN"]


class _Kind(NamedTuple):
    """What the entries of a group are called, look like, must build and are checked by."""

    noun: str
    head: str
    law: str
    needs: tuple[str, ...]


_HEAD = "factory(input_dim, *, context_dim=0, **options)"
_MAP = ("forward_and_log_det", "inverse_and_log_det", "domain", "codomain", "condition")
_FLOW = ("transform", "base", "forward", "state_dict", "context_dim")
_KINDS = {
    GROUPS[0]: _Kind("transform", _HEAD, "check_transform", (*_MAP, "context_dim", "parameters")),
    GROUPS[1]: _Kind("flow", _HEAD, "check_distribution", _FLOW),
    GROUPS[2]: _Kind("guide", "Guide(model, **options)", "check_guide", ("__call__", "setup")),
}


def _address(distribution: str, name: str) -> str:
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
        return _address(self.distribution, self.name)


@dataclass(frozen=True)
class Config:
    """How an object was built by name: what it takes to build it again, and which package that needs.

    Attributes:
        group: the entry-point group.
        name: the registered name; ``package:name`` where the bare name was contested.
        input_dim: the number of dimensions, or the shape of an image.
        context_dim: the number of context dimensions, 0 for none.
        options: the factory's other options, as given.
        distribution: the package that registered the name.
        version: that package's version.
    """

    group: str
    name: str
    input_dim: int | tuple[int, ...]
    context_dim: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    distribution: str = "pyroflows"
    version: str = ""

    @property
    def address(self) -> str:
        """``package:name``, which names the same factory whatever else is installed."""
        return _address(self.distribution, self.name)


# --- one entry -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Entry:
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
    def kind(self) -> _Kind:
        return _KINDS[self.point.group]

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


def _registry() -> dict[str, list[_Entry]]:
    with _lock:
        return _scan()


@functools.cache
def _scan() -> dict[str, list[_Entry]]:
    """Reads all metadata; of two copies of a package, the first on ``sys.path`` counts, as for Python."""
    packages: dict[str, list[_Entry]] = {}
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


def _declared(package: metadata.Distribution) -> list[_Entry]:
    """The entries of one package; none if its metadata cannot be read, which is no one else's trouble."""
    try:
        found: dict[tuple[str, str], dict[str, metadata.EntryPoint]] = {}
        for point in package.entry_points:
            if point.group in _KINDS:
                found.setdefault((point.group, point.name), {})[point.value] = point
        if not found:
            return []
        distribution = _normalise(package.metadata.get_all("Name", [])[0])
        version = package.metadata.get_all("Version", ["?"])[0]
    except Exception:
        return []
    entries = []
    for (_, name), points in found.items():
        flaw = f"registered {len(points)} times: {', '.join(sorted(points))}" if len(points) > 1 else ""
        if not re.fullmatch(r"[\w.-]+", name):
            flaw = "a name is made of letters, digits, '_', '-' and '.'"
        entries.append(_Entry(points[min(points)], distribution, version, flaw))
    return entries


def _normalise(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _conflict(entry: _Entry, group: list[_Entry]) -> str:
    """Says who else claims an entry's name: a built-in always wins, what is blocked claims nothing."""
    rivals = [other for other in group if other is not entry and other.point.name == entry.point.name]
    if entry.builtin:
        return ""
    if any(rival.builtin for rival in rivals):
        return "the bare name is the built-in's"
    claims = [rival.distribution for rival in rivals if entry.blocked or not rival.blocked]
    return f"also registered by {', '.join(claims)}" if claims else ""


def _apply_environment(entries: list[_Entry]) -> None:
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


def _named(variable: str, entries: list[_Entry]) -> set[_Entry]:
    """The entries that a variable lists by name, by ``package:name`` or by package."""
    named: set[_Entry] = set()
    for item in filter(None, map(str.strip, os.environ.get(variable, "").split(","))):
        package, colon, name = item.partition(":")
        full = _normalise(package) + colon + name
        matched = {e for e in entries if item == e.point.name or full in (e.address, e.distribution)}
        if not matched:
            known = {word for e in entries for word in (e.point.name, e.address, e.distribution)}
            raise PluginConfigError(f'{variable} names "{item}", which is not installed{_nearest(item, known) or "."}')
        if variable == "PYROFLOWS_BLOCK" and all(entry.builtin for entry in matched):
            raise PluginConfigError(f'{variable} names "{item}", which is built in and cannot be blocked.')
        named |= matched
    return named


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


# --- asking for a name -----------------------------------------------------------------------------------


def _group(group: str) -> str:
    full = group if group in _KINDS else f"pyroflows.{group}"
    if full not in _KINDS:
        known = ", ".join(name.removeprefix("pyroflows.") for name in GROUPS)
        raise UnknownPlugin(f'no plugin group "{group}"; the groups are {known}.')
    return full


def _find(group: str, name: str) -> _Entry:
    group = _group(group)
    package, colon, bare = name.partition(":")
    full = f"{_normalise(package)}:{bare}"
    claims = [e for e in _registry()[group] if (e.address == full if colon else e.point.name == name)]
    claims = [entry for entry in claims if entry.builtin] or claims
    usable = [entry for entry in claims if not entry.blocked]
    if len(usable) == 1:
        return usable[0]
    if usable:
        choices = " or ".join(f'"{entry.address}"' for entry in usable)
        raise AmbiguousPlugin(
            f'{len(usable)} packages register the {usable[0].kind.noun} "{name}": ask for {choices}, '
            "or list in PYROFLOWS_BLOCK those that you do not want."
        )
    if claims:
        raise PluginBlocked(f"{claims[0]} is switched off: {claims[0].blocked}.")
    raise UnknownPlugin(_unknown(group, name))


def _unknown(group: str, name: str) -> str:
    registry = _registry()
    noun = _KINDS[group].noun
    message = f'no {noun} "{name}"'
    for other, entries in registry.items():
        if any(name in (entry.point.name, entry.address) for entry in entries):
            there = _KINDS[other].noun
            return f'{message}, but there is a {there} "{name}": pyroflows.{there}("{name}", ...).'
    active = [entry for entry in registry[group] if not entry.blocked]
    message += _nearest(name, {word for entry in active for word in (entry.shown, entry.address)}) or "."
    message += f" Installed {noun}s: {', '.join(available(group)) or 'none'}."
    if not any(entry.builtin for entry in active):
        message += " The built-in ones are missing: install pyroflows again."
    return message


def available(group: str) -> tuple[str, ...]:
    """The names that can be asked for, sorted; from package metadata alone.

    Args:
        group: ``"transforms"``, ``"distributions"`` or ``"guides"``, or the entry-point group in full.

    Raises:
        PluginError: if there is no such group, or an environment variable names what is not installed.

    Example:
        >>> "affine" in available("transforms")
        True
    """
    usable = [entry for entry in _registry()[_group(group)] if not entry.blocked and not entry.flaw]
    return tuple(sorted(entry.shown for entry in usable))


def get(group: str, name: str) -> Any:
    """Imports one entry, at the first call, and hands back the factory or guide class behind it.

    Args:
        group: the group, as in :func:`available`.
        name: a name that :func:`available` lists, or ``package:name``.

    Raises:
        UnknownPlugin: if no installed package registers the name.
        AmbiguousPlugin: if two do.
        PluginBlocked: if an environment variable switches it off.
        PluginLoadError: if its import fails; the same again until :func:`refresh`.
        PluginContractError: if it is no callable, or is written for another API version.

    Example:
        >>> callable(get("distributions", "nsf"))
        True
    """
    return _find(group, name).load()


def refresh() -> None:
    """Forgets all names and failures, so that the next use looks again.

    Modules that Python has imported stay imported: a plugin upgraded in place needs a new process.
    """
    with _lock:
        importlib.invalidate_caches()
        _scan.cache_clear()


def report(group: str | None = None, *, load: bool = False) -> list[PluginInfo]:
    """Everything that is registered, usable or not, and why not.

    Args:
        group: the group, as in :func:`available`; all three by default.
        load: imports all that is not blocked, to find what is broken. Without it, only what has failed
            before in this process shows as broken.

    Raises:
        PluginError: as :func:`available` does.

    Example:
        >>> {line.status for line in report() if line.distribution == "pyroflows"}
        {'BUILT-IN'}
    """
    groups = GROUPS if group is None else (_group(group),)
    entries = [entry for name in groups for entry in _registry()[name]]
    for entry in entries:
        if load and not entry.blocked:
            with suppress(PluginLoadError):
                entry.load()
    return [entry.info() for entry in entries]


# --- building --------------------------------------------------------------------------------------------


def build(group: str, name: str, subject: Any, /, **options: Any) -> Any:
    """``get(group, name)(subject, **options)``, with the contract checked before and after.

    Args:
        group: the group, as in :func:`available`.
        name: the name, as in :func:`get`.
        subject: what the factory takes first: ``input_dim``, or a guide's model.
        **options: the factory's options, ``context_dim`` among them.

    Raises:
        OptionError: if the factory has no such option, or a dimension is no whole number or too small.
        PluginContractError: if the factory builds something else than its group promises.
        PluginError: as :func:`get` does. The factory's own errors pass through as they are.

    Example:
        >>> build("transforms", "affine", 2).config.address
        'pyroflows:affine'
    """
    entry = _find(group, name)
    factory, kind, is_guide = entry.load(), entry.kind, entry.point.group == "pyroflows.guides"
    if not is_guide:
        subject = _shape(subject)
        options["context_dim"] = _whole("context_dim", options.get("context_dim", 0), least=0)
    _check_options(entry, factory, options)
    try:
        built = factory(subject, **options)
    except TypeError as error:  # an option that the factory passes on, and nobody knows
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in options:
            raise
        raise OptionError(f"the {kind.noun} {name!r} has no option {unknown[1]!r} ({error}).") from error
    if missing := [need for need in kind.needs if not hasattr(built, need)]:
        breach = f"it built {type(built).__name__} without {', '.join(missing)}; a {kind.noun} has "
        breach += f'{", ".join(kind.needs)}. See pyroflows.testing.{kind.law}("{entry.shown}")'
        raise entry.error(PluginContractError, breach)
    if not is_guide:
        width = options.pop("context_dim")
        group, package, version = entry.point.group, entry.distribution, entry.version
        built.config = Config(group, entry.shown, subject, width, options, package, version)
    return built


def transform(name: str, /, *, input_dim: int | tuple[int, ...], context_dim: int = 0, **options: Any) -> FlowTransform:
    """Builds a transform by name; its ``.config`` is the :class:`Config` that builds it again.

    Args:
        name: a name of ``available("transforms")``.
        input_dim: the number of dimensions; for an image layer its shape.
        context_dim: the number of context dimensions, 0 for none.
        **options: the layer's own options.

    Raises:
        OptionError: if an option is unknown or a dimension impossible.
        PluginError: if the name cannot be found or imported, or what it builds is no transform.

    Example:
        >>> transform("affine", input_dim=3).config.input_dim
        3
    """
    return build("transforms", name, input_dim, context_dim=context_dim, **options)


def flow(
    name: str, /, *, input_dim: int | tuple[int, ...], context_dim: int = 0, compile: bool = False, **options: Any
) -> Flow:
    """Builds a flow, a module that makes distributions, by name; ``.config`` is as for :func:`transform`.

    Args:
        name: a name of ``available("distributions")``.
        input_dim: the number of dimensions, or the shape of an image.
        context_dim: the number of context dimensions, 0 for none.
        compile: whether ``torch.compile`` works on it, see ``Flow.compile``; no part of ``.config``.
        **options: the recipe's own options.

    Raises:
        OptionError: if an option is unknown or a dimension impossible.
        PluginError: if the name cannot be found or imported, or what it builds is no flow.

    Example:
        >>> flow("nsf", input_dim=2, transforms=3).config.options
        {'transforms': 3}
    """
    built = build("distributions", name, input_dim, context_dim=context_dim, **options)
    return built.compile() if compile else built


def guide(name: str, model: Any, /, **options: Any) -> Any:
    """Builds a guide by name; its parameters exist after ``setup(...)`` with the model's arguments.

    Args:
        name: a name of ``available("guides")``.
        model: the Pyro model.
        **options: the guide's own options.

    Raises:
        OptionError: if an option is unknown.
        PluginError: if the name cannot be found or imported, or what it builds is no guide.
    """
    return build("guides", name, model, **options)


def _shape(input_dim: Any) -> int | tuple[int, ...]:
    if isinstance(input_dim, (tuple, list)) and input_dim:
        return tuple(_whole("input_dim", size, least=1) for size in input_dim)
    return _whole("input_dim", input_dim, least=1)


def _whole(what: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise OptionError(f"{what} is a whole number, {least} or more; got {value!r}.")
    return number


def _check_options(entry: _Entry, factory: Any, options: Mapping[str, Any]) -> None:
    """Refuses an option that the factory's signature does not have, before it is called."""
    try:
        _, *parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # no signature to read: the call itself will tell
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if "context_dim" in options and "context_dim" not in accepted:
        raise entry.error(PluginContractError, f"it takes no context_dim; expected {entry.kind.head}")
    known = [name for name in accepted if name != "context_dim"]
    for option in options:
        if option not in accepted:
            hint = _nearest(option, known) or "."
            raise OptionError(f'{entry} has no option "{option}"{hint} It has {", ".join(known) or "none"}.')
