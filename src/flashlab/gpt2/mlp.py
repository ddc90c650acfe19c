"""The MLP of a block by kernels that compute GELU, and its gradient, behind the product that it follows.

Shapes: N tokens, W features, I hidden features. By itself GELU reads and writes ``[N, I]`` once more in each direction,
and what comes out is kept for the backward pass. Here the backward pass computes it again beside its gradient.

Source of the kernels: the package quack, https://github.com/Dao-AILab/quack.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flashlab.gpt2 import quack

MODULE = "quack.gemm_interface"
GELU = "gelu_tanh_approx"


@torch.compiler.assume_constant_result
def why_not(device: str, dtype: torch.dtype, features: int, hidden: int) -> str | None:
    """Say why the kernels cannot run here, or return None when they can; under torch.compile that is a constant."""
    return quack.why_not(MODULE, device, dtype, (features, hidden))


def fused_mlp(x: Tensor, c_fc: nn.Linear, c_proj: nn.Linear) -> Tensor | None:
    """Compute ``c_proj(gelu(c_fc(x)))``, or return None without gradients and where the kernels cannot run.

    The layers give their weights; they are not called, nor are hooks on them.

    Args:
        x: ``[..., N, W]``.
        c_fc: from W features to I.
        c_proj: from I features to W.

    Returns:
        ``[..., N, W]`` in the dtype of autocast, if that is on.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if not torch.is_grad_enabled() or why_not(kind, dtype, c_fc.in_features, c_fc.out_features) is not None:
        return None
    weights = (c_fc.weight, c_fc.bias, c_proj.weight, c_proj.bias)
    with torch.autocast(kind, enabled=False):
        cast = [x.to(dtype).flatten(0, -2), *(None if weight is None else weight.to(dtype) for weight in weights)]
        return _FusedMLP.apply(*cast).unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call,no-any-return]


@torch.library.custom_op("flashlab::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what GELU is applied to, and what comes out: ``[N, I]`` each."""
    from quack.gemm_interface import gemm_act

    before, after = gemm_act(x, weight.T, bias=bias, activation=GELU, tuned=False)
    return before, after


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))


@torch.library.custom_op("flashlab::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(grad: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of what GELU is applied to, and what comes out of it: ``[N, I]`` each."""
    from quack.gemm_interface import gemm_dact

    grad_before, after = gemm_dact(grad, weight, before, activation=GELU, tuned=False)
    return grad_before, after


@_linear_gelu_backward.register_fake
def _(grad: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(before), torch.empty_like(before)


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None
    ) -> Tensor:
        before, after = _linear_gelu(x, w_fc, b_fc)
        ctx.save_for_backward(x, w_fc, w_proj, before)
        ctx.has_bias = b_fc is not None
        return nn.functional.linear(after, w_proj, b_proj)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w_fc, w_proj, before = ctx.saved_tensors
        grad_before, after = _linear_gelu_backward(grad.contiguous(), w_proj, before)
        grad_b_fc, grad_b_proj = (grad_before.sum(0), grad.sum(0)) if ctx.has_bias else (None, None)
        return grad_before @ w_fc, grad_before.T @ x, grad_b_fc, grad.T @ after, grad_b_proj
