"""The loss of a language model, without ever holding all its logits.

Shapes: N tokens, W features, V tokens of the vocabulary, P rows of the table that predicts, V padded for speed.

The logits of a batch, ``[N, P]`` in float32, are the largest tensor of a small model's training by far: 6 GiB for
GPT-2 and 32k tokens. Here they exist for a chunk of the tokens at a time. Their gradients are computed in the same go,
since once the loss of a chunk is known nothing else is missing, so that no logit is computed twice.
"""

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashlab.errors import UserError

logger = logging.getLogger(__name__)

METHODS = ("auto", "liger", "chunked", "full")
IGNORED = -100  # the target of tokens that do not count, as in torch
LIGER = "liger_kernel.transformers"
# Logits at a time. Each chunk adds to the gradient of the whole table: on a GPU small chunks would wait for memory.
# Compiled kernels read and write logits in the dtype of autocast; uncompiled they are in memory in float32 as well.
CHUNK = {"cuda": 2**28, "cpu": 2**24}
COMPILED_CHUNK = 2**30


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, method: str = "auto") -> Tensor:
    """Average the cross-entropy of predicting each target from its features.

    Equals ``F.cross_entropy(x @ weight[:vocab_size].T, targets)``. Under autocast the logits are computed in its dtype.

    Args:
        x: ``[N, W]``.
        weight: ``[P, W]``, the rows from V on are left out.
        targets: int64 ``[N]``, `IGNORED` for tokens that do not count.
        vocab_size: V.
        method: full keeps all logits; chunked does not; liger, the package's fused kernel, does not either; auto takes
            liger outside torch.compile where it can run, else chunked.

    Returns:
        float32 ``[]`` (float64 for float64 features); 0 where no target counts.

    Raises:
        UserError: the method cannot run here; the message says why.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    name = resolve(method, kind, dtype == torch.float64, torch.compiler.is_compiling())
    with torch.autocast(kind, enabled=False):
        if name == "liger":
            return _liger(x.to(dtype), weight.to(dtype), targets, vocab_size)
        if name == "full":
            padding = torch.arange(weight.shape[0], device=x.device) >= vocab_size
            logits = F.linear(x.to(dtype), weight.to(dtype)).to(_exact(dtype)).masked_fill(padding, -torch.inf)
            total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            return total / (targets != IGNORED).sum().clamp(min=1)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _Chunked.apply(x, weight, targets, vocab_size, dtype)  # type: ignore[no-untyped-call]
        return _chunked(x, weight, targets, vocab_size, dtype, with_gradients=False)[0]


def why_not(method: str, device: str, float64: bool, compiling: bool) -> str | None:
    """Say why a method cannot run here, or return None when it can.

    Args:
        method: one of `METHODS`, not auto.
        device: its type, as cuda.
        float64: the logits are.
        compiling: it is to be a part of a graph of torch.compile.
    """
    if method != "liger":
        return None
    if device != "cuda":
        return f"it needs a CUDA device; the model is on {device}"
    if float64:
        return "it computes in float32 at most"
    if compiling:
        return "it reads a number back from the GPU, which breaks the graph of torch.compile"
    return _liger_problem()


@torch.compiler.assume_constant_result
def resolve(method: str, device: str, float64: bool, compiling: bool) -> str:
    """Choose the method; a graph under torch.compile holds the answer as a constant."""
    if method == "auto":
        reason = why_not("liger", device, float64, compiling)
        chosen = "liger" if reason is None else "chunked"
        _announce(f"loss: auto chose {chosen} on {device}" + (f"; not liger: {reason}" if reason else ""))
        return chosen
    if method not in METHODS:
        raise UserError(f"no loss {method!r}; there are: {', '.join(METHODS)}")
    if (reason := why_not(method, device, float64, compiling)) is not None:
        raise UserError(f"loss {method!r} cannot run here: {reason}; take auto or chunked")
    return method


@cache
def _announce(message: str) -> None:
    """Log each distinct choice once."""
    logger.info(message)


@cache
def _liger_problem() -> str | None:
    try:
        import_module(LIGER)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if LIGER.startswith(missing):
            return "the package liger-kernel is not installed"
        return f"the package liger-kernel lacks the module {missing}"
    except Exception as error:  # made for another torch or triton, it fails in its own ways
        return f"the package liger-kernel does not load: {' '.join(str(error).split())}"
    return None


def _liger(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    padding = None
    if vocab_size < weight.shape[0]:
        padding = torch.zeros(weight.shape[0], dtype=x.dtype, device=x.device)
        padding[vocab_size:] = -torch.inf
    loss: Any = import_module(LIGER).LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, accum_dtype=torch.float32)
    return loss(weight, x, targets, padding)


class _Chunked(torch.autograd.Function):
    """`_chunked` with its gradients: the backward pass only scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype
    ) -> Tensor:
        loss, *gradients = _chunked(x, weight, targets, vocab_size, dtype, with_gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        count, grad_x, grad_weight = ctx.saved_tensors
        share = grad / count
        return grad_x * share.to(grad_x.dtype), grad_weight * share.to(grad_weight.dtype), None, None, None


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, ...]:
    """Compute the average, the number of targets that count, and the gradients ``[N, W]`` and ``[P, W]`` of the sum."""
    exact, table = _exact(dtype), weight.to(dtype)
    column = torch.arange(weight.shape[0], device=x.device)
    at_once = COMPILED_CHUNK if torch.compiler.is_compiling() else CHUNK.get(x.device.type, CHUNK["cpu"])
    chunks = -(-len(x) * len(weight) // at_once)
    rows = -(-len(x) // 2 ** (chunks - 1).bit_length())  # batches are powers of two: chunks of one size, which align
    total, grads_x, grad_weight = torch.zeros((), dtype=exact, device=x.device), [], None
    for some_x, some_targets in zip(x.to(dtype).split(rows), targets.split(rows), strict=True):
        counts = some_targets != IGNORED
        target = some_targets.where(counts, 0)[:, None]
        logits = F.linear(some_x, table).to(exact).masked_fill_(column >= vocab_size, -torch.inf)
        log_sum = logits.logsumexp(dim=-1, keepdim=True)
        total = total + ((log_sum - logits.gather(1, target))[:, 0] * counts).sum()
        if with_gradients:
            grad = logits.sub_(log_sum).exp_().add_(column == target, alpha=-1).mul_(counts[:, None]).to(dtype)
            grads_x.append((grad @ table).to(x.dtype))
            grad_table = grad.T @ some_x
            grad_weight = grad_table.to(exact) if grad_weight is None else grad_weight + grad_table
    count = (targets != IGNORED).sum().clamp(min=1)
    if grad_weight is None:
        return total / count, count
    return total / count, count, torch.cat(grads_x), grad_weight.to(weight.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
