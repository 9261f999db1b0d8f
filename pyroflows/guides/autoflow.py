"""A flow over all continuous latents of a Pyro model, as an automatic guide."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.distributions import biject_to

from pyroflows import plugins
from pyroflows.distributions import Flow, FlowDistribution, standard_normal
from pyroflows.errors import GuideNotSetUp, NotReparametrized, OptionError, SubsampledLatentError
from pyroflows.numerics import bounded_log_scale, sum_last
from pyroflows.transforms import Compose, FlowTransform

__all__ = ["AutoFlow"]

_PARAMETERS: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
"""The parameters of all living guides by ``id``, by which they know each other's in Pyro's parameter store."""


class _Start(FlowTransform):
    """The outermost layer of a guide: where the latents start and how far they spread at first."""

    MAX_LOG_SCALE = 30.0
    sign = 1

    def __init__(self, loc: Tensor, scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.clone())
        raw = self.MAX_LOG_SCALE * math.atanh(math.log(scale) / self.MAX_LOG_SCALE)
        self.raw_log_scale = nn.Parameter(torch.full_like(loc, raw))

    def _log_scale(self) -> Tensor:
        return bounded_log_scale(self.raw_log_scale, self.MAX_LOG_SCALE)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self._log_scale()
        y = self.loc + torch.exp(log_scale) * x
        return y, sum_last(log_scale).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self._log_scale()
        x = (y - self.loc) * torch.exp(-log_scale)
        return x, -sum_last(log_scale).expand(x.shape[:-1])


class AutoFlow(AutoContinuous):
    r"""An automatic guide: one flow over all continuous latents, mapped to their supports.

    A draw is :math:`z = \mathrm{loc} + \mathrm{scale} \cdot f(\epsilon)` in the unconstrained space, with
    :math:`\epsilon` from the flow's base and ``loc`` from ``init_loc_fn``. It is an
    ``pyro.infer.autoguide.AutoContinuous``: it trains under ``SVI`` with any ELBO of Pyro, and ``NeuTraReparam``,
    ``Predictive`` and ``AutoGuideList`` accept it.

    ``setup(*args)`` runs the model once and creates all parameters, so that an optimizer or ``load_state_dict``
    can follow. A flow whose fast direction is scoring (``maf``) works, but each draw takes one pass a latent.

    Args:
        model: a Pyro model without discrete latents (enumerate or block those).
        flow: the name of a registered flow; or a function from the number of latents to a `Flow` or a
            transform.
        init_loc_fn: where each latent starts, as for Pyro's guides.
        init_scale: the standard deviation of each unconstrained latent at the start.
        **options: of the flow, such as ``transforms=3``.

    Raises:
        OptionError: ``init_scale`` is not positive, or options were given with a function.

    Example:
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, scale), obs=x)
        >>> guide = AutoFlow(model, flow="nsf", transforms=2).setup(torch.randn(20))
        >>> guide.latent_dim
        2
        >>> sorted(guide.median())
        ['loc', 'scale']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | Callable[[int], Flow | FlowTransform] = "nsf",
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        **options: Any,
    ) -> None:
        if not 1e-12 < init_scale < 1e12:
            raise OptionError(f"init_scale must be positive (1e-12 to 1e12), got {init_scale!r}.")
        if options and not isinstance(flow, str):
            raise OptionError(f"options {sorted(options)} go with the name of a flow; give them to your function.")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._flow, self._options, self._init_scale = flow, options, float(init_scale)

    # --- parameters -------------------------------------------------------------------------------------

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Runs the model once with its arguments and creates all parameters.

        Returns:
            The guide itself.

        Raises:
            SubsampledLatentError: a latent lies in a subsampled plate, so that one flow would mix rows.
            NotReparametrized: the flow has no samples that can be differentiated, as a mixture.
        """
        if self.prototype_trace is None:
            try:
                self._setup_prototype(*args, **kwargs)
            except Exception:
                self.prototype_trace = None  # the next call says the same
                raise
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        trace: Any = self.prototype_trace
        for name, site in trace.iter_stochastic_nodes():
            for frame in site["cond_indep_stack"]:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise SubsampledLatentError(
                        f"latent {name!r} lies in plate {frame.name!r}, which takes {frame.size} of "
                        f"{frame.full_size} rows a step; a joint flow would stand for different rows each time. "
                        "Use the full plate, or a guide with a factor for each row."
                    )
        loc = self._init_loc()
        flow = self._build(self.latent_dim)
        learned = flow.learned if isinstance(flow, Flow) else flow
        base = flow.base if isinstance(flow, Flow) else standard_normal(self.latent_dim)
        self.base = base.to(loc)
        self.transform = Compose([learned, _Start(loc, self._init_scale)]).to(loc)
        with poutine.block():  # NeuTraReparam reads the plates; a first call of the guide makes its own
            self._create_plates(*args, **kwargs)
        self._claim_store_entries()

    def _build(self, latent_dim: int) -> Flow | FlowTransform:
        if isinstance(self._flow, str):
            flow: Flow | FlowTransform = plugins.flow(self._flow, input_dim=latent_dim, **self._options)
        else:
            flow = self._flow(latent_dim)
        if not isinstance(flow, Flow | FlowTransform) or flow.context_dim:
            raise OptionError(f"flow must make a Flow or a FlowTransform without a context, got {type(flow).__name__}.")
        if isinstance(flow, Flow) and not flow.standardizes:
            raise OptionError(
                f"a guide needs a flow on the real numbers, and this one lives on {flow.support}. Take another flow; "
                "the guide maps to the supports of the sites by itself."
            )
        if isinstance(flow, Flow) and not flow().has_rsample:
            # Pyro leaves log q of an auxiliary site out of what weighs the score, so the gradient would be another.
            raise NotReparametrized(
                "an automatic guide needs samples that can be differentiated, and this flow has none (a mixture jumps "
                "between its components). Take a single flow, or write a guide that has pyro.sample(name, flow())."
            )
        return flow

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads a state dict, after ``setup``.

        Raises:
            GuideNotSetUp: there are no parameters to load into yet.
        """
        self._check_set_up("load_state_dict")
        return super().load_state_dict(*args, **kwargs)

    def _check_set_up(self, what: str) -> None:
        if self.prototype_trace is None:
            raise GuideNotSetUp(
                f"{what} needs the guide's parameters, which exist after guide.setup(*args) with the model's "
                "arguments (or after the first call of the guide)."
            )

    # --- the parameter store ----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every latent, as Pyro's guides do; sets up on the first call.

        Returns:
            A value for each latent site.
        """
        self.setup(*args, **kwargs)
        self._claim_store_entries()
        return super().forward(*args, **kwargs)

    def _claim_store_entries(self) -> None:
        """Makes Pyro's parameter store hold this guide's own parameters.

        Left alone, Pyro would optimize whatever the store has under the guide's name. Entries of another
        ``AutoFlow`` are left to it, and this guide takes a name with a number; entries of unknown origin were
        loaded from a file, and their values are taken over.
        """
        store = pyro.get_param_store()
        parameters = {
            f"{part}$$${name}": value
            for part in ("base", "transform")
            for name, value in self._modules[part].named_parameters()  # type: ignore[union-attr]
        }
        own, number = self._pyro_name, 0
        while True:
            keys = {name: f"{self._pyro_name}.{name}" for name in parameters}
            others = {name: store._params[key] for name, key in keys.items() if key in store}
            others = {name: value for name, value in others.items() if value is not parameters[name]}
            if not any(_PARAMETERS.get(id(value)) is value for value in others.values()):
                break
            number += 1
            self._pyro_name = f"{own}_{number}"
        with torch.no_grad():
            for name, value in others.items():
                parameters[name].copy_(value)
                del store[keys[name]]
        _PARAMETERS.update((id(parameter), parameter) for parameter in parameters.values())

    def __getstate__(self) -> dict[str, Any]:
        model, master = self._model, self.master  # Pyro's method takes them from the live guide
        try:
            return {**super().__getstate__(), "_model": None, "master": None}
        finally:
            self._model, self.master = model, master

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model = self._model
        return new

    # --- the posterior ----------------------------------------------------------------------------------

    def get_base_dist(self) -> dist.TorchDistribution:
        """The base distribution of the flow."""
        self._check_set_up("get_base_dist")
        return self.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The transform from the base to the unconstrained latents."""
        self._check_set_up("get_transform")
        return self.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of all latents in the unconstrained space, ``[latent_dim]``."""
        return FlowDistribution(self.get_base_dist(), [self.get_transform(*args, **kwargs)])

    def _draws(self, num_samples: int) -> Tensor:
        # The same draws each time, and none taken from the caller's generator.
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            return self.get_posterior().sample((num_samples,))

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        draws = self._draws(2000)
        return draws.mean(0), draws.std(0)

    def _quantiles(self, probabilities: Sequence[float], num_samples: int) -> dict[str, Tensor]:
        with torch.no_grad():
            draws = self._draws(num_samples)
            latents = torch.quantile(draws, draws.new_tensor(probabilities), dim=0)
            sites: dict[str, list[Tensor]] = {}
            for latent in latents:
                for site, value in self._unpack_latent(latent):
                    sites.setdefault(site["name"], []).append(biject_to(site["fn"].support)(value))
        return {name: torch.stack(values) for name, values in sites.items()}

    def median(self, *args: Any, num_samples: int = 2000, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent, from a fixed set of draws.

        The median of each unconstrained coordinate is mapped to the support. For scalar supports that is the
        median itself; for a simplex or a matrix it is a central point of the support.

        Args:
            *args: ignored, as the posterior does not depend on the model's arguments.
            num_samples: how many draws.
            **kwargs: ignored likewise.

        Returns:
            A tensor for each latent site, of the site's shape.
        """
        return {name: value[0] for name, value in self._quantiles([0.5], num_samples).items()}

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, num_samples: int = 2000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each latent, from a fixed set of draws; see `median` for what they are.

        Args:
            quantiles: probabilities between 0 and 1.
            *args: ignored.
            num_samples: how many draws.
            **kwargs: ignored.

        Returns:
            A tensor ``[len(quantiles), *site_shape]`` for each latent site.

        Raises:
            OptionError: a probability is not between 0 and 1.
        """
        probabilities = [float(q) for q in quantiles]
        if not all(0 <= q <= 1 for q in probabilities):
            raise OptionError(f"quantiles must be between 0 and 1, got {probabilities}.")
        return self._quantiles(probabilities, num_samples)
