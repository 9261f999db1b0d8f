"""Pure functions of tensors: splines, roots, sums. No parameters, no densities, no state."""

from pyroflows.numerics.affine import bounded_affine
from pyroflows.numerics.derivatives import gradients_with_graph
from pyroflows.numerics.fallback import Fallback
from pyroflows.numerics.logistic import deep_sigmoid, logistic_mean, mixture_parameters, mixture_weights
from pyroflows.numerics.means import elu_mean, leaky_relu_mean, normal_mean
from pyroflows.numerics.modes import is_differentiated, is_plainly_eager
from pyroflows.numerics.ode import Solution, ode_solvers, ode_tolerances, solve
from pyroflows.numerics.parts import apart, together
from pyroflows.numerics.piecewise import piecewise_cubic, piecewise_linear, piecewise_quadratic
from pyroflows.numerics.quadrature import gauss_legendre, powers
from pyroflows.numerics.record import Record, Work, open_records, recorded
from pyroflows.numerics.reduce import matvec, sum_last
from pyroflows.numerics.roots import Root, monotone_root
from pyroflows.numerics.scales import bounded_log_scale, positive
from pyroflows.numerics.splines import linear_rational, rational_quadratic
from pyroflows.numerics.trace import (
    Trace,
    deflate,
    draw_probes,
    exact_divergence,
    hutch_plus_plus,
    hutchinson,
    total_derivative,
)

__all__ = [
    "Fallback",
    "Record",
    "Root",
    "Solution",
    "Trace",
    "Work",
    "apart",
    "bounded_affine",
    "bounded_log_scale",
    "deep_sigmoid",
    "deflate",
    "draw_probes",
    "elu_mean",
    "exact_divergence",
    "gauss_legendre",
    "gradients_with_graph",
    "hutch_plus_plus",
    "hutchinson",
    "is_differentiated",
    "is_plainly_eager",
    "leaky_relu_mean",
    "linear_rational",
    "logistic_mean",
    "matvec",
    "mixture_parameters",
    "mixture_weights",
    "monotone_root",
    "normal_mean",
    "ode_solvers",
    "ode_tolerances",
    "open_records",
    "piecewise_cubic",
    "piecewise_linear",
    "piecewise_quadratic",
    "positive",
    "powers",
    "rational_quadratic",
    "recorded",
    "solve",
    "sum_last",
    "together",
    "total_derivative",
]
