"""stub"""

from pyroflows.testing.trial import Trial

GUIDE_LAWS = ()


class GuideTrial(Trial): ...
