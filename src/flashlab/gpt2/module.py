"""GPT-2 as Lightning trains it: loss, optimiser, schedule, and the tokens it is fed."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from flashlab.errors import UserError
from flashlab.gpt2.config import GPTConfig
from flashlab.gpt2.data import Blocks, OrderedBatches, ShuffledShards
from flashlab.gpt2.loss import IGNORED
from flashlab.gpt2.model import GPT
from flashlab.gpt2.options import OptimizerConfig
from flashlab.gpt2.tokenizer import VOCABULARY, Tokenizer, reload_tokenizer
from flashlab.training.batches import ResumedData, loader
from flashlab.training.callbacks import BEST
from flashlab.training.run import loading
from flashlab.training.trainer import adamw

# Options of `GPTConfig` that say how a model is computed, not what it is: a run may be resumed with others.
COMPUTED = ("backend", "loss", "fused_mlp", "residual_in_fp32", "activation_checkpointing")
# Blocks that fsdp gathers at once: one by one, a small batch would wait for the exchanges to be launched.
GATHERED = 4


class GPTModule(LightningModule):
    """GPT-2 with its optimiser. What tells one run from another stands in every checkpoint.

    A batch is all that a process computes for one step: it is cut into micro-batches here, so that for Lightning, its
    callbacks and its checkpoints there are steps and nothing between them.

    Args:
        config: the shape, as asked for.
        optimizer: how it learns.
        tokenizer: of the tokens, as its `describe` says.
        tokens: which tokens these are.
        strategy: ddp or fsdp; it decides how a checkpoint keeps the optimiser's state.
        init: folder of the weights that it began with; None for random ones.
        chosen: what the run has in place of auto in `config`.
        batch_size: sequences of a micro-batch.
        max_steps: of the whole run.
        tokens_per_step: of all processes.
        gradient_clip_val: largest norm of the gradient.
        compiled: whether torch.compile makes the kernels.
        seed: of dropout.
    """

    def __init__(
        self,
        config: GPTConfig,
        optimizer: OptimizerConfig,
        tokenizer: dict[str, Any],
        tokens: str,
        strategy: str,
        *,
        init: str | None,
        chosen: GPTConfig,
        batch_size: int,
        max_steps: int,
        tokens_per_step: int,
        gradient_clip_val: float,
        compiled: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        kept = {"model": asdict(config), "optimizer": asdict(optimizer), "tokenizer": tokenizer, "tokens": tokens}
        how = {"strategy": strategy, "tokens_per_step": tokens_per_step, "gradient_clip_val": gradient_clip_val}
        self.save_hyperparameters(kept | {"trainer": how | {"init": init}}, logger=False)
        self.gpt = GPT(chosen)
        self.config, self.strategy, self.compiled = optimizer, strategy, compiled
        self.batch_size, self.max_steps, self.tokens_per_step = batch_size, max_steps, tokens_per_step
        self.gradient_clip_val, self.seed = gradient_clip_val, seed

    def configure_model(self) -> None:
        """Compile the model, and share it out among the GPUs if that is the strategy."""
        if self.compiled:
            # DDP exchanges the gradients of a block during the backward pass of the one before; for that it need not
            # cut what is compiled, and cannot where there are operators of their own kind, as the loss is one.
            torch._dynamo.config.optimize_ddp = False
            self.gpt.compile_parts()
        if self.strategy == "fsdp":
            how: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}  # type: ignore[index]
            if self.trainer.precision == "bf16-mixed":  # gathered in 16 bits; rotary angles are not rounded to them
                how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            blocks = list(self.gpt.h)
            for first in range(0, len(blocks), GATHERED):
                fully_shard(blocks[first : first + GATHERED], **how)
            fully_shard(self.gpt, **how)

    def training_step(self, blocks: Tensor) -> None:
        trainer, optimizer = self.trainer, self.optimizers()
        step = trainer.global_step
        if self.gpt.config.dropout:  # arithmetic too: a resumed run drops the same, and no two processes do
            state = np.random.SeedSequence((self.seed, step, self.global_rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))
        rate = self.config.rate(step, self.max_steps, self.tokens_per_step)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate
        micro_batches = blocks.split(self.batch_size)
        total = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            loss = self.gpt(micro_batch[:, :-1], micro_batch[:, 1:]) / len(micro_batches)
            total += loss.detach()
            exchange = nullcontext() if number == len(micro_batches) else self._without_exchange()
            with exchange, torch.autocast(self.device.type, enabled=False):
                self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.gradient_clip_val, foreach=True)
        optimizer.step()  # type: ignore[union-attr]
        # DDP keeps the memory of gradients to exchange them; were they None, the next batches would take it again.
        optimizer.zero_grad(set_to_none=not isinstance(trainer.strategy, DDPStrategy))  # type: ignore[union-attr]
        if (step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # Not for the bar: Lightning would read it at every step.
            self.log("train/loss", total, sync_dist=True)
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
            self.log("train/lr", rate)

    def _without_exchange(self) -> AbstractContextManager[Any]:
        """Keep gradients in this process: of several micro-batches they are exchanged once (by fsdp, each time)."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def on_validation_epoch_start(self) -> None:
        self._seen = torch.zeros(2, device=self.device, dtype=torch.float64)

    def validation_step(self, blocks: Tensor) -> None:
        # The last batch is filled up, so that all have one shape and none is compiled anew.
        targets = F.pad(blocks[:, 1:], (0, 0, 0, self.batch_size - len(blocks)), value=IGNORED)
        inputs = F.pad(blocks[:, :-1], (0, 0, 0, self.batch_size - len(blocks)))
        self._seen += torch.stack([self.gpt(inputs, targets).double(), self._seen.new_ones(())]) * len(blocks)

    def on_validation_epoch_end(self) -> None:
        total, count = self.trainer.strategy.reduce(self._seen, reduce_op="sum")
        self.log("val/loss", (total / count).float(), sync_dist=True)  # equal in all processes, but Lightning asks
        self.log("val/perplexity", (total / count).exp().float(), sync_dist=True)
        if isinstance(self.gpt, FSDPModule):
            self.gpt.reshard()  # a backward pass would have done it

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self, self.config.lr, self.config.weight_decay, self.config.betas)


class TokensDataModule(ResumedData):
    """Training and validation blocks of a token set.

    Args:
        train: blocks of the training part.
        validation: blocks of the validation part.
        batch_size: sequences of a micro-batch.
        accumulated: micro-batches of a step.
        max_steps: of the whole run.
        val_batches: micro-batches of a validation, of all processes together; None for all.
        seed: of the order.
        num_workers: processes that load.
    """

    def __init__(
        self,
        train: Blocks,
        validation: Blocks,
        *,
        batch_size: int,
        accumulated: int,
        max_steps: int,
        val_batches: int | None,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__(ShuffledShards(train.per_shard, seed), batch_size * accumulated, max_steps)
        self.train, self.validation, self.num_workers = train, validation, num_workers
        self.val_batch_size, self.val_batches = batch_size, val_batches

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self._load(self.train, self.train_batches())

    def val_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        count, rank, ranks = len(self.validation), self.trainer.global_rank, self.trainer.world_size
        if self.val_batches is not None:
            count = min(count, max(self.val_batches * self.val_batch_size, ranks))
        batches = OrderedBatches(count, self.val_batch_size, rank=rank, world_size=ranks)
        return self._load(self.validation, batches)

    def _load(self, blocks: Blocks, batches: Any) -> DataLoader[Tensor]:
        assert self.trainer is not None
        pinned = self.trainer.strategy.root_device.type == "cuda"
        return loader(blocks, batches, num_workers=self.num_workers, prefetch=8, pin_memory=pinned)


def load_gpt(run: Path, checkpoint: str = BEST) -> tuple[GPT, Tokenizer]:
    """Load a trained model and its tokenizer, without executing what the files may hold.

    The model is in evaluation mode, on the CPU, and chooses its attention backend by itself.

    Args:
        run: folder of the run.
        checkpoint: file in its checkpoints.

    Raises:
        UserError: there is no checkpoint, it is damaged or of another shape, or the vocabulary is not its own.
    """
    path = run / "checkpoints" / checkpoint
    with loading(path, "flashlab gpt2 train"):
        kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "tokenizer" not in kept["hyper_parameters"]:
            raise UserError(f"{path} was not written by `flashlab gpt2 train`; give the folder of a run of that")
        described = kept["hyper_parameters"]["tokenizer"]
        how = {"backend": "auto", "loss": "auto", "activation_checkpointing": False, "dropout": 0.0}
        with torch.device("meta"):  # no weights are drawn, to be replaced at once
            model = GPT(GPTConfig(**kept["hyper_parameters"]["model"] | how))
        weights = {name.removeprefix("gpt."): weight for name, weight in kept["state_dict"].items()}
        model.load_state_dict(weights, assign=True)
    vocabulary = run / VOCABULARY
    try:
        tokenizer = reload_tokenizer(described, vocabulary.read_bytes, str(vocabulary), of=str(path))
    except OSError as error:
        raise UserError(
            f"cannot read {vocabulary}: {error.strerror}; copy it from the token set that the run was trained on"
        ) from error
    return model.eval(), tokenizer
