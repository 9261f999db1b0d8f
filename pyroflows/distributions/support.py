"""Where data live: constraints of torch, how a user names them, and how a file does."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import ComposeTransform

from pyroflows.errors import ArchiveCorrupt, NotRebuildable, OptionError
from pyroflows.transforms import CholeskyTransform, FlowTransform, VectorToCholesky, Wrapped

__all__ = ["Support", "as_constraint", "describe", "is_real", "onto", "restore"]

Support = constraints.Constraint | str | Sequence[constraints.Constraint | str]
"""A constraint, its name in ``pyro.distributions.constraints``, or one of either for each column."""

_NAMED = {
    name: getattr(constraints, name)
    for name in (
        *("real", "real_vector", "positive", "nonnegative", "unit_interval", "simplex", "softplus_positive"),
        *("ordered_vector", "positive_ordered_vector", "lower_cholesky", "positive_definite"),
        *("positive_semidefinite", "corr_cholesky", "corr_matrix"),
    )
}
# Pyro's says of a vector that it is a number.
_NAMED["positive_ordered_vector"] = copy.copy(constraints.positive_ordered_vector)
_NAMED["positive_ordered_vector"].event_dim = 1
_BOUNDED: dict[str, tuple[type[constraints.Constraint], tuple[str, ...]]] = {
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "half_open_interval": (constraints.half_open_interval, ("lower_bound", "upper_bound")),
}


def as_constraint(support: Support | None) -> constraints.Constraint | None:
    """The constraint that a user named; ``None`` for all real vectors.

    Raises:
        OptionError: a name is unknown, or takes bounds, or a bound is out of order.

    Example:
        >>> as_constraint(["positive", constraints.interval(0.0, 2.0)]).check(torch.tensor([3.0, 1.0]))
        tensor([True, True])
    """
    if support is None or support is constraints.real or support is constraints.real_vector:
        return None
    if support is constraints.positive_ordered_vector:
        return _NAMED["positive_ordered_vector"]
    if isinstance(support, constraints.cat | constraints.stack):
        if support.dim != -1:
            raise OptionError(f"a support by columns goes along the last dimension, dim=-1, not dim={support.dim}.")
        lengths = getattr(support, "lengths", [1] * len(support.cseq))
        return as_constraint([column for column, n in zip(support.cseq, lengths, strict=True) for _ in range(n)])
    if isinstance(support, constraints.Constraint):
        return _with_plain_bounds(support)
    if isinstance(support, str):
        if support not in _NAMED:
            hint = f"; write constraints.{support}(...) for it" if support in _BOUNDED else ""
            raise OptionError(f"no support named {support!r}{hint}. Known names: {', '.join(_NAMED)}.")
        return as_constraint(_NAMED[support])
    if not isinstance(support, Iterable):
        raise OptionError(f"a support is a constraint, a name, or one for each column; got {support!r}.")
    columns = [as_constraint(column) or constraints.real for column in support]
    return constraints.cat(columns, dim=-1, lengths=[1] * len(columns))


def is_real(constraint: constraints.Constraint) -> bool:
    """Whether a constraint allows every real number in every entry.

    Example:
        >>> is_real(constraints.real_vector), is_real(constraints.positive)
        (True, False)
    """
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))  # a copied constraint is another object


def _with_plain_bounds(constraint: constraints.Constraint) -> constraints.Constraint:
    """The constraint with bounds that are numbers, one for each column where a bound is a vector."""
    kind, names = next((entry for entry in _BOUNDED.values() if type(constraint) is entry[0]), (None, ()))
    if kind is None:
        return constraint
    bounds = torch.broadcast_tensors(*(torch.as_tensor(getattr(constraint, name)).double() for name in names))
    if bounds[0].dim() > 1 or not all(torch.isfinite(bound).all() for bound in bounds):
        raise OptionError(f"the bounds of {constraint} must be finite numbers, or one for each column.")
    if len(bounds) == 2 and not bool((bounds[0] < bounds[1]).all()):
        raise OptionError(f"the lower bound of {constraint} is not below the upper one.")
    if bounds[0].dim() == 0:
        return kind(*(float(bound) for bound in bounds))
    return as_constraint([kind(*row) for row in zip(*(bound.tolist() for bound in bounds), strict=True)])  # type: ignore[return-value]


def onto(constraint: constraints.Constraint, event_shape: Sequence[int]) -> FlowTransform:
    """The bijection from real points of a shape onto a constraint.

    Raises:
        OptionError: none is known, or points of this shape do not fit it.

    Example:
        >>> onto(constraints.lower_cholesky, (3,))(torch.zeros(3))
        tensor([[1., 0.],
                [0., 1.]])
    """
    try:
        bijection = _bijection(constraint)
    except NotImplementedError as error:
        raise OptionError(
            f"no bijection from the real vectors onto the support {constraint} is known. Supports with one: "
            f"{', '.join([*_NAMED, *_BOUNDED])}, and one of these for each column."
        ) from error
    size = torch.Size(event_shape).numel()
    columns = sum(getattr(constraint, "lengths", ())) or size
    if columns != size:
        raise OptionError(f"the support names {columns} columns and the flow has {size}.")
    if isinstance(constraint, constraints.cat) and any(column.event_dim for column in constraint.cseq):
        raise OptionError(f"a support by columns takes one of numbers for each column, got {constraint.cseq}.")
    try:
        bijection.forward_shape(event_shape)
    except ValueError as error:
        raise OptionError(
            f"points of shape {tuple(event_shape)} do not fit the support {constraint}: {error}"
        ) from error
    return Wrapped(bijection, constraint)


def _bijection(constraint: constraints.Constraint) -> Transform:
    if type(constraint) is type(constraints.lower_cholesky):
        return VectorToCholesky()
    if type(constraint) in (type(constraints.positive_definite), type(constraints.positive_semidefinite)):
        return ComposeTransform([VectorToCholesky(), CholeskyTransform().inv])
    return biject_to(constraint)


def describe(constraint: constraints.Constraint | None) -> Any:
    """A constraint in terms that JSON can hold.

    Raises:
        NotRebuildable: the constraint is not one of those that a file may name.

    Example:
        >>> describe(constraints.interval(0.0, 2.0))
        {'interval': {'lower_bound': 0.0, 'upper_bound': 2.0}}
    """
    if constraint is None:
        return None
    for name, known in _NAMED.items():
        if type(constraint) is type(known) and vars(constraint) == vars(known):  # a copy is as good
            return name
    if isinstance(constraint, constraints.cat):
        return [describe(column) for column in constraint.cseq]
    if isinstance(constraint, constraints.independent):
        return describe(constraint.base_constraint)
    for name, (kind, bounds) in _BOUNDED.items():
        if type(constraint) is kind:
            return {name: {bound: float(getattr(constraint, bound)) for bound in bounds}}
    raise NotRebuildable(
        f"a file cannot name the support {constraint!r}. It can name {', '.join([*_NAMED, *_BOUNDED])}."
    )


def restore(description: Any) -> Support | None:
    """The constraint that `describe` put down.

    Raises:
        ArchiveCorrupt: the description is not one of ours.

    Example:
        >>> restore({"interval": {"lower_bound": 0.0, "upper_bound": 2.0}})
        Interval(lower_bound=0.0, upper_bound=2.0)
    """
    if description is None:
        return None
    if isinstance(description, str) and description in _NAMED:
        return _NAMED[description]
    if isinstance(description, list):
        return [as_constraint(restore(column)) or constraints.real for column in description]
    if isinstance(description, Mapping) and len(description) == 1:
        [(name, bounds)] = description.items()
        if name in _BOUNDED and isinstance(bounds, Mapping) and set(bounds) == set(_BOUNDED[name][1]):
            values = {key: float(value) for key, value in bounds.items()}
            return _BOUNDED[name][0](**values)
    raise ArchiveCorrupt(f"the archive names an unknown support: {description!r}.")
