"""stub"""

from pyroflows.testing.trial import Trial

DISTRIBUTION_LAWS = ()


class FlowTrial(Trial): ...
