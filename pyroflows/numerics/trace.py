r"""Traces of Jacobians, exact and estimated, and derivatives along a solution.

Everything here is made of one linearisation, :math:`u \mapsto J^\top u`: one evaluation of the function, as many
products as are asked for, each differentiable again.

Estimates: Hutchinson (1990), *A stochastic estimator of the trace of the influence matrix*; Grathwohl, Chen,
Bettencourt, Sutskever, Duvenaud (2019), *FFJORD*, arXiv:1810.01367; Meyer, Musco, Musco, Woodruff (2021), *Hutch++*,
arXiv:2010.09649. The Jacobian's norm from the same products: Finlay, Jacobsen, Nurbekyan, Oberman (2020), *How to
train your neural ODE*, arXiv:2002.02798. Derivatives along a solution: Kelly, Bettencourt, Johnson, Duvenaud (2020),
*Learning differential equations that are easy to solve*, arXiv:2007.04504.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import OptionError, ShapeError
from pyroflows.numerics.modes import is_plainly_eager
from pyroflows.numerics.reduce import sum_last

__all__ = ["Trace", "deflate", "draw_probes", "exact_divergence", "hutch_plus_plus", "hutchinson", "total_derivative"]

ROWS = 256
"""From this many rows on, products with the Jacobian are as fast one by one as all at once, and need less memory."""


class Trace(NamedTuple):
    r"""A function's value, the trace of its Jacobian :math:`J` in every row, and what else that tells.

    Attributes:
        value: ``[*batch, D]``.
        divergence: :math:`\operatorname{tr} J`, or its estimate: ``[*batch]``, at least float32.
        samples: the estimates that the divergence is the mean of, ``[n, *batch]``; none if it is exact.
        products: products with the Jacobian's transpose ``[n, *batch, D]``, from which its norm follows; none if
            there was no need of any.
        share: what each product counts in the norm.
    """

    value: Tensor
    divergence: Tensor
    samples: Tensor | None = None
    products: Tensor | None = None
    share: float = 1.0

    @property
    def standard_error(self) -> Tensor:
        """Of the divergence, ``[*batch]``: zero if it is exact, infinite after a single probe."""
        if self.samples is None:
            return torch.zeros_like(self.divergence)
        count = len(self.samples)
        if count == 1:
            return torch.full_like(self.divergence, math.inf)
        return self.samples.std(0) / math.sqrt(count)

    @property
    def squared_norm(self) -> Tensor:
        r"""The squared Frobenius norm :math:`\|J\|_F^2`, exact or estimated without bias: ``[*batch]``.

        Raises:
            OptionError: there are no products with the Jacobian.
        """
        if self.products is None:
            raise OptionError("the norm of a Jacobian needs products with it: give probes.")
        return self.share * sum_last(self.products.square()).sum(0)


def draw_probes(
    x: Tensor,
    count: int = 1,
    kind: Literal["rademacher", "gaussian"] = "rademacher",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Independent random vectors with mean zero and unit covariance, in the shape, dtype and device of ``x``.

    A trace's estimate varies less with signs (Rademacher) than with normal numbers.

    Args:
        x: ``[*batch, D]``.
        count: how many for each row, :math:`n`.
        kind: signs, or standard normal numbers.
        generator: where the random numbers come from.

    Returns:
        ``[n, *batch, D]``.

    Raises:
        OptionError: the count is not positive, or the kind is unknown.

    Example:
        >>> draw_probes(torch.zeros(5, 2), 3).abs().unique(), draw_probes(torch.zeros(5, 2), 3).shape
        (tensor([1.]), torch.Size([3, 5, 2]))
    """
    if not isinstance(count, int) or count < 1:
        raise OptionError(f"the number of probes must be a positive integer, got {count!r}.")
    shape = (count, *x.shape)
    if kind == "rademacher":
        return torch.randint(0, 2, shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1
    if kind == "gaussian":
        return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
    raise OptionError(f"no probes of kind {kind!r}. Known kinds: rademacher, gaussian.")


def exact_divergence(function: Callable[[Tensor], Tensor], x: Tensor) -> Trace:
    r"""The trace of a function's Jacobian in every row, by one product with it a dimension.

    Few rows take many products at once, if the function's derivative can be vectorised, and many rows one by one:
    both are faster than forward mode, which the derivatives of many custom functions do not have either.

    Args:
        function: from ``[*batch, D]`` to ``[*batch, D]``, each row for itself.
        x: ``[*batch, D]``.

    Returns:
        The value, the exact divergence, and the rows of the Jacobian as products.

    Raises:
        ShapeError: the function's value has another shape than ``x``.

    Example:
        >>> trace = exact_divergence(lambda x: x**2, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> trace.divergence, trace.squared_norm
        (tensor([ 6., 14.]), tensor([ 20., 100.]))
    """
    dim = x.shape[-1]
    at_once = min(dim, ROWS // max(1, x.shape[:-1].numel()))
    basis = torch.eye(dim, dtype=x.dtype, device=x.device)
    basis = basis.reshape(dim, *(1,) * (x.dim() - 1), dim).expand(dim, *x.shape)
    if at_once > 1:
        try:
            value, pull = torch.func.vjp(function, x)  # type: ignore[misc]
            _check_square(value, x)
            (products,) = torch.func.vmap(pull, chunk_size=at_once)(basis)
            return Trace(value, _diagonal_sum(products), None, products)
        except (RuntimeError, NotImplementedError):  # no vectorised rule, or an error that the next lines raise again
            pass
    value, pull = _pullback(function, x)
    _check_square(value, x)
    products = torch.stack([pull(unit)[0] for unit in basis])
    return Trace(value, _diagonal_sum(products), None, products)


def hutchinson(function: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor) -> Trace:
    r"""Hutchinson's estimate :math:`\frac{1}{n} \sum_i e_i^\top J e_i` of the trace of a function's Jacobian.

    Unbiased for independent probes with mean zero and unit covariance, such as `draw_probes` gives.

    Args:
        function: from ``[*batch, D]`` to ``[*batch, D]``, each row for itself.
        x: ``[*batch, D]``.
        probes: ``[n, *batch, D]``; the same throughout a solve, so that the solver sees a smooth function.

    Raises:
        ShapeError: the probes, or the function's value, do not have the shape of ``x``.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> hutchinson(lambda x: x**2, x, draw_probes(x, 2)).divergence  # exact for a diagonal Jacobian
        tensor([ 6., 14.])
    """
    _check_probes(probes, x, least=1)
    value, pull = _pullback(function, x)
    _check_square(value, x)
    products = torch.stack([pull(probe)[0] for probe in probes])
    samples = sum_last(products * probes)
    return Trace(value, samples.mean(0), samples, products, 1 / len(probes))


def hutch_plus_plus(function: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor) -> Trace:
    r"""The Hutch++ estimate: exact on a few directions of the Jacobian's range, Hutchinson's estimate on the rest.

    With :math:`Q` an orthonormal basis of the span of :math:`J^\top s_i` and :math:`P = I - Q Q^\top`,

    .. math:: \operatorname{tr}(Q^\top J Q) + \frac{1}{n} \sum_i g_i^\top P J P g_i

    where :math:`s_i` is the first half of the probes and :math:`g_i` the other. Unbiased, and exact where the rank of
    the Jacobian is below the number of :math:`s_i`. It costs half as many products more than there are probes. The
    basis counts as a constant when the estimate is differentiated, which leaves the gradient unbiased.

    Args:
        function: from ``[*batch, D]`` to ``[*batch, D]``, each row for itself.
        x: ``[*batch, D]``.
        probes: ``[n, *batch, D]``, two at least.

    Raises:
        ShapeError: there are fewer than two probes, or they, or the value, do not have the shape of ``x``.

    Example:
        >>> x, ones = torch.ones(5, 8), torch.ones(8, 8)
        >>> hutch_plus_plus(lambda x: x @ ones, x, draw_probes(x, 4, "gaussian")).divergence.round(decimals=4)
        tensor([8., 8., 8., 8., 8.])
    """
    _check_probes(probes, x, least=2)
    value, pull = _pullback(function, x)
    _check_square(value, x)
    half = min(len(probes) // 2, x.shape[-1])
    directions, rest = deflate(torch.stack([pull(probe)[0] for probe in probes[:half]]), probes[half:])
    within = torch.stack([pull(direction)[0] for direction in directions])
    beyond = torch.stack([pull(probe)[0] for probe in rest])
    samples = sum_last(within * directions).sum(0) + sum_last(beyond * rest)
    products = torch.cat([within, beyond / math.sqrt(len(rest))])
    return Trace(value, samples.mean(0), samples, products)


def deflate(sketch: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the span of some vectors, without gradient, and what other vectors have beside it.

    Args:
        sketch: ``[m, *batch, D]``.
        probes: ``[n, *batch, D]``.

    Returns:
        ``[min(m, D), *batch, D]`` and ``[n, *batch, D]``.

    Example:
        >>> basis, rest = deflate(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
        >>> basis.abs(), rest
        (tensor([[1., 0.]]), tensor([[0., 2.]]))
    """
    columns = sketch.detach().movedim(0, -1).to(torch.promote_types(probes.dtype, torch.float32))
    basis = torch.linalg.qr(columns)[0].to(probes.dtype)
    return basis.movedim(-1, 0), probes - (basis @ (basis.mT @ probes.unsqueeze(-1))).squeeze(-1)


def total_derivative(function: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""A velocity and its derivative along the solution, :math:`\partial_t v + J v` with :math:`\dot z = v(t, z)`.

    That is the acceleration that TayNODE of order two keeps small. By two transposed products, the second of which
    undoes the transposition, on one evaluation of the function: half the cost of forward mode on a small network.

    Args:
        function: the velocity ``[*batch, D]`` of a time and a state.
        t: a time, ``[]`` or ``[*batch, 1]``.
        x: ``[*batch, D]``.

    Returns:
        The velocity and its derivative, both ``[*batch, D]``.

    Raises:
        ShapeError: the velocity has another shape than ``x``.

    Example:
        >>> total_derivative(lambda t, x: t * x, torch.tensor(2.0), torch.tensor([[1.0, 3.0]]))
        (tensor([[2., 6.]]), tensor([[ 5., 15.]]))
    """
    value, pull = _pullback(function, t, x)
    _check_square(value, x)

    def along(u: Tensor) -> Tensor:  # linear in u, with the derivative as its gradient
        by_time, by_state = pull(u)
        return by_time.sum() + (by_state * value).sum()

    start = torch.zeros_like(value)
    scalar, push = _pullback(along, start.requires_grad_() if is_plainly_eager() else start)
    return value, push(torch.ones_like(scalar))[0]


def _pullback(
    function: Callable[..., Tensor], *inputs: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """A function's value, and the map from ``u`` to its gradients times ``u``; differentiable where that is asked for.

    Plain autograd wherever it can be: `torch.func` costs a sixth more, and refuses functions without a vectorised
    rule. It is used inside its own transforms, in inference mode, where autograd records nothing, and where plain
    autograd would record a graph that nobody needs.
    """
    recorded = torch.is_grad_enabled()
    if not is_plainly_eager() or torch.is_inference_mode_enabled():
        return torch.func.vjp(function, *inputs)  # type: ignore[return-value]
    if recorded and not any(x.requires_grad for x in inputs):
        with contextlib.suppress(RuntimeError, NotImplementedError):  # raised again below, if it was the function's
            return torch.func.vjp(function, *inputs)  # type: ignore[return-value]
    with torch.enable_grad():
        # New tensors, so that what the function has closed over does not count even if it came from the inputs.
        held = [x.view_as(x) if recorded and x.requires_grad else x.detach().requires_grad_() for x in inputs]
        value = function(*held)

    def pull(u: Tensor) -> tuple[Tensor, ...]:
        if not value.requires_grad:
            return tuple(map(torch.zeros_like, held))
        graph = torch.is_grad_enabled()
        return torch.autograd.grad(value, held, u, retain_graph=True, create_graph=graph, materialize_grads=True)

    return value if recorded else value.detach(), pull


def _diagonal_sum(rows: Tensor) -> Tensor:
    """The trace of matrices whose rows come first: ``[D, *batch, D]`` to ``[*batch]``."""
    return sum_last(rows.diagonal(dim1=0, dim2=-1))


def _check_square(value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape:
        raise ShapeError(f"expected a value of the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}.")


def _check_probes(probes: Tensor, x: Tensor, least: int) -> None:
    if probes.shape[1:] != x.shape or len(probes) < least:
        raise ShapeError(
            f"expected probes [n, {', '.join(map(str, x.shape))}] with n of {least} at least, "
            f"got shape {tuple(probes.shape)}. draw_probes(x, n) gives them."
        )
