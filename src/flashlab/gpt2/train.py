"""Train GPT-2 with Lightning."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from flashlab.errors import UserError, replacing
from flashlab.gpt2 import huggingface
from flashlab.gpt2.config import flops_per_token, num_parameters
from flashlab.gpt2.data import Blocks
from flashlab.gpt2.hardware import peak_flops
from flashlab.gpt2.kernels import choose_kernels
from flashlab.gpt2.module import COMPUTED, GPTModule, TokensDataModule
from flashlab.gpt2.options import DataConfig, LoggerConfig, ModelConfig, OptimizerConfig, TrainerConfig
from flashlab.gpt2.tokenizer import VOCABULARY
from flashlab.gpt2.tokens import TokenSet, open_set
from flashlab.training.callbacks import Checkpoints, Speed
from flashlab.training.run import Run, plain
from flashlab.training.trainer import (
    choose_accelerator,
    choose_precision,
    make_trainer,
    quieten,
    why_no_compiler,
    why_not_compiled,
)
from flashlab.training.world import TIMEOUT, choose_size

if TYPE_CHECKING:
    Seed = int
else:
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


def train(
    *,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    model: ModelConfig = ModelConfig(),  # noqa: B008
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    trainer: TrainerConfig = TrainerConfig(),  # noqa: B008
    logger: LoggerConfig = LoggerConfig(),  # noqa: B008
    init: Path | None = None,
    run: Path = Path("runs/gpt2"),
    resume: bool = False,
    seed: Seed = 0,
) -> int:
    """Train GPT-2 on a token set.

    The run folder gets config.yaml, run.json, curves and checkpoints: best.ckpt (lowest validation loss) and last.ckpt.
    SIGTERM and Ctrl-C write last.ckpt and end the run; --resume goes on from there, block for block.

    Args:
        data: what is read.
        model: the shape.
        optimizer: how it learns.
        trainer: how long, and on what.
        logger: where curves go; TensorBoard files in the run folder by default.
        init: folder with weights in Hugging Face's GPT-2 format to begin with, instead of random ones.
        run: folder of the run.
        resume: continue the run in the folder from its last good checkpoint; start it if there is none.
        seed: of initial weights and order of blocks.

    Raises:
        UserError: the token set or the run folder cannot be used, a value is impossible, or the GPU is not there.
    """
    data, model, optimizer, trainer = plain(data), plain(model), plain(optimizer), plain(trainer)
    seed = int(seed)
    config: dict[str, Any] = {
        "data": asdict(data),
        "model": asdict(model),
        "optimizer": asdict(optimizer),
        "trainer": asdict(trainer),
        "logger": asdict(plain(logger)),
        "init": str(init) if init else None,
        "seed": seed,
    }
    devices, num_nodes = choose_size(trainer.devices, trainer.num_nodes)
    trainer = replace(trainer, devices=devices, num_nodes=num_nodes)
    world_size = devices * num_nodes
    tokens = open_set(data.path)
    this = Run.open(run, resume=resume)
    shape = model.shape(tokens.vocab_size)
    blocks, val_blocks = Blocks(tokens, "train", shape.block_size), Blocks(tokens, "validation", shape.block_size)
    if len(val_blocks) < world_size:
        raise UserError(
            f"{tokens.path}: the validation part has {len(val_blocks)} blocks of {shape.block_size:,} + 1 tokens for "
            f"{world_size} processes; take a smaller --model.block_size, or prepare more text"
        )
    accumulated = trainer.accumulated(data.batch_size, shape.block_size)
    tokens_per_step = accumulated * data.batch_size * shape.block_size * world_size
    max_steps = trainer.steps(tokens_per_step, len(blocks) * shape.block_size)
    if (warmup := optimizer.warmup(tokens_per_step)) >= max_steps:
        raise UserError(
            f"the warm-up of {warmup:,} steps is not shorter than the run of {max_steps:,}; lower "
            "--optimizer.warmup_steps or warmup_tokens, or train for longer"
        )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"--optimizer.min_lr {optimizer.min_lr} is above --optimizer.lr {optimizer.lr}; lower it")
    trained_on = tokens.manifest["folder"]
    begun_with = str(init.resolve()) if init else None
    how = [trainer.strategy, tokens_per_step, trainer.gradient_clip_val, begun_with, seed]
    kept = [{name: value for name, value in asdict(shape).items() if name not in COMPUTED}, config["optimizer"], how]
    if this.is_trained(trained_on, kept, max_steps, f"other tokens than {data.path} holds"):
        return 0
    accelerator = choose_accelerator(trainer.accelerator, devices)
    precision = choose_precision(trainer.precision, accelerator)
    if trainer.strategy == "fsdp" and world_size == 1:
        raise UserError("--trainer.strategy fsdp shares a model out among several devices; give --trainer.devices")
    compiled, why_not = _choose_compile(trainer, accelerator)
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}[precision]
    chosen = choose_kernels(shape, data.batch_size, device, dtype)
    curves = logger.make(run)

    quieten()
    torch.set_float32_matmul_precision("high")
    seed_everything(seed, workers=True, verbose=False)
    module = GPTModule(
        shape,
        optimizer,
        tokens.manifest["tokenizer"],
        trained_on,
        trainer.strategy,
        init=begun_with,
        chosen=chosen,
        batch_size=data.batch_size,
        max_steps=max_steps,
        tokens_per_step=tokens_per_step,
        gradient_clip_val=trainer.gradient_clip_val,
        compiled=compiled,
        seed=seed,
    )
    datamodule = TokensDataModule(
        blocks,
        val_blocks,
        batch_size=data.batch_size,
        accumulated=accumulated,
        max_steps=max_steps,
        val_batches=trainer.val_batches,
        seed=seed,
        num_workers=0 if tokens.is_local else 1,
    )
    checkpoint = this.last_good_checkpoint(module, datamodule, "tokens", COMPUTED) if resume else None
    if init is not None and checkpoint is None:
        huggingface.load(module.gpt, init)
    facts = {
        "parameters": num_parameters(shape),
        "attention_backend": chosen.backend,
        "loss": chosen.loss,
        "fused_mlp": chosen.fused_mlp,
        "residual_in_fp32": chosen.residual_in_fp32,
        "compiled": compiled,
        "tokens_per_step": tokens_per_step,
        "accumulated": accumulated,
        "trained_on": trained_on,
        "shape": kept,
    }
    with this.begun(config, facts) as record:
        if this.is_first:
            _keep_vocabulary(run, tokens)
        peak = peak_flops(torch.cuda.get_device_name(), precision) if accelerator == "gpu" else None
        peak_per_s = world_size * peak / flops_per_token(shape, shape.block_size) if peak else None
        speed = Speed("tokens", tokens_per_step, peak_per_s=peak_per_s)
        checkpoints = Checkpoints(run, trainer.checkpoint_every_n_steps, checkpoint)
        patience = trainer.early_stopping_patience
        lightning = make_trainer(
            run,
            trainer,
            max_steps,
            speed,
            checkpoints,
            [EarlyStopping("val/loss", patience=patience)] if patience else [],
            accelerator=accelerator,
            strategy=_strategy(trainer.strategy, world_size),
            precision=precision,
            inference_mode=False,  # which neither sharded nor compiled models take
            logger=curves,
        )
        this.say(
            f"{run}: {num_parameters(shape):,} parameters, {max_steps:,} steps of {tokens_per_step:,} tokens on "
            f"{world_size} {accelerator} (attention {chosen.backend}, loss {chosen.loss}; "
            f"{'compiled' if compiled else why_not}){f', resumed from {checkpoint}' if checkpoint else ''}"
        )
        started = time.perf_counter()
        if code := this.fit(lightning, module, datamodule, checkpoints, checkpoint):
            return code
    finished = this.finish(record, lightning, started, {})
    took = f", {finished['seconds']} s since it was resumed" if checkpoint else f" in {finished['seconds']} s"
    this.say(f"{run}: trained {finished['steps']:,} steps{took}, {_words(finished)}")
    return 0


def _choose_compile(trainer: TrainerConfig, accelerator: str) -> tuple[bool, str]:
    """Say whether the model is compiled, and if not why."""
    if trainer.compile is False:
        return False, "not compiled"
    if trainer.compile == "auto":
        why_not = why_not_compiled(accelerator)
        return why_not is None, f"not compiled: {why_not}"
    if why_not := why_no_compiler(accelerator):
        raise UserError(f"--trainer.compile true cannot run here: {why_not}; leave it at auto")
    return True, ""


def _strategy(name: str, world_size: int) -> Any:
    if world_size == 1:
        return "auto"
    timeout = 3 * TIMEOUT  # the first process writes checkpoints, of up to 32 GB, while the others wait
    if name == "fsdp":
        return ModelParallelStrategy(world_size, 1, save_distributed_checkpoint=False, timeout=timeout)
    return DDPStrategy(timeout=timeout, gradient_as_bucket_view=True)


def _keep_vocabulary(run: Path, tokens: TokenSet) -> None:
    """Keep the tokenizer's vocabulary beside the checkpoints, which are of no use without it."""
    if tokens.manifest["tokenizer"]["name"] != "bytes":
        with replacing(run / VOCABULARY) as partial:
            partial.write_bytes(tokens.read(f"{tokens.manifest['folder']}/{VOCABULARY}"))


def _words(finished: dict[str, Any]) -> str:
    """Say how it went."""
    words = []
    if finished["best_val_loss"] is not None:
        words.append(f"best validation loss {finished['best_val_loss']:.4f}")
    if "tokens_per_s" in finished:
        words.append(f"{finished['tokens_per_s']:,} tokens/s")
    if "mfu" in finished:
        words.append(f"MFU {finished['mfu']:.1%}")
    return ", ".join(words) or "no validation was reached"
