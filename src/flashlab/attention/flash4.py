"""flash-attn 4 as operators of torch, which is how a graph under torch.compile can hold it.

Called directly, its Python code compiles and launches kernels, which torch.compile cannot trace: the graph would break.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashlab.attention.spec import Options


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Run flash-attn 4 from inside torch.compile.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        options: How scores become weights.
    """
    return _forward(q, k, v, *_settings(options))[0]


def attention_qkvpacked(qkv: Tensor, options: Options) -> Tensor:
    """Run flash-attn 4 on ``[B, S, 3, H, D]``, inside torch.compile or not; the gradient is written as one tensor."""
    return _QKVPacked.apply(qkv, *_settings(options))  # type: ignore[no-untyped-call,no-any-return]


def _settings(options: Options) -> tuple[float, bool, int, int, float, bool]:
    """Take apart what operators of torch take as numbers alone."""
    return options.softmax_scale, options.causal, *options.window_size, options.softcap, options.deterministic


def _window(left: int, right: int) -> dict[str, Any]:
    return {"window_size_left": None if left < 0 else left, "window_size_right": None if right < 0 else right}


@torch.library.custom_op("flashlab::flash_attention_4", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    keywords = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap, "return_lse": True}
    out, lse, *_ = _flash_attn_fwd(q, k, v, **keywords, **_window(left, right))
    return out, lse


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch_size, seqlen_q, num_heads, _head_dim = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (batch_size, num_heads, seqlen_q), dtype=torch.float32
    )


@torch.library.custom_op("flashlab::flash_attention_4_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
    packed: bool,
) -> list[Tensor]:
    """Return the gradients of q, k and v or, packed, the one of all three ``[B, S, 3, H, D]``."""
    from flash_attn.cute.interface import _flash_attn_bwd

    returned = _empty_gradients(q, k, v, packed)
    dq, dk, dv = returned[0].unbind(2) if packed else returned
    _flash_attn_bwd(
        q, k, v, out, grad_out.contiguous(), lse, softmax_scale, causal, softcap,
        **_window(left, right), deterministic=deterministic, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return returned


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    return _empty_gradients(q, k, v, packed=rest[-1])


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> list[Tensor]:
    if packed:
        return [q.new_empty((*q.shape[:2], 3, *q.shape[2:]))]
    return [torch.empty_like(x) for x in (q, k, v)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, *ctx.saved_tensors, *ctx.settings, False), *(None for _ in ctx.settings)


_forward.register_autograd(_differentiate, setup_context=_save)


class _QKVPacked(torch.autograd.Function):
    """The same, with one gradient: put together from three it would be copied."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *settings: Any) -> Tensor:  # type: ignore[override]
        out, lse = _forward(*qkv.unbind(2), *settings)
        ctx.save_for_backward(qkv, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, out, lse = ctx.saved_tensors
        return *_backward(grad_out, *qkv.unbind(2), out, lse, *ctx.settings, True), *(None for _ in ctx.settings)
