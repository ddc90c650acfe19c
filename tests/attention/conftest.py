import pytest
import torch

from flashlab.attention import AttentionSpec
from flashlab.attention.backends import why_not


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def make_spec():
    def make(**changes):
        spec = {"batch_size": 2, "seqlen_q": 16, "seqlen_k": 16, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32}
        spec |= {"dtype": torch.bfloat16, "device": torch.device("cpu")}
        return AttentionSpec(**spec | changes)

    return make


@pytest.fixture
def skip_unless_runs(device, make_spec):
    """Skip, with the backend's own reason, what it refuses on this device."""

    def skip(backend, **changes):
        if (reason := why_not(backend, make_spec(device=device, **changes))) is not None:
            pytest.skip(f"{backend} on {device}: {reason}")

    return skip
