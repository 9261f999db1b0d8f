"""What every test starts from, and leaves behind."""

import pyro
import pytest
import torch

# Two workers share two cores; a second thread for each only makes them wait for one another.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _as_found():
    """Random numbers are fixed; the parameter store, the default dtype and validation are restored."""
    dtype, settings = torch.get_default_dtype(), pyro.settings.get()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    pyro.settings.set(**settings)
