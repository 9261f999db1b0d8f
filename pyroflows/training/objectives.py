r"""What ``fit`` minimises: a likelihood, a distance of velocities, or a divergence from a density known up to a factor.

Lipman, Chen, Ben-Hamu, Nickel, Le (2023), *Flow matching*, arXiv:2210.02747; Tong et al. (2024), *Minibatch optimal
transport*, arXiv:2302.00482; Tong et al. (2024), *Simulation-free Schrödinger bridges*, arXiv:2307.03672; Albergo,
Vanden-Eijnden (2023), *Stochastic interpolants*, arXiv:2209.15571; Kerrigan, Migliorini, Smyth (2024), *Dynamic
conditional optimal transport*, arXiv:2404.04240.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pyroflows.distributions import Bounded, Flow
from pyroflows.errors import NotReparametrized, OptionError, ShapeError
from pyroflows.transforms import Compose, ContinuousTransform, FlowTransform
from pyroflows.transforms.regularizers import is_number

__all__ = ["ELBO", "FlowMatching", "Likelihood", "Objective", "as_objectives", "velocity_layer"]


class Objective:
    """What a fit minimises: ``objective(flow, rows, context)`` is a loss for each row ``[rows]``.

    A subclass writes ``__call__``. The score of held-out rows is minus their mean loss, in ``eval()`` and with the
    same random numbers every time, so that two epochs differ by their weights alone.

    Example:
        >>> class Tempered(Objective):
        ...     def __call__(self, flow, rows, context=None):
        ...         return -flow(context).log_prob(rows).clamp(min=-20)  # rows far out count no more than this
        >>> import pyroflows as pf
        >>> result = pf.fit(
        ...     pf.flow("maf", input_dim=2), torch.randn(100, 2), objective=Tempered(), max_epochs=1, progress=False
        ... )
        >>> result.history["epoch"]
        [0.0, 1.0]
    """

    in_nats: ClassVar[bool] = True
    """Whether minus the loss is a log-density, which the history shows as ``"train"`` and ``"validation"``."""
    reads_rows: ClassVar[bool] = True
    """Whether it needs data."""
    samples: int = 0
    """How many rows of it make an epoch where there are none."""
    draws: ClassVar[int] = 0
    """If the loss is random: of how many draws at least a held-out score is the mean; rows are taken repeatedly."""
    score: ClassVar[str] = "log-likelihood"
    """What the score in nats is called."""

    def __call__(self, flow: Flow | Bounded, rows: Tensor, context: Tensor | None = None) -> Tensor:
        """The loss of each row ``[rows]``, differentiable.

        Args:
            flow: the flow that is fitted.
            rows: points of the data, ``[rows, *flow.data_shape]``.
            context: ``[rows, context_dim]``, if the flow reads one.
        """
        raise NotImplementedError

    def check(self, flow: Flow | Bounded) -> None:
        """Raises `OptionError` for a flow that it cannot fit."""


class Likelihood(Objective):
    r"""Maximum likelihood: the loss is :math:`-\log p_\theta(x | c)`. For every flow.

    Example:
        >>> import pyroflows as pf
        >>> Likelihood()(pf.flow("maf", input_dim=2), torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __call__(self, flow: Flow | Bounded, rows: Tensor, context: Tensor | None = None) -> Tensor:
        return -flow(context).log_prob(rows)


class ELBO(Objective):
    r"""Fits a flow to an unnormalised density: the loss of a draw is :math:`\log q_\theta(z) - \log \tilde p(z)`.

    Its mean is the divergence :math:`\mathrm{KL}(q_\theta \| p)` less :math:`\log \int \tilde p`, so that minus the
    mean, the score, is a lower bound of the log normaliser. There are no data:
    ``fit(flow, objective=ELBO(log_density))``. A flow that reads a context is given contexts, one draw for each row.

    Args:
        log_density: from points ``[n, *data_shape]`` to :math:`\log \tilde p`, ``[n]``, differentiable; of a flow that
            reads a context from points and contexts ``[n, context_dim]``.
        samples: how many draws make an epoch where there are no contexts to count; a share of them is held out.

    Raises:
        OptionError: ``log_density`` is not callable, or ``samples`` is less than 4.

    Example:
        >>> import pyroflows as pf
        >>> flow = pf.flow("iaf", input_dim=2, hidden_dims=(16,))
        >>> target = torch.distributions.Laplace(torch.zeros(2), 1.0)
        >>> objective = ELBO(lambda z: target.log_prob(z).sum(-1))
        >>> bool(pf.fit(flow, objective=objective, max_epochs=1, progress=False).validation <= 0.05)
        True
    """

    reads_rows = False
    draws = 2048
    score = "ELBO"

    def __init__(self, log_density: Callable[..., Tensor], samples: int = 2560) -> None:
        if not callable(log_density):
            raise OptionError(f"log_density must be a function of points, got {type(log_density).__name__}.")
        if not isinstance(samples, int) or samples < 4:
            raise OptionError(f"samples must be an integer of at least 4, got {samples!r}.")
        self.log_density, self.samples = log_density, samples

    def check(self, flow: Flow | Bounded) -> None:
        context = torch.zeros(1, flow.context_dim).to(next(flow.parameters())) if flow.context_dim else None
        if not flow(context).has_rsample:
            raise NotReparametrized("this flow has no samples that can be differentiated, which an ELBO takes.")

    def __call__(self, flow: Flow | Bounded, rows: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            z, log_q = flow().rsample_with_log_prob((len(rows),))
            log_p = self.log_density(z)
        else:
            z, log_q = flow(context).rsample_with_log_prob()
            log_p = self.log_density(z, context)
        if log_p.shape != log_q.shape:
            raise ShapeError(
                f"expected log_density to give one number a point, {tuple(log_q.shape)}, got {tuple(log_p.shape)}."
            )
        return log_q - log_p


PATHS = ("optimal_transport", "variance_preserving", "schroedinger_bridge")


class FlowMatching(Objective):
    r"""Regression of the velocity on that of paths from the base to the data; no differential equation is solved.

    For a flow whose learned transform is one `ContinuousTransform`. At a time :math:`s` between 0 and 1, for a point
    :math:`x_0` of the base, a row :math:`x_1` (where the learned transform leads to: without support and standardiser)
    and a standard normal :math:`\epsilon`, a path is at :math:`x_s` and moves by :math:`\dot x_s`; the loss is

    .. math:: w_s \, \| T\, v_\theta(s T, x_s, c) - \dot x_s \|^2 / D

    with one draw of :math:`s, x_0, \epsilon` a row and step. The velocity of least loss,
    :math:`E[\dot x_s | x_s] / T`, carries the base to the data within the time :math:`T`. The paths are

    - ``"optimal_transport"``: :math:`x_s = (1 - (1 - \sigma) s)\, x_0 + s\, x_1`, straight lines;
    - ``"variance_preserving"``: :math:`x_s = \cos(\vartheta s)\, x_0 + \sin(\vartheta s)\, x_1`,
      :math:`\cos\vartheta = \sigma`;
    - ``"schroedinger_bridge"``: :math:`x_s = (1 - s)\, x_0 + s\, x_1 + \sigma \sqrt{s (1 - s)}\, \epsilon`, Brownian
      bridges. Their :math:`\dot x_s` has no finite variance at the ends, hence :math:`w_s = 4 s (1 - s)`; for the
      others it is 1.

    The loss is no likelihood: ``fit`` selects weights by it, on held-out rows with random numbers that stay the same,
    and computes the held-out log-likelihood once, of these weights. Times of a step are stratified. What only shapes
    the likelihood is not trained: the end time :math:`T`, parameters of the base, and regularisers of solves.

    Args:
        path: the name of one of the paths.
        coupling: which points of the base go with which rows: ``"independent"``, or ``"optimal_transport"`` within
            groups of rows (by scipy; for bridges entropic, by Sinkhorn's iteration with :math:`2 \sigma^2`), which
            straightens the field, so that solves take fewer steps. Default independent, for bridges optimal transport.
        group: how many rows such a group has at most. The work for a row grows with its square.
        sigma: :math:`\sigma`. Of bridges their noise, default 0.5; else the share of the base that is left at the data,
            default 0.
        context_weight: with optimal transport and a context, pairing a base point drawn with one row's context to
            another row costs this times the squared distance of their (standardised) contexts, as otherwise the base
            would depend on the context. Densities are blurred over contexts at distances of
            ``1 / sqrt(context_weight)``; infinite weight is the independent coupling.

    Raises:
        OptionError: an option has a value that it cannot take.

    Example:
        >>> import pyroflows as pf
        >>> from pyroflows.distributions import standard_normal
        >>> from pyroflows.transforms import continuous
        >>> flow = pf.Flow(continuous(2, hidden_dims=(16, 16)), standard_normal(2))
        >>> objective = FlowMatching(coupling="optimal_transport")
        >>> result = pf.fit(flow, torch.randn(100, 2), objective=objective, max_epochs=2, progress=False)
        >>> flow().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    in_nats = False
    draws = 2048

    def __init__(
        self,
        path: Literal["optimal_transport", "variance_preserving", "schroedinger_bridge"] = "optimal_transport",
        *,
        coupling: Literal["independent", "optimal_transport"] | None = None,
        group: int = 64,
        sigma: float | None = None,
        context_weight: float = 100.0,
    ) -> None:
        if path not in PATHS:
            raise OptionError(f"no path {path!r}. Known names: {', '.join(PATHS)}.")
        if coupling not in (None, "independent", "optimal_transport"):
            raise OptionError(f'coupling must be "independent", "optimal_transport" or None, got {coupling!r}.')
        if not isinstance(group, int) or group < 2:
            raise OptionError(f"group must be an integer of at least 2, got {group!r}.")
        self.bridge = path == "schroedinger_bridge"
        if sigma is None:
            sigma = 0.5 if self.bridge else 0.0
        if not is_number(sigma) or not (0 < sigma < math.inf if self.bridge else 0 <= sigma < 1):
            bounds = "positive and finite" if self.bridge else "at least 0 and below 1"
            raise OptionError(f"sigma of the path {path!r} must be {bounds}, got {sigma!r}.")
        if not is_number(context_weight) or not 0 < context_weight < math.inf:
            raise OptionError(f"context_weight must be positive and finite, got {context_weight!r}.")
        self.path, self.group, self.sigma, self.context_weight = path, group, float(sigma), float(context_weight)
        self.coupling = coupling or ("optimal_transport" if self.bridge else "independent")

    def __repr__(self) -> str:
        return f"FlowMatching({self.path!r}, coupling={self.coupling!r}, sigma={self.sigma})"

    def check(self, flow: Flow | Bounded) -> None:
        if not any(p.requires_grad for p in velocity_layer(flow)[1].velocity.parameters()):
            raise OptionError("the velocity has no trainable parameters, and flow matching trains nothing else.")
        if self.coupling == "optimal_transport" and not self.bridge:
            _assignment()

    def __call__(self, flow: Flow | Bounded, rows: Tensor, context: Tensor | None = None) -> Tensor:
        flow, layer = velocity_layer(flow)
        context = flow.read_context(context)
        with torch.no_grad():
            data, base, end = rows, flow.base().sample((len(rows),)), _end_time(layer)
            for part in list(flow.transform)[:0:-1]:
                data, _ = part.inverse_and_log_det(data)
            if self.coupling == "optimal_transport" and len(data):
                groups = torch.arange(len(data), device=data.device).split(self.group)
                base = torch.cat(
                    [self._coupled(base[i], data[i], None if context is None else context[i]) for i in groups]
                )
            s = _times(data)
            x, velocity = self.point(s, base, data, torch.randn_like(data) if self.bridge else None)
        error = end * layer.velocity(end * s, x, context) - velocity
        loss = error.square().mean(-1)
        return 4 * (s * (1 - s)).squeeze(-1) * loss if self.bridge else loss

    def point(self, s: Tensor, base: Tensor, data: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Where paths are at a time and how they move, :math:`x_s` and :math:`\dot x_s`, each ``[n, D]``.

        Args:
            s: the times, ``[n, 1]``, between 0 (base) and 1 (data).
            base: :math:`x_0`, ``[n, D]``.
            data: :math:`x_1`, ``[n, D]``.
            noise: :math:`\epsilon`, ``[n, D]``, of bridges.
        """
        if self.path == "optimal_transport":
            return (1 - (1 - self.sigma) * s) * base + s * data, data - (1 - self.sigma) * base
        if self.path == "variance_preserving":
            angle = math.acos(self.sigma)
            cos, sin = torch.cos(angle * s), torch.sin(angle * s)
            return cos * base + sin * data, angle * (cos * data - sin * base)
        spread = torch.sqrt(s * (1 - s))
        noise = torch.zeros_like(data) if noise is None else self.sigma * noise
        return (1 - s) * base + s * data + spread * noise, data - base + (0.5 - s) / spread * noise

    def _coupled(self, base: Tensor, data: Tensor, context: Tensor | None) -> Tensor:
        """The base points in the order in which they go with the rows, by a plan of least total cost."""
        cost = torch.cdist(data, base).double().square()
        if context is not None:
            cost = cost + self.context_weight * torch.cdist(context, context).double().square()
        if self.bridge:
            return base[torch.multinomial(_entropic_plan(cost, 2 * self.sigma**2), 1).squeeze(1)]
        _, columns = _assignment()(cost.cpu().numpy())
        return base[torch.from_numpy(columns).to(data.device)]


def velocity_layer(flow: Flow | Bounded) -> tuple[Flow, ContinuousTransform]:
    """The flow, and the one layer of it that has a velocity.

    Raises:
        OptionError: the learned transform is another one, or its end time is 0.
    """
    layer: FlowTransform | None = flow.learned if isinstance(flow, Flow) else None
    while isinstance(layer, Compose) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(flow, Flow) or not isinstance(layer, ContinuousTransform):
        raise OptionError(
            "flow matching trains a velocity: expected a flow whose learned transform is one ContinuousTransform, "
            f"such as pf.Flow(continuous(2), standard_normal(2)), got {type(layer or flow).__name__}. "
            'Take objective="likelihood".'
        )
    if _end_time(layer) == 0:
        raise OptionError("end_time is 0, so that nothing moves; flow matching needs a positive one.")
    return flow, layer


def _end_time(layer: ContinuousTransform) -> float:
    return float(torch.as_tensor(layer.end_time).detach())


def as_objectives(objective: Any) -> list[Objective]:
    """The objectives that a fit goes through, one after another.

    Args:
        objective: an `Objective`, a name, or several of them; ``"mixture"`` is flow matching, then likelihood.

    Raises:
        OptionError: there is no such objective.

    Example:
        >>> as_objectives(["flow_matching", ELBO(lambda z: -z.square().sum(-1))])[0]
        FlowMatching('optimal_transport', coupling='independent', sigma=0.0)
    """
    if isinstance(objective, Objective):
        return [objective]
    if isinstance(objective, Sequence) and not isinstance(objective, str) and objective:
        return [one for several in objective for one in as_objectives(several)]
    named: dict[Any, list[Objective]] = {
        "likelihood": [Likelihood()],
        "flow_matching": [FlowMatching()],
        "mixture": [FlowMatching(), Likelihood()],
    }
    if isinstance(objective, str) and objective in named:
        return named[objective]
    if isinstance(objective, str) and objective.lower() == "elbo":
        raise OptionError("an ELBO needs a density: objective=pyroflows.training.ELBO(log_density).")
    raise OptionError(
        f"objective must be one of {', '.join(map(repr, named))}, an Objective of pyroflows.training such as "
        f"FlowMatching(coupling='optimal_transport'), or a sequence of them, got {objective!r}."
    )


def _times(rows: Tensor) -> Tensor:
    """A time for each row ``[rows, 1]``: each uniform, and one in each n-th of the interval.

    The ends are left out, where a bridge moves infinitely fast.
    """
    n, eps = len(rows), torch.finfo(rows.dtype).eps
    strata = torch.randperm(n, device=rows.device) + torch.rand(n, device=rows.device, dtype=rows.dtype)
    return (strata / n).clamp(eps, 1 - eps).unsqueeze(-1)


def _assignment() -> Callable[[Any], tuple[Any, Any]]:
    try:
        from scipy.optimize import linear_sum_assignment  # at first use: it takes longer to import than to call
    except ImportError as error:
        raise OptionError(
            'coupling="optimal_transport" needs scipy: pip install scipy, or coupling="independent".'
        ) from error
    return linear_sum_assignment


def _entropic_plan(cost: Tensor, strength: float, rounds: int = 200) -> Tensor:
    r"""The plan :math:`\pi` of least :math:`\langle\pi, C\rangle - \text{strength} \cdot H(\pi)` whose rows and columns
    all have the same sum, times the number of rows (Cuturi 2013, arXiv:1306.0895). Rows are exact, columns up to 1e-2.
    """
    log_kernel = -cost / strength
    rows = log_kernel.new_zeros(len(cost), 1)
    for round in range(rounds):
        columns = -torch.logsumexp(log_kernel + rows, 0)
        before, rows = rows, -torch.logsumexp(log_kernel + columns, 1, keepdim=True)
        if round % 10 == 9 and bool((rows - before).abs().max() < 1e-2):
            break
    return torch.exp(log_kernel + rows + columns)
