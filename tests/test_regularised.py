"""The record of solves; regularisers in the same solve, against closed forms, with three gradients."""

import threading

import pytest
import torch

import pyroflows as pf
from pyroflows.numerics import solve
from pyroflows.transforms import ContinuousTransform, continuous

DOUBLE = torch.float64


# --- the record ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "direct"])
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_a_record_counts_every_evaluation_of_both_passes(gradient, solver):
    calls = [0]

    def field(t, y):
        calls[0] += 1
        return torch.sin(y)

    x = torch.ones(3, 2, requires_grad=True)
    with pf.recorded() as record:
        for _ in range(2):
            x = solve(field, x, 0.0, 1.0, solver=solver, gradient=gradient).state
    assert (record.solves, record.nfe_forward, record.nfe_backward) == (2, calls[0], 0)
    x.sum().backward()
    assert record.nfe_forward + record.nfe_backward == calls[0]
    assert (record.nfe_backward > 0) == (gradient != "direct")
    solve(field, torch.ones(3, 2), 0.0, 1.0)
    assert record.solves == 2


def test_records_nest_and_belong_to_a_thread():
    def one():
        solve(lambda t, y: -y, torch.ones(1, 1), 0.0, 1.0)

    with pf.recorded() as outer:
        one()
        with pf.recorded() as inner:
            one()
            other = threading.Thread(target=one)
            other.start()
            other.join()
        with pytest.raises(RuntimeError, match="stop"), pf.recorded():
            raise RuntimeError("stop")
        one()
    one()
    assert (outer.solves, inner.solves) == (3, 1)
    assert outer.nfe_forward == 3 * inner.nfe_forward


def test_backward_in_another_thread_is_counted():
    with pf.recorded() as record:
        out = solve(lambda t, y: -y, torch.ones(1, 1, requires_grad=True), 0.0, 1.0).state.sum()
    other = threading.Thread(target=out.backward)
    other.start()
    other.join()
    assert record.nfe_backward > 0


def test_a_record_without_solves_is_empty():
    with pf.recorded() as record:
        ContinuousTransform(torch.nn.Identity(), 1)
        continuous(2)(torch.ones(0, 2))
    assert (record.solves, record.nfe_forward, record.penalties) == (0, 0, {})
    assert torch.equal(record.penalty(), torch.zeros(()))
