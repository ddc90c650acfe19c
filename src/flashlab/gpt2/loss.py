"""The loss of a language model, without ever holding all its logits.

Shapes: N tokens, W features, V tokens of the vocabulary, P rows of the table that predicts, V padded for speed.

The logits of a batch, ``[N, P]`` in float32, are the largest tensor of a small model's training by far: 6 GiB for
GPT-2 and 32k tokens. Here they exist for a chunk of the tokens at a time. Their gradients are computed in the same go,
since once the loss of a chunk is known nothing else is missing, so that no logit is computed twice.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashlab.errors import UserError
from flashlab.gpt2 import quack

logger = logging.getLogger(__name__)

METHODS = ("auto", "quack", "chunked", "full")
IGNORED = -100  # the target of tokens that do not count, as in torch
MODULE = "quack.cross_entropy"
# Logits at a time. Each chunk adds to the gradient of the whole table: on a GPU small chunks would wait for memory.
# Fused kernels read and write logits in the dtype of autocast; else they are in memory in float32 as well.
CHUNK = {"cuda": 2**28, "cpu": 2**24}
FUSED_CHUNK = 2**30


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, method: str = "auto") -> Tensor:
    """Average the cross-entropy of predicting each target from its features.

    Equals ``F.cross_entropy(x @ weight[:vocab_size].T, targets)``. Under autocast the logits are computed in its dtype.

    Args:
        x: ``[N, W]``.
        weight: ``[P, W]``, the rows from V on are left out.
        targets: int64 ``[N]``, `IGNORED` for tokens that do not count.
        vocab_size: V.
        method: full keeps all logits; chunked does not; quack does not either, and takes the kernel of the package
            that flash-attn 4 is built on; auto takes quack where it can run, else chunked.

    Returns:
        float32 ``[]`` (float64 for float64 features); 0 where no target counts.

    Raises:
        UserError: the method cannot run here; the message says why.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    name = resolve(method, kind, dtype, len(weight))
    with torch.autocast(kind, enabled=False):
        if name == "full":
            padding = torch.arange(weight.shape[0], device=x.device) >= vocab_size
            logits = F.linear(x.to(dtype), weight.to(dtype)).to(_exact(dtype)).masked_fill(padding, -torch.inf)
            total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            return total / _count(targets)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _Chunked.apply(x, weight, targets, vocab_size, dtype, name)  # type: ignore[no-untyped-call]
        (total,) = SUMS[name](x.to(dtype), weight.to(dtype), targets, vocab_size, False)
        return total / _count(targets)


def why_not(method: str, device: str, dtype: torch.dtype, rows: int) -> str | None:
    """Say why a method cannot run here, or return None when it can.

    Args:
        method: one of `METHODS`, not auto.
        device: its type, as cuda.
        dtype: of the logits.
        rows: P, rows of the table.
    """
    return quack.why_not(MODULE, device, dtype, (rows,)) if method == "quack" else None


@torch.compiler.assume_constant_result
def resolve(method: str, device: str, dtype: torch.dtype, rows: int) -> str:
    """Choose the method; a graph under torch.compile holds the answer as a constant."""
    if method == "auto":
        reason = why_not("quack", device, dtype, rows)
        chosen = "quack" if reason is None else "chunked"
        _announce(f"loss: auto chose {chosen} on {device}" + (f"; not quack: {reason}" if reason else ""))
        return chosen
    if method not in METHODS:
        raise UserError(f"no loss {method!r}; there are: {', '.join(METHODS)}")
    if (reason := why_not(method, device, dtype, rows)) is not None:
        raise UserError(f"loss {method!r} cannot run here: {reason}; take auto or chunked")
    return method


@cache
def _announce(message: str) -> None:
    """Log each distinct choice once."""
    logger.info(message)


class _Chunked(torch.autograd.Function):
    """The average, with its gradients at once: the backward pass only scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype, name: str
    ) -> Tensor:
        total, grad_x, grad_table = SUMS[name](x.to(dtype), weight.to(dtype), targets, vocab_size, True)
        count = _count(targets)
        ctx.save_for_backward(count, grad_x.to(x.dtype), grad_table.to(weight.dtype))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        count, grad_x, grad_weight = ctx.saved_tensors
        share = grad / count  # not rounded to 16 bits: where three batches are averaged it would be off by 0.2 %
        grads = ((x.to(share.dtype) * share).to(x.dtype) for x in (grad_x, grad_weight))
        return *grads, None, None, None, None


def _plain(x: Tensor, table: Tensor, targets: Tensor, vocab_size: int, with_gradients: bool) -> list[Tensor]:
    """Return the sum of the losses and, if asked for, its gradients ``[N, W]`` and ``[P, W]``."""
    exact = _exact(x.dtype)
    column = torch.arange(len(table), device=x.device)
    at_once = FUSED_CHUNK if torch.compiler.is_compiling() else CHUNK.get(x.device.type, CHUNK["cpu"])
    rows = _rows(x, table, at_once)
    total, grads_x, grad_table = torch.zeros((), dtype=exact, device=x.device), [], None
    for some_x, some_targets in zip(x.split(rows), targets.split(rows), strict=True):
        counts = some_targets != IGNORED
        target = some_targets.where(counts, 0)[:, None]
        logits = F.linear(some_x, table).to(exact).masked_fill_(column >= vocab_size, -torch.inf)
        log_sum = logits.logsumexp(dim=-1, keepdim=True)
        total = total + ((log_sum - logits.gather(1, target))[:, 0] * counts).sum()
        if with_gradients:
            grad = logits.sub_(log_sum).exp_().add_(column == target, alpha=-1).mul_(counts[:, None]).to(x.dtype)
            grads_x.append(grad @ table)
            some = grad.T @ some_x
            grad_table = some.to(exact) if grad_table is None else grad_table + some
    return [total] if grad_table is None else [total, torch.cat(grads_x), grad_table]


@torch.library.custom_op("flashlab::linear_cross_entropy", mutates_args=())
def _fused(x: Tensor, table: Tensor, targets: Tensor, vocab_size: int, with_gradients: bool) -> list[Tensor]:
    """As `_plain`, for which the logits of a chunk are read and their gradients written over them once."""
    from quack.cross_entropy import cross_entropy_fwd_out

    rows = _rows(x, table, FUSED_CHUNK)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    buffer = x.new_empty(min(rows, len(x)), len(table))
    grad_x, grad_table = torch.empty_like(x), None
    for begin in range(0, len(x), rows):
        some = slice(begin, begin + rows)
        logits = buffer[: len(x) - begin]
        torch.mm(x[some], table.T, out=logits)
        logits[:, vocab_size:] = -torch.inf
        written = logits if with_gradients else None
        cross_entropy_fwd_out(logits, targets[some], None, losses[some], None, written, None, IGNORED)
        if with_gradients:
            torch.mm(logits, table, out=grad_x[some])
            gradient = logits.T @ x[some]
            grad_table = gradient.float() if grad_table is None else grad_table.add_(gradient)
    return [losses.sum()] if grad_table is None else [losses.sum(), grad_x, grad_table]


@_fused.register_fake
def _(x: Tensor, table: Tensor, targets: Tensor, vocab_size: int, with_gradients: bool) -> list[Tensor]:
    total = x.new_empty((), dtype=torch.float32)
    return [total, torch.empty_like(x), torch.empty_like(table, dtype=torch.float32)] if with_gradients else [total]


SUMS: dict[str, Callable[..., list[Tensor]]] = {"chunked": _plain, "quack": _fused}


def _rows(x: Tensor, table: Tensor, at_once: int) -> int:
    """Return how many tokens make a chunk: batches are powers of two, so chunks are of one size and align."""
    chunks = -(-len(x) * len(table) // at_once)
    return -(-len(x) // 2 ** (chunks - 1).bit_length())


def _count(targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum().clamp(min=1)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
