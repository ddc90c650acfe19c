"""Every row of the table against float64 standard attention; a new row is tested without a change here."""

import pytest
import torch

from flashlab.attention import attention
from flashlab.attention.backends import AUTO_ORDER, BACKENDS
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
}


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
    causal = options.get("causal", False)
    skip_unless_runs(backend, **names, head_dim=head_dim, dtype=dtype, needs_grad=True, causal=causal)
    tensors, grad_out = inputs(seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, dtype, device)

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
        runs = {name for name, backend in BACKENDS.items() if backend.why_not(spec) is None}
        assert runs >= {"standard", "sdpa_math", "sdpa_flash"}
        assert not runs & {"sdpa_efficient", "sdpa_cudnn", "flash_attention_2"}


def test_auto_knows_only_backends_of_the_table_and_always_ends_on_one_that_runs_everywhere():
    for order in AUTO_ORDER.values():
        assert set(order) <= set(BACKENDS)
        assert order[-1] == "sdpa_math"
