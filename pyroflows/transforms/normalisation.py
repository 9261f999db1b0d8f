r"""Normalisation layers: a shift and a scale of each coordinate that start from, or follow, the data.

Kingma, Dhariwal (2018), *Glow*, arXiv:1807.03039 (activation normalisation); Ioffe, Szegedy (2015), *Batch
normalization*, arXiv:1502.03167; Dinh, Sohl-Dickstein, Bengio (2016), *Density estimation using Real NVP*,
arXiv:1605.08803 (batch normalisation as a layer of a flow).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.nets import Activation
from pyroflows.numerics import bounded_log_scale, positive, sum_last
from pyroflows.transforms.base import FlowTransform

__all__ = ["ActNorm", "BatchNorm", "moments"]


def moments(rows: Tensor, *, of_all_ranks: bool = False) -> tuple[float, Tensor, Tensor]:
    """How many rows there are, their mean, and their variance over ``n - 1``, each coordinate for itself.

    Args:
        rows: ``[N, D]``.
        of_all_ranks: count the rows of every rank of ``torch.distributed``, if that is initialised; every rank has to
            call this then, also one without rows.

    Returns:
        ``N`` and two tensors ``[D]``; the variance is NaN for less than two rows.

    Example:
        >>> moments(torch.tensor([[1.0], [3.0]]))
        (2.0, tensor([2.]), tensor([2.]))
    """
    joined = of_all_ranks and distributed.is_available() and distributed.is_initialized()

    def total(values: Tensor) -> Tensor:
        if joined:
            distributed.all_reduce(values)
        return values

    with torch.no_grad():
        sums = total(torch.cat([rows.new_tensor([len(rows)], dtype=torch.float64), rows.double().sum(0)]))
        count, mean = sums[0], sums[1:] / sums[0]
        variance = total((rows.double() - mean).square().sum(0)) / (count - 1)
        variance = torch.where(count > 1, variance, torch.nan)
        return float(count), mean.to(rows.dtype), variance.to(rows.dtype)


class ActNorm(FlowTransform):
    r"""A learned shift and scale of each coordinate, :math:`y = e^s x + t`, that can start from data.

    ``initialize(y)`` sets both so that the inverse of the given batch has mean zero and standard deviation
    one; ``pyroflows.fit`` calls it on the training data.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        max_log_scale: the log scale stays in ``(-max_log_scale, max_log_scale)``.
        hidden_dims: the hidden widths of the network that reads the context.
        activation: its activation.

    Example:
        >>> layer = ActNorm(1)
        >>> layer.initialize(torch.tensor([[3.0], [5.0], [7.0]]))
        >>> layer.inv(torch.tensor([[5.0]]))
        tensor([[0.]], grad_fn=<...>)
    """

    sign = 1

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        max_log_scale: float = 10.0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        if not max_log_scale > 0:
            raise OptionError(f"max_log_scale must be positive, got {max_log_scale}.")
        self.input_dim, self.max_log_scale = input_dim, max_log_scale
        self.declare_parameters(
            hidden_dims=hidden_dims,
            activation=activation,
            shift=torch.zeros(input_dim),
            raw_log_scale=torch.zeros(input_dim),
        )

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Sets shift and scale to the mean and standard deviation of ``y``, over all but the last dimension.

        Where ``torch.distributed`` is initialised, the rows of all ranks count, and every rank has to call this.
        """
        count, shift, variance = moments(y.detach().reshape(-1, self.input_dim), of_all_ranks=True)
        if count < 2:
            return
        with torch.no_grad():
            inside = (0.5 * torch.log(variance.clamp_min(1e-30)) / self.max_log_scale).clamp(-0.999, 0.999)
            raw = self.max_log_scale * torch.atanh(inside)
            self.start_from(shift=shift, raw_log_scale=raw)

    def _shift_and_log_scale(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw = self.parameters_of(context)
        return raw["shift"], bounded_log_scale(raw["raw_log_scale"], self.max_log_scale)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``e^s x + t`` and the sum of ``s``."""
        self.check_width(x, self.input_dim)
        shift, log_scale = self._shift_and_log_scale(context)
        y = x * torch.exp(log_scale) + shift
        return y, sum_last(log_scale).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y - t) e^-s`` and minus the sum of ``s``."""
        self.check_width(y, self.input_dim)
        shift, log_scale = self._shift_and_log_scale(context)
        x = (y - shift) * torch.exp(-log_scale)
        return x, -sum_last(log_scale).expand(x.shape[:-1])


class BatchNorm(FlowTransform):
    r"""Batch normalisation, :math:`x = \gamma (y - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta`, by Pyro's name.

    :math:`\mu` and :math:`\sigma^2` are the buffers ``moving_mean`` and ``moving_variance``. The layer is the affine
    map that they make, in ``train()`` as in ``eval()``: the two directions are inverse to each other, no row depends
    on another, and the log-det is that of the map. What moves the buffers:

    - ``initialize(y)`` sets them to the moments of ``y``; ``pyroflows.fit`` calls it on the training data. Rows of all
      ranks count, where ``torch.distributed`` is initialised.
    - ``update(y)`` moves them towards the moments of ``y`` by ``momentum``.
    - In ``train()`` the call of the inverse through torch's protocol (``layer.inv(y)``, as the ``log_prob`` of a
      ``TransformedDistribution`` of Pyro's makes it) calls ``update(y)`` first, as Pyro's layer does, unless ``y`` is
      the layer's own last sample. ``forward_and_log_det`` and ``inverse_and_log_det``, and so the ``log_prob`` of a
      pyroflows flow, change nothing.

    Pyro's layer normalises a training batch by the moments of that batch, in one direction only; its training
    ``log_prob`` is the log of no density. Here it is one, always.

    Args:
        input_dim: the number of coordinates.
        momentum: how far one update moves, as in ``torch.nn.BatchNorm1d``.
        epsilon: what is added to the variance.
        context_dim: the width of the context; with one, a network gives :math:`\gamma` and :math:`\beta`.
        hidden_dims: the hidden widths of that network.
        activation: its activation.

    Raises:
        OptionError: ``momentum`` is not in ``[0, 1]``, or ``epsilon`` not positive.

    Example:
        >>> layer = BatchNorm(1)
        >>> layer.initialize(torch.tensor([[3.0], [5.0], [7.0]]))
        >>> layer.inverse_and_log_det(torch.tensor([[5.0]]))[0].detach()
        tensor([[0.]])
    """

    sign = 1
    domain = codomain = constraints.real
    moving_mean: Tensor
    moving_variance: Tensor

    def __init__(
        self,
        input_dim: int,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (128, 128),
        activation: Activation = "relu",
    ) -> None:
        super().__init__(context_dim)
        if not 0 <= momentum <= 1 or not epsilon > 0:
            raise OptionError(f"expected momentum in [0, 1] and epsilon > 0, got {momentum} and {epsilon}.")
        self.input_dim, self.momentum, self.epsilon = input_dim, momentum, epsilon
        self.register_buffer("moving_mean", torch.zeros(input_dim))
        self.register_buffer("moving_variance", torch.ones(input_dim))
        self.declare_parameters(
            hidden_dims=hidden_dims, activation=activation, gamma=torch.ones(input_dim), beta=torch.zeros(input_dim)
        )

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Sets the moving moments to those of ``y``, over all but the last dimension and over all ranks."""
        self._move(moments(y.detach().reshape(-1, self.input_dim), of_all_ranks=True), 1.0)

    def update(self, y: Tensor) -> None:
        """Moves the moving moments by ``momentum`` towards those of ``y``; less than two rows move nothing."""
        self._move(moments(y.detach().reshape(-1, self.input_dim)), self.momentum)

    def _move(self, found: tuple[float, Tensor, Tensor], share: float) -> None:
        count, mean, variance = found
        if count >= 2:
            self.moving_mean.lerp_(mean, share)
            self.moving_variance.lerp_(variance, share)

    def _inv_call(self, y: Tensor) -> Tensor:
        if self.training and self._recall(y=y) is None:  # its own samples teach it nothing
            self.update(y)
        return super()._inv_call(y)

    def _inverse(self, y: Tensor) -> Tensor:
        if self.training:
            self.update(y)
        return super()._inverse(y)

    def _read(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scale from base to data and beta, each ``[..., D]``."""
        self.check_width(value, self.input_dim)
        raw = self.parameters_of(context)
        spread = torch.sqrt(self.moving_variance + self.epsilon)
        return spread / positive(raw["gamma"] - 1), raw["beta"]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``scale (x - beta) + mean`` and the log of the scale, a coordinate each."""
        scale, beta = self._read(x, context)
        y = scale * (x - beta) + self.moving_mean
        return y, sum_last(torch.log(scale), 0).expand(y.shape)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y - mean) / scale + beta`` and minus the log of the scale, a coordinate each."""
        scale, beta = self._read(y, context)
        x = (y - self.moving_mean) / scale + beta
        return x, -sum_last(torch.log(scale), 0).expand(x.shape)
