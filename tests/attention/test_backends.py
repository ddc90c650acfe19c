"""Every row of the table against float64 standard attention; a new row is tested without a change here."""

import pytest
import torch

from flashlab.attention import attention, attention_packed, attention_qkvpacked, attention_with_kvcache
from flashlab.attention.backends import BACKENDS, why_not
from flashlab.attention.reference import allowed_error

# (seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, options)
CASES = {
    "full": (33, 33, 4, 4, 32, {}),
    "cross": (17, 70, 4, 4, 64, {}),
    "causal": (129, 129, 4, 4, 32, {"causal": True}),
    "causal, more keys": (7, 65, 4, 4, 32, {"causal": True}),
    "causal, more queries": (65, 7, 4, 4, 32, {"causal": True}),
    "causal, one query": (1, 50, 4, 4, 64, {"causal": True}),
    "causal, one key": (5, 1, 4, 4, 32, {"causal": True}),
    "grouped heads": (33, 33, 6, 2, 32, {"causal": True}),
    "grouped heads, more keys": (9, 33, 6, 2, 32, {"causal": True}),
    "one key/value head": (33, 33, 4, 1, 40, {}),
    "softmax scale": (33, 33, 4, 4, 32, {"causal": True, "softmax_scale": 0.05}),
    "small heads": (64, 64, 8, 8, 8, {"causal": True}),
    "window": (70, 70, 4, 4, 32, {"window_size": (9, 5)}),
    "window, causal": (40, 70, 4, 2, 32, {"window_size": (9, -1), "causal": True}),
    "window to the right": (70, 20, 4, 4, 32, {"window_size": (-1, 3)}),
    "window of one": (33, 33, 4, 4, 32, {"window_size": (0, 0)}),
    "soft cap": (33, 65, 4, 4, 32, {"softcap": 2.0, "causal": True}),
    "ALiBi": (33, 65, 4, 4, 32, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}),
    "ALiBi by sequence": (33, 65, 2, 1, 32, {"alibi_slopes": torch.tensor([[0.5, 0.1], [1.0, 0.0]]), "causal": True}),
    "block mask": (300, 400, 2, 1, 32, {"block_mask": torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]) > 0}),
    "block mask, causal": (300, 260, 2, 2, 32, {"block_mask": torch.eye(3) > 0, "causal": True}),
    "deterministic": (70, 70, 4, 2, 32, {"deterministic": True, "causal": True}),
}


def features(options):
    """Say what of the options a spec holds."""
    kept = {name: options[name] for name in ("causal", "window_size", "deterministic") if name in options}
    names = {"softcap": "softcap", "alibi_slopes": "alibi", "block_mask": "block_sparse"}
    return kept | {feature: name in options for name, feature in names.items()}


def run(backend, tensors, grad_out, **options):
    """Return out, dq, dk and dv."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
    out = attention(q, k, v, backend=backend, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def inputs(seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, dtype, device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, seqlen_q, num_heads, head_dim), *[(2, seqlen_k, num_kv_heads, head_dim)] * 2]
    *tensors, grad_out = (torch.randn(shape, generator=generator).to(device, dtype) for shape in [*shapes, shapes[0]])
    return tensors, grad_out


def longest(x):
    return float(x.norm(dim=-1).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_as_close_as_standard_attention_twice(backend, case, dtype, device, skip_unless_runs):
    seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, options = CASES[case]
    names = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    skip_unless_runs(backend, **names, head_dim=head_dim, dtype=dtype, needs_grad=True, **features(options))
    tensors, grad_out = inputs(seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, dtype, device)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}

    got = run(backend, tensors, grad_out, **options)
    standard = run("standard", tensors, grad_out, **options)
    exact = run("standard", [x.double() for x in tensors], grad_out.double(), **options)

    (q, k, v), scale = tensors, options.get("softmax_scale", head_dim**-0.5)
    largest_product = max(scale * longest(q) * longest(k), longest(grad_out) * longest(v))
    for name, x, low, ref in zip(("out", "dq", "dk", "dv"), got, standard, exact, strict=True):
        error = float((x.double() - ref).abs().max())
        assert x.dtype == dtype
        assert x.shape == ref.shape
        allowed = allowed_error(low, ref, largest_product)
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"  # NaN fails too


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_future_does_not_reach_the_past(backend, device, skip_unless_runs):
    if backend != "auto":
        skip_unless_runs(backend, seqlen_q=48, seqlen_k=48, causal=True)
    (q, k, v), _ = inputs(48, 48, 4, 4, 32, torch.bfloat16, device)
    before = attention(q, k, v, backend=backend, causal=True)
    for x in (q, k, v):
        x[:, 20:] = 100 * torch.randn_like(x[:, 20:])
    after = attention(q, k, v, backend=backend, causal=True)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend, device, skip_unless_runs):
    skip_unless_runs(backend)
    packed = torch.randn(2, 16, 3, 4, 32, device=device, dtype=torch.bfloat16)
    q, k, v = packed.unbind(dim=2)  # strided, head dimension contiguous
    crossed = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]  # head dimension strided
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
    assert torch.equal(attention(q, k, v, backend=backend), expected)
    assert torch.equal(attention(*crossed, backend=backend), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_of_queries_keys_and_values_is_as_three(backend, compiled, device, skip_unless_runs):
    options = {"causal": True, "window_size": (20, 0)}
    skip_unless_runs(backend, seqlen_q=48, seqlen_k=48, needs_grad=True, **features(options))
    torch._dynamo.reset()

    def packed(qkv):
        return attention_qkvpacked(qkv, backend=backend, softmax_scale=0.2, **options)

    run_packed = torch.compile(packed, fullgraph=True, backend="aot_eager") if compiled else packed
    qkv = torch.randn(2, 48, 3, 4, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad_out = torch.randn(2, 48, 4, 32, device=device, dtype=torch.bfloat16)
    expected = attention(*qkv.unbind(2), backend=backend, softmax_scale=0.2, **options)
    out = run_packed(qkv)
    # Of FlexAttention this compiler makes plain operators, not the kernel that runs without one.
    same_kernel = not (compiled and backend == "flex_attention")
    assert torch.equal(out, expected) if same_kernel else torch.allclose(out, expected, atol=0.02)
    (grad,), (expected_grad,) = (torch.autograd.grad(x, qkv, grad_out) for x in (out, expected))
    assert torch.allclose(grad, expected_grad, atol=0.02)  # some kernels add up in an order of chance


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("sdpa_")])
def test_the_named_kernel_runs_and_no_other(backend, device, skip_unless_runs):
    skip_unless_runs(backend, needs_grad=True, causal=True)
    tensors, grad_out = inputs(16, 16, 4, 4, 32, torch.bfloat16, device)
    with torch.profiler.profile() as profile:
        run(backend, tensors, grad_out, causal=True)
    dispatched = {event.key for event in profile.key_averages() if event.key.startswith("aten::_scaled_dot_product")}
    kernels = {kernel for kernel in ("math", "efficient", "flash", "cudnn") for key in dispatched if kernel in key}
    assert kernels == {backend.removeprefix("sdpa_")}


def test_on_the_cpu_torch_has_two_kernels(make_spec):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        spec = make_spec(dtype=dtype, needs_grad=True)
        runs = {name for name in BACKENDS if why_not(name, spec) is None}
        assert runs >= {"standard", "sdpa_math", "sdpa_flash"}
        assert not runs & {"sdpa_efficient", "sdpa_cudnn", "flash_attention_2"}


PACKED = {"queries": [5, 1, 0, 130], "keys": [5, 40, 3, 129]}


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": (4, -1)}, {"softcap": 2.0}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_do_not_see_each_other(backend, options, device, skip_unless_runs):
    skip_unless_runs(backend, layout="packed", needs_grad=True, num_kv_heads=2, **features(options))
    lengths_q, lengths_k = PACKED["queries"], PACKED["keys"]
    (q, _, _), grad_out = inputs(sum(lengths_q), 1, 4, 2, 32, torch.bfloat16, device)
    (_, k, v), _ = inputs(1, sum(lengths_k), 4, 2, 32, torch.bfloat16, device)
    q, k, v = (x[0].requires_grad_() for x in (q, k, v))
    ends = [torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    out = attention_packed(q, k, v, *ends, max(lengths_q), max(lengths_k), backend=backend, **options)
    got = out, *torch.autograd.grad(out, (q, k, v), grad_out[0])

    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    alone = [
        attention(*(x[None] for x in part), backend="standard", **options)[0] if len(part[0]) else part[0]
        for part in parts
    ]
    expected = torch.cat(alone), *torch.autograd.grad(torch.cat(alone), (q, k, v), grad_out[0].double())
    for x, y in zip(got, expected, strict=True):
        assert torch.allclose(x.double(), y, atol=0.02 * float(y.abs().max()))


@pytest.mark.parametrize(
    "options", [{}, {"window_size": (9, -1)}, {"softcap": 2.0}, {"alibi_slopes": [0.5, 0.1, 0.0, 1]}]
)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_with_a_cache_is_the_last_rows_of_the_whole(backend, new, options, device, skip_unless_runs):
    skip_unless_runs(
        backend, layout="cache", seqlen_q=new, seqlen_k=64, num_kv_heads=2, causal=True, **features(options)
    )
    if "alibi_slopes" in options:
        options = {"alibi_slopes": torch.tensor(options["alibi_slopes"], device=device)}
    (q, k, v), _ = inputs(40, 40, 4, 2, 32, torch.bfloat16, device)
    nan = float("nan")  # what was never written must not be read
    k_cache, v_cache = (torch.full((2, 64, 2, 32), nan, device=device, dtype=torch.bfloat16) for _ in range(2))
    filled = torch.tensor([17, 37 - new], device=device, dtype=torch.int32)
    for b, n in enumerate(filled.tolist()):
        k_cache[b, :n], v_cache[b, :n] = k[b, :n], v[b, :n]
    at = [slice(n, n + new) for n in filled.tolist()]
    q_new, k_new, v_new = (torch.stack([x[b, at[b]] for b in range(2)]) for x in (q, k, v))
    out = attention_with_kvcache(q_new, k_cache, v_cache, filled, k=k_new, v=v_new, backend=backend, **options)
    whole = attention(q.double(), k.double(), v.double(), backend="standard", causal=True, **options)
    expected = torch.stack([whole[b, at[b]] for b in range(2)])
    assert torch.allclose(out.double(), expected, atol=0.02 * float(expected.abs().max()))
    for b, n in enumerate(filled.tolist()):
        assert torch.equal(k_cache[b, : n + new], k[b, : n + new])
        assert torch.equal(v_cache[b, : n + new], v[b, : n + new])
        assert k_cache[b, n + new :].isnan().all()
