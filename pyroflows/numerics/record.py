"""What solves of differential equations took, and what their regularisers come to, told to whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Record", "Work", "open_records", "recorded"]


@dataclass
class Work:
    """How many times a field was evaluated.

    Attributes:
        forward: for the solution. Where a gradient is to be recorded by "adjoint" or "checkpoint", one of them, of a
            single row, looks for the tensors that the field depends on.
        backward: for its gradient, each time with a vector-Jacobian product; 0 before ``backward()`` has run, and
            with ``gradient="direct"``, which evaluates nothing again.
    """

    forward: int = 0
    backward: int = 0


class Record:
    """What the solves of a `recorded` block took. It goes on counting in ``backward()``, also after the block."""

    def __init__(self) -> None:
        self._works: list[Work] = []
        self._terms: list[tuple[str, float, Tensor]] = []

    def __repr__(self) -> str:
        return (
            f"Record(solves={self.solves}, nfe_forward={self.nfe_forward}, nfe_backward={self.nfe_backward}, "
            f"penalties={self.penalties})"
        )

    @property
    def solves(self) -> int:
        """How many solves there were, of one row at least."""
        return len(self._works)

    @property
    def nfe_forward(self) -> int:
        """How many times fields were evaluated for solutions."""
        return sum(work.forward for work in self._works)

    @property
    def nfe_backward(self) -> int:
        """How many times they were evaluated for gradients so far; see `Work`."""
        return sum(work.backward for work in self._works)

    @property
    def penalties(self) -> dict[str, float]:
        """Every regulariser by its name, without its weight: its mean over the rows of a solve, summed over solves."""
        found: dict[str, float] = {}
        for name, _, value in self._terms:
            found[name] = found.get(name, 0.0) + float(value.detach())
        return found

    def penalty(self) -> Tensor:
        """The weighted sum of all regularisers, a differentiable scalar to add to a loss; 0 if there were none."""
        terms = [weight * value for _, weight, value in self._terms]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def count(self, work: Work) -> None:
        """Counts a solve with all that it will evaluate."""
        self._works.append(work)

    def add(self, name: str, weight: float, value: Tensor) -> None:
        """Adds a regulariser of a solve: its weight and its mean over the rows, a scalar."""
        self._terms.append((name, weight, value))


_OPEN: ContextVar[tuple[Record, ...]] = ContextVar("open_records", default=())


def open_records() -> tuple[Record, ...]:
    """The records of this thread that are open, the outermost first; none under ``torch.compile`` and tracing."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return ()
    return _OPEN.get()


@contextmanager
def recorded() -> Iterator[Record]:
    """A block in which solves of differential equations say what they took and what their regularisers come to.

    Blocks may be nested: each sees all that happens in it. A record belongs to the thread that opened it, and holds
    the graph of its regularisers: open a new one for every step of training.

    Example:
        >>> from pyroflows.numerics import solve
        >>> rate = torch.tensor(2.0, requires_grad=True)
        >>> with recorded() as record:
        ...     y = solve(lambda t, y: -rate * y, torch.ones(5, 1), 0.0, 1.0, gradient="adjoint").state
        >>> record.solves, record.nfe_forward > 0, record.nfe_backward
        (1, True, 0)
        >>> y.sum().backward()
        >>> record.nfe_backward > 0, record.penalty()
        (True, tensor(0.))
    """
    record = Record()
    token = _OPEN.set((*_OPEN.get(), record))
    try:
        yield record
    finally:
        _OPEN.reset(token)
