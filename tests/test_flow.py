"""A flow as a module: each part is registered once, and stays what it was when other tensors are put in its place."""

import copy
import pickle

import pyro
import pytest
import torch

import pyroflows as pf
from pyroflows import plugins
from pyroflows.distributions import Standardize
from pyroflows.errors import PyroflowsError


def build(group, name, options):
    """The layer or flow in the first of its sizes, with a context if it reads one."""
    factory = plugins.get(group, name)
    for context_dim in (2, 0):
        for input_dim in getattr(factory, "input_dims", (2, 3)):
            try:
                return plugins.build(group, name, input_dim, context_dim=context_dim, **options)
            except PyroflowsError:
                continue
    raise AssertionError(f"{name} takes none of the sizes")


def of_every_name():
    for group in plugins.GROUPS[:2]:
        for name in pf.available(group):
            for number, options in enumerate(getattr(plugins.get(group, name), "variants", ({},))):
                yield pytest.param(group, name, options, id=f"{name}-{number}")


@pytest.mark.parametrize(("group", "name", "options"), [*of_every_name()])
def test_every_part_is_registered_once(group, name, options):
    """What holds a module twice keeps the tensors that ``torch.func.functional_call`` lends to it."""
    modules = [id(module) for _, module in build(group, name, options).named_modules(remove_duplicate=False)]
    assert len(modules) == len(set(modules))


@pytest.mark.parametrize("name", ["nsf", "mixture", "ncsf", "glow"])
def test_tensors_that_are_lent_to_a_flow_are_given_back(name):
    flow = pf.flow(name, input_dim=(1, 4, 4) if name == "glow" else 2)
    x = flow().sample((5,))
    own = {id(p) for p in flow.parameters()}
    before = flow().log_prob(x)
    lent = {key: torch.randn_like(p) * 0.1 for key, p in flow.named_parameters()}

    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow().log_prob(x)

    scores = torch.func.functional_call(Score(), {f"flow.{key}": value for key, value in lent.items()}, (x,))
    assert not torch.allclose(scores, before)
    assert {id(p) for p in flow.parameters()} == own
    assert torch.equal(flow().log_prob(x), before)


def test_the_parts_of_a_flow():
    flow = pf.flow("nsf", input_dim=2, support="positive")
    assert [flow.learned, flow.standardize] == list(flow.transform)[:2]
    assert isinstance(flow.standardize, Standardize)
    learned, standardize = flow.learned, flow.standardize
    for support, parts in ((None, 2), ("unit_interval", 3), ("unit_interval", 3)):
        flow.constrain(support)
        assert (flow.learned, flow.standardize, len(flow.transform)) == (learned, standardize, parts)
    on_angles = pf.flow("ncsf", input_dim=2)
    assert on_angles.standardize is None
    assert len(on_angles.transform) == 1
    assert len(pf.flow("sphere", input_dim=2).transform) == 2  # the chart


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_the_parts_of_a_copy_are_its_own(clone):
    flow = pf.flow("maf", input_dim=2, support="positive")
    other = clone(flow)
    assert other.learned is other.transform[0]
    assert not {id(p) for p in flow.parameters()} & {id(p) for p in other.parameters()}
    x = flow().sample((4,))
    assert torch.equal(other().log_prob(x), flow().log_prob(x))
    with torch.no_grad():
        next(other.learned.parameters()).add_(1)
    assert not torch.equal(other().log_prob(x), flow().log_prob(x))


def test_every_tensor_has_one_name():
    flow = pf.flow("realnvp", input_dim=2)
    state = flow.state_dict(keep_vars=True)
    assert len({id(value) for value in state.values()}) == len(state)
    pyro.clear_param_store()
    pyro.module("flow", flow)
    assert len(pyro.get_param_store()) == len(list(flow.parameters()))
    pyro.clear_param_store()
