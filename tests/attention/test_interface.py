import logging

import pytest
import torch

from flashlab.attention import BackendUnavailable, attention, interface, resolve
from flashlab.attention.backends import BACKENDS, Backend, why_not
from flashlab.errors import UserError


def qkv(q=(2, 8, 4, 16), k=(2, 8, 4, 16), v=None, dtypes=(torch.float32,) * 3, devices=("cpu",) * 3):
    return [
        torch.zeros(shape, dtype=dtype, device=device)
        for shape, dtype, device in zip((q, k, v or k), dtypes, devices, strict=True)
    ]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (qkv(q=(2, 8, 64)), r"must be \[batch, seqlen, heads, head_dim\]; got q \(2, 8, 64\)"),
        (qkv(v=(2, 9, 4, 16)), r"k and v must have the same shape; got k \(2, 8, 4, 16\), v \(2, 9, 4, 16\)"),
        (qkv(k=(3, 8, 4, 16)), r"q and k must agree in batch and head_dim"),
        (qkv(k=(2, 8, 4, 32)), r"q and k must agree in batch and head_dim"),
        (qkv(q=(2, 0, 4, 16)), r"no dimension may be 0"),
        (qkv(k=(2, 0, 4, 16)), r"no dimension may be 0"),
        (qkv(k=(2, 8, 3, 16)), r"must divide the query heads; got 4 query heads, 3 key/value heads"),
        (qkv(k=(2, 8, 8, 16)), r"must divide the query heads; got 4 query heads, 8 key/value heads"),
        (qkv(dtypes=(torch.float32, torch.float32, torch.bfloat16)), r"share one floating-point dtype; got torch.fl"),
        (qkv(dtypes=(torch.int64,) * 3), r"share one floating-point dtype; got torch.int64"),
        (qkv(devices=("cpu", "meta", "meta")), r"must be on one device; got cpu, meta, meta"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "standard", "sdpa_flash"])
def test_tensors_that_do_not_fit_together_are_one_clear_error(tensors, message, backend):
    with pytest.raises(ValueError, match=message) as raised:
        attention(*tensors, backend=backend)
    assert "\n" not in str(raised.value)


def test_unknown_backend_suggests_the_nearest():
    with pytest.raises(UserError, match="no attention backend 'flash_atention2'; did you mean 'flash_attention_2'"):
        attention(*qkv(), backend="flash_atention2")


@pytest.mark.parametrize("backend", ["sdpa_efficient", "sdpa_cudnn", "flash_attention_2"])
def test_named_backend_that_cannot_run_raises_its_reason(backend, make_spec):
    reason = BACKENDS[backend].why_not(make_spec())
    assert reason
    with pytest.raises(BackendUnavailable) as raised:
        attention(*qkv(), backend=backend)
    assert str(raised.value) == f"attention backend {backend!r} cannot run this call: {reason}"


def test_a_refusal_is_about_the_call_not_the_backend(monkeypatch):
    refuse_long = Backend(BACKENDS["standard"].run, lambda spec: "too long" if spec.seqlen_q > 8 else None)
    monkeypatch.setitem(BACKENDS, "short_only", refuse_long)
    attention(*qkv(), backend="short_only")
    with pytest.raises(BackendUnavailable, match="too long"):
        attention(*qkv(q=(2, 9, 4, 16)), backend="short_only")


def test_auto_takes_the_first_that_runs_and_says_so_once(monkeypatch, make_spec, caplog):
    interface._announce.cache_clear()
    row = BACKENDS["standard"]
    monkeypatch.setitem(BACKENDS, "flash_attention_2", Backend(row.run, lambda spec: "not installed"))
    monkeypatch.setitem(BACKENDS, "sdpa_flash", Backend(row.run, lambda spec: None))
    with caplog.at_level(logging.INFO, logger="flashlab.attention"):
        for seqlen in (16, 32):
            assert resolve("auto", make_spec(device=torch.device("cuda"), seqlen_q=seqlen)) == "sdpa_flash"
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("attention backend: auto chose sdpa_flash on cuda (")
    assert "; not flash_attention_2: not installed" in said


def test_auto_on_the_cpu_is_a_flash_kernel(make_spec):
    assert resolve("auto", make_spec(device=torch.device("cpu"), causal=True)) == "sdpa_flash"


def test_a_call_is_checked_and_resolved_once(monkeypatch):
    asked = []
    monkeypatch.setitem(BACKENDS, "counted", Backend(BACKENDS["standard"].run, asked.append))
    for _ in range(3):
        attention(*qkv(), backend="counted")
    assert len(asked) == 1
    assert not asked[0].needs_grad
    attention(*(x.requires_grad_() for x in qkv()), backend="counted")
    assert asked[1].needs_grad


@pytest.mark.parametrize("backend", ["auto", "standard", "sdpa_math", "sdpa_flash"])
def test_autocast_casts_the_inputs(backend):
    q, k, v = (torch.randn(2, 8, 4, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v.bfloat16(), backend=backend, causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), attention(q, k, v, causal=True), atol=0.05)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_into_one_graph_also_when_lengths_change(backend, device, make_spec, skip_unless_runs):
    if backend != "auto":
        skip_unless_runs(backend, needs_grad=True, causal=True)
    torch._dynamo.reset()

    def layer(q, k, v):
        return attention(q * 2, k, v, backend=backend, causal=True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seqlen_q, seqlen_k in ((16, 16), (24, 24), (40, 24), (5, 24)):
        spec = make_spec(device=device, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=True, needs_grad=True)
        if backend != "auto" and why_not(backend, spec) is not None:
            continue
        q = torch.randn(2, seqlen_q, 4, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(2, seqlen_k, 4, 32, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = compiled(q, k, v)
        assert torch.allclose(out, layer(q, k, v), atol=0.02)
        out.sum().backward()
