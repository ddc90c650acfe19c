import sys
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from tiny import some_tokens, tiny
from torch import nn
from torch.nn import functional

from flashlab.gpt2 import mlp, quack
from flashlab.gpt2.kernels import choose_kernels
from flashlab.gpt2.mlp import fused_mlp


def plain(x, c_fc, c_proj):
    return c_proj(functional.gelu(c_fc(x), approximate="tanh"))


def layers(features, hidden, bias=True, device="cpu"):
    torch.manual_seed(0)
    return [nn.Linear(*sizes, bias=bias, device=device) for sizes in ((features, hidden), (hidden, features))]


def results(call, x, linears):
    """Return what comes out, and the gradients of all that went in."""
    out = call(x, *linears)
    inputs = [x, *(parameter for linear in linears for parameter in linear.parameters())]
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.fixture
def kernels(monkeypatch):
    """Stand in for quack's kernels, which need a GPU; do on the CPU what the package says; count the calls."""
    calls = []

    def gemm_act(x, weight, bias, activation, tuned):
        calls.append(activation)
        before = x @ weight if bias is None else x @ weight + bias
        return before, functional.gelu(before, approximate="tanh")

    def gemm_dact(grad, weight, before, activation, tuned):
        calls.append(activation)
        return (
            torch.ops.aten.gelu_backward(grad @ weight, before, approximate="tanh"),
            functional.gelu(before, approximate="tanh"),
        )

    module = ModuleType("quack.gemm_interface")
    module.gemm_act, module.gemm_dact = gemm_act, gemm_dact
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mlp, "why_not", lambda *_: None)
    return calls


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_what_the_kernels_are_given_makes_the_mlp_and_its_gradients(bias, compiled, kernels):
    x, linears = torch.randn(2, 5, 16, requires_grad=True), layers(16, 64, bias)
    torch.compiler.reset()
    call = torch.compile(fused_mlp, fullgraph=True, backend="aot_eager") if compiled else fused_mlp
    torch.testing.assert_close(results(call, x, linears), results(plain, x, linears))
    assert kernels == ["gelu_tanh_approx"] * 2


@pytest.mark.parametrize("changes", [{"fused_mlp": False}, {"mlp": "swiglu"}, {}], ids=str)
def test_a_model_takes_them_in_training_where_they_stand_for_its_mlp(changes, kernels):
    model, tokens = tiny(**changes), some_tokens()
    with torch.no_grad():
        model(tokens, tokens)
    assert kernels == []
    model(tokens, tokens).backward()
    assert len(kernels) == (0 if changes else 2 * model.config.n_layer)


def test_where_they_cannot_run_there_is_a_reason(monkeypatch):
    x, linears = torch.randn(2, 5, 16, requires_grad=True), layers(16, 64)
    assert fused_mlp(x, *linears) is None
    assert mlp.why_not("cpu", torch.bfloat16, 16, 64) == "it needs a CUDA device; the model is on cpu"
    assert "got 44" in mlp.why_not("cuda", torch.bfloat16, 44, 176)
    assert not choose_kernels(tiny().config, 1, torch.device("cpu"), torch.bfloat16).fused_mlp
    quack._problem.cache_clear()
    monkeypatch.setattr(quack, "import_module", Mock(side_effect=ModuleNotFoundError(name="quack")))
    assert "quack-kernels is not installed" in mlp.why_not("cuda", torch.bfloat16, 16, 64)
    quack._problem.cache_clear()
    monkeypatch.setattr(quack, "import_module", Mock(side_effect=ModuleNotFoundError(name="quack.gemm_interface")))
    assert "lacks the module quack.gemm_interface" in mlp.why_not("cuda", torch.bfloat16, 16, 64)
    quack._problem.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_on_a_gpu_it_is_as_exact_as_by_itself(bias, compiled):
    if (reason := mlp.why_not("cuda", torch.bfloat16, 768, 3072)) is not None:
        pytest.skip(reason)
    torch.set_float32_matmul_precision("highest")
    x, linears = torch.randn(4, 1000, 768, device="cuda", requires_grad=True), layers(768, 3072, bias, "cuda")
    exact = results(plain, x, linears)
    torch.compiler.reset()
    call = torch.compile(fused_mlp, fullgraph=True) if compiled else fused_mlp
    with torch.autocast("cuda", torch.bfloat16):
        rough, found = results(plain, x, linears), results(call, x, linears)
    for right, one, other in zip(exact, rough, found, strict=True):
        scale = right.abs().max()
        allowed, error = ((result - right).abs().max() / scale for result in (one, other))
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps
