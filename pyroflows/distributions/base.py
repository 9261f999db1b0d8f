"""Base distributions as modules, so that they follow ``.to(device)`` and ``state_dict``.

A flow whose layers are nearly linear far out has the tails of its base, so heavy tails are to be had from a base with
heavy tails whose weight is learned: Jaini, Kobyzev, Yu, Brubaker (2020), *Tails of Lipschitz triangular flows*,
arXiv:1907.04481.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.numerics import bounded_log_scale

__all__ = ["Base", "BaseName", "LearnedStudentT", "base_by_name", "standard_normal"]

BaseName = Literal["normal", "student_t"]
"""The bases that named flows on real vectors can start from."""


class Base(nn.Module):
    """A fixed distribution whose parameters are buffers; calling it gives the Pyro distribution.

    Args:
        distribution: a class or function from tensors to a Pyro distribution.
        event_dim: how many trailing batch dimensions become event dimensions.
        **parameters: its tensors, kept as buffers.

    Raises:
        OptionError: no tensor was given, so there is nothing that a device or dtype could be read from.
        ValueError: a parameter lies outside of its constraint.

    Example:
        >>> base = Base(dist.StudentT, df=torch.tensor(3.0), loc=torch.zeros(2), scale=torch.ones(2))
        >>> base().event_shape
        torch.Size([2])
    """

    def __init__(self, distribution: Callable[..., Any], event_dim: int = 1, **parameters: Tensor) -> None:
        super().__init__()
        if not parameters:
            raise OptionError("Base needs the distribution's parameters, as tensors by name.")
        distribution(**parameters)  # checks them, once
        quiet = "validate_args" in inspect.signature(distribution).parameters
        self.options: dict[str, Any] = {"validate_args": False} if quiet else {}
        self.distribution, self.event_dim, self.names = distribution, event_dim, tuple(parameters)
        for name, value in parameters.items():
            self.register_buffer(name, value)

    def forward(self) -> dist.TorchDistribution:
        """The distribution."""
        base = self.distribution(**{name: getattr(self, name) for name in self.names}, **self.options)
        return base.to_event(self.event_dim)

    def extra_repr(self) -> str:
        """The distribution's name."""
        return str(getattr(self.distribution, "__name__", self.distribution))


def standard_normal(input_dim: int) -> Base:
    """The standard normal on vectors of ``input_dim`` numbers.

    Example:
        >>> standard_normal(3)().event_shape
        torch.Size([3])
    """
    return Base(dist.Normal, loc=torch.zeros(input_dim), scale=torch.ones(input_dim))


class _StudentT(dist.TorchDistribution):
    """Independent Student-t numbers whose degrees of freedom are asked for when they are needed."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real
    has_rsample = True

    def __init__(self, owner: LearnedStudentT, batch_shape: torch.Size) -> None:
        self.owner = owner
        super().__init__(batch_shape, validate_args=False)

    @property
    def df(self) -> Tensor:
        """The degrees of freedom as they are now."""
        return self.owner.df.expand(self.batch_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _StudentT:
        """The same over a larger batch."""
        return _StudentT(self.owner, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A normal over the root of a mean square of ``df`` others."""
        df = self.df
        wide = df.to(torch.promote_types(df.dtype, torch.float32))
        square = torch.distributions.Chi2(wide, validate_args=False).rsample(torch.Size(sample_shape))
        return (torch.randn_like(square) * torch.rsqrt(square / wide)).to(df.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of each number, in at least float32; finite for every finite one."""
        df = self.df.to(torch.promote_types(self.df.dtype, torch.float32))
        constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * torch.log(math.pi * df)
        u = value.abs() * torch.rsqrt(df)
        far = u > 1
        # log(1 + u^2), whose square would overflow.
        near = torch.log1p(torch.where(far, 0.0, u).square())
        out = torch.where(far, u, 1.0)
        return constant - (df + 1) / 2 * torch.where(
            far, 2 * torch.log(out) + torch.log1p(out.reciprocal().square()), near
        )


class LearnedStudentT(nn.Module):
    r"""Independent Student-t numbers about 0 with scale 1, each of whose degrees of freedom is learned.

    :math:`p(x) \propto (1 + x^2 / \nu)^{-(\nu + 1) / 2}`, whose tails fall like a power: moments exist below order
    :math:`\nu`. It starts at ``df`` and stays within a factor of :math:`e^3` of it. A fixed number of degrees is
    ``Base(dist.StudentT, df=..., loc=..., scale=...)``.

    Args:
        input_dim: how many numbers.
        df: the degrees of freedom :math:`\nu` at the start.

    Raises:
        OptionError: ``df`` is not between 0.1 and 1000.

    Example:
        >>> base = LearnedStudentT(2, df=3.0)
        >>> base.df
        tensor([3., 3.], grad_fn=<...>)
        >>> base().log_prob(torch.tensor([0.0, 1e30])).isfinite()
        tensor(True)
    """

    MAX_LOG_FACTOR = 3.0

    def __init__(self, input_dim: int, df: float = 5.0) -> None:
        super().__init__()
        if not 0.1 <= df <= 1000:
            raise OptionError(f"df must be between 0.1 and 1000, got {df!r}.")
        self.start = float(df)
        self.raw = nn.Parameter(torch.zeros(input_dim))

    @property
    def df(self) -> Tensor:
        """The degrees of freedom ``[input_dim]``."""
        return self.start * torch.exp(bounded_log_scale(self.raw, self.MAX_LOG_FACTOR))

    def forward(self) -> dist.TorchDistribution:
        """The distribution."""
        return _StudentT(self, self.raw.shape).to_event(1)

    def extra_repr(self) -> str:
        """Size and start."""
        return f"{len(self.raw)}, df={self.start}"


def base_by_name(name: BaseName, input_dim: int) -> nn.Module:
    """The base that a named flow on ``input_dim`` real numbers starts from.

    Raises:
        OptionError: there is no such base.

    Example:
        >>> base_by_name("student_t", 3)
        LearnedStudentT(3, df=5.0)
    """
    if name == "normal":
        return standard_normal(input_dim)
    if name == "student_t":
        return LearnedStudentT(input_dim)
    raise OptionError(f'base must be "normal" or "student_t", got {name!r}.')
