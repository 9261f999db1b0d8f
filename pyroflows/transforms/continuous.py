r"""Continuous-time transforms: a point follows a velocity field, and its log-density the field's divergence.

Chen, Rubanova, Bettencourt, Duvenaud (2018), *Neural ordinary differential equations*, arXiv:1806.07366; Grathwohl,
Chen, Bettencourt, Sutskever, Duvenaud (2019), *FFJORD*, arXiv:1810.01367.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyroflows.errors import DtypeError, OptionError
from pyroflows.nets import PotentialGradient, Velocity, VelocityMLP, as_velocity
from pyroflows.numerics import (
    Fallback,
    Trace,
    deflate,
    draw_probes,
    hutchinson,
    ode_tolerances,
    open_records,
    positive,
    solve,
)
from pyroflows.transforms.base import FlowTransform, with_variants
from pyroflows.transforms.regularizers import checked_weights, gathered, integrand, is_number
from pyroflows.transforms.replaced import call_with

__all__ = ["ContinuousTransform", "Flowed", "continuous"]

AFFORDABLE = 256
"""Up to this many dimensions an estimated divergence is replaced by the exact one in ``eval()``."""
VELOCITIES: dict[str, Callable[..., Velocity]] = {"mlp": VelocityMLP, "potential": PotentialGradient}
"""The velocities that `continuous` knows by name."""


class Flowed(NamedTuple):
    """Where points came to, and what it took.

    Attributes:
        value: ``[*batch, D]``.
        log_det: ``log|det|`` of the way there, ``[*batch]``.
        standard_error: of an estimated log-det, over its probes ``[*batch]``; zero if it is exact, infinite after a
            single probe.
        nfe: how many times the velocity was evaluated.
    """

    value: Tensor
    log_det: Tensor
    standard_error: Tensor
    nfe: int


class ContinuousTransform(FlowTransform):
    r"""A point follows a velocity field for a time: :math:`y = z(T)`, :math:`\dot z = v(t, z, c)`, :math:`z(0) = x`.

    .. math::
        \log \left|\det \frac{\partial y}{\partial x}\right| = \int_0^T \operatorname{tr} \frac{\partial v}{\partial z}
        (t, z(t), c)\, dt

    One solve carries both. The inverse is the same solve backwards in time. Each row takes the steps that it needs by
    itself, so its result does not depend on the rows beside it; ``rtol`` and ``atol`` bound the estimated error of each
    of its steps, in every coordinate and in the log-det. An error at the end can be a few times larger.

    Regularisers keep the way straight and the steps few. They are integrals along it, found in the same solve:

    - ``kinetic``: :math:`\int_0^T |v|^2\, dt` (arXiv:2002.02798);
    - ``jacobian``: :math:`\int_0^T \|\partial v / \partial z\|_F^2\, dt` (the same), from the probes of the estimate;
    - ``acceleration``: :math:`\int_0^T |\ddot z|^2\, dt` (arXiv:2007.04504, of order two);
    - ``hjb``: :math:`\int_0^T |\partial_t \Phi - |v|^2 / 2|\, dt` of a `PotentialGradient` (arXiv:2006.00104).

    In training mode, a solve inside of `pyroflows.recorded` gives them to the record: their mean over the rows, in
    ``record.penalties``, and their weighted sum, in ``record.penalty()``. `pyroflows.fit` adds that to its loss. In a
    loop of your own add it yourself; in a guide, ``pyro.factor("path", record.penalty(), has_rsample=True)`` does, and
    in a model its negative. Elsewhere they cost nothing. They do not steer the steps: they change no density, and their
    own error is not bounded by the tolerances. To the time of a training step with a `VelocityMLP`, ``kinetic`` adds
    about nothing, ``jacobian`` 0.4 of it and ``acceleration`` 2.5; with a `PotentialGradient`, ``hjb`` adds 0.2 to 0.6.

    Args:
        velocity: a `Velocity`, or a module ``net(t, x)`` or ``net(t, x, context)``; see `as_velocity`.
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        end_time: :math:`T`; 0 is the identity.
        learn_end_time: whether :math:`T` is trained too, starting there.
        divergence: ``"exact"``; or in training mode an unbiased estimate of one draw of probes a solve:
            ``"hutchinson"``, or ``"hutch++"``, which is exact on the directions that the Jacobian favours at the start.
            In ``eval()`` it is exact up to 256 dimensions, and beyond that uses the same probes every time.
        probes: how many the estimate is the mean of; at least 3 for ``"hutch++"``.
        noise: the probes' distribution.
        solver: one of `pyroflows.numerics.ode_solvers()`.
        steps: how many steps a solver without step control takes.
        rtol: relative tolerance; default 1e-5, in float64 1e-9.
        atol: absolute tolerance; default as ``rtol``.
        eval_rtol: in ``eval()``; default as ``rtol``.
        eval_atol: in ``eval()``; default as ``atol``.
        max_nfe: how many evaluations of the velocity a solve may take.
        gradient: ``"direct"`` keeps all of the way and is the fastest; ``"checkpoint"`` keeps the accepted steps and
            takes them again, the same gradient in about 1.4 of the time of a step; ``"adjoint"`` keeps nothing and
            solves backwards, in 1.8 to 2.4 of the time. See `pyroflows.numerics.solve`.
        solver_options: passed on to a solver of torchdiffeq.
        fallback: ``"rk4"``, another solver without step control, or a `pyroflows.numerics.Fallback`: takes the rows
            that the solver gives up because of ``max_nfe`` or of too small steps, with one warning. The error of these
            is not controlled. By default it is an error.
        regularize: the weights of regularisers, by name.

    Raises:
        OptionError: an option has a value that it cannot take, or the velocity has other widths.

    Example:
        >>> layer = ContinuousTransform(VelocityMLP(2, hidden_dims=(8, 8)), 2)
        >>> y, log_det = layer.forward_and_log_det(torch.ones(5, 2))
        >>> torch.allclose(layer.inv(y), torch.ones(5, 2), atol=1e-4)
        True
        >>> import pyroflows
        >>> weights = {"kinetic": 0.01, "jacobian": 0.01}
        >>> layer = continuous(2, hidden_dims=(8, 8), gradient="adjoint", regularize=weights)
        >>> flow = pyroflows.Flow(layer, pyroflows.distributions.standard_normal(2))
        >>> with pyroflows.recorded() as record:
        ...     loss = -flow().log_prob(torch.ones(5, 2)).mean()
        >>> (loss + record.penalty()).backward()
        >>> sorted(record.penalties), record.nfe_forward > 0
        (['jacobian', 'kinetic'], True)
    """

    inverse = "numeric"
    vmaps = False
    compiles = False
    sequential = (True, True)
    sign = 1

    def __init__(
        self,
        velocity: nn.Module,
        input_dim: int,
        *,
        context_dim: int = 0,
        end_time: float = 1.0,
        learn_end_time: bool = False,
        divergence: Literal["exact", "hutchinson", "hutch++"] = "exact",
        probes: int = 1,
        noise: Literal["rademacher", "gaussian"] = "rademacher",
        solver: str = "dopri5",
        steps: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        eval_rtol: float | None = None,
        eval_atol: float | None = None,
        max_nfe: int = 5000,
        gradient: Literal["adjoint", "checkpoint", "direct"] = "direct",
        solver_options: Mapping[str, Any] | None = None,
        fallback: str | Fallback | None = None,
        regularize: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(context_dim)
        if divergence not in ("exact", "hutchinson", "hutch++"):
            raise OptionError(f'divergence must be "exact", "hutchinson" or "hutch++", got {divergence!r}.')
        least = 3 if divergence == "hutch++" else 1
        if not isinstance(probes, int) or probes < least:
            raise OptionError(f"probes must be an integer of at least {least}, got {probes!r}.")
        if not is_number(end_time) or not 0 <= end_time < float("inf") or (learn_end_time and end_time == 0):
            raise OptionError(
                f"end_time must be finite and not negative, and positive to be learned, got {end_time!r}."
            )
        self.input_dim = input_dim
        self.velocity: Velocity = as_velocity(velocity, input_dim, context_dim)
        self.divergence, self.probes, self.noise = divergence, probes, noise
        self.regularize = checked_weights(regularize or {}, self.velocity)
        self.log_det = "exact" if divergence == "exact" else "estimate"
        self.end = float(end_time)
        self.raw_time = nn.Parameter(torch.zeros(())) if learn_end_time else None
        self.tolerances = {True: (rtol, atol), False: (_either(eval_rtol, rtol), _either(eval_atol, atol))}
        self.settings: dict[str, Any] = {
            "solver": solver,
            "steps": steps,
            "max_nfe": max_nfe,
            "gradient": gradient,
            "options": solver_options,
            "fallback": Fallback(fallback) if isinstance(fallback, str) else fallback,  # one, to warn once
        }
        ode_tolerances(*self.tolerances[False], torch.float64)
        draw_probes(torch.zeros(0, 1, device="cpu"), 1, noise)
        # A solve of no rows checks the options and costs nothing; which dtype will come, and may warn, is open.
        none = torch.zeros(0, 1, dtype=torch.float64, device="cpu")
        solve(lambda t, z: z, none, 0.0, 1.0, rtol=rtol, atol=atol, **self.settings)

    def extra_repr(self) -> str:
        """The sizes and settings."""
        shown = {**self.settings, "regularize": self.regularize or None}
        named = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"input_dim={self.input_dim}, context_dim={self.context_dim}, divergence={self.divergence!r}, {named}"

    def tolerance(self, dtype: torch.dtype) -> float:
        """Ten times what its solver may be off by in a step, because the errors of steps add up."""
        return 10 * max(ode_tolerances(*self.tolerances[self.training], torch.promote_types(dtype, torch.float32)))

    @property
    def end_time(self) -> Tensor | float:
        """The time :math:`T` for which points flow."""
        return self.end if self.raw_time is None else self.end * positive(self.raw_time)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The solve from 0 to :math:`T`.

        Raises:
            ODESolveError: the velocity is not finite, or the tolerances are not to be had within ``max_nfe``.
        """
        return self.flow(x, context)[:2]

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The solve from :math:`T` to 0.

        Raises:
            ODESolveError: the velocity is not finite, or the tolerances are not to be had within ``max_nfe``.
        """
        return self.flow(y, context, backwards=True)[:2]

    def flow(self, value: Tensor, context: Tensor | None = None, *, backwards: bool = False) -> Flowed:
        """Either direction, with what it took.

        Args:
            value: ``[*batch, D]``, at time 0, or ``backwards`` at :math:`T`.
            context: ``[*batch, context_dim]``.
            backwards: from :math:`T` to 0.

        Example:
            >>> layer = continuous(2, hidden_dims=(8, 8), divergence="hutchinson", probes=4)
            >>> layer.flow(torch.zeros(5, 2)).standard_error.shape
            torch.Size([5])
        """
        self.check_width(value, self.input_dim)
        self.check_context(context)
        context = context if self.context_dim else None
        batch = value.shape[:-1]
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
        if value.is_complex():
            raise DtypeError("expected real numbers, got complex ones: give x.real.")
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        rows = value.expand(*batch, self.input_dim).reshape(-1, self.input_dim)
        evaluate, tensors, fixed = self._as_it_is_now()
        carried = []
        if context is not None:
            context = context.expand(*batch, self.context_dim).reshape(-1, self.context_dim)
            carried.append(context)
        ends = (self.end_time, 0.0) if backwards else (0.0, self.end_time)
        records = open_records() if self.training and len(rows) else ()
        regularizers = tuple(self.regularize) if records else ()
        estimated = self.divergence != "exact" and (self.training or self.input_dim > AFFORDABLE)
        probes = self._draw(rows, ends[0], context) if estimated or "jacobian" in regularizers else None
        if probes is not None:
            carried.append(probes.movedim(0, 1))

        def field(t: Tensor, state: Tensor, *carried: Tensor) -> Tensor:
            x = state[:, : self.input_dim].to(value.dtype)
            given = iter(carried)
            at = next(given) if context is not None else None
            noise = next(given, None)
            noise = None if noise is None else noise.movedim(1, 0)
            return evaluate(t.to(value.dtype), x, at, noise, estimated, regularizers).to(state.dtype)

        log_dets = self.probes - self._directions if estimated else 1
        width = self.input_dim + log_dets
        dtype = _at_least_float32(value)
        state = nn.functional.pad(rows.to(dtype), (0, log_dets + len(regularizers)))
        rtol, atol = self.tolerances[self.training]
        settings = {**self.settings, "rtol": rtol, "atol": atol, "controlled": width}
        if not fixed:
            settings["gradient"] = "direct"
        found = solve(field, state, *ends, carried=carried, parameters=tensors, **settings)
        for name, integral in zip(regularizers, found.state[:, width:].unbind(-1), strict=True):
            for record in records:
                record.add(name, self.regularize[name], -integral.mean() if backwards else integral.mean())
        state = found.state[:, :width].reshape(*batch, width)
        samples = state[..., self.input_dim :]
        log_det, error = samples.mean(-1), torch.zeros(batch, dtype=dtype, device=value.device)
        if estimated:
            error = samples.detach().std(-1) / log_dets**0.5 if log_dets > 1 else error + float("inf")
        return Flowed(state[..., : self.input_dim].to(value.dtype), log_det, error, found.nfe)

    def _as_it_is_now(self) -> tuple[Callable[..., Tensor], list[Tensor], bool]:
        """What a solve follows at the velocity's present tensors, those that need gradients, and whether they stay.

        A gradient that evaluates the velocity again has to find the tensors of the forward pass, though another set
        may have been put in its place for the while (``torch.func.functional_call``). Weights that Pyro samples when
        they are asked for cannot be had again.
        """
        then = dict(itertools.chain(self.velocity.named_parameters(), self.velocity.named_buffers()))

        def evaluate(*arguments: Any) -> Tensor:
            now = itertools.chain(self.velocity.parameters(), self.velocity.buffers())
            if all(a is b for a, b in zip(then.values(), now, strict=True)):
                return self._change(*arguments)
            replaced = {f"velocity.{name}": tensor for name, tensor in then.items()}
            return call_with(self, replaced, self._change, *arguments)

        fixed = not any(getattr(module, "_pyro_samples", None) for module in self.velocity.modules())
        return evaluate, [tensor for tensor in then.values() if tensor.requires_grad], fixed

    def _draw(self, rows: Tensor, t: Tensor | float, context: Tensor | None) -> Tensor:
        """The probes of a solve ``[n, rows, D]``.

        For Hutch++ the first half becomes an orthonormal basis of what the Jacobian makes of them where the solve
        starts, and the others what is left of them beside it. Any basis gives an unbiased estimate (Meyer et al. 2021,
        arXiv:2010.09649), and one that stays for the whole solve gives a smooth one.
        """
        if self.training:
            probes = draw_probes(rows, self.probes, self.noise)
        else:
            generator = torch.Generator(rows.device).manual_seed(0)
            probes = draw_probes(rows[:1], self.probes, self.noise, generator).expand(-1, len(rows), -1)
        if not self._directions:
            return probes
        products = hutchinson(lambda x: self.velocity(t, x, context), rows, probes[: self._directions]).products
        assert products is not None  # an estimate always has them
        return torch.cat(deflate(products, probes[self._directions :]))

    @property
    def _directions(self) -> int:
        """How many of the probes Hutch++ spends on directions."""
        return min(self.probes // 2, self.input_dim) if self.divergence == "hutch++" else 0

    def _change(
        self,
        t: Tensor | float,
        x: Tensor,
        context: Tensor | None,
        probes: Tensor | None,
        estimated: bool,
        regularizers: tuple[str, ...],
    ) -> Tensor:
        """The velocity, what each sample of the log-det gains, and the integrand of each regulariser."""
        if probes is None:
            trace = Trace(*self.velocity.with_divergence(t, x, context))
        elif estimated:
            trace = hutchinson(lambda x: self.velocity(t, x, context), x, probes)
        else:
            trace = self.velocity.trace(t, x, context, probes)
        samples = gathered(trace.samples, self._directions) if estimated else trace.divergence.unsqueeze(0)
        terms = [integrand(name, trace, self._directions, self.velocity, t, x, context) for name in regularizers]
        return torch.cat([trace.value, samples.mT, *(term.unsqueeze(-1) for term in terms)], -1)


def _at_least_float32(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _either(value: float | None, default: float | None) -> float | None:
    return default if value is None else value


@with_variants({"velocity": "potential"}, {"divergence": "hutchinson"})
def continuous(
    input_dim: int,
    *,
    context_dim: int = 0,
    velocity: Literal["mlp", "potential"] | nn.Module = "mlp",
    **options: Any,
) -> ContinuousTransform:
    """A flow along a velocity field: a network, the gradient of a potential, or a module of your own.

    Args:
        input_dim: the number of coordinates.
        context_dim: the width of the context.
        velocity: ``"mlp"``, a `VelocityMLP`; ``"potential"``, a `PotentialGradient`; or a module
            ``net(t, x, context)``, see `as_velocity`.
        **options: of the named velocity and of `ContinuousTransform`.

    Raises:
        OptionError: an option is unknown or has a value that it cannot take.

    Example:
        >>> continuous(2, hidden_dims=(8, 8)).inv(torch.ones(2)).shape
        torch.Size([2])
    """
    known = set(inspect.signature(ContinuousTransform).parameters) - {"velocity", "input_dim", "context_dim"}
    if isinstance(velocity, str):
        if velocity not in VELOCITIES:
            raise OptionError(f"velocity must be a module or one of {', '.join(VELOCITIES)}, got {velocity!r}.")
        kind = VELOCITIES[velocity]
        own = set(inspect.signature(kind).parameters) - {"input_dim", "context_dim"}
        velocity = kind(input_dim, context_dim=context_dim, **{name: options.pop(name) for name in own & set(options)})
        known |= own
    if unknown := sorted(set(options) - known):
        raise OptionError(f"there is no option {', '.join(unknown)}; the options are {', '.join(sorted(known))}.")
    return ContinuousTransform(velocity, input_dim, context_dim=context_dim, **options)
