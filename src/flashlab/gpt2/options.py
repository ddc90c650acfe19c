"""The options of `flashlab gpt2 train`, section by section."""

import inspect
import math
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type
from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger

from flashlab.errors import UserError
from flashlab.gpt2.config import GPTConfig, preset

if TYPE_CHECKING:
    Decay = float
    TwoOrMore = int
else:
    Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)])
    TwoOrMore = restricted_number_type("TwoOrMore", int, (">=", 2))


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it at once.

    Args:
        path: token set, a folder or an object storage URL.
        batch_size: sequences that a GPU computes at once; trainer.global_batch_tokens says how many make a step.
    """

    path: str = "data/gpt2"
    batch_size: PositiveInt = 16


@dataclass(frozen=True)
class ModelConfig:
    """A published shape, and what is to differ from it. The vocabulary is that of the token set.

    Args:
        preset: gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3-125m, gpt3-350m, gpt3-760m, gpt3-1.3b or gpt3-2.7b.
        n_layer: transformer blocks.
        n_head: attention heads; they divide n_embd.
        n_embd: features per position.
        block_size: tokens in a sequence.
        position: learned adds a vector for each position; rotary turns queries and keys.
        norm: layernorm or rmsnorm.
        mlp: gelu, or swiglu with as many weights.
        bias: add biases in linear layers and LayerNorm.
        dropout: share of the embeddings, and of what each block adds, that is dropped.
        tie_weights: predict with the transposed table of token embeddings.
        backend: attention backend; auto takes the best that can run.
        loss: how the loss is computed; quack needs flash-attn 4, full keeps all logits, auto takes the best.
        fused_mlp: compute GELU behind its product where flash-attn 4 is installed; it trains faster in less memory.
        residual_in_fp32: keep what blocks add to in float32 under autocast, not in its dtype, which is faster.
        activation_checkpointing: keep only the input of each block, and compute the block again for the backward pass.
    """

    preset: str = "gpt2"
    n_layer: PositiveInt | None = None
    n_head: PositiveInt | None = None
    n_embd: PositiveInt | None = None
    block_size: PositiveInt | None = None
    position: Literal["learned", "rotary"] | None = None
    norm: Literal["layernorm", "rmsnorm"] | None = None
    mlp: Literal["gelu", "swiglu"] | None = None
    bias: bool | None = None
    dropout: NonNegativeFloat | None = None
    tie_weights: bool | None = None
    backend: str | None = None
    loss: Literal["auto", "quack", "chunked", "full"] | None = None
    fused_mlp: bool | None = None
    residual_in_fp32: bool | None = None
    activation_checkpointing: bool | None = None

    def shape(self, vocab_size: int) -> GPTConfig:
        """Return what the options describe.

        Raises:
            UserError: there is no such preset, or no model can have this shape.
        """
        changes = {name: value for name, value in asdict(self).items() if value is not None and name != "preset"}
        return preset(self.preset, vocab_size=vocab_size, **changes)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, a linear warm-up, and half a cosine from there to the last step.

    Args:
        lr: learning rate after the warm-up.
        min_lr: learning rate that the cosine falls to.
        betas: decay of AdamW's averages.
        weight_decay: of matrices; vectors have none.
        warmup_steps: steps over which the rate rises to lr.
        warmup_tokens: the same in tokens, instead of warmup_steps.
    """

    lr: PositiveFloat = 6e-4
    min_lr: NonNegativeFloat = 6e-5
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.1
    warmup_steps: NonNegativeInt = 700
    warmup_tokens: NonNegativeInt | None = None

    def rate(self, step: int, max_steps: int, tokens_per_step: int) -> float:
        """Return the learning rate of a step, of which the first has the number 0.

        Source: Brown et al. (2020), "Language Models are Few-Shot Learners", appendix B.
        """
        warmup = self.warmup(tokens_per_step)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        share = (step - warmup) / max(max_steps - warmup, 1)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def warmup(self, tokens_per_step: int) -> int:
        """Return the steps of the warm-up."""
        return self.warmup_steps if self.warmup_tokens is None else -(-self.warmup_tokens // tokens_per_step)


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what, and how often things are looked at.

    Args:
        max_steps: optimiser steps; without them and max_tokens, as many as one pass over the training tokens takes.
        max_tokens: tokens to train on, instead of max_steps.
        global_batch_tokens: tokens of a step, of all GPUs together. Each computes its share in as many batches of
            data.batch_size as that takes. null is one batch for each GPU.
        val_every_n_steps: steps from one validation to the next, two or more: checkpoints are written between them.
        val_batches: batches of a validation, of all GPUs together; null reads the whole validation part.
        checkpoint_every_n_steps: steps from one periodic checkpoint to the next.
        log_every_n_steps: steps from one logged point to the next.
        early_stopping_patience: validations without a better loss after which training ends; null never ends it.
        gradient_clip_val: largest norm of the gradient.
        accelerator: cpu, gpu (an error if there is none), or auto.
        devices: how many GPUs, or processes on the CPU.
        num_nodes: how many machines.
        strategy: of several GPUs; ddp gives each the whole model, fsdp (FSDP2) a share of it.
        precision: of Lightning; auto is bf16-mixed on a GPU and 32-true on a CPU.
        compile: whether torch.compile makes kernels for the model; auto does on a GPU.
    """

    max_steps: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    global_batch_tokens: PositiveInt | None = 524_288
    val_every_n_steps: TwoOrMore = 500
    val_batches: PositiveInt | None = None
    checkpoint_every_n_steps: PositiveInt = 500
    log_every_n_steps: PositiveInt = 10
    early_stopping_patience: PositiveInt | None = None
    gradient_clip_val: PositiveFloat = 1.0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    compile: bool | Literal["auto"] = "auto"

    def accumulated(self, batch_size: int, block_size: int) -> int:
        """Return how many batches each GPU computes for a step.

        Raises:
            UserError: global_batch_tokens is no multiple of what all GPUs compute at once.
        """
        gpus = self.devices * self.num_nodes
        at_once = batch_size * block_size * gpus
        if self.global_batch_tokens is None:
            return 1
        if self.global_batch_tokens % at_once:
            below = self.global_batch_tokens // at_once * at_once
            near = [f"{tokens:,}" for tokens in (below, below + at_once) if tokens]
            raise UserError(
                f"--trainer.global_batch_tokens {self.global_batch_tokens:,} is no multiple of the {at_once:,} tokens "
                f"computed at once ({batch_size} sequences of {block_size:,} on each of {gpus} device(s)); take "
                f"{' or '.join(near)}, or another --data.batch_size"
            )
        return self.global_batch_tokens // at_once

    def steps(self, tokens_per_step: int, num_tokens: int) -> int:
        """Return how many steps the run has.

        Args:
            tokens_per_step: of all GPUs.
            num_tokens: of the training part, which one pass reads.

        Raises:
            UserError: both max_steps and max_tokens are given, or one pass is less than a step.
        """
        if self.max_steps and self.max_tokens:
            raise UserError("--trainer.max_steps and --trainer.max_tokens say the same thing; give one of them")
        if self.max_steps:
            return self.max_steps
        if self.max_tokens:
            return -(-self.max_tokens // tokens_per_step)
        if num_tokens < tokens_per_step:
            raise UserError(
                f"one pass over the {num_tokens:,} training tokens is less than a step of {tokens_per_step:,}; give "
                "--trainer.max_steps, or a smaller --trainer.global_batch_tokens"
            )
        return num_tokens // tokens_per_step


@dataclass(frozen=True)
class LoggerConfig:
    """Where curves go: to one of Lightning's loggers.

    Args:
        name: its class; of Lightning's own the last part will do, as WandbLogger or CSVLogger.
        arguments: its arguments; the folder is the run's unless save_dir is among them.
    """

    name: str = "TensorBoardLogger"
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self, run: Path) -> Logger:
        """Return the logger.

        Raises:
            UserError: there is no such class, its package is not installed, or it does not take these arguments.
        """
        known = [name for name in loggers.__all__ if name != "Logger"]
        if "." not in self.name and self.name not in known:
            raise UserError(f"--logger.name {self.name}: Lightning has no such logger; it has {', '.join(known)}")
        path = self.name if "." in self.name else f"lightning.pytorch.loggers.{self.name}"
        module, _, kind = path.rpartition(".")
        try:
            made = getattr(import_module(module), kind)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--logger.name {self.name}: {_reason(error)}; check the name") from error
        if not (isinstance(made, type) and issubclass(made, Logger)):
            raise UserError(f"--logger.name {self.name} is no logger of Lightning's; check the name")
        defaults: dict[str, Any] = {"save_dir": run}
        if kind == "TensorBoardLogger":  # right in the run's folder, where a resumed run goes on with it
            defaults |= {"name": None, "version": ""}
        taken = inspect.signature(made).parameters
        try:
            return made(**{key: value for key, value in defaults.items() if key in taken} | self.arguments)
        except Exception as error:  # of a missing package, of a wrong argument, of a service that cannot be reached
            raise UserError(f"--logger.name {self.name} does not start: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
