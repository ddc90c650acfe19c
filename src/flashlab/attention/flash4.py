"""flash-attn 4 as operators of torch, which is how a graph under torch.compile can hold it.

Called directly, its Python code compiles and launches kernels, which torch.compile cannot trace: the graph would break.
"""

from typing import Any

import torch
from torch import Tensor

from flashlab.attention.spec import Options


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Run flash-attn 4 from inside torch.compile.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        options: How scores become weights.
    """
    left, right = options.window_size
    scale, causal, softcap = options.softmax_scale, options.causal, options.softcap
    return _forward(q, k, v, scale, causal, left, right, softcap, options.deterministic)[0]


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
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, grad_out.contiguous(), lse, softmax_scale, causal, softcap,
        **_window(left, right), deterministic=deterministic,
    )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, *ctx.saved_tensors, *ctx.settings), *(None for _ in ctx.settings)


_forward.register_autograd(_differentiate, setup_context=_save)
