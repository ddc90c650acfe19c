"""GPT-2: a decoder of transformer blocks, with the names of its published weights.

Shapes: B batch, S tokens per sequence, W = `n_embd` features, H heads of Q = W / H features, V `vocab_size`, P rows of
the token table (V padded for speed), M places of a key-value cache.

What is not GPT-2's is an option: rotary positions, RMSNorm, SwiGLU, no biases. Read from here to the end, it is: cache,
attention, MLP, block, model.

Source: Radford et al. (2019), "Language Models are Unsupervised Multitask Learners", and the code that came with it,
https://github.com/openai/gpt-2/blob/master/src/model.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashlab.attention import attention, attention_qkvpacked, attention_with_kvcache
from flashlab.errors import UserError
from flashlab.gpt2.config import GPTConfig
from flashlab.gpt2.loss import linear_cross_entropy
from flashlab.gpt2.mlp import fused_mlp

EPSILON = 1e-5  # of the norms
STD = 0.02  # of new weights


class KeyValueCache:
    """The keys and values of the tokens so far, from which generation goes on.

    Attributes:
        layers: for each block the keys and the values, ``[B, M, H, Q]``.
        seqlens: int32 ``[B]``, the places that are filled.
    """

    def __init__(self, config: GPTConfig, batch_size: int, places: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, places, config.head_dim)
        # A head's places lie side by side: products by matrix would copy the cache otherwise.
        held = torch.zeros(shape, device=device, dtype=dtype).transpose(3, 4)
        self.layers = [(keys, values) for keys, values in held]
        self.seqlens = torch.zeros(batch_size, device=device, dtype=torch.int32)


Rotation = tuple[Tensor, Tensor]


def rotation_of(positions: Tensor, head_dim: int) -> Rotation:
    """Return cosine and sine ``[..., S, 1, Q / 2]`` of the rotary angles at positions ``[..., S]``.

    Source: Su et al. (2021), "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angle = positions[..., None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn ``[B, S, H, Q]`` by its positions, feature i paired with i + Q / 2."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Each position reads from the positions up to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.backend = config.n_head, config.backend
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: Tensor, rotation: Rotation | None, layer: tuple[Tensor, Tensor] | None, seqlens: Tensor | None
    ) -> Tensor:
        """Map ``[B, S, W]`` to ``[B, S, W]``; with a layer of a cache, go on from its filled places."""
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # [B, S, 3, H, Q]
        q, k, v = qkv.unbind(2)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if layer is not None and seqlens is not None:
            mixed = attention_with_kvcache(q, *layer, seqlens, k=k, v=v, backend=self.backend, causal=True)
        elif rotation is not None:
            mixed = attention(q, k, v, backend=self.backend, causal=True)
        else:
            mixed = attention_qkvpacked(qkv, backend=self.backend, causal=True)
        return self.c_proj(mixed.flatten(-2))


class MLP(nn.Module):
    """Each position is worked on by itself."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.fused = config.fused_mlp and not self.gated
        self.c_fc = nn.Linear(config.n_embd, config.n_inner * (2 if self.gated else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, W]`` to ``[B, S, W]``."""
        if self.fused and (mixed := fused_mlp(x, self.c_fc, self.c_proj)) is not None:
            return mixed
        x = self.c_fc(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * x)
        return self.c_proj(F.gelu(x, approximate="tanh"))


class RMSNorm(nn.RMSNorm):
    """torch's, in the precision of its weight: under autocast torch does that for LayerNorm alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., W]`` to ``[..., W]``."""
        return super().forward(x.to(self.weight.dtype))


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=EPSILON)
    return nn.LayerNorm(config.n_embd, eps=EPSILON, bias=config.bias)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to what it was given."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = _norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        layer: tuple[Tensor, Tensor] | None = None,
        seqlens: Tensor | None = None,
    ) -> Tensor:
        """Map ``[B, S, W]`` to ``[B, S, W]``, as `CausalSelfAttention`."""
        x = x + self.dropout(self.attn(self.ln_1(x), rotation, layer, seqlens))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Predict the next token at every position.

    Args:
        config: the shape; see `GPTConfig`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # torch would first draw weights of its own, which are not wanted
            self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
            self.dropout = nn.Dropout(config.dropout)
            self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = _norm(config)
            self.lm_head = None
            if not config.tie_weights:
                self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.to_empty(device=torch.get_default_device())
        self._loss = _loss_of
        self.initialise()

    def compile_parts(self) -> None:
        """Have torch.compile make the kernels of the blocks, which share them, and of the last norm with the loss.

        That takes seconds however many blocks there are; compiled as a whole a deep model would take minutes.
        """
        for block in self.h:
            block.compile(dynamic=False)
        self._loss = torch.compile(_loss_of, dynamic=False)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw new weights as GPT-2's: what adds to the residual stream starts small by its depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:  # of a norm
                nn.init.ones_(parameter)
            elif name == "wpe.weight":
                nn.init.normal_(parameter, std=STD / 2)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=STD / (2 * self.config.n_layer) ** 0.5)
            else:
                nn.init.normal_(parameter, std=STD)
        for table in {self.wte.weight, self.head_weight}:
            table[self.config.vocab_size :] = 0  # the rows that pad: no gradient ever reaches them

    @property
    def head_weight(self) -> Tensor:
        """The table ``[P, W]`` that predicts."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits ``[B, S, V]`` of the next tokens or, given these, the average loss.

        Args:
            tokens: int64 ``[B, S]``.
            targets: int64 ``[B, S]``, the token after each; -100 where none counts.

        Raises:
            UserError: the sequences are longer than the learned positions, or the backend or the loss that the
                configuration names cannot run here.
        """
        if targets is None:
            return self.logits(self.features(tokens))
        x = self._residual_stream(tokens)
        return self._loss(x, self.ln_f, self.head_weight, targets, self.config.vocab_size, self.config.loss)

    def features(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return what the logits are computed from, ``[B, S, W]``.

        Args:
            tokens: int64 ``[B, S]``.
            cache: goes on where it ends, and appends to it; without gradients.

        Raises:
            UserError: as `forward`.
        """
        return self.ln_f(self._residual_stream(tokens, cache))

    def _residual_stream(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device)
        if cache is not None:
            positions = cache.seqlens[:, None] + positions
        x = self.wte(tokens)
        if self.wpe is not None:
            check_length(self.config, length)
            x = x + self.wpe(positions)
        x = self.dropout(x)
        if torch.is_autocast_enabled(x.device.type):  # fsdp gathers tables in 16 bits, others are in float32
            x = x.to(torch.float32 if self.config.residual_in_fp32 else torch.get_autocast_dtype(x.device.type))
        rotation = rotation_of(positions, self.config.head_dim) if self.wpe is None else None
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(self.h):
            if cache is not None:
                x = block(x, rotation, cache.layers[index], cache.seqlens)
            elif recompute:
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        if cache is not None:
            cache.seqlens += length
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits ``[..., V]`` of features ``[..., W]``."""
        return F.linear(x, self.head_weight)[..., : self.config.vocab_size]


def _loss_of(x: Tensor, norm: nn.Module, weight: Tensor, targets: Tensor, vocab_size: int, method: str) -> Tensor:
    """Return the average loss of the residual stream ``[B, S, W]``: norm and loss, so that they compile together."""
    return linear_cross_entropy(norm(x).flatten(0, 1), weight, targets.flatten(), vocab_size, method)


def check_length(config: GPTConfig, length: int) -> None:
    """Refuse sequences that have no positions.

    Raises:
        UserError: the positions are learned, and fewer than the tokens.
    """
    if config.position == "learned" and length > config.block_size:
        raise UserError(
            f"{length} tokens are more than block_size {config.block_size}, and learned positions end there; "
            "give fewer, or train with a larger block_size or rotary positions"
        )
