"""What computes a model's attention, loss and MLP, chosen once for a run, before anything is compiled around it."""

from dataclasses import replace

import torch

from flashlab.attention import AttentionSpec, resolve
from flashlab.gpt2 import loss, mlp
from flashlab.gpt2.config import GPTConfig


def choose_kernels(config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> GPTConfig:
    """Put what training will run in place of auto, and of kernels that cannot run here.

    Args:
        config: the shape; block_size is the length of the sequences.
        batch_size: sequences that are computed at once.
        device: where.
        dtype: what products are computed in.

    Raises:
        UserError: attention backend or loss is named, and cannot run here; the message says why.
    """
    length, heads = config.block_size, config.n_head
    shape = (batch_size, length, length, heads, heads, config.head_dim)
    return replace(
        config,
        backend=resolve(config.backend, AttentionSpec(*shape, dtype, device, causal=True, needs_grad=True)),
        loss=loss.resolve(config.loss, device.type, dtype, config.padded_vocab_size),
        fused_mlp=config.fused_mlp
        and config.mlp == "gelu"
        and mlp.why_not(device.type, dtype, config.n_embd, config.n_inner) is None,
    )
