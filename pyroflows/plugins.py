"""The registry: every transform, flow and guide is found by name among the installed packages' entry points.

Names come from package metadata, read once, at first use. A plugin is imported when it is asked for by name,
and one that fails breaks nothing but itself. Nothing here imports torch.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyroflows.entries import (
    API_VERSION,
    GROUPS,
    KINDS,
    Entry,
    PluginInfo,
    address_of,
    forget,
    nearest,
    normalise,
    registry,
)
from pyroflows.errors import (
    AmbiguousPlugin,
    OptionError,
    PluginBlocked,
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
        return address_of(self.distribution, self.name)


# --- asking for a name -----------------------------------------------------------------------------------


def _group(group: str) -> str:
    full = group if group in KINDS else f"pyroflows.{group}"
    if full not in KINDS:
        known = ", ".join(name.removeprefix("pyroflows.") for name in GROUPS)
        raise UnknownPlugin(f'no plugin group "{group}"; the groups are {known}.')
    return full


def _find(group: str, name: str) -> Entry:
    group = _group(group)
    package, colon, bare = name.partition(":")
    full = f"{normalise(package)}:{bare}"
    claims = [e for e in registry()[group] if (e.address == full if colon else e.point.name == name)]
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
    groups = registry()
    noun = KINDS[group].noun
    message = f'no {noun} "{name}"'
    for other, entries in groups.items():
        if any(name in (entry.point.name, entry.address) for entry in entries):
            there = KINDS[other].noun
            return f'{message}, but there is a {there} "{name}": pyroflows.{there}("{name}", ...).'
    active = [entry for entry in groups[group] if not entry.blocked]
    message += nearest(name, {word for entry in active for word in (entry.shown, entry.address)}) or "."
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
    usable = [entry for entry in registry()[_group(group)] if not entry.blocked and not entry.flaw]
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
    forget()


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
    entries = [entry for name in groups for entry in registry()[name]]
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


def _check_options(entry: Entry, factory: Any, options: Mapping[str, Any]) -> None:
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
            hint = nearest(option, known) or "."
            raise OptionError(f'{entry} has no option "{option}"{hint} It has {", ".join(known) or "none"}.')
