"""What becomes of rows that a solver with step control gives up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyroflows.errors import ODESolveError, OptionError
from pyroflows.numerics.runge_kutta import TABLEAUS

if TYPE_CHECKING:
    from pyroflows.numerics.ode import Problem

__all__ = ["Fallback", "in_parts", "numbered"]


@dataclass
class Fallback:
    """Fixed steps for rows that a solver with step control gives up, because of ``max_nfe`` or of too small steps.

    Their error is not controlled. A velocity that is not finite stays an error. Each of these objects warns once.

    Args:
        solver: ``"euler"``, ``"midpoint"`` or ``"rk4"``.
        steps: how many steps.

    Raises:
        OptionError: the solver is another, or there is no step.
    """

    solver: str = "rk4"
    steps: int = 200
    warned: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.solver not in TABLEAUS or TABLEAUS[self.solver].error:
            fixed = (name for name, tableau in TABLEAUS.items() if not tableau.error)
            raise OptionError(f"Expected fallback to be one of {', '.join(fixed)}, got {self.solver!r}.")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"Expected at least one step, got steps={self.steps!r}.")

    def takes(self, error: ODESolveError) -> bool:
        """Whether it is for rows that stopped so; then it says so, the first time."""
        takes = error.reason in ("step", "max_nfe")
        if takes and not self.warned:
            self.warned = True
            warnings.warn(
                f"A solver with step control gave up some rows ({error.reason}). They are solved by {self.steps} fixed "
                f"steps of {self.solver!r} instead, whose error is not controlled.",
                stacklevel=4,
            )
        return takes


def in_parts(
    problem: Problem, rows: Tensor, solved: Callable[[Problem, Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Rows and their solutions: of all at once, or where some are for the fallback, of these and of the others."""
    if not len(rows):
        return []
    try:
        return [(rows, solved(problem, rows))]
    except ODESolveError as error:
        if problem.fallback is None or not problem.fallback.takes(error):
            raise
        # Without numbers it is all of them, which share torchdiffeq's steps.
        lost = torch.isin(rows, torch.tensor(error.rows or rows.tolist(), device=rows.device))
    given_up = rows[lost]
    rest = in_parts(problem, rows[~lost], solved)
    try:
        return [*rest, (given_up, solved(problem.by_fixed_steps(), given_up))]
    except ODESolveError as error:
        error.add_note("This was the fallback: fixed steps for rows that the solver with step control gave up.")
        raise


@contextmanager
def numbered(rows: Tensor) -> Iterator[None]:
    """Errors from inside name rows of the whole batch."""
    try:
        yield
    except ODESolveError as error:
        error.rows = tuple(rows[list(error.rows)].tolist())
        raise
