import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

from flashlab.errors import UserError
from flashlab.gpt2 import loss as module
from flashlab.gpt2.loss import IGNORED, linear_cross_entropy, resolve, why_not

TOKENS, WIDTH, VOCABULARY, PADDED = 96, 16, 500, 512


@pytest.fixture
def chunk(monkeypatch):
    """Make chunks of at most so many tokens."""

    def of(rows):
        monkeypatch.setitem(module.CHUNK, "cpu", rows * PADDED)
        monkeypatch.setattr(module, "COMPILED_CHUNK", rows * PADDED)

    return of


def inputs(dtype=torch.float64, device="cpu", tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    weight[VOCABULARY:] = 5  # would rule every softmax if it were not left out
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    targets[::7] = IGNORED
    return (*(part.to(device, dtype).requires_grad_() for part in (x, weight)), targets.to(device))


def results(x, weight, targets, method="auto", call=linear_cross_entropy):
    """Return the loss, and the gradients of three times it."""
    loss = call(x, weight, targets, VOCABULARY, method)
    return [loss, *torch.autograd.grad(3 * loss, (x, weight))]


def expected(x, weight, targets):
    x, weight = (part.detach().double().requires_grad_() for part in (x, weight))
    loss = F.cross_entropy(x @ weight[:VOCABULARY].T, targets)
    return [loss, *torch.autograd.grad(3 * loss, (x, weight))]


@pytest.mark.parametrize("rows", [1, 7, 32, 95, 96, 1000])
@pytest.mark.parametrize("method", ["auto", "chunked", "full"])
def test_loss_and_gradients_are_those_of_cross_entropy(method, rows, chunk):
    chunk(rows)
    for found, right in zip(results(*inputs(), method), expected(*inputs()), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


def errors(found, right):
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, right, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "inputs"])
def test_in_half_precision_it_is_as_exact_as_with_all_logits(dtype, whole, chunk):
    """Gradients of an average over 20,000 tokens are below what float16 can say; their sum's are not."""
    chunk(4096)
    x, weight, targets = inputs(dtype if whole else torch.float32, tokens=20_000)
    with torch.autocast("cpu", dtype, enabled=not whole):
        found, full = (results(x, weight, targets, method) for method in ("chunked", "full"))
    assert found[0].dtype == torch.float32
    assert [gradient.dtype for gradient in found[1:]] == [x.dtype, weight.dtype]
    right = expected(x, weight, targets)
    for error, error_of_full in zip(errors(found, right), errors(full, right), strict=True):
        assert error <= 2 * error_of_full + torch.finfo(dtype).eps


class Largest(TorchDispatchMode):
    """Remember the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(("method", "largest"), [("chunked", 12 * PADDED), ("full", TOKENS * PADDED)])
def test_logits_exist_for_a_chunk_at_a_time(method, largest, chunk):
    chunk(20)
    x, weight, targets = inputs(torch.float32)
    for forward in (results, torch.no_grad()(lambda *args: linear_cross_entropy(*args[:3], VOCABULARY, args[3]))):
        with Largest() as seen:
            forward(x, weight, targets, method)
        assert seen.numel == max(largest, weight.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_one_graph_that_computes_no_logit_twice(dtype, chunk):
    chunk(25)
    made = {}

    def compiler(name):
        def record(graph, _):
            values = [(node, node.meta.get("val")) for node in graph.graph.nodes if node.op == "call_function"]
            sizes = [value.numel() for _, value in values if isinstance(value, torch.Tensor)]
            made[name] = max(sizes), sum("mm" in str(node.target) for node, _ in values)
            return make_boxed_func(graph.forward)

        return record

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    compiled = torch.compile(linear_cross_entropy, backend=backend, fullgraph=True)
    x, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found, right = results(x, weight, targets, call=compiled), results(x, weight, targets)
    torch.testing.assert_close(found, right)
    assert max(made["forward"][0], made["backward"][0]) == 24 * PADDED
    assert made["forward"][1] + made["backward"][1] == 3 * TOKENS / 24  # logits and two gradients a chunk


@pytest.mark.parametrize("method", ["chunked", "full"])
def test_where_no_target_counts_there_is_nothing_to_learn(method):
    x, weight, targets = inputs()
    found = results(x, weight, torch.full_like(targets, IGNORED), method)
    assert [tensor.abs().max().item() for tensor in found] == [0, 0, 0]


def test_a_loss_that_cannot_run_says_why(monkeypatch, caplog):
    with pytest.raises(UserError, match=r"loss 'liger' cannot run here: it needs a CUDA device; the model is on cpu"):
        linear_cross_entropy(*inputs(), VOCABULARY, "liger")
    with pytest.raises(UserError, match=r"no loss 'ligre'; there are: auto, liger, chunked, full"):
        linear_cross_entropy(*inputs(), VOCABULARY, "ligre")
    assert "breaks the graph of torch.compile" in why_not("liger", "cuda", False, True)
    assert "float32 at most" in why_not("liger", "cuda", True, False)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    module._liger_problem.cache_clear()
    module._announce.cache_clear()
    assert why_not("liger", "cuda", False, False) == "the package liger-kernel is not installed"
    with caplog.at_level(logging.INFO):
        assert resolve("auto", "cuda", False, False) == "chunked"
    assert caplog.messages == ["loss: auto chose chunked on cuda; not liger: the package liger-kernel is not installed"]
    module._liger_problem.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["liger", "chunked", "compiled"])
def test_on_a_gpu_it_is_as_exact_as_with_all_logits_and_takes_a_fraction_of_their_memory(method):
    if method == "liger" and (reason := why_not("liger", "cuda", False, False)) is not None:
        pytest.skip(reason)
    tokens, width, vocabulary, padded = 32768, 768, 50257, 50304
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, width, device="cuda", generator=generator, requires_grad=True)
    weight = (0.02 * torch.randn(padded, width, device="cuda", generator=generator)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda", generator=generator)
    call = torch.compile(linear_cross_entropy, fullgraph=True) if method == "compiled" else linear_cross_entropy

    def run(method, dtype):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = (linear_cross_entropy if method == "full" else call)(x, weight, targets, vocabulary, method)
            gradients = torch.autograd.grad(loss, (x, weight))
        return [loss.detach(), *gradients], torch.cuda.max_memory_allocated() - before

    torch.set_float32_matmul_precision("highest")
    right = [tensor.double() for tensor in run("full", torch.float32)[0]]
    method = "auto" if method == "compiled" else method
    run(method, torch.bfloat16)  # compiles
    (found, memory), (full, memory_of_full) = run(method, torch.bfloat16), run("full", torch.bfloat16)
    for error, error_of_full in zip(errors(found, right), errors(full, right), strict=True):
        assert error <= 2 * error_of_full + torch.finfo(torch.bfloat16).eps
    assert memory < memory_of_full / 2
