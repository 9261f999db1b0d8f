r"""A velocity that is the gradient of a potential, with its divergence in closed form.

Onken, Wu Fung, Li, Ruthotto (2021), *OT-Flow: fast and accurate continuous normalizing flows via optimal transport*,
arXiv:2006.00104.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh, linear

from pyroflows.errors import OptionError
from pyroflows.nets.mlp import check_widths, within_reach
from pyroflows.nets.smooth import smooth_softplus
from pyroflows.nets.velocity import GAIN, REACH, Steering, Velocity, uniform
from pyroflows.numerics import sum_last

__all__ = ["PotentialGradient"]

CURVATURE = 8.0
"""The bound of the quadratic part's Laplacian. Contraction by exp(-8) in a unit of time is more than a density needs,
and without a bound large weights make a field that no solver gets through."""


class PotentialGradient(Velocity):
    r"""The gradient field :math:`v = -\nabla_x \Phi(t, x, c)` of a potential, with a closed-form divergence.

    .. math::
        \Phi = w^\top u_n + \tfrac{1}{2} |A x + a|^2 + b^\top x, \quad u_0 = \sigma(K_0 x + k_0), \quad
        u_i = u_{i-1} + \tfrac{1}{n} \sigma(K_i u_{i-1} + k_i), \quad \sigma(z) = \log 2 \cosh z

    with :math:`a` and :math:`k_0` affine in time and context, and :math:`|A|_F^2 < 8`. Optimal transport moves along
    such a field. The divergence takes one product for each dimension and residual layer; none with a single hidden
    layer.

    The field starts close to zero.

    Args:
        input_dim: the number of coordinates of the state, :math:`D`.
        context_dim: the width of the context, 0 for none.
        hidden_dims: the equal widths of the layers of the network in the potential, one at least.
        rank: the number of rows of :math:`A`; by default :math:`D` and 10 at most.

    Raises:
        OptionError: a width is not positive, they are not equal, or there is none.

    Example:
        >>> velocity = PotentialGradient(2, hidden_dims=(8, 8))
        >>> v, divergence = velocity.with_divergence(torch.tensor(0.5), torch.zeros(5, 2))
        >>> v.shape, divergence.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        rank: int | None = None,
    ) -> None:
        super().__init__(input_dim, context_dim)
        hidden_dims = check_widths(hidden_dims)
        if len(set(hidden_dims)) != 1:
            raise OptionError(f"hidden_dims must be equal widths, one at least, got {hidden_dims}.")
        rank = min(10, input_dim) if rank is None else rank
        if not isinstance(rank, int) or rank < 1:
            raise OptionError(f"rank must be a positive integer, got {rank!r}.")
        width, fan_in = hidden_dims[0], input_dim + 1 + context_dim
        self.first = nn.Parameter(uniform(torch.empty(width, input_dim), fan_in, GAIN))
        self.steering = Steering((width, rank), context_dim, (fan_in, fan_in))
        self.weights = nn.ParameterList(uniform(torch.empty(width, width), width) for _ in hidden_dims[1:])
        self.biases = nn.ParameterList(uniform(torch.empty(width), width) for _ in hidden_dims[1:])
        self.readout = nn.Parameter(0.01 * uniform(torch.empty(1, width), width))
        self.quadratic = nn.Parameter(0.1 * uniform(torch.empty(rank, input_dim), fan_in))
        self.slant = nn.Parameter(torch.zeros(input_dim))
        with torch.no_grad():
            for parameter in self.steering.parameters():
                parameter.split(self.steering.sizes)[1].mul_(0.1 / GAIN)

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._run(t, x, context, divergence=False)[0]

    def with_divergence(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(t, x, context, divergence=True)[:2]

    def potential_by_time(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""How fast the potential changes at a point: :math:`\partial_t \Phi`, ``[*batch]``, at least float32.

        Along straight lines at constant speed, as those of optimal transport are, it is :math:`|\nabla \Phi|^2 / 2` but
        for a function of time alone (the equation of Hamilton, Jacobi and Bellman).
        """
        return self._run(t, x, context, divergence=False)[2]

    def _run(
        self, t: Tensor | float, x: Tensor, context: Tensor | None, *, divergence: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(t, x, context)
        dtype = torch.promote_types(x.dtype, torch.float32)
        first, square, last = (each.to(dtype) for each in (self.first, self.quadratic, self.readout[0]))
        square = square * (1 + square.square().sum() / CURVATURE).rsqrt()
        shift, offset = self.steering(t, context, dtype)
        others = [(weight.to(dtype), bias.to(dtype)) for weight, bias in zip(self.weights, self.biases, strict=True)]
        step = 1 / max(1, len(others))
        near = within_reach(x.to(dtype))
        before = linear(hardtanh(x.to(dtype), -REACH, REACH), first) + shift
        slopes = [torch.tanh(before)]
        hidden = _log_two_cosh(before)
        for k, (weight, bias) in enumerate(others):
            before = linear(hidden, weight, bias)
            slopes.append(torch.tanh(before))
            if k + 1 < len(others):
                hidden = hidden + step * _log_two_cosh(before)
        # What one unit of each layer adds to the potential, from the last layer to the first.
        worth = [last]
        for (weight, _), slope in zip(reversed(others), reversed(slopes), strict=False):
            worth.insert(0, worth[0] + step * ((worth[0] * slope) @ weight))
        pull, height = worth[0] * slopes[0], linear(near, square) + offset
        gradient = pull @ first + height @ square + self.slant.to(dtype)
        value = -gradient.to(x.dtype)
        if not divergence:
            rates = self.steering.time_weight.to(dtype).split(self.steering.sizes)
            return value, value, sum_last(pull * rates[0]) + sum_last(height * rates[1])
        curvature = (1 - slopes[0].square()) * worth[0] * first.square().sum(-1)
        moves = first.mT * slopes[0].unsqueeze(-2)  # row d: how the hidden layer moves with coordinate d
        for (weight, _), slope, each in zip(others, slopes[1:], worth[1:], strict=True):
            moved = linear(moves, weight)
            curvature = curvature + step * (1 - slope.square()) * each * moved.square().sum(-2)
            moves = moves + step * moved * slope.unsqueeze(-2)
        held = (near == x) * square.square().sum(0)  # beyond reach the quadratic part is constant
        return value, -(sum_last(curvature) + sum_last(held)), value


def _log_two_cosh(z: Tensor) -> Tensor:
    return smooth_softplus(2 * z) - z
