"""From what a user has to rows of finite numbers, or an error that names the row or column at fault.

A row is a vector for most flows, and an image or a matrix for some: a point, of whatever shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.errors import ConstantColumn, DataError, NonFiniteData, NotNumeric, OutsideSupport, TooFewRows

__all__ = ["check_context", "check_rows", "check_spread", "check_support", "entry"]


def entry(index: int, shape: Sequence[int]) -> int | str:
    """What the errors call a number of a point: its column, or its place such as ``"(0, 3, 4)"``.

    Example:
        >>> entry(5, (6,)), entry(5, (2, 3))
        (5, '(1, 2)')
    """
    return index if len(shape) < 2 else str(tuple(int(i) for i in np.unravel_index(index, tuple(shape))))


def _names(value: Any, shape: Sequence[int]) -> list[int | str]:
    columns = getattr(value, "columns", None)
    if columns is not None:
        return [str(name) for name in columns]
    return [entry(index, shape) for index in range(math.prod(shape))]


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


def _finite(value: Any, shape: Sequence[int], what: str, to: Tensor) -> tuple[Tensor, list[int | str]]:
    """Rows of points of a shape, and what their numbers are called."""
    rows = _as_tensor(value, what)
    if rows.is_complex():
        raise NotNumeric(f"{what} holds complex numbers; expected real ones.")
    if rows.dim() == 1 and tuple(shape) == (1,):
        rows = rows.unsqueeze(-1)
    if rows.dim() == 0 or rows.shape[1:] != tuple(shape):
        expected = ", ".join(["rows", *map(str, shape)])
        raise DataError(f"expected {what} of shape [{expected}], got {list(rows.shape)}.")
    names = _names(value, shape)
    bad = ~torch.isfinite(rows).reshape(len(rows), len(names))
    if bool(bad.any()):
        where = bad.nonzero()
        at, columns = where[:, 0].unique().tolist(), [names[j] for j in where[:, 1].unique().tolist()]
        row, column = where[0].tolist()
        raise NonFiniteData(
            f"{what} has {len(at)} rows with NaN or infinite entries (rows {_some(at)}; columns "
            f"{_some(columns)}; first {rows[row].flatten()[column].item()} at row {row}, column "
            f"{names[column]!r}). Remove or impute them.",
            rows=at[:100],
            columns=columns,
        )
    converted = rows.to(dtype=to.dtype, device=to.device)
    lost = ~torch.isfinite(converted).reshape(len(rows), len(names))
    if bool(lost.any()):
        row, column = lost.nonzero()[0].tolist()
        raise NonFiniteData(
            f"{what} overflows {to.dtype} at row {row}, column {names[column]!r}. Rescale it, or use flow.double().",
            rows=[row],
            columns=[names[column]],
        )
    return converted, names


def check_rows(
    value: Any, input_dim: int | Sequence[int], to: Tensor, *, min_rows: int | None = None, what: str = "x"
) -> Tensor:
    """Training rows ``[rows, input_dim]``, or ``[rows, *shape]``, in the dtype and on the device of ``to``.

    Args:
        value: a tensor, array, data frame or nested list of numbers; for ``input_dim == 1`` also one-dimensional.
        input_dim: the number of columns expected, or the shape of a point, such as ``(3, 8, 8)`` of an image.
        to: a tensor whose dtype and device the rows take.
        min_rows: the least number of rows; default one more than columns, and 2 for points of more dimensions.
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
        >>> check_rows(torch.zeros(5, 3, 8, 8), (3, 8, 8), torch.zeros(1)).shape
        torch.Size([5, 3, 8, 8])
    """
    shape = (input_dim,) if isinstance(input_dim, int) else tuple(input_dim)
    rows, names = _finite(value, shape, what, to)
    vectors = len(shape) == 1
    least = (shape[0] + 1 if vectors else 2) if min_rows is None else min_rows
    if len(rows) < least:
        size = f"{shape[0]} columns" if vectors else f"points of shape {shape}"
        raise TooFewRows(f"{what} has {len(rows)} rows for {size}; at least {least} are needed to fit and validate.")
    if vectors and min_rows is None and (constant := _constant(rows, names)):
        raise ConstantColumn(
            f"column {_some([repr(name) for name in constant])} of {what} is constant, so it has no density. "
            "Leave it out.",
            columns=constant,
        )
    return rows


def _constant(rows: Tensor, names: Sequence[int | str]) -> list[int | str]:
    still = (rows == rows[0]).all(0).flatten().tolist()
    return [name for name, flat in zip(names, still, strict=True) if flat]


def check_spread(unconstrained: Tensor) -> None:
    """Checks that every entry of points of several dimensions changes, before the map to their support.

    So the ones on the diagonal of a correlation matrix are no fault of the data.

    Raises:
        ConstantColumn: some entry does not, such as a pixel that is black in every image.
    """
    shape = unconstrained.shape[1:]
    constant = _constant(unconstrained, _names(None, shape))
    if constant:
        raise ConstantColumn(
            f"{len(constant)} of the {shape.numel()} numbers of a point are the same in every row (at "
            f"{_some(constant)}), so they have no density. Add noise to them; the pixels of an image are dequantised "
            "by (x + torch.rand_like(x)) / 256.",
            columns=constant,
        )


def check_context(value: Any, context_dim: int, rows: int, to: Tensor) -> Tensor:
    """Context rows ``[rows, context_dim]`` in the dtype and on the device of ``to``.

    Raises:
        DataError: the shape is wrong, or the number of rows is not that of the data.
        NotNumeric: a column or entry is not a number.
        NonFiniteData: an entry is NaN or infinite.
    """
    context, _ = _finite(value, (context_dim,), "context", to)
    if len(context) != rows:
        raise DataError(f"x has {rows} rows and context has {len(context)}; expected one context a row.")
    return context


def check_support(rows: Tensor, support: constraints.Constraint, unconstrain: Callable[[Tensor], Tensor]) -> Tensor:
    """Checks that rows lie inside of a support, and that its bijection takes them to finite numbers.

    Returns:
        These numbers.

    Raises:
        OutsideSupport: some row does not; the message names the first.
    """
    inside = support.check(rows).reshape(len(rows), -1).all(-1)
    unconstrained = rows
    if bool(inside.all()):
        unconstrained = unconstrain(rows)
        inside = torch.isfinite(unconstrained).reshape(len(rows), -1).all(-1)
    if not bool(inside.all()):
        at = (~inside).nonzero()[:, 0].tolist()
        first = f"; row {at[0]} is {rows[at[0]].tolist()}" if rows[0].numel() <= 100 else ""
        raise OutsideSupport(
            f"{len(at)} rows lie outside or on the edge of the support {support} (rows {_some(at)}{first}). "
            "Move them inside, or declare another support.",
            rows=at[:100],
        )
    return unconstrained
