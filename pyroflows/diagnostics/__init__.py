"""How good an approximation is: importance weights, PSIS, ArviZ."""

from pyroflows.diagnostics.arviz import from_guide
from pyroflows.diagnostics.importance import ImportanceSummary, importance_summary, khat

__all__ = ["ImportanceSummary", "from_guide", "importance_summary", "khat"]
