"""What the documentation says about the registry and the public names, read from the package itself.

`.. registry:: transforms` lists the built-in entries of a group, with what each claims. A public name of the
package that no page documents is a warning, and so an error of `make docs`.
"""

import copy
import inspect
from importlib import import_module
from importlib.util import find_spec

import torch
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from torch.distributions import biject_to

import pyroflows as pf
from pyroflows import plugins
from pyroflows.errors import ContextError, OptionError, ShapeError
from pyroflows.testing.trial import is_real, perturb

logger = logging.getLogger(__name__)

INPUT_DIMS = (2, 3, 4, (2, 4, 4), (4, 4))  # the first that a factory takes; image layers take a shape
CLAIMS = ("Inverse", "Log-det", "Context", "vmap", "compile", "2nd derivative", "Round trip, float64", "float32")
SCALE, POINTS = 0.5, 256  # of the parameters at which round trips are measured


def summary(entry):
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(entry) or "").split("\n\n")[0].split())


def build(name, group, **options):
    make = plugins.transform if group == "transforms" else plugins.flow
    for input_dim in (*getattr(plugins.get(group, name), "input_dims", ()), *INPUT_DIMS):
        try:
            return make(name, input_dim=input_dim, **options)
        except (OptionError, ShapeError):
            continue
    raise OptionError(f"{name} could be built for none of the sizes {INPUT_DIMS}.")


def claims(name, group):
    """The flags of a registered transform, or of a flow's transform, as it is built without options."""
    built = build(name, group)
    part = getattr(built, "components", [built])[0]  # the components of a mixture are alike
    transform = built if group == "transforms" else part.transform
    dim = built.config.input_dim
    shape = part.base().event_shape if group == "distributions" else (dim,) if isinstance(dim, int) else dim
    try:
        context = "yes" if build(name, group, context_dim=2).context_dim else "ignored"
    except ContextError:
        context = "no"
    flags = (transform.vmaps, transform.compiles, transform.twice_differentiable)
    errors = (f"{round_trip(transform, shape, dtype):.0e}" for dtype in (torch.float64, torch.float32))
    return [transform.inverse, transform.log_det, context, *("yes" if flag else "no" for flag in flags), *errors]


def round_trip(transform, shape, dtype):
    """How far inverse(forward(x)) is from x at worst, at random parameters, over 1 + abs(x)."""
    moved = copy.deepcopy(transform).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    perturb(moved, SCALE, generator)
    x = torch.randn(POINTS, *shape, generator=generator, dtype=torch.float64)
    if not is_real(moved.domain):
        to_domain = biject_to(moved.domain)
        x = to_domain(torch.randn(POINTS, *to_domain.inverse_shape(shape), generator=generator, dtype=torch.float64))
    x = x.to(dtype)
    with torch.no_grad():
        back = moved.inverse_and_log_det(moved.forward_and_log_det(x)[0])[0]
    return float(((back - x).abs() / (1 + x.abs())).max())


class Registry(SphinxDirective):
    """A table of the built-in entries of a group."""

    required_arguments = 1

    def run(self):
        self.env.note_reread()
        [group] = self.arguments
        titles = ["Name", "What it is", *(CLAIMS if group != "guides" else ())]
        widths = "14 36 8 8 8 6 7 8 8 8" if group != "guides" else "20 80"
        rows = [titles]
        for info in plugins.report(group):
            if info.distribution == "pyroflows":
                link = f":py:obj:`{info.name} <{info.value.replace(':', '.')}>`"
                about = summary(plugins.get(group, info.name))
                rows.append([link, about, *(claims(info.name, group) if group != "guides" else ())])
        table = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
        for row in rows:
            table += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
        return self.parse_text_to_nodes("\n".join(table))


def public_names():
    """Every sub-package that exists, with the names in its ``__all__``."""
    for package in filter(lambda name: find_spec(f"pyroflows.{name}"), pf.__all__):
        module = import_module(f"pyroflows.{package}")
        yield from ((module, name) for name in getattr(module, "__all__", ()))


def resolve_public_names(app):
    for module, name in public_names():
        setattr(module, name, getattr(module, name))  # autodoc sees no name that a module imports lazily


def check_public_names(app, env):
    documented = set(env.get_domain("py").objects)
    for module, name in public_names():
        if f"{module.__name__}.{name}" not in documented:
            logger.warning("%s.%s is public and on no page of docs/api", module.__name__, name)


def setup(app):
    app.add_directive("registry", Registry)
    app.connect("builder-inited", resolve_public_names)
    app.connect("env-check-consistency", check_public_names)
    return {"parallel_read_safe": True}
