"""From what a user has to rows of finite numbers, or an error that names the row or column at fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.errors import ConstantColumn, DataError, NonFiniteData, NotNumeric, OutsideSupport, TooFewRows

__all__ = ["check_context", "check_rows", "check_support"]


def _names(value: Any, width: int) -> list[int | str]:
    columns = getattr(value, "columns", None)
    return list(range(width)) if columns is None else [str(name) for name in columns]


def _as_tensor(value: Any, what: str) -> Tensor:
    """A tensor of any number type from a tensor, array, data frame or nested list."""
    if isinstance(value, Tensor):
        return value.detach()
    if hasattr(value, "columns") and hasattr(value, "dtypes"):
        for name, dtype in zip(value.columns, value.dtypes, strict=True):
            if not np.issubdtype(np.asarray(value[name]).dtype, np.number) and str(dtype) != "bool":
                raise NotNumeric(
                    f"column {name!r} of {what} holds {dtype}, not numbers. Drop it, or encode it as numbers.",
                    columns=[str(name)],
                )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{what} is ragged: its rows have different lengths ({error}).") from error
    if array.dtype.kind in "US":
        array = np.asarray(value, dtype=object)  # numpy makes text of the numbers beside text
    if array.dtype.kind not in "biuf":
        rows, columns = [], []
        for index, entry in np.ndenumerate(array):
            if not isinstance(entry, int | float | np.number):
                rows, columns = [index[0]], list(index[1:2])
                where = f"row {index[0]}" + (f", column {index[1]}" if len(index) > 1 else "")
                raise NotNumeric(
                    f"{what} holds {type(entry).__name__.rstrip('_')} {str(entry)!r} at {where}; expected numbers.",
                    rows=rows,
                    columns=columns,
                )
        array = array.astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(array))


def _some(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:5])
    return f"{shown}, ..." if len(items) > 5 else shown


def _finite_matrix(value: Any, width: int, what: str, to: Tensor) -> tuple[Tensor, list[int | str]]:
    rows = _as_tensor(value, what)
    if rows.is_complex():
        raise NotNumeric(f"{what} holds complex numbers; expected real ones.")
    if rows.dim() == 1 and width == 1:
        rows = rows.unsqueeze(-1)
    if rows.dim() != 2 or rows.shape[1] != width:
        raise DataError(f"expected {what} of shape [rows, {width}], got {list(rows.shape)}.")
    names = _names(value, width)
    bad = ~torch.isfinite(rows)
    if bool(bad.any()):
        where = bad.nonzero()
        at, columns = where[:, 0].unique().tolist(), [names[j] for j in where[:, 1].unique().tolist()]
        first = where[0].tolist()
        raise NonFiniteData(
            f"{what} has {len(at)} rows with NaN or infinite entries (rows {_some(at)}; columns "
            f"{_some(columns)}; first {rows[first[0], first[1]].item()} at row {first[0]}, column "
            f"{names[first[1]]!r}). Remove or impute them.",
            rows=at[:100],
            columns=columns,
        )
    converted = rows.to(dtype=to.dtype, device=to.device)
    lost = ~torch.isfinite(converted)
    if bool(lost.any()):
        row, column = lost.nonzero()[0].tolist()
        raise NonFiniteData(
            f"{what} overflows {to.dtype} at row {row}, column {names[column]!r}. Rescale it, or use flow.double().",
            rows=[row],
            columns=[names[column]],
        )
    return converted, names


def check_rows(value: Any, input_dim: int, to: Tensor, *, min_rows: int | None = None, what: str = "x") -> Tensor:
    """Training rows ``[rows, input_dim]`` in the dtype and on the device of ``to``.

    Args:
        value: a tensor, array, data frame or nested list of numbers; for ``input_dim == 1`` also one-dimensional.
        input_dim: the number of columns expected.
        to: a tensor whose dtype and device the rows take.
        min_rows: the least number of rows; default one more than columns.
        what: what the errors call the data.

    Raises:
        DataError: the shape is wrong.
        NotNumeric: a column or entry is not a number.
        NonFiniteData: an entry is NaN or infinite, or overflows the dtype.
        ConstantColumn: a column has no spread.
        TooFewRows: there are too few rows.

    Example:
        >>> check_rows([[1, 2], [3, 5], [4, 4]], 2, torch.zeros(1)).dtype
        torch.float32
    """
    rows, names = _finite_matrix(value, input_dim, what, to)
    least = input_dim + 1 if min_rows is None else min_rows
    if len(rows) < least:
        raise TooFewRows(
            f"{what} has {len(rows)} rows for {input_dim} columns; at least {least} are needed to fit and validate."
        )
    constant = [name for name, flat in zip(names, (rows == rows[0]).all(0).tolist(), strict=True) if flat]
    if constant and min_rows is None:
        raise ConstantColumn(
            f"column {_some([repr(name) for name in constant])} of {what} is constant, so it has no density. "
            "Leave it out.",
            columns=constant,
        )
    return rows


def check_context(value: Any, context_dim: int, rows: int, to: Tensor) -> Tensor:
    """Context rows ``[rows, context_dim]`` in the dtype and on the device of ``to``.

    Raises:
        DataError: the shape is wrong, or the number of rows is not that of the data.
        NotNumeric: a column or entry is not a number.
        NonFiniteData: an entry is NaN or infinite.
    """
    context, _ = _finite_matrix(value, context_dim, "context", to)
    if len(context) != rows:
        raise DataError(f"x has {rows} rows and context has {len(context)}; expected one context a row.")
    return context


def check_support(rows: Tensor, support: constraints.Constraint, unconstrained: Tensor, name: object) -> None:
    """Checks that rows lie inside of a support, and that its bijection takes them to finite numbers.

    Raises:
        OutsideSupport: some row does not; the message names the first.
    """
    inside = support.check(rows)
    inside = inside.reshape(len(rows), -1).all(-1) & torch.isfinite(unconstrained).all(-1)
    if not bool(inside.all()):
        at = (~inside).nonzero()[:, 0].tolist()
        raise OutsideSupport(
            f"{len(at)} rows lie outside or on the edge of the support {name} (rows {_some(at)}; row {at[0]} is "
            f"{rows[at[0]].tolist()}). Move them inside, or declare another support.",
            rows=at[:100],
        )
