"""Every error that pyroflows raises on purpose: each says what is wrong, what was expected and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "AmbiguousPlugin",
    "ArchiveCorrupt",
    "ArchiveError",
    "ArchiveMismatch",
    "ArchiveTooNew",
    "ConstantColumn",
    "ContextError",
    "DataError",
    "DtypeError",
    "GuideNotSetUp",
    "InverseNotConverged",
    "LawViolation",
    "NonFiniteData",
    "NonFiniteLoss",
    "NotNumeric",
    "NotRebuildable",
    "NotReparametrized",
    "ODESolveError",
    "OptionError",
    "OutsideSupport",
    "PluginBlocked",
    "PluginConfigError",
    "PluginContractError",
    "PluginError",
    "PluginLoadError",
    "PyroflowsError",
    "ShapeError",
    "SubsampledLatentError",
    "TooFewRows",
    "UnknownPlugin",
    "UntrustedFile",
]


class PyroflowsError(Exception):
    """The root of every error of this package."""


# --- layers and flows ------------------------------------------------------------------------------------


class OptionError(PyroflowsError, ValueError):
    """An option of a layer, recipe or function has a value that it cannot take."""


class ShapeError(PyroflowsError, ValueError):
    """A tensor's shape does not fit the layer or flow that it was given to."""


class DtypeError(PyroflowsError, TypeError):
    """A tensor has another dtype than the flow that it was given to, or is no tensor."""


class ContextError(PyroflowsError, ValueError):
    """A context is missing, unexpected, or of the wrong width."""


class NotReparametrized(PyroflowsError, NotImplementedError):
    """A distribution has no samples that can be differentiated."""


class InverseNotConverged(PyroflowsError, RuntimeError):
    """A numeric inverse stopped before its tolerance.

    Attributes:
        residual: the largest ``|f(x) - y|`` over the entries that did not converge.
        count: how many entries did not converge.
        steps: how many steps were taken.
    """

    def __init__(self, message: str, *, residual: float = math.nan, count: int = 0, steps: int = 0) -> None:
        super().__init__(message)
        self.residual, self.count, self.steps = residual, count, steps


class ODESolveError(PyroflowsError, RuntimeError):
    """A differential equation was not solved to its end.

    Attributes:
        t: the time at which the worst row stopped.
        dt: the step that it would have taken next.
        nfe: how many times the field was evaluated.
        norm: the largest absolute entry of that row's state.
        rows: the numbers of all rows that stopped.
        reason: why: ``"velocity"`` (not finite), ``"state"`` (not finite), ``"step"`` (too small) or ``"max_nfe"``.
    """

    def __init__(
        self,
        message: str,
        *,
        t: float = math.nan,
        dt: float = math.nan,
        nfe: int = 0,
        norm: float = math.nan,
        rows: Sequence[int] = (),
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.t, self.dt, self.nfe, self.norm, self.rows, self.reason = t, dt, nfe, norm, tuple(rows), reason


# --- data and training -----------------------------------------------------------------------------------


class DataError(PyroflowsError, ValueError):
    """Training data that cannot be used as it is.

    Attributes:
        rows: the first offending row numbers, if rows are at fault.
        columns: the offending column names or numbers, if columns are at fault.
    """

    def __init__(self, message: str, *, rows: Sequence[int] = (), columns: Sequence[int | str] = ()) -> None:
        super().__init__(message)
        self.rows, self.columns = tuple(rows), tuple(columns)


class NotNumeric(DataError, TypeError):
    """A column holds text or objects instead of numbers."""


class NonFiniteData(DataError):
    """Some entries are NaN or infinite."""


class ConstantColumn(DataError):
    """A column has no spread, so it has no density."""


class TooFewRows(DataError):
    """There are too few rows to fit and to validate."""


class OutsideSupport(DataError):
    """Some entries lie outside, or on the edge of, the declared support."""


class NonFiniteLoss(PyroflowsError, ArithmeticError):
    """The loss or its gradient stayed NaN or infinite; the best weights so far were restored."""


# --- guides ----------------------------------------------------------------------------------------------


class GuideNotSetUp(PyroflowsError, RuntimeError):
    """A guide was used before ``setup(*args)`` created its parameters."""


class SubsampledLatentError(PyroflowsError, ValueError):
    """A joint guide was given a model whose local latents are subsampled, which would mix rows."""


# --- plugins ---------------------------------------------------------------------------------------------


class PluginError(PyroflowsError):
    """Something is wrong with an installed plugin or with how it was asked for."""


class UnknownPlugin(PluginError, LookupError):
    """No installed package registers this name."""


class AmbiguousPlugin(PluginError, LookupError):
    """Two installed packages register this name."""


class PluginBlocked(PluginError, LookupError):
    """The name is installed but switched off by an environment variable."""


class PluginConfigError(PluginError, ValueError):
    """An environment variable that steers plugins names something that is not installed."""


class PluginLoadError(PluginError, ImportError):
    """A plugin failed while it was imported.

    Attributes:
        plugin: the registered name.
        distribution: the package that registers it.
        version: that package's version.
    """

    def __init__(self, message: str, *, plugin: str = "", distribution: str = "", version: str = "") -> None:
        super().__init__(message)
        self.plugin, self.distribution, self.version = plugin, distribution, version


class PluginContractError(PluginLoadError, TypeError):
    """A plugin was imported but is not what its group promises, or speaks another API version."""


# --- archives --------------------------------------------------------------------------------------------


class ArchiveError(PyroflowsError, ValueError):
    """A file cannot be read as, or written as, a pyroflows archive."""


class NotRebuildable(ArchiveError):
    """The object was not built by name, so a file could not say how to build it again."""


class ArchiveCorrupt(ArchiveError):
    """The file is not a pyroflows archive, or is damaged."""


class ArchiveTooNew(ArchiveError):
    """The file was written by a newer format than this version reads."""


class ArchiveMismatch(ArchiveError):
    """The file's tensors do not fit the object that its manifest describes."""


class UntrustedFile(ArchiveError):
    """A pickle file was to be read without the caller vouching for it."""


# --- laws ------------------------------------------------------------------------------------------------


class LawViolation(PyroflowsError, AssertionError):
    """A transform, flow or guide broke one of the laws of ``pyroflows.testing``."""
