"""Layers and flows with one fault each, and the law that has to find it."""

import functools

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions.transforms import _InverseTransform

from pyroflows.distributions import Flow, FlowDistribution, standard_normal
from pyroflows.numerics import sum_last
from pyroflows.transforms import FlowTransform

TRANSFORMS = {}
FLOWS = {}


def breaks(law, table=TRANSFORMS, **options):
    """Puts a fault into the table, with the law that must name it."""

    def add(factory):
        table[factory.__name__] = (factory, law, options)
        return factory

    return add


class Sound(FlowTransform):
    """A scale, a shift and a lower triangular mix: y = L (e^a x) + b. Nothing is wrong with it."""

    def __init__(self, input_dim, *, context_dim=0):
        super().__init__(context_dim)
        self.input_dim = input_dim
        a, b, mix = torch.zeros(input_dim), torch.zeros(input_dim), torch.zeros(input_dim, input_dim)
        self.declare_parameters(hidden_dims=(8,), a=a, b=b, mix=mix)

    def parts(self, context):
        p = self.parameters_of(context)
        lower = p["mix"].tril(-1) + torch.eye(self.input_dim, dtype=p["a"].dtype, device=p["a"].device)
        return 2 * torch.tanh(p["a"] / 2), p["b"], lower

    def forward_and_log_det(self, x, context=None):
        a, b, lower = self.parts(context)
        y = (lower @ (x * a.exp()).unsqueeze(-1)).squeeze(-1) + b
        return y, sum_last(a).expand(y.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        a, b, lower = self.parts(context)
        z = torch.linalg.solve_triangular(lower, (y - b).unsqueeze(-1), upper=False, unitriangular=True)
        return z.squeeze(-1) * (-a).exp(), -sum_last(a).expand(torch.broadcast_shapes(y.shape, a.shape)[:-1])


class Elementwise(FlowTransform):
    """y = f(x; a) coordinate by coordinate; a fault replaces the scalar functions."""

    def __init__(self, input_dim, *, context_dim=0):
        super().__init__(context_dim)
        self.input_dim = input_dim
        self.declare_parameters(hidden_dims=(8,), a=torch.zeros(input_dim))

    def raw(self, context):
        return self.parameters_of(context)["a"]

    def scale(self, a):
        return 2 * torch.tanh(a / 2)

    def go(self, x, a):
        s = self.scale(a)
        return x * s.exp(), s + 0 * x

    def back(self, y, a):
        s = self.scale(a)
        return y * (-s).exp(), -s + 0 * y

    def forward_and_log_det(self, x, context=None):
        y, slope = self.go(x, self.raw(context))
        return y, sum_last(slope)

    def inverse_and_log_det(self, y, context=None):
        x, slope = self.back(y, self.raw(context))
        return x, sum_last(slope)


# --- wrong numbers ---------------------------------------------------------------------------------------


@breaks("log_det")
class RowsForColumns(Sound):
    """The log-det is right at the start and wrong away from it, as Pyro's Sylvester's is."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det + self.parts(context)[2].tril(-1).square().sum((-1, -2)) * 0.1


@breaks("log_det")
class OneSignLost(Sound):
    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y, context)
        return x, -log_det


@breaks("log_det")
class EpsilonInTheLog(Elementwise):
    def go(self, x, a):
        s = self.scale(a)
        return x * s.exp(), torch.log(s.exp() + 1e-6) + 0 * x


@breaks("round_trip")
class OneStepAway(Sound):
    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y, context)
        return x + 1e-6, log_det


@breaks("round_trip")
class SaturatingBracket(Elementwise):
    """Bisection between fixed ends: right in the middle, stuck in the tails."""

    def go(self, x, a):
        s = self.scale(a)
        return x * s.exp() + torch.tanh(x), torch.log(s.exp() + 1 - torch.tanh(x) ** 2)

    def back(self, y, a):
        low, high = torch.full_like(y, -2.5), torch.full_like(y, 2.5)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.go(middle, a)[0] > y
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return low, -self.go(low, a)[1]


@breaks("log_det")
class Clamped(Elementwise):
    def go(self, x, a):
        return super().go(x.clamp(-3, 3), a)


@breaks("gradients")
class DetachedScale(Elementwise):
    def go(self, x, a):
        return super().go(x, a * 0 + a.detach())


@breaks("gradients")
class WrongBackward(Elementwise):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x, s):
            return x * s

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            x, s = ctx.saved_tensors
            return grad * s, (0.5 * grad * x).sum_to_size(s.shape)

    def go(self, x, a):
        s = self.scale(a)
        return self.Cube.apply(x, s.exp()), s + 0 * x


@breaks("second_derivatives")
class OnceDifferentiable(Elementwise):
    class Sinh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.asinh(x)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad / torch.sqrt(1 + x * x)

    def go(self, x, a):
        s = self.scale(a)
        return self.Sinh.apply(x) + x * s.exp(), torch.log(1 / torch.sqrt(1 + x * x) + s.exp())

    vmaps = False


# --- rows ------------------------------------------------------------------------------------------------


@breaks("rows")
class BatchMateLeak(Elementwise):
    def go(self, x, a):
        return super().go(x, a + 0.01 * torch.tanh(x.mean(0)))


@breaks("shapes")
class ScalarLogDet(Sound):
    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det.mean()


@breaks("shapes")
class NoRows(Elementwise):
    """Cannot take a batch of none."""

    def go(self, x, a):
        return super().go(x / x.abs().max() * x.abs().max(), a)


@breaks("shapes", context_dims=(3,))
class ContextOfTheSameBatch(Elementwise):
    """Joins x and context without broadcasting."""

    def raw(self, context):
        self.rows = context
        return super().raw(context)

    def go(self, x, a):
        torch.cat([x, self.rows], -1)
        return super().go(x, a)

    def __getstate__(self):
        return {**super().__getstate__(), "rows": None}


@breaks("extreme_inputs")
class MaskedBranch(Elementwise):
    """A branch that is masked away and still poisons the gradient: the root at zero."""

    def go(self, x, a):
        y, slope = super().go(x, a)
        return y + 0 * torch.where(x > 0, torch.sqrt(x), torch.zeros_like(x)), slope


@breaks("extreme_inputs")
class Overflowing(Elementwise):
    """sinh(asinh(x)) by its formula: the square overflows."""

    def go(self, x, a):
        y, slope = super().go(x, a)
        return y, slope + torch.log(torch.sqrt(1 + x * x) / torch.sqrt(1 + x * x))


@breaks("extreme_parameters")
class ScaleUnderflows(Elementwise):
    def scale(self, a):
        return torch.log(torch.nn.functional.softplus(a + 0.5413248546129181))


@breaks("extreme_parameters")
class ScaleOverflows(Elementwise):
    def scale(self, a):
        return 5 * a


@breaks("start")
class FarStart(Elementwise):
    def scale(self, a):
        return super().scale(a) + 1.0


# --- state -----------------------------------------------------------------------------------------------


@breaks("pure")
class RunningMean(Elementwise):
    """Batch normalisation's trap: a pass in train() moves a buffer."""

    def __init__(self, input_dim, *, context_dim=0):
        super().__init__(input_dim, context_dim=context_dim)
        self.register_buffer("mean", torch.zeros(input_dim))

    def back(self, y, a):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
        return super().back(y, a)


@breaks("pure")
class WritesItsInput(Elementwise):
    def go(self, x, a):
        with torch.no_grad():
            x.add_(1.0)
        return super().go(x, a)


@breaks("pure")
class NoiseInEval(Elementwise):
    def go(self, x, a):
        y, slope = super().go(x, a)
        return y, slope + 0.01 * torch.randn_like(slope)


@breaks("memo")
class IdentityCache(Sound):
    """torch's own cache: by object, never mind what happened since."""

    def __call__(self, x):
        known = self.__dict__.get("_pair")
        if known is not None and known[0] is x:
            return known[1]
        y = self._call(x)
        self.__dict__["_pair"] = (x, y)
        return y

    def _inv_call(self, y):
        known = self.__dict__.get("_pair")
        return known[0] if known is not None and known[1] is y else self._inverse(y)

    def __getstate__(self):
        return {**super().__getstate__(), "_pair": None}


@breaks("memo")
class VersionCounterCache(Sound):
    """A cache that trusts version counters, which fused optimizers and .data do not move."""

    def inverse_and_log_det(self, y, context=None):
        stamp = tuple(p._version for p in self.parameters())
        known = self.__dict__.get("_seen")
        if context is None and known is not None and known[0] is y and known[1] == stamp:
            return known[2]
        found = super().inverse_and_log_det(y, context)
        if context is None and not torch._C._are_functorch_transforms_active():
            self.__dict__["_seen"] = (y, stamp, found)
        return found

    def __getstate__(self):
        return {**super().__getstate__(), "_seen": None}


@breaks("memo")
class NoMemo(Sound):
    """Scoring a sample costs an inverse."""

    def _remember(self, *args, **kwargs):
        pass


@breaks("copies")
class Unpicklable(Elementwise):
    def __init__(self, input_dim, *, context_dim=0):
        super().__init__(input_dim, context_dim=context_dim)
        self.squash = lambda a: 2 * torch.tanh(a / 2)


@breaks("state_dict")
class PermutationNotInState(FlowTransform):
    """Pyro's Permute: a list, so that a loaded flow is another function and nobody is told."""

    def __init__(self, input_dim, *, context_dim=0):
        super().__init__()
        self.order = torch.randperm(input_dim).tolist()
        self.back = sorted(range(input_dim), key=self.order.__getitem__)

    def forward_and_log_det(self, x, context=None):
        return x[..., self.order], x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        return y[..., self.back], y.new_zeros(y.shape[:-1])


@breaks("dtype")
class Float32Constant(Elementwise):
    def go(self, x, a):
        return super().go(x, a + torch.linspace(0.0, 0.1, x.shape[-1]))


@breaks("dtype")
class Float32Result(Elementwise):
    def back(self, y, a):
        x, slope = super().back(y, a)
        return x.float(), slope


@breaks("meta")
class LeftBehind(Elementwise):
    def __init__(self, input_dim, *, context_dim=0):
        super().__init__(input_dim, context_dim=context_dim)
        self.masks = [torch.ones(input_dim, dtype=torch.bool)]


# --- the algebra -----------------------------------------------------------------------------------------


@breaks("algebra")
class InverseLosesParameters(Sound):
    @property
    def inv(self):
        return _InverseTransform(self)


@breaks("algebra", context_dims=(3,))
class ConditionLosesParameters(Sound):
    def condition(self, context):
        plain = Sound(self.input_dim)
        plain.forward_and_log_det = functools.partial(self.forward_and_log_det, context=context)
        plain.inverse_and_log_det = functools.partial(self.inverse_and_log_det, context=context)
        return plain


@breaks("protocol", context_dims=(3,))
class ConditionHidesItsBatch(Sound):
    """Pyro's trap: six contexts and one batch_shape, so that six rows share their noise."""

    def condition(self, context):
        conditioned = super().condition(context)
        conditioned.__dict__["forward_shape"] = torch.Size
        conditioned.__dict__["inverse_shape"] = torch.Size
        return conditioned


# --- claims ----------------------------------------------------------------------------------------------


@breaks("vmap")
class DataDependentBranch(Elementwise):
    def go(self, x, a):
        return super().go(x if bool((x == x).all()) else x * 1.0, a)


@breaks("compile")
class GraphBreak(Elementwise):
    def go(self, x, a):
        torch._dynamo.graph_break()
        return super().go(x, a)


class _Estimated(Elementwise):
    log_det = "estimate"

    def noise(self, slope):
        return torch.randn_like(slope)

    def go(self, x, a):
        y, slope = super().go(x, a)
        return (y, slope + self.noise(slope)) if self.training else (y, slope)

    def back(self, y, a):
        x, slope = super().back(y, a)
        return (x, slope - self.noise(slope)) if self.training else (x, slope)


@breaks("estimate")
class BiasedEstimate(_Estimated):
    def noise(self, slope):
        return torch.randn_like(slope) + 0.3


@breaks("estimate")
class NewNoiseEachTime(_Estimated):
    def log_abs_det_jacobian(self, x, y):
        return self.forward_and_log_det(x)[1]


@breaks("pure")
class EstimateInEval(_Estimated):
    def go(self, x, a):
        y, slope = Elementwise.go(self, x, a)
        return y, slope + self.noise(slope)


class SoundEstimate(_Estimated):
    """Nothing is wrong with it."""


# --- flows -----------------------------------------------------------------------------------------------


def flow(make, input_dim, context_dim):
    """A flow of one sound layer whose distribution is of another class."""

    class Faulty(Flow):
        def forward(self, context=None):
            d = super().forward(context)
            return make(d.base_dist, d.transforms)

        def __reduce__(self):
            return rebuilt, (make, input_dim, context_dim, self.state_dict(), self.training)

    return Faulty(Sound(input_dim, context_dim=context_dim), standard_normal(input_dim))


def rebuilt(make, input_dim, context_dim, state, training):
    """What unpickling a faulty flow does."""
    other = flow(make, input_dim, context_dim)
    dtype = next(iter(state.values())).dtype
    other.to(dtype).load_state_dict(state, assign=True)
    return other.train(training)


def faulty_flow(law):
    """Registers a distribution class as a faulty flow."""

    def add(make):
        def factory(input_dim, *, context_dim=0):
            return flow(make, input_dim, context_dim)

        factory.__name__ = make.__name__
        return breaks(law, FLOWS)(factory)

    return add


@faulty_flow("normalised")
class ConstantLost(FlowDistribution):
    def log_prob(self, value):
        return super().log_prob(value) + 0.05


@faulty_flow("samples")
class SamplesTooWide(FlowDistribution):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape) * 1.3

    def sample(self, sample_shape=()):
        return self.rsample(sample_shape).detach()


@faulty_flow("joint")
class JointScoreOff(FlowDistribution):
    def rsample_with_log_prob(self, sample_shape=()):
        value, score = super().rsample_with_log_prob(sample_shape)
        return value, score + 0.1


@faulty_flow("event_shapes")
class ScoreOfOneShape(FlowDistribution):
    def log_prob(self, value):
        return super().log_prob(value)[..., None]


@faulty_flow("context_rows")
class SharedNoise(FlowDistribution):
    def rsample(self, sample_shape=()):
        value = super().rsample(sample_shape)
        return value[..., :1, :].expand_as(value) if len(self.batch_shape) else value

    def sample(self, sample_shape=()):
        return self.rsample(sample_shape).detach()


@faulty_flow("validation")
class TakesNaN(FlowDistribution):
    def log_prob(self, value):
        return super().log_prob(value.nan_to_num(0.0))


class _Unused(Sound):
    def __init__(self, input_dim, *, context_dim=0):
        super().__init__(input_dim, context_dim=context_dim)
        self.unused = nn.Parameter(torch.zeros(2))


@breaks("training_step", FLOWS)
def parameter_without_gradient(input_dim, *, context_dim=0):
    return Flow(_Unused(input_dim, context_dim=context_dim), standard_normal(input_dim))


class _Plain(nn.Module):
    """A base whose tensors are no buffers."""

    def __init__(self, input_dim):
        super().__init__()
        self.loc = torch.zeros(input_dim)

    def forward(self):
        return dist.Normal(self.loc, 1.0).to_event(1)


@breaks("flow_copies", FLOWS)
def base_left_behind(input_dim, *, context_dim=0):
    return Flow(Sound(input_dim, context_dim=context_dim), _Plain(input_dim))
