"""Pure functions of tensors: splines, roots, sums. No parameters, no densities, no state."""

from pyroflows.numerics.reduce import matvec, sum_last
from pyroflows.numerics.roots import Root, monotone_root
from pyroflows.numerics.scales import bounded_log_scale, positive
from pyroflows.numerics.splines import linear_rational, rational_quadratic

__all__ = [
    "Root",
    "bounded_log_scale",
    "linear_rational",
    "matvec",
    "monotone_root",
    "positive",
    "rational_quadratic",
    "sum_last",
]
