import sys
from types import ModuleType

import pytest
import torch

from flashlab.attention import flash, flash4, reference
from flashlab.attention.spec import Options


@pytest.fixture
def flash_attn_package(tmp_path, monkeypatch):
    """Stand in for an installed flash-attn whose files are given."""
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    flash.import_problem.cache_clear()

    def install(**files):
        (tmp_path / "flash_attn").mkdir()
        for name, text in {"__init__": "", **files}.items():
            (tmp_path / "flash_attn" / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    flash.import_problem.cache_clear()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "it needs a CUDA device; the inputs are on cpu"),
        ({"dtype": torch.float32}, "it computes in float16 or bfloat16 only; the inputs are float32"),
        ({"head_dim": 264}, "it takes head_dim up to 256; got 264"),
        ({"head_dim": 12}, "it takes head_dim in multiples of 8; got 12"),
    ],
)
def test_refuses_with_a_reason(changes, reason, make_spec):
    assert flash.why_not(2, make_spec(**{"device": torch.device("cuda")} | changes)) == reason


def test_flash_attention_4_alone_is_not_flash_attention_2(flash_attn_package, make_spec):
    flash_attn_package(cute="")
    assert "flash-attn 2 is not installed" in flash.why_not(2, make_spec(device=torch.device("cuda")))


def test_an_abi_mismatch_is_named(flash_attn_package, make_spec):
    flash_attn_package(flash_attn_interface="raise ImportError('undefined symbol: _ZN3c105Error')")
    reason = flash.why_not(2, make_spec(device=torch.device("cuda")))
    assert f"does not load with torch {torch.__version__}: undefined symbol: _ZN3c105Error" in reason
    assert "flashlab doctor" in reason


def test_a_missing_extension_is_named(flash_attn_package, make_spec):
    flash_attn_package(flash_attn_interface="import flash_attn_2_cuda_missing")
    reason = flash.why_not(2, make_spec(device=torch.device("cuda")))
    assert "flash-attn 2 lacks its module flash_attn_2_cuda_missing" in reason


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        (2, (7, 5), "it needs an Ampere GPU or newer (compute capability 8.0); this one has 7.5"),
        (2, (9, 0), None),
        (3, (8, 0), "it needs a Hopper GPU or newer (compute capability 9.0); this one has 8.0"),
        (3, (9, 0), None),
        (3, (10, 0), "it is made for Hopper alone (compute capability 9.0); this one has 10.0"),
        (4, (8, 9), "it needs a Hopper GPU or newer (compute capability 9.0); this one has 8.9"),
        (4, (10, 0), None),
    ],
)
def test_each_version_has_its_gpus(version, capability, reason, make_spec, monkeypatch):
    monkeypatch.setattr(flash, "import_problem", lambda version: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert flash.why_not(version, make_spec(device=torch.device("cuda"))) == reason


def _weights(q, k, softmax_scale):
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(dim=-1)


def _forward(q, k, v, *, softmax_scale, causal, **_):
    assert causal
    out = torch.einsum("bhij,bjhd->bihd", _weights(q, k, softmax_scale), v).contiguous()
    return out, out.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def _backward(q, k, v, out, grad_out, lse, softmax_scale, causal, softcap, *, dq, dk, dv, **_):
    weights = _weights(q, k, softmax_scale)
    grad = torch.einsum("bihd,bjhd->bhij", grad_out, v)
    grad = weights * (grad - (weights * grad).sum(dim=-1, keepdim=True)) * softmax_scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", grad, k))
    dk.copy_(torch.einsum("bhij,bihd->bjhd", grad, q))
    dv.copy_(torch.einsum("bhij,bihd->bjhd", weights, grad_out))


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_flash_attention_4_as_an_operator_of_torch(packed, compiled, monkeypatch):
    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _forward, _backward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch._dynamo.reset()
    options = Options(0.2, causal=True)

    def run(qkv):
        if packed:
            return flash4.attention_qkvpacked(qkv * 2, options)
        return flash4.attention(*(qkv * 2).unbind(2), options)

    qkv = torch.randn(2, 24, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    out = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(qkv)
    expected = reference.attention(*(qkv * 2).unbind(2), options)
    torch.testing.assert_close(out, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(x.square().sum(), qkv) for x in (out, expected))
    torch.testing.assert_close(grad, expected_grad)
