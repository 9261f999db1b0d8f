"""One direction of a transform through ``torch.compile``, or as it is where no compiler is found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.errors import PyroflowsError

__all__ = ["Compiled"]

Direction = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Compiled:
    """A function that is compiled at its first call, and again for what it has not seen before.

    If compiling fails (no C++ compiler is installed, say), one warning tells so, and the function runs as it is. An
    error of the function itself is raised as ever. Argument checks of distributions, which the first compilation of a
    process switches off, are afterwards as they were.

    Args:
        function: a direction of a transform, ``(value, context) -> (value, log_det)``.
        **options: of ``torch.compile``.

    Example:
        >>> from pyroflows.transforms import affine
        >>> double = Compiled(affine(2).forward_and_log_det, backend="eager")
        >>> double(torch.zeros(3, 2))[0].shape
        torch.Size([3, 2])
    """

    def __init__(self, function: Direction, **options: Any) -> None:
        self.function, self.options = function, options
        self._run: Direction | None = None

    def __call__(self, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or self._run is self.function:
            return self.function(value, context)
        checks = Distribution._validate_args
        try:
            if self._run is None:
                self._run = torch.compile(self.function, **self.options)
            return self._run(value, context)
        except PyroflowsError:
            raise
        except Exception as error:
            result = self.function(value, context)  # raises, if it is the function that fails
            self._run = self.function
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {reason[0]}), so the transform runs uncompiled. "
                "Results are the same. Install a C++ compiler, such as g++, or leave compile=True out.",
                RuntimeWarning,
                stacklevel=2,
            )
            return result
        finally:
            Distribution.set_default_validate_args(checks)
