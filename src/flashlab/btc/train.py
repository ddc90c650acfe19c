"""Train the forecaster with Lightning."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_number_type
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from flashlab.attention import AttentionSpec, resolve
from flashlab.btc.callbacks import AverageWeights
from flashlab.btc.captured import Replicas
from flashlab.btc.dataset import DataConfig
from flashlab.btc.model import WARM_UP, ModelConfig
from flashlab.btc.module import BarsDataModule, ForecasterModule, OptimizerConfig
from flashlab.btc.prepare import BAR_BYTES, PreparedSet, open_set
from flashlab.btc.profile import FIRST_STEP, STEPS, Profile
from flashlab.btc.windows import part_windows
from flashlab.errors import UserError
from flashlab.machine import memory
from flashlab.training.callbacks import Checkpoints, Speed
from flashlab.training.run import Run, plain
from flashlab.training.trainer import choose_accelerator, choose_precision, make_trainer, quieten, why_not_compiled
from flashlab.training.world import TIMEOUT, choose_size

if TYPE_CHECKING:
    TwoOrMore = int
    Seed = int
else:
    TwoOrMore = restricted_number_type("TwoOrMore", int, (">=", 2))
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what, and how often things are looked at.

    Args:
        max_steps: optimiser steps.
        val_every_n_steps: steps from one validation to the next, two or more: checkpoints are written between them.
        checkpoint_every_n_steps: steps from one periodic checkpoint to the next.
        log_every_n_steps: steps from one TensorBoard point to the next.
        early_stopping_patience: validations without a better loss after which training ends.
        gradient_clip_val: largest norm of the gradient.
        accelerator: cpu, gpu (an error if there is none), or auto.
        devices: how many GPUs, or processes on the CPU.
        num_nodes: how many machines.
        precision: of Lightning; auto is bf16-mixed on a GPU and 32-true on a CPU.
        step: captured compiles the step and replays it as one CUDA graph; plain lets the host launch its kernels one by
            one, and is all that a CPU can do; auto is captured on a GPU.
        profile: write a profile of some steps into the run folder: what the kernels are, and how long each takes.
    """

    max_steps: PositiveInt = 3000
    val_every_n_steps: TwoOrMore = 250
    checkpoint_every_n_steps: PositiveInt = 100
    log_every_n_steps: PositiveInt = 10
    early_stopping_patience: PositiveInt = 6
    gradient_clip_val: PositiveFloat = 0.5
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    step: Literal["auto", "captured", "plain"] = "auto"
    profile: bool = False


def train(
    *,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    model: ModelConfig = ModelConfig(),  # noqa: B008
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    trainer: TrainerConfig = TrainerConfig(),
    run: Path = Path("runs/btc"),
    resume: bool = False,
    seed: Seed = 0,
) -> int:
    """Train the minute-bar forecaster on a prepared set.

    The run folder gets config.yaml, run.json, TensorBoard logs and checkpoints: best.ckpt (lowest validation loss) and
    last.ckpt. SIGTERM and Ctrl-C write last.ckpt and end the run; --resume goes on from there, batch for batch.

    Args:
        data: what is read.
        model: the forecaster's shape.
        optimizer: how it learns.
        trainer: how long, and on what.
        run: folder of the run.
        resume: continue the run in the folder from its last good checkpoint; start it if there is none.
        seed: of initial weights and order of windows.

    Raises:
        UserError: the prepared set or the run folder cannot be used, a value is impossible, or the GPU is not there.
    """
    data, model, optimizer, trainer, seed = plain(data), plain(model), plain(optimizer), plain(trainer), int(seed)
    config: dict[str, Any] = {
        "data": asdict(data),
        "model": asdict(model),
        "optimizer": asdict(optimizer),
        "trainer": asdict(trainer),
        "seed": seed,
    }
    devices, num_nodes = choose_size(trainer.devices, trainer.num_nodes)
    trainer = replace(trainer, devices=devices, num_nodes=num_nodes)
    prepared = open_set(data.path)
    this = Run.open(run, resume=resume)
    trained_on, shape = fingerprint(prepared), [config["model"], config["optimizer"]]
    if this.is_trained(trained_on, shape, trainer.max_steps, f"other bars than {data.path} holds"):
        return 0
    accelerator = choose_accelerator(trainer.accelerator, trainer.devices)
    precision = choose_precision(trainer.precision, accelerator)
    check_context(prepared, data.context_length)
    _check(prepared, data, model)
    backend = _resolve_backend(model, data, accelerator, precision)
    captured, why_plain = _choose_step(trainer, accelerator, precision)
    data, where = _choose_place(prepared, data, accelerator, captured)
    resident = captured and not data.stream
    datamodule = BarsDataModule(prepared, data, trainer.max_steps, seed, resident=resident)

    quieten()
    torch.set_float32_matmul_precision("high")
    seed_everything(seed, workers=True, verbose=False)
    module = make_module(config, prepared)
    module.captured = captured
    for block in module.forecaster.blocks:
        block.backend = backend  # type: ignore[assignment]
    checkpoint = this.last_good_checkpoint(module, datamodule, "bars") if resume else None
    facts = {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "attention_backend": backend,
        "trained_on": trained_on,
        "shape": shape,
    }
    with this.begun(config, facts) as record:
        checkpoints = Checkpoints(run, trainer.checkpoint_every_n_steps, checkpoint)
        world_size = trainer.devices * trainer.num_nodes
        skipped = FIRST_STEP + STEPS if trainer.profile else 0
        bars_per_step = data.batch_size * data.context_length * world_size
        callbacks: list[Callback] = [EarlyStopping("val/loss", patience=trainer.early_stopping_patience)]
        if optimizer.average_decay:
            callbacks.insert(0, AverageWeights(optimizer.average_decay))
        if trainer.profile:
            callbacks.append(Profile(run))
        lightning = make_trainer(
            run,
            trainer,
            trainer.max_steps,
            Speed("bars", bars_per_step, skip=skipped),
            checkpoints,
            callbacks,
            accelerator=accelerator,
            strategy=(Replicas if captured else DDPStrategy)(timeout=TIMEOUT) if world_size > 1 else "auto",
            precision=precision,
            gradient_clip_val=trainer.gradient_clip_val,
            logger=TensorBoardLogger(run, name=None, version="", default_hp_metric=False),
        )
        this.say(
            f"{run}: {facts['parameters']:,} parameters, {lightning.max_steps:,} steps on {accelerator} ({where}; "
            f"{why_plain or 'steps captured'}){f', resumed from {checkpoint}' if checkpoint else ''}"
        )
        started = time.perf_counter()
        if code := this.fit(lightning, module, datamodule, checkpoints, checkpoint):
            return code
    finished = this.finish(record, lightning, started, {"step": "captured" if captured else "plain"})
    best = finished["best_val_loss"]
    this.say(
        f"{run}: trained {finished['steps']:,} steps in {finished['seconds']} s"
        f"{f', best validation loss {best:.4f}' if best is not None else ''}; score it with `flashlab evaluate {run}`"
    )
    return 0


def make_module(config: dict[str, Any], prepared: PreparedSet) -> ForecasterModule:
    """Return the untrained module of a run's options."""
    return ForecasterModule(
        config["model"],
        config["optimizer"],
        prepared.scaler.mean,
        prepared.scaler.std,
        prepared.manifest["missing"]["mask_filled"],
    )


def fingerprint(prepared: PreparedSet) -> dict[str, Any]:
    """Tell one prepared set from another that holds other bars, or splits them otherwise."""
    manifest = prepared.manifest
    sources = [source["sha256"] for source in manifest["cleaning"]["sources"]]
    return {"sources": sources, "missing": manifest["missing"], "split": manifest["split"]}


def check_context(prepared: PreparedSet, context_length: int) -> None:
    """Refuse a context length that the set was not split for.

    Raises:
        UserError: it is longer than the gap between the parts, or not that of the windows dealt out at random.
    """
    split = prepared.manifest["split"]
    longest = split["context_length"]
    if context_length > longest or (split["kind"] == "seed" and context_length != longest):
        raise UserError(
            f"--data.context_length {context_length} does not fit {prepared.path}, which was split for windows of "
            f"{longest}; prepare it with --context_length {context_length}"
        )


def _check(prepared: PreparedSet, data: DataConfig, model: ModelConfig) -> None:
    """Refuse what cannot work before anything is written."""
    if model.width % model.num_heads or (model.width // model.num_heads) % 2:
        raise UserError(f"--model.num_heads {model.num_heads} must divide --model.width {model.width} into even parts")
    if data.context_length <= WARM_UP:
        raise UserError(
            f"--data.context_length {data.context_length} is too short: the first {WARM_UP} bars only warm up"
        )
    if data.mirror and model.frame == "level":
        raise UserError("--data.mirror true needs --model.frame relative: a mirrored price has another level")
    for part in ("train", "validation"):
        if not len(part_windows(prepared.manifest, part, data.context_length, data.stride)):
            raise UserError(
                f"{prepared.path}: the {part} part has no window of {data.context_length} bars; prepare more bars"
            )


def _resolve_backend(model: ModelConfig, data: DataConfig, accelerator: str, precision: str) -> str:
    """Choose the attention backend once for the whole run."""
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    length, heads = data.context_length, model.num_heads
    shape = (data.batch_size, length, length, heads, heads, model.width // heads)
    return resolve(model.backend, AttentionSpec(*shape, dtype, device, causal=True, needs_grad=True))


def _choose_step(config: TrainerConfig, accelerator: str, precision: str) -> tuple[bool, str]:
    """Say whether steps are captured, and if not why."""
    why_not = why_not_compiled(accelerator)
    if accelerator == "gpu" and precision == "16-mixed":
        why_not = "a scaled loss needs the host at every step"
    if config.step == "captured" and why_not:
        raise UserError(f"--trainer.step captured cannot run here: {why_not}; leave it at auto")
    if config.step == "plain":
        return False, "steps launched one by one"
    return why_not is None, f"steps launched one by one: {why_not}" if why_not else ""


def _choose_place(prepared: PreparedSet, data: DataConfig, accelerator: str, captured: bool) -> tuple[DataConfig, str]:
    """Decide where the series lies while it is trained on, and say it in a few words."""
    size = prepared.manifest["bars"] * BAR_BYTES
    if accelerator == "gpu" and captured:
        place, free = "GPU", torch.cuda.mem_get_info()[0]
    else:
        place, free = "memory", memory()["available_gib"] * 2**30
    stream = size > free / 2 if data.stream == "auto" else data.stream
    where = f"{size / 1e6:,.0f} MB of bars " + (f"streamed from {prepared.path}" if stream else f"in the {place}")
    return replace(data, stream=stream), where.replace("the memory", "memory")
