"""Importing changes nothing and costs little; the names that are promised exist."""

import subprocess
import sys
import textwrap

import pytest

import pyroflows as pf


def fresh(code):
    """What a new interpreter prints for some code."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout.split()


def test_import_is_lazy():
    loaded = fresh("""
        import sys
        import pyroflows
        print(*[name for name in ("torch", "pyro", "arviz", "matplotlib", "scipy", "numpy") if name in sys.modules])
        """)
    assert loaded == []


def test_every_public_name_exists_without_arviz_or_torchdiffeq():
    heavy = fresh("""
        import sys
        import pyroflows as pf
        for name in pf.__all__:
            getattr(pf, name)
        assert sorted(set(pf.__all__) - set(dir(pf))) == []
        print(*[name for name in ("arviz", "matplotlib", "torchdiffeq", "pytest", "hypothesis", "typer")
                if name in sys.modules])
        """)
    assert heavy == []


def test_import_changes_no_global():
    fresh("""
        import torch, pyro, warnings, random
        import numpy as np
        import pyro.distributions as dist
        from torch.distributions import Distribution, Transform, constraints, biject_to

        def state():
            return (
                Distribution._validate_args,
                torch.get_default_dtype(),
                torch.is_grad_enabled(),
                torch.get_num_threads(),
                torch.initial_seed(),
                torch.random.get_rng_state().tolist(),
                random.getstate(),
                np.random.get_state()[1].tolist(),
                list(warnings.filters),
                sorted(vars(Transform)),
                # Of constraints that are not our own, which nobody else can mean.
                sorted(str(kind) for kind in biject_to._registry if not kind.__module__.startswith("pyroflows")),
                pyro.settings.get(),
                dict(pyro.get_param_store()),
            )

        before = state()
        import pyroflows as pf
        for name in pf.__all__:
            getattr(pf, name)
        pf.flow("nsf", input_dim=2)
        after = state()
        assert before[:5] == after[:5] and before[6:] == after[6:]  # building a flow draws its weights
        try:
            dist.Normal(0.0, -1.0)
        except ValueError:
            pass
        else:
            raise AssertionError("validation was switched off")
        """)


def test_importing_every_module_leaves_the_generator_alone():
    fresh("""
        import torch
        before = torch.random.get_rng_state()
        import pyroflows as pf
        for name in pf.__all__:
            getattr(pf, name)
        assert torch.equal(before, torch.random.get_rng_state())
        """)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        pf.nope  # noqa: B018


def test_every_name_in_all_is_documented():
    for package in ("transforms", "distributions", "guides", "training", "diagnostics", "plugins", "archive", "errors"):
        module = getattr(pf, package)
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and getattr(thing, "__module__", "").startswith("pyroflows"):  # Pyro documents its own
                assert thing.__doc__, f"{package}.{name}"
