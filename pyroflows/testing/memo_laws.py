"""The law of the memo: what is remembered between calls saves work and never shows."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pyroflows.testing.trial import TransformTrial, Trial, is_real
from pyroflows.transforms import FlowTransform, Inverse

__all__ = ["EDITS", "count_calls", "memo", "never_stale"]

Distribution = Callable[[Any], Any]


def _step(optimizer: Callable[..., Any], **options: Any) -> Callable[[nn.Module], None]:
    def step(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer(list(module.parameters()), lr=0.1, **options).step()

    return step


def _write_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.25)


def _replace_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.75


def _write_vector(module: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(module.parameters()) * 1.1, module.parameters())


def _load(module: nn.Module) -> None:
    parameters = {name: parameter.detach() * 1.1 for name, parameter in module.named_parameters()}
    module.load_state_dict({**module.state_dict(), **parameters})


def _replace_parameters(module: nn.Module) -> None:
    for owner in list(module.modules()):
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                setattr(owner, name, nn.Parameter(parameter.detach() * 1.1))


def _write_through_numpy(module: nn.Module) -> None:
    for parameter in module.parameters():
        array = parameter.detach().cpu().numpy() if parameter.device.type == "cpu" else None
        if array is not None:
            array *= 1.1


UPDATES: dict[str, Callable[[nn.Module], None]] = {
    "Adam": _step(torch.optim.Adam, foreach=False),
    "Adam(foreach=True)": _step(torch.optim.Adam, foreach=True),
    "Adam(fused=True)": _step(torch.optim.Adam, fused=True),
    "SGD": _step(torch.optim.SGD),
    "SGD(fused=True)": _step(torch.optim.SGD, fused=True),
    "ClippedAdam": _step(ClippedAdam),
    "p.data.mul_": _write_data,
    "p.data = ...": _replace_data,
    "vector_to_parameters": _write_vector,
    "load_state_dict": _load,
    "new parameters": _replace_parameters,
    "writing through numpy": _write_through_numpy,
}
"""Every way to change parameters; several of them move no version counter."""


def _reverse(value: Tensor) -> Tensor:
    return value.detach().flip(0).clone()


def _assign(value: Tensor, new: Tensor) -> None:
    value.data.copy_(new)


def _assign_through_numpy(value: Tensor, new: Tensor) -> None:
    if value.device.type == "cpu":
        value.detach().numpy()[...] = new.numpy()
    else:
        value.data.copy_(new)


def _write(value: Tensor) -> None:
    with torch.no_grad():
        value.mul_(0.9)


def _nudge(value: Tensor) -> Tensor:
    new = value.detach().clone()
    new[:1] *= 1 + 1e-3
    return new


EDITS: dict[str, Callable[[Tensor], None]] = {
    "writing in place": _write,
    "writing .data": lambda value: _assign(value, value.detach() * 0.9),
    "shuffling rows in .data": lambda value: _assign(value, _reverse(value)),
    "shuffling rows through numpy": lambda value: _assign_through_numpy(value, _reverse(value)),
    "nudging one row through .data": lambda value: _assign(value, _nudge(value)),
}
"""Every way to change a tensor that the caller owns."""

FEW = (
    "Adam(fused=True)",
    "p.data.mul_",
    "p.data = ...",
    "new parameters",
    "writing in place",
    "shuffling rows in .data",
)
"""What layers with a search or a solve are put through, which take a hundred times as long: one way of each kind."""


def never_stale(
    trial: Trial,
    module: nn.Module,
    distribution: Distribution,
    data: Tensor,
    edits: Mapping[str, Callable[[Tensor], None]] = EDITS,
) -> None:
    """Whatever changes the parameters or the tensors, a score is that of the present values.

    Args:
        trial: where to complain.
        module: what holds the parameters.
        distribution: from (a copy of) the module to its distribution.
        data: points to score.
        edits: what is done to points; all of it must leave them in the support.
    """

    def compare(what: str, changed: nn.Module, d: Any, value: Tensor) -> None:
        found = d.log_prob(value)
        with torch.no_grad():
            again = d.log_prob(value)
            truth = distribution(copy.deepcopy(changed)).log_prob(value.detach().clone())
        unit = (1 + truth.abs()).flatten()
        trial.close(f"log_prob of {what}", found.flatten(), truth.flatten(), 1e-8, unit)
        trial.close(f"log_prob without gradient of {what}", again.flatten(), truth.flatten(), 1e-8, unit)

    draws = ("sample", "rsample") if distribution(module).has_rsample else ("sample",)
    updates = UPDATES if any(p.requires_grad for p in module.parameters()) else {}
    if any(isinstance(part, FlowTransform) and part.inverse == "numeric" for part in module.modules()):
        updates = {name: update for name, update in updates.items() if name in FEW}
        edits = {name: edit for name, edit in edits.items() if name in FEW}
    for name, update in updates.items():
        m = copy.deepcopy(module)
        d = distribution(m)
        d.log_prob(data)
        update(m)
        compare(f"the same data after {name}", m, d, data)
        for scored in (False, True):
            kept = getattr(d, draws[-1])()
            if scored:
                d.log_prob(kept)
            update(m)
            compare(f"a kept sample after {name}", m, d, kept)

    for name, edit in edits.items():
        d = distribution(module)
        for draw in draws:
            value = getattr(d, draw)((64,))
            edit(value)
            compare(f"a {draw} after {name}", module, d, value)
        mine = data.clone()
        d.log_prob(mine)
        edit(mine)
        compare(f"data after {name}", module, d, mine)

    m = copy.deepcopy(module)
    d = distribution(m)
    for _ in range(2):  # twice the same tensor, each time with a backward of its own
        m.zero_grad(set_to_none=True)
        if (total := d.log_prob(data).sum()).requires_grad:
            total.backward()

    with torch.no_grad():
        quiet = d.sample()
    _same_gradients(trial, "a sample drawn without gradient", m, d, quiet, quiet.clone())
    if "rsample" in draws:
        value = d.rsample()
        _same_gradients(trial, "a differentiable sample", m, d, value, value.clone())


def _same_gradients(trial: Trial, what: str, m: nn.Module, d: Any, value: Tensor, stranger: Tensor) -> None:
    """The gradient of the score of a sample is that of a tensor that the layer has never seen."""
    parameters = [p for p in m.parameters() if p.requires_grad]
    found, truth = (_gradients(d.log_prob(v).sum(), parameters) for v in (value, stranger))
    for got, want in zip(found, truth, strict=True):
        error, allowed = float((got - want).abs().max()), 1e-6 * (1 + float(want.abs().max()))
        trial.require(error <= allowed, f"the gradient of log_prob of {what} is off by {error:.3g}")


def _gradients(total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    grads = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def count_calls(module: Any, method: str) -> list[int]:
    """Replaces a method of a module by one that counts its calls."""
    calls, original = [0], getattr(module, method)

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return original(*arguments)

    setattr(module, method, counted)
    return calls


def memo(trial: TransformTrial) -> None:
    """After any change of parameters, context or points, a score is the new one; sampling then scoring costs no
    inverse; gradients are complete; nothing outlives ``clear_cache``.
    """
    if trial.dtype != torch.float64:
        return
    if not is_real(trial.original.domain):
        return
    x, y, context, _, _ = trial.probe

    def distribution(t: Any) -> Any:
        forth = tuple(t.forward_shape(trial.event_shape)) == trial.y_event_shape  # or t is the inverse
        shape = trial.event_shape if forth else trial.y_event_shape
        zero = torch.zeros(shape, dtype=trial.dtype, device=trial.device)
        base = dist.Normal(zero, torch.ones_like(zero)).to_event(t.domain.event_dim)
        return dist.TransformedDistribution(base, [t if context is None else t.condition(context)])

    never_stale(trial, trial.transform, distribution, y)
    never_stale(trial, trial.transform, lambda t: distribution(t.inv), x)
    _sampling_is_free(trial, distribution)
    _layer_alone(trial, x, y, context)


def _sampling_is_free(trial: TransformTrial, distribution: Distribution) -> None:
    for backwards in (False, True):
        t = copy.deepcopy(trial.transform)
        d = distribution(t.inv if backwards else t)
        inner = t.transform if isinstance(t, Inverse) else t
        counts = {method: count_calls(inner, method) for method in ("forward_and_log_det", "inverse_and_log_det")}
        for draw in ("sample", "rsample"):
            for calls in counts.values():
                calls[0] = 0
            with torch.set_grad_enabled(draw == "rsample"):
                d.log_prob(getattr(d, draw)())
            used = {method: calls[0] for method, calls in counts.items()}
            cheap = "inverse_and_log_det" if backwards != (inner is not t) else "forward_and_log_det"
            side = ".inv" if backwards else "the layer"
            trial.require(
                sum(used.values()) == 1 and used[cheap] == 1,
                f"{draw} and log_prob through {side} took {used}, not one call",
            )


def _layer_alone(trial: TransformTrial, x: Tensor, y: Tensor, context: Tensor | None) -> None:
    t = copy.deepcopy(trial.transform)
    at = t if context is None else t.condition(context)
    point = x.clone()
    image = at(point)
    for name, edit in EDITS.items():
        edit(point)
        fresh = at.forward_and_log_det(point)
        trial.equal(f"log_abs_det_jacobian(x, y) after {name} x", at.log_abs_det_jacobian(point, image), fresh[1])
        image = at(point)
        trial.equal(f"t(x) after {name} x", image, fresh[0])
    if context is not None:
        at(point)
        context = context.clone()
        at = t.condition(context)
        image = at(point)
        context.mul_(0.5)
        back = t.inverse_and_log_det(image, context)[0]
        trial.equal("the inverse after the context was changed in place", at.inv(image), back)
    found = at.inv(y)
    trial.equal("t(t.inv(y)) for data y", at(found.clone()), at.forward_and_log_det(found)[0])
    image = at(x.clone())
    ghost = weakref.ref(image)
    at.clear_cache()
    del image
    trial.require(ghost() is None, "clear_cache keeps a tensor alive")
