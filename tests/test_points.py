"""What is no point of a flow is refused, in words that say which points are."""

import math

import numpy as np
import pyro
import pytest
import torch

import pyroflows as pf
from pyroflows.distributions import Standardize
from pyroflows.errors import ContextError, DtypeError, ShapeError

FLOWS = {
    "nsf": (lambda: pf.flow("nsf", input_dim=3), (3,)),
    "one coordinate": (lambda: pf.flow("nsf", input_dim=1), (1,)),
    "planar": (lambda: pf.flow("planar", input_dim=3), (3,)),
    "positive": (lambda: pf.flow("realnvp", input_dim=3, support="positive"), (3,)),
    "simplex": (lambda: pf.flow("maf", input_dim=2, support="simplex"), (3,)),
    "matrices": (lambda: pf.flow("maf", input_dim=3, support="positive_definite"), (2, 2)),
    "angles": (lambda: pf.flow("ncsf", input_dim=2), (2,)),
    "directions": (lambda: pf.flow("sphere", input_dim=2), (3,)),
    "images": (lambda: pf.flow("glow", input_dim=(1, 4, 4), steps=1), (1, 4, 4)),
    "mixture": (lambda: pf.distributions.mixture(3, flow="maf"), (3,)),
    "context": (lambda: pf.flow("nsf", input_dim=3, context_dim=2), (3,)),
}


def at(flow):
    return flow(torch.zeros(flow.context_dim)) if flow.context_dim else flow()


@pytest.fixture(params=FLOWS)
def flow_and_shape(request):
    build, shape = FLOWS[request.param]
    torch.manual_seed(0)
    flow = build()
    assert flow.data_shape == shape
    return flow, shape


@pytest.mark.parametrize("validate", [True, False])
def test_shapes(flow_and_shape, validate):
    flow, shape = flow_and_shape
    with pyro.validation_enabled(validate):
        d = at(flow)
        for wrong in ((5, *shape[:-1], shape[-1] + 1), (7,), (), (5, 1)):
            if wrong[-len(shape) :] == shape:
                continue
            with pytest.raises(ShapeError, match=r"expected points of shape \[\*batch, .*got \(") as caught:
                d.log_prob(torch.full(wrong, 0.5))
            assert ", ".join(map(str, ("*batch", *shape))) in str(caught.value)
            t = flow.transform.condition(torch.zeros(2)) if flow.context_dim else flow.transform
            with pytest.raises(ShapeError):
                t.inverse_and_log_det(torch.full(wrong, 0.5))
        base = flow.base().event_shape
        for wrong in ((5, *base[:-1], base[-1] + 1), ()):
            with pytest.raises(ShapeError):
                t.forward_and_log_det(torch.full(wrong, 0.5))


def test_dtypes(flow_and_shape):
    flow, _ = flow_and_shape
    x = at(flow).sample((4,))
    with pyro.validation_enabled(False):
        d = at(flow)
        with pytest.raises(DtypeError, match=r"float32 and x is float64: x.float\(\), or flow.double\(\)\."):
            d.log_prob(x.double())
        with pytest.raises(DtypeError, match="ndarray"):
            d.log_prob(np.zeros((4, 3)))
        before = d.log_prob(x.clone())
        after = at(flow.double()).log_prob(x.double())
    assert (before.dtype, after.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(before, after.float(), rtol=1e-4, atol=1e-4)


def test_what_is_no_real_number(flow_and_shape):
    flow, shape = flow_and_shape
    with pytest.raises(DtypeError, match="real numbers, got complex64"):
        at(flow).log_prob(torch.ones(4, *shape, dtype=torch.complex64))
    with pytest.raises(DtypeError, match="real numbers, got bool"):
        at(flow).log_prob(torch.ones(4, *shape, dtype=torch.bool))


@pytest.mark.parametrize("name", ["sphere", "ncsf", "nsf"])
def test_whole_numbers_are_points(name):
    flow = pf.flow(name, input_dim=2)
    x = torch.tensor([1, 0, 0] if name == "sphere" else [1, 0])
    assert torch.equal(flow().log_prob(x), flow().log_prob(x.float()))


def test_fewer_digits_are_taken():
    flow = pf.flow("nsf", input_dim=2)
    assert flow().log_prob(torch.zeros(3, 2).bfloat16()).dtype == torch.float32
    assert flow().log_prob(torch.zeros(3, 2, dtype=torch.long)).dtype == torch.float32
    assert flow.double()().log_prob(torch.zeros(3, 2)).dtype == torch.float64


def test_batches():
    d = pf.flow("nsf", input_dim=3, context_dim=2)(torch.zeros(6, 2))
    for shape in ((5, 3), (6, 5, 3), (2, 4, 5, 3)):
        with pytest.raises(ShapeError, match=r"\(6,\)"):
            d.log_prob(torch.zeros(shape))
    for shape, batch in (((3,), (6,)), ((6, 3), (6,)), ((1, 3), (6,)), ((4, 6, 3), (4, 6)), ((4, 1, 3), (4, 6))):
        assert d.log_prob(torch.zeros(shape)).shape == batch
    with pytest.raises(ShapeError):
        pf.flow("nsf", input_dim=3)().expand((2, 6)).log_prob(torch.zeros(5, 3))


def test_contexts():
    for flow in (pf.flow("maf", input_dim=3, context_dim=2), pf.distributions.mixture(3, context_dim=2, flow="maf")):
        with pytest.raises(DtypeError, match=r"context is float64: context.float\(\), or flow.double\(\)"):
            flow(torch.zeros(6, 2).double())
        for wrong in (torch.zeros(6, 3), torch.zeros(())):
            with pytest.raises(ContextError, match=r"\[\*batch, 2\]"):
                flow(wrong)
        with pytest.raises(ContextError, match=r"list: give torch.as_tensor"):
            flow([[0.0, 1.0]])


def test_the_standardiser_alone():
    layer = Standardize((2, 3))
    for call in (layer, layer.inv):
        with pytest.raises(ShapeError, match=r"\[\*batch, 2, 3\], got \(5, 3\)"):
            call(torch.zeros(5, 3))
        with pytest.raises(DtypeError):
            call(torch.zeros(5, 2, 3).double())
    numbers = Standardize(())
    numbers.set(torch.tensor(1.0), torch.tensor(2.0))
    y, log_det = numbers.forward_and_log_det(torch.zeros(4))
    assert y.tolist() == [1.0] * 4
    assert log_det.tolist() == pytest.approx([math.log(2)] * 4)


def test_starting_values_need_points(flow_and_shape):
    flow, shape = flow_and_shape
    context = torch.zeros(5, 2) if flow.context_dim else None
    flow.initialize(at(flow).sample((5,)), context)
    with pytest.raises(ShapeError):
        flow.initialize(torch.zeros(5, *shape[:-1], shape[-1] + 1), context)


def test_a_flow_of_double_parts_is_double():
    for context_dim in (0, 3):
        part = pf.transforms.coupling(2, "affine", context_dim=context_dim).double()
        flow = pf.distributions.Flow(part, pf.distributions.standard_normal(2).double())
        q = flow(torch.zeros(5, 3, dtype=torch.float64)) if context_dim else flow()
        assert q.sample((3,)).dtype == torch.float64
        assert q.log_prob(torch.zeros(5, 2, dtype=torch.float64)).dtype == torch.float64


def test_a_mixture_of_double_flows_reads_double_contexts():
    parts = [pf.flow("realnvp", input_dim=2, context_dim=3, hidden_dims=(8,)).double() for _ in range(2)]
    mixed = pf.distributions.Mixture(parts).double()
    again = pf.distributions.Mixture(parts)
    assert again.context_loc.dtype == again.standardize.loc.dtype == torch.float64
    context = torch.zeros(5, 3, dtype=torch.float64)
    assert mixed(context).log_prob(torch.zeros(5, 2, dtype=torch.float64)).dtype == torch.float64
