import logging

import pytest
import torch

from flashlab.attention import (
    BackendUnavailable,
    attention,
    attention_packed,
    attention_qkvpacked,
    attention_with_kvcache,
    interface,
    resolve,
)
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
        (qkv(dtypes=(torch.float32, torch.float32, torch.bfloat16)), r"share one of float16, .* got torch.float32"),
        (qkv(dtypes=(torch.int64,) * 3), r"share one of float16, bfloat16, float32, float64; got torch.int64"),
        (qkv(dtypes=(torch.float8_e4m3fn,) * 3), r"share one of float16, .*; got torch.float8_e4m3fn"),
        (qkv(q=(2, 8, 4, 0), k=(2, 8, 4, 0)), r"no dimension may be 0"),
        ([torch.tensor(1.0)] * 3, r"must be tensors with dimensions; got torch.float32 \(\)"),
        ([None] * 3, r"must be tensors with dimensions; got None"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": (-2, 0)}, r"window_size must be two whole numbers from -1"),
        ({"window_size": (1.5, 0)}, r"window_size must be two whole numbers from -1"),
        ({"window_size": 4}, r"window_size must be two whole numbers from -1"),
        ({"window_size": (1, 2, 3)}, r"window_size must be two whole numbers from -1"),
        ({"window_size": (4.0, 0)}, r"window_size must be two whole numbers from -1"),
        ({"softcap": -1.0}, r"softcap must be a number from 0 \(none\) on; got -1"),
        ({"softcap": float("nan")}, r"softcap must be a number from 0"),
        ({"softcap": float("inf")}, r"softcap must be a number from 0"),
        ({"softcap": None}, r"softcap must be a number from 0"),
        ({"causal": "no"}, r"causal must be True or False; got 'no'"),
        ({"deterministic": 1}, r"deterministic must be True or False; got 1"),
        ({"alibi_slopes": [1.0]}, r"alibi_slopes must be a tensor; got \[1.0\]"),
        (
            {"alibi_slopes": torch.ones(3)},
            r"alibi_slopes must be torch.float32 \(4,\) or \(2, 4\) on cpu; got .*3",
        ),
        ({"alibi_slopes": torch.ones(4).half()}, r"alibi_slopes must be torch.float32 .* got torch.float16"),
        ({"block_mask": torch.ones(2, 2) > 0}, r"block_mask must be torch.bool \(1, 1\) on cpu; got .*\(2, 2\)"),
        ({"block_mask": torch.ones(1, 1)}, r"block_mask must be torch.bool"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*qkv(), **options)


def packed(ends_q=(0, 3, 8), ends_k=(0, 3, 8), longest=5, dtype=torch.int32):
    rows = torch.zeros(8, 4, 16)
    return rows, rows, rows, torch.tensor(ends_q, dtype=dtype), torch.tensor(ends_k, dtype=dtype), longest, 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (packed(dtype=torch.int64), r"cu_seqlens_q must be torch.int32 on cpu; got torch.int64"),
        (packed(ends_k=(0, 8)), r"must both be \[sequences \+ 1\]; got \(3,\) and \(2,\)"),
        (packed(ends_q=(0, 3, 7)), r"cu_seqlens_q must rise from 0 to the 8 rows of q .* got \[0, 3, 7\]"),
        (packed(ends_q=(0, 9, 8)), r"cu_seqlens_q must rise from 0"),
        (packed(longest=4), r"in steps of at most max_seqlen_q = 4"),
        ((*qkv(), *packed()[3:]), r"q, k and v must be \[rows, heads, head_dim\]"),
    ],
)
def test_packed_sequences_that_do_not_fit_are_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_packed(*arguments)


def caches(filled=0, new=1, places=8, **changes):
    q = torch.zeros(2, 1, 4, 16)
    k_cache, v_cache = torch.zeros(2, places, 4, 16), torch.zeros(2, places, 4, 16)
    added = {"k": torch.zeros(2, new, 4, 16), "v": torch.zeros(2, new, 4, 16)} | changes
    return (q, k_cache, v_cache, filled), added


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (caches(filled=8), r"the cache has 8 places; 8 filled and 1 new do not fit"),
        (caches(filled=torch.tensor([0, 7], dtype=torch.int32), new=2), r"the cache has 8 places; 7 filled and 2 new"),
        (caches(filled=torch.tensor([0, 7])), r"cache_seqlens must be .* torch.int32 \(2,\) on cpu; got torch.int64"),
        (caches(filled=torch.tensor([-2, 3], dtype=torch.int32)), r"cache_seqlens must be 0 or more; got -2"),
        (caches(filled=-2), r"cache_seqlens must be 0 or more; got -2"),
        (caches(filled=2.0), r"cache_seqlens must be a whole number or torch.int32 \(2,\) on cpu; got 2.0"),
        (caches(v=None), r"give both or neither"),
        (caches(k=torch.zeros(2, 1, 4, 8)), r"k and v must be torch.float32 \(2, 1, 4, 16\) like the cache"),
    ],
)
def test_a_cache_that_does_not_fit_is_one_clear_error_and_stays_as_it_was(call, message):
    arguments, added = call
    with pytest.raises(ValueError, match=message):
        attention_with_kvcache(*arguments, **added)
    assert not arguments[1].any()


def test_a_cache_gives_no_gradients():
    (q, *rest), added = caches()
    with pytest.raises(ValueError, match="call under torch"):
        attention_with_kvcache(q.requires_grad_(), *rest, **added)
    with pytest.raises(ValueError, match="call under torch"):
        attention_with_kvcache(q.detach(), *rest, **added | {"k": added["k"].requires_grad_()})


def test_under_autocast_the_cache_has_its_dtype():
    (q, k_cache, v_cache, filled), added = caches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_with_kvcache(q, k_cache.bfloat16(), v_cache.bfloat16(), filled, **added)
        with pytest.raises(ValueError, match="under autocast the cache must be of its dtype"):
            attention_with_kvcache(q, k_cache, v_cache, filled, **added)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["auto", "standard", "tiled", "sdpa_math", "sdpa_flash"])
def test_slopes_are_constants(backend):
    q, k, v = (torch.randn(2, 8, 4, 16, requires_grad=True) for _ in range(3))
    slopes = torch.ones(4, requires_grad=True)
    attention(q, k, v, backend=backend, alibi_slopes=slopes).sum().backward()
    assert q.grad is not None
    assert slopes.grad is None


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph_also_when_options_change(dynamic):
    torch._dynamo.reset()

    def layer(q, window, softcap):
        return attention(q, q, q, backend="standard", window_size=(window, 0), softcap=softcap)

    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
    for length, window, softcap in ((16, 3, 3.0), (20, 5, 5.0), (24, -1, 0.0)):
        q = torch.randn(2, length, 4, 16)
        assert torch.allclose(compiled(q, window, softcap), layer(q, window, softcap), atol=1e-6)


def test_a_new_table_is_followed_at_once(monkeypatch):
    q = qkv()
    attention(*q)
    monkeypatch.setattr(interface.auto, "choose", lambda spec: interface.auto.Choice("standard", "a new table", ()))
    ran = []
    monkeypatch.setitem(BACKENDS, "standard", Backend(lambda *call: ran.append(call) or call[0], lambda spec: None))
    attention(*q)
    assert not ran
    interface.auto.forget()
    attention(*q)
    assert ran
    interface.auto.forget()


def test_backends_without_a_layout_refuse_it(make_spec):
    with pytest.raises(BackendUnavailable, match="it has no form for packed sequences"):
        attention_packed(*packed(), backend="sdpa_math")
    assert resolve("auto", make_spec(layout="packed")) in BACKENDS


@pytest.mark.parametrize("shape", [(2, 8, 4, 16), (2, 8, 2, 4, 16)], ids=str)
def test_one_tensor_that_is_not_of_three_is_refused(shape):
    with pytest.raises(ValueError, match=r"qkv must be of shape \[B, S, 3, H, D\]; got torch.float32 \(2, 8, "):
        attention_qkvpacked(torch.randn(shape))
