"""What an archive says about the object in it: plain data, checked before anything is built from it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows import __version__, plugins
from pyroflows.errors import ArchiveCorrupt, ArchiveTooNew

__all__ = ["FORMAT", "KEY", "ROOM", "Manifest", "line", "parse", "plain"]

KEY, FORMAT = "pyroflows", 1
ROOM = 2**20
"""How long a manifest, and how large a number in it, may be however small the file."""


@dataclass(frozen=True)
class Manifest:
    """What a file says about the object in it.

    Attributes:
        group: the entry-point group of the factory that builds it.
        name: the factory's registered name.
        distribution: the package that registers the name.
        version: that package's version.
        input_dim: the number of dimensions, or the shape of an image.
        context_dim: the number of context dimensions, 0 for none.
        options: the factory's other options, with its defaults of the time.
        support: where the data live, as ``support_description`` puts it.
        training: whether the object was in training mode.
        frozen: the parameters that require no gradient.
        pyroflows: the version of pyroflows that wrote the file.
        torch: the version of torch that wrote it.
        format: the version of the format.
        sha256: the checksum of all this and of the tensors.
    """

    group: str
    name: str
    distribution: str
    version: str
    input_dim: int | tuple[int, ...]
    context_dim: int
    options: Mapping[str, Any]
    support: Any
    training: bool
    frozen: tuple[str, ...]
    pyroflows: str
    torch: str
    format: int
    sha256: str

    def __post_init__(self) -> None:
        words = ("name", "distribution", "version", "pyroflows", "torch")
        sizes = (*self.shape, self.context_dim)
        sound = {
            "group": self.group in plugins.GROUPS[:2],
            **{word: _is_word(getattr(self, word)) for word in words},
            "input_dim or context_dim": all(type(size) is int and size >= 0 for size in sizes),
            "options": isinstance(self.options, dict) and plain(self.options),
            "support": plain(self.support),
            "training": isinstance(self.training, bool),
            "frozen": isinstance(self.frozen, tuple) and all(isinstance(name, str) for name in self.frozen),
            "format": type(self.format) is int and self.format == FORMAT,
            "sha256": isinstance(self.sha256, str),
        }
        if wrong := [name for name, fine in sound.items() if not fine]:
            raise ValueError(f"{wrong[0]} is of the wrong kind")

    @property
    def shape(self) -> tuple[int, ...]:
        """``input_dim`` as a shape."""
        return self.input_dim if isinstance(self.input_dim, tuple) else (self.input_dim,)

    @property
    def address(self) -> str:
        """``package:name``, which names one factory whatever else is installed."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f'"{self.name}" of {self.distribution} {self.version}'

    def digest(self, tensors: Mapping[str, Tensor]) -> str:
        """The checksum that belongs into ``sha256``; the order of the tensors does not matter."""
        digest = hashlib.sha256(json.dumps({**asdict(self), "sha256": ""}, sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def parse(metadata: Mapping[str, str] | None, path: Any) -> Manifest:
    """The manifest in a file's metadata.

    Raises:
        ArchiveCorrupt: there is none, or it is damaged.
        ArchiveTooNew: it is of a later format.
    """
    text = (metadata or {}).get(KEY)
    if text is None:
        raise ArchiveCorrupt(f"{path} is a safetensors file, but not one that pyroflows.save wrote.")
    try:
        if len(text) > ROOM:
            raise ValueError(f"it has {len(text)} characters")
        fields = json.loads(text, object_pairs_hook=_unique)
        newer = fields["format"] > FORMAT
        manifest = None if newer else Manifest(**{**_tuples(fields), "support": fields["support"]})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArchiveCorrupt(f"{path} has a damaged manifest: {line(error)}.") from error
    if manifest is None:
        raise ArchiveTooNew(
            f"{path} is of format {fields['format']!r}, and pyroflows {__version__} reads up to format {FORMAT}: "
            "upgrade pyroflows."
        )
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_word(value: Any) -> bool:
    """Whether it is a name or version: no path, no address, nothing that a terminal would obey."""
    return isinstance(value, str) and re.fullmatch(r"[\w.+!?-]*", value) is not None


def plain(value: Any, most: float = math.inf, depth: int = 16) -> bool:
    """Whether a file can hold it: text, lists, dicts, finite numbers, and whole ones of at most ``most``."""
    if isinstance(value, (dict, list, tuple)):
        keys, items = (value.keys(), value.values()) if isinstance(value, dict) else ((), value)
        return depth > 0 and all(isinstance(k, str) for k in keys) and all(plain(i, most, depth - 1) for i in items)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) <= most)


def line(error: Exception) -> str:
    """An error's text on one line; a file cannot have it print anything else."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))[:400].rstrip(".")
