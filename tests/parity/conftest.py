"""What the runs beside the frameworks share."""

import pytest


@pytest.fixture
def double():
    """Double precision in torch, its counters included."""
    import torch  # here, so that Keras runs without it

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
