"""Draws of a guide as ArviZ data, for ArviZ 0.x and 1.x alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine

from pyroflows import __version__

__all__ = ["from_guide"]


def from_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    max_plate_nesting: int = 4,
    coords: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Draws of any guide as ArviZ data: one chain of independent draws, dimensions named after the plates.

    The groups are ``posterior``, ``observed_data`` and ``sample_stats`` with ``lp`` (log joint density of the
    model) and ``log_q`` (log density of the guide) for each draw. ArviZ is imported on the first call.

    Args:
        model: a Pyro model whose plates are vectorised.
        guide: its guide.
        *args: the model's arguments.
        num_samples: how many draws.
        max_plate_nesting: at least the number of nested plates in the model.
        coords: labels for plates, by the plate's name.
        **kwargs: the model's keyword arguments.

    Returns:
        ``arviz.InferenceData`` (0.x) or ``xarray.DataTree`` (1.x); both have ``to_netcdf``.

    Example:
        >>> import pyro.distributions as dist
        >>> model = lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> data = from_guide(model, model, num_samples=10)
        >>> data.posterior["z"].shape
        (1, 10)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.x announces 1.x, which this function supports
        import arviz  # four seconds: only when asked for

    plate = pyro.plate("_num_draws", num_samples, dim=-max_plate_nesting - 1)
    with torch.no_grad():
        guide_trace = poutine.trace(plate(guide)).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(plate(model), guide_trace)).get_trace(*args, **kwargs)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()

    def by_draw(trace: poutine.Trace) -> np.ndarray[Any, Any]:
        total = torch.zeros(num_samples, dtype=torch.float64)
        nodes: dict[str, Any] = dict(trace.nodes)
        for site in nodes.values():
            if site["type"] == "sample" and site["name"] != "_num_draws":
                log_prob = site["log_prob"].double().cpu()
                if log_prob.dim() > max_plate_nesting:  # [draws, *plates]
                    total = total + log_prob.flatten(1).sum(-1)
                else:  # the same in every draw
                    total = total + log_prob.sum()
        return total.numpy()[None]

    posterior, observed, dims = {}, {}, {}
    nodes: dict[str, Any] = dict(model_trace.nodes)
    for name, site in nodes.items():
        if site["type"] != "sample" or name == "_num_draws" or type(site["fn"]).__name__ == "_Subsample":
            continue
        value, event_dim = site["value"], site["fn"].event_dim
        frames = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        frames = {dim: plate_name for dim, plate_name in frames.items() if plate_name != "_num_draws"}
        batch = value.shape[: value.dim() - event_dim]
        event = value.shape[value.dim() - event_dim :]
        kept = sorted(frames)  # outermost plate first
        shape = [batch[dim] if -dim <= len(batch) else 1 for dim in kept]
        event_names = [f"{name}_dim_{i}" for i in range(event_dim)]
        if site["is_observed"]:
            if len(batch) > max_plate_nesting:
                value = value[0]
            observed[name] = value.reshape(*shape, *event).cpu().numpy()
        else:
            if len(batch) <= max_plate_nesting:
                value = value.expand(num_samples, *value.shape)
            posterior[name] = value.reshape(1, num_samples, *shape, *event).cpu().numpy()
        dims[name] = [frames[dim] for dim in kept] + event_names
    groups: dict[str, Any] = {
        "posterior": posterior,
        "sample_stats": {"lp": by_draw(model_trace), "log_q": by_draw(guide_trace)},
    }
    if observed:
        groups["observed_data"] = observed
    about = {"inference_library": "pyroflows", "inference_library_version": __version__, "inference_method": "svi"}
    if _takes_flat_groups(arviz):
        return arviz.from_dict(**groups, coords=coords, dims=dims, posterior_attrs=about)
    return arviz.from_dict(groups, coords=coords, dims=dims, attrs={"posterior": about})


def _takes_flat_groups(arviz: Any) -> bool:
    """ArviZ 0.x takes each group as an argument; 1.x takes one dictionary of groups."""
    return int(str(arviz.__version__).split(".")[0]) < 1
