"""Save and load: one safetensors file of tensors and a JSON manifest, rebuilt by name through the registry.

Neither part holds code or an import path. Loading runs the factory of an installed package and nothing else, and
that only for as much work and memory as the size of the file bears out.
"""

from __future__ import annotations

import inspect as introspection
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pyroflows import __version__, plugins
from pyroflows.errors import (
    ArchiveCorrupt,
    ArchiveMismatch,
    NotRebuildable,
    PluginError,
    UnknownPlugin,
    UntrustedFile,
)
from pyroflows.manifest import FORMAT, KEY, ROOM, Manifest, line, parse, plain

__all__ = ["import_param_store", "inspect", "load", "save"]


def save(obj: Any, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Writes what was built by name to one file, which appears whole or not at all.

    Args:
        obj: what ``pf.flow`` or ``pf.transform`` built, trained or not, on any device.
        path: the file, by custom ``.safetensors``, in a folder that exists.
        overwrite: whether to replace a file that is already there.

    Raises:
        NotRebuildable: the object was not built by name, was altered since, or has an option that no file can
            hold; the message says what to do.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, pyroflows as pf
        >>> flow, x = pf.flow("nsf", input_dim=2), torch.randn(5, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pf.save(flow, f"{folder}/flow.safetensors")
        ...     again = pf.load(f"{folder}/flow.safetensors")
        >>> torch.equal(flow().log_prob(x), again().log_prob(x))
        True
    """
    target = Path(path).resolve()  # a link stays one: the file behind it is replaced
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}: create it first.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: pass overwrite=True to replace it.")
    content = _pack(obj)
    draft = target.with_name(f".pyroflows-{secrets.token_hex(8)}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Any:
    """Builds the object of a file again: same values, dtype, support, frozen parameters and training mode.

    A file from a stranger is safe to load: it can run no code of its own. The random state stays as it is.

    Args:
        path: a file that :func:`save` wrote.
        device: where to put the object; default the CPU.

    Raises:
        ArchiveCorrupt: the file is no such file, or is damaged.
        ArchiveTooNew: a later pyroflows wrote it, in a format that this one does not read.
        ArchiveMismatch: its tensors are not those of the object that it describes.
        UnknownPlugin: it needs a package that is not installed; the message names it.
        PluginError: the package is installed, but switched off or broken.
        OSError: the file cannot be read.
    """
    with _reading(path) as file:
        manifest = parse(file.metadata(), path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    if manifest.digest(tensors) != manifest.sha256:
        raise ArchiveCorrupt(f"{path} is damaged: its checksum does not fit. Get or save the file again.")
    obj = _build(manifest, tensors, path)
    return obj if device is None else obj.to(device)


def inspect(path: str | os.PathLike[str]) -> Manifest:
    """Reads what a file says about itself; builds nothing, imports no plugin and checks no checksum.

    Args:
        path: a file that :func:`save` wrote.

    Raises:
        ArchiveCorrupt: the file is no such file, or is damaged.
        ArchiveTooNew: a later pyroflows wrote it, in a format that this one does not read.
        OSError: the file cannot be read.
    """
    with _reading(path) as file:
        return parse(file.metadata(), path)


def import_param_store(path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Tensor]:
    """Reads a file of ``pyro.get_param_store().save``. **Unsafe**: it is a pickle, which can run any code.

    Args:
        path: the file.
        trust: pass ``True`` to say that you know who made the file and trust them with your computer.

    Returns:
        The parameters by name, constrained as ``pyro.param`` gives them, on the CPU.

    Raises:
        UntrustedFile: ``trust`` is not ``True``.
        ArchiveCorrupt: the file holds no param store.
        OSError: the file cannot be read.
    """
    if trust is not True:
        raise UntrustedFile(
            f"{path} is to be read as a pickle, which can run any code on this computer: pass trust=True if you "
            "know who made it. Then pf.save what you build from it, in a file that is safe."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=False)
        constraints = state["constraints"]
        return {name: transform_to(constraints[name])(value.detach()) for name, value in state["params"].items()}
    except OSError:
        raise
    except Exception as error:
        raise ArchiveCorrupt(f"{path} holds no param store of Pyro: {line(error)}.") from error


# --- writing ---------------------------------------------------------------------------------------------


def _pack(obj: Any) -> bytes:
    obj = getattr(obj, "_orig_mod", obj)  # what torch.compile wraps
    kind, config = type(obj).__name__, getattr(obj, "config", None)
    if not isinstance(config, plugins.Config) or not isinstance(obj, nn.Module):
        raise NotRebuildable(
            f"this {kind} was not built by name, so no file can say how to build it again: build it with "
            "pf.flow(name, ...) or pf.transform(name, ...), or keep its state_dict() yourself."
        )
    options, support = _options(obj, config), getattr(obj, "support_description", None)
    _check_options({**options, "support": support})
    try:
        state, _ = _state(obj)
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        manifest = Manifest(
            group=config.group,
            name=config.name.rpartition(":")[2],
            distribution=config.distribution,
            version=config.version,
            input_dim=config.input_dim,
            context_dim=config.context_dim,
            options=options,
            support=support,
            training=obj.training,
            frozen=tuple(name for name, tensor in state.items() if _frozen(tensor)),
            pyroflows=__version__,
            torch=str(torch.__version__),
            format=FORMAT,
            sha256="",
        )
        text = json.dumps(asdict(replace(manifest, sha256=manifest.digest(tensors))))
        # Whatever is saved can be loaded, because saving does it: what comes back is compared with what went in.
        again = _modules(_build(parse({KEY: text}, kind), tensors, kind))
        for name, type_name in _modules(obj).items():
            if again.get(name) != type_name:
                raise ArchiveMismatch(f"{name or kind} is a {type_name}, not a {again.get(name)}.")
        return to_bytes(tensors, {KEY: text})
    except PluginError:
        raise
    except Exception as error:
        raise NotRebuildable(
            f"this {kind} is not what its name and options build, so no file can say how to build it again: "
            f"register what you changed as a plugin, or keep its state_dict() yourself. {line(error)}."
        ) from error


def _options(obj: Any, config: plugins.Config) -> dict[str, Any]:
    """The options in force: those given, and the defaults, which another version may have changed."""
    options = dict(config.options)
    factory = plugins.get(config.group, config.address)
    with suppress(TypeError, ValueError):  # no signature to read
        for name, parameter in [*introspection.signature(factory).parameters.items()][1:]:
            if name != "context_dim" and plain(parameter.default, ROOM):
                options.setdefault(name, parameter.default)
    if hasattr(obj, "support_description"):  # which tells it better: it also knows flow.constrain(...)
        options.pop("support", None)
    return options


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if not plain(value):
            hint = "pass finite numbers, strings, or lists of them"
            if hasattr(value, "tolist"):
                hint = "pass its .tolist()"
            elif isinstance(value, (type, nn.Module)):
                hint = f'pass it by name, as in {name}="silu"'
            raise NotRebuildable(f"no file can hold the option {name}, a {type(value).__name__}: {hint}.")


def _modules(obj: nn.Module) -> dict[str, str]:
    return {name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in obj.named_modules()}


# --- reading ---------------------------------------------------------------------------------------------


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Any]:
    with open(path, "rb"):  # Python's own errors for what is missing, forbidden or a folder
        pass
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ArchiveCorrupt(
            f"{path} is no pyroflows archive, or is damaged: {line(error)}. (A file of Pyro's param store is read "
            "by pyroflows.archive.import_param_store.)"
        ) from error


# --- rebuilding ------------------------------------------------------------------------------------------


class _Budget(TorchDispatchMode):
    """Stops a build before it makes much more than what the file holds.

    Building our own layers takes at most 4 operations a tensor, and makes 3 numbers for each that stays.
    """

    def __init__(self, tensors: int, numbers: int) -> None:
        super().__init__()
        self.operations, self.numbers = 2_000 + 100 * tensors, ROOM // 4 + 64 * numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:  # without memory, to learn what it would take
            there = {key: value for key, value in (("device", "meta"), ("generator", None)) if key in kwargs}
            shapes = func(*_on_meta(args), **{**_on_meta(kwargs), **there})
        except Exception:  # it reads values, so it makes none to speak of
            shapes = ()
        self.operations -= 1
        self.numbers -= sum(leaf.numel() for leaf in tree_leaves(shapes) if isinstance(leaf, Tensor))
        if self.operations < 0 or self.numbers < 0:
            raise ArchiveMismatch("it would be far larger than the file is.")
        return func(*args, **kwargs)


def _on_meta(values: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), values)


def _build(manifest: Manifest, tensors: Mapping[str, Tensor], path: Any) -> Any:
    """What the manifest describes, with the file's tensors in it."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    sizes = (math.prod(manifest.shape), manifest.context_dim, manifest.options, manifest.support)
    if not plain(sizes, max(ROOM, numbers)):
        raise ArchiveMismatch(f"{path} asks for {manifest} with a number that no honest file of its size has.")
    _check_registered(manifest, path)
    options = {**manifest.options, "context_dim": manifest.context_dim}
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _Budget(len(tensors), numbers):
            obj = plugins.build(manifest.group, manifest.address, manifest.input_dim, **options)
            if manifest.support is not None or hasattr(obj, "restore_support"):
                obj.restore_support(manifest.support)
        _fill(obj, manifest, tensors)
    except PluginError:
        raise
    except Exception as error:
        here = {info.version for info in plugins.report(manifest.group) if info.address == manifest.address}
        also = "" if manifest.version in here else f" Installed is {', '.join(here)}, which may be why."
        raise ArchiveMismatch(f"{path} holds what {manifest} does not build: {line(error)}.{also}") from error
    return obj


def _check_registered(manifest: Manifest, path: Any) -> None:
    try:
        plugins.get(manifest.group, manifest.address)
    except UnknownPlugin as error:
        others = [i.distribution for i in plugins.report(manifest.group) if i.address.endswith(f":{manifest.name}")]
        also = f" The one of {', '.join(others)} is another that shares its name." if others else ""
        raise UnknownPlugin(
            f"{path} needs {manifest}, which is not installed here: if you trust that package, install it and "
            f"load again.{also}"
        ) from error


def _state(obj: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor of an object once, by its first name; and for each name that first one."""
    state = obj.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArchiveMismatch(f"{name} is a {type(value).__name__}, not a tensor.")
    first = {id(value): name for name, value in reversed(state.items())}
    names = {name: first[id(value)] for name, value in state.items()}
    return {name: state[name] for name in names.values()}, names


def _frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _fill(obj: nn.Module, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Copies the file's tensors into the object, and with them their dtypes; ties between tensors hold."""
    state, names = _state(obj)
    wrong = [f"{name} is missing" for name in state if name not in tensors]
    wrong += [f"{name!r} is unknown" for name in (*tensors, *manifest.frozen) if name not in state]
    wrong += [
        f"{name} is {_looks(tensors[name])} instead of {_looks(tensor)}"
        for name, tensor in state.items()
        if name in tensors and not _alike(tensors[name], tensor)
    ]
    if wrong:
        raise ArchiveMismatch(f"{'; '.join(wrong[:4])}{f'; and {len(wrong) - 4} more' * (len(wrong) > 4)}.")
    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floats) == 1:
        obj.to(dtype=floats.pop())  # for buffers that no state_dict holds
    values = {name: tensors[first] for name, first in names.items()}
    for name, tensor in obj.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(values[name].dtype)
    obj.load_state_dict(values)
    for name, tensor in _state(obj)[0].items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in manifest.frozen)
    obj.train(manifest.training)


def _looks(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.dtype == b.dtype or (a.is_floating_point() and b.is_floating_point()))
