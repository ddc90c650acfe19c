"""The shapes of the models: GPT-2's and GPT-3's as published, and what may be changed in them.

Letters: L `n_layer`, H `n_head`, W `n_embd`, Q = W / H the head dimension, T `block_size`, V `vocab_size`.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from flashlab.errors import UserError

PAD_TO = 128  # tensor cores want even shapes: 50257 tokens alone would run at a fraction of the speed


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, and how it is computed. The defaults are those of GPT-2 with 124 M parameters.

    Args:
        n_layer: L, transformer blocks.
        n_head: H, attention heads; they divide n_embd.
        n_embd: W, features per position.
        block_size: T, tokens in the longest sequence.
        vocab_size: V, tokens of the tokenizer.
        position: learned adds a vector for each position, as GPT-2; rotary turns queries and keys.
        norm: layernorm, as GPT-2, or rmsnorm.
        mlp: gelu, as GPT-2, or swiglu, with as many weights.
        bias: add biases in linear layers and LayerNorm.
        dropout: share of the embeddings, and of what each block adds, that is dropped; attention weights are not.
        tie_weights: predict with the transposed table of token embeddings.
        backend: attention backend; auto takes the best that can run.
        loss: how the loss is computed; quack needs flash-attn 4, full keeps all logits, auto takes the best.
        fused_mlp: compute GELU behind its product where flash-attn 4 is installed; it trains faster in less memory.
        residual_in_fp32: keep what blocks add to in float32 under autocast, not in its dtype, which is faster.
        activation_checkpointing: keep only the input of each block, and compute the block again for the backward pass.

    Raises:
        UserError: the heads do not divide n_embd, they leave an odd head dimension for rotary positions, or dropout is
            no share.
    """

    n_layer: PositiveInt = 12
    n_head: PositiveInt = 12
    n_embd: PositiveInt = 768
    block_size: PositiveInt = 1024
    vocab_size: PositiveInt = 50257
    position: Literal["learned", "rotary"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    dropout: float = 0.0
    tie_weights: bool = True
    backend: str = "auto"
    loss: Literal["auto", "quack", "chunked", "full"] = "auto"
    fused_mlp: bool = True
    residual_in_fp32: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse shapes that no model can have."""
        if self.n_embd % self.n_head:
            raise UserError(f"n_head {self.n_head} must divide n_embd {self.n_embd}; change one of them")
        if self.position == "rotary" and self.head_dim % 2:
            raise UserError(
                f"rotary positions turn pairs: n_embd / n_head must be even, and is {self.head_dim}; change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be from 0 to below 1; got {self.dropout}")

    @property
    def head_dim(self) -> int:
        """Q, features per head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table: V rounded up, for speed. The rows beyond V stand for no token."""
        return _round_up(self.vocab_size)

    @property
    def n_inner(self) -> int:
        """Hidden features of an MLP: 4 W, and for SwiGLU, which has three matrices to GELU's two, two thirds of that.

        Source: Shazeer (2020), "GLU Variants Improve Transformer", section 3.1.
        """
        return 4 * self.n_embd if self.mlp == "gelu" else _round_up(8 * self.n_embd / 3)


def _round_up(size: float) -> int:
    return -int(-size // PAD_TO) * PAD_TO


_GPT2 = GPTConfig()
_GPT3 = replace(_GPT2, block_size=2048)

# Source: Radford et al. (2019), "Language Models are Unsupervised Multitask Learners", table 2, and the heads of the
# released models; Brown et al. (2020), "Language Models are Few-Shot Learners", table 2.1. GPT-3's alternate layers of
# banded attention are dense here. The table gives the 1.3B model 24 heads of 128, which are not 2048 features: 16 are.
PRESETS = {
    "gpt2": _GPT2,
    "gpt2-medium": replace(_GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": replace(_GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": replace(_GPT2, n_layer=48, n_head=25, n_embd=1600),
    "gpt3-125m": _GPT3,
    "gpt3-350m": replace(_GPT3, n_layer=24, n_head=16, n_embd=1024),
    "gpt3-760m": replace(_GPT3, n_layer=24, n_head=16, n_embd=1536),
    "gpt3-1.3b": replace(_GPT3, n_layer=24, n_head=16, n_embd=2048),
    "gpt3-2.7b": replace(_GPT3, n_layer=32, n_head=32, n_embd=2560),
}


def preset(name: str, **changes: Any) -> GPTConfig:
    """Return a published shape, with changes.

    Raises:
        UserError: there is no such preset; the message names the nearest.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"no preset {name!r}; did you mean {nearest!r}? (there are: {', '.join(PRESETS)})")
    return replace(PRESETS[name], **changes)


def num_parameters(config: GPTConfig) -> int:
    """Count the parameters, as published: without the rows that pad the vocabulary."""
    width, inner = config.n_embd, config.n_inner
    norm = width * (1 + (config.bias and config.norm == "layernorm"))
    sizes_in_out = [(width, 3 * width), (width, width), (width, _mlp_in(config)), (inner, width)]
    linear = sum((size_in + config.bias) * size_out for size_in, size_out in sizes_in_out)
    tables = _looked_up(config) + config.vocab_size * width  # and the one that predicts
    return tables + config.n_layer * (linear + 2 * norm) + norm


def _mlp_in(config: GPTConfig) -> int:
    return config.n_inner * (2 if config.mlp == "swiglu" else 1)


def _looked_up(config: GPTConfig) -> int:
    """Count the parameters that are only looked up, never multiplied with."""
    rows = config.block_size * (config.position == "learned") + config.vocab_size * (not config.tie_weights)
    return rows * config.n_embd


def flops_per_token(config: GPTConfig, seqlen: int) -> float:
    """Count the floating-point operations that training needs for a token: 6 N + 12 L H Q T.

    N are the parameters that are multiplied with: position vectors are looked up, and so are token embeddings that are
    not tied. Attention counts in full, though a causal mask hides half of it; what activation checkpointing computes
    again counts nothing. Model FLOPs utilisation is this times tokens per second over the peak of the hardware.

    Args:
        config: the shape.
        seqlen: T, tokens per sequence.

    Source: Chowdhery et al. (2022), "PaLM: Scaling Language Modeling with Pathways", appendix B.
    """
    multiplied = num_parameters(config) - _looked_up(config)
    return 6 * multiplied + 12 * config.n_layer * config.n_head * config.head_dim * seqlen
