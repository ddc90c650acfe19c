import logging
import sys
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashlab.errors import UserError
from flashlab.gpt2 import loss as module
from flashlab.gpt2 import quack
from flashlab.gpt2.loss import IGNORED, linear_cross_entropy, resolve, why_not

TOKENS, WIDTH, VOCABULARY, PADDED = 96, 16, 500, 512


@pytest.fixture
def chunk(monkeypatch):
    """Make chunks of at most so many tokens."""

    def of(rows):
        monkeypatch.setitem(module.CHUNK, "cpu", rows * PADDED)
        monkeypatch.setattr(module, "FUSED_CHUNK", rows * PADDED)

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


@pytest.mark.parametrize("rows", [7, 32, 96, 1000])
def test_what_quack_is_given_makes_the_loss_and_its_gradients(rows, chunk, monkeypatch):
    """By a stand-in of its kernel that does on the CPU what the package says: the real one needs a GPU."""

    def cross_entropy_fwd_out(x, target, target_logit, loss, lse, dx, weight, ignore_index=-100):
        assert x.is_contiguous()
        assert target_logit is lse is weight is None
        loss.copy_(F.cross_entropy(x, target, ignore_index=ignore_index, reduction="none"))
        if dx is not None:
            counts = target != ignore_index
            gradient = x.softmax(dim=-1) - F.one_hot(target.where(counts, 0), x.shape[-1])
            dx.copy_(gradient * counts[:, None])

    stand_in = ModuleType("quack.cross_entropy")
    stand_in.cross_entropy_fwd_out = cross_entropy_fwd_out
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", stand_in)
    monkeypatch.setattr(module, "why_not", lambda *_: None)
    chunk(rows)
    x, weight, targets = inputs(torch.float32)
    torch.testing.assert_close(results(x, weight, targets, "quack"), [*map(torch.Tensor.float, expected(*inputs()))])
    with torch.no_grad():
        alone = linear_cross_entropy(x, weight, targets, VOCABULARY, "quack")
    torch.testing.assert_close(alone, expected(*inputs())[0].float())
    with FakeTensorMode(allow_non_fake_inputs=True):  # what torch.compile believes of it
        shapes = [part.shape for part in module.SUMS["quack"](x, weight, targets, VOCABULARY, True)]
    assert shapes == [(), x.shape, weight.shape]


def test_a_loss_that_cannot_run_says_why(monkeypatch, caplog):
    with pytest.raises(UserError, match=r"loss 'quack' cannot run here: it needs a CUDA device; the model is on cpu"):
        linear_cross_entropy(*inputs(), VOCABULARY, "quack")
    with pytest.raises(UserError, match=r"no loss 'duck'; there are: auto, quack, chunked, full"):
        linear_cross_entropy(*inputs(), VOCABULARY, "duck")
    assert "for bfloat16 and float16; the model computes in float64" in why_not("quack", "cuda", torch.float64, PADDED)
    assert "multiples of 8; got 50,257" in why_not("quack", "cuda", torch.bfloat16, 50257)
    monkeypatch.setattr(quack, "import_module", Mock(side_effect=ModuleNotFoundError(name="quack")))
    quack._problem.cache_clear()
    module._announce.cache_clear()
    reason = "the package quack-kernels is not installed; it comes with flash-attn 4"
    assert why_not("quack", "cuda", torch.bfloat16, PADDED) == reason
    with caplog.at_level(logging.INFO):
        assert resolve("auto", "cuda", torch.bfloat16, PADDED) == "chunked"
    assert caplog.messages == [f"loss: auto chose chunked on cuda; not quack: {reason}"]
    quack._problem.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", ["quack", "chunked"])
def test_on_a_gpu_it_is_as_exact_as_with_all_logits_and_takes_a_fraction_of_their_memory(method, compiled):
    if (reason := why_not(method, "cuda", torch.bfloat16, PADDED)) is not None:
        pytest.skip(reason)
    tokens, width, vocabulary, padded = 32768, 768, 50257, 50304
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, width, device="cuda", generator=generator, requires_grad=True)
    weight = (0.02 * torch.randn(padded, width, device="cuda", generator=generator)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda", generator=generator)
    targets[::7] = IGNORED
    call = torch.compile(linear_cross_entropy, fullgraph=True) if compiled else linear_cross_entropy

    def run(method, dtype):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = (linear_cross_entropy if method == "full" else call)(x, weight, targets, vocabulary, method)
            gradients = torch.autograd.grad(loss, (x, weight))
        return [loss.detach(), *gradients], torch.cuda.max_memory_allocated() - before

    torch.set_float32_matmul_precision("highest")
    right = [tensor.double() for tensor in run("full", torch.float32)[0]]
    run(method, torch.bfloat16)  # compiles
    (found, memory), (full, memory_of_full) = run(method, torch.bfloat16), run("full", torch.bfloat16)
    for error, error_of_full in zip(errors(found, right), errors(full, right), strict=True):
        assert error <= 2 * error_of_full + torch.finfo(torch.bfloat16).eps
    assert memory < memory_of_full / 2
