"""Train the forecaster with Lightning."""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import yaml
from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_number_type
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import is_torchelastic_launched

from flashlab.attention import AttentionSpec, resolve
from flashlab.btc.callbacks import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    AverageWeights,
    BestCheckpoint,
    Checkpoints,
    Progress,
    ProgressLines,
    Speed,
    Stopped,
)
from flashlab.btc.captured import Replicas
from flashlab.btc.dataset import DataConfig
from flashlab.btc.model import WARM_UP, ModelConfig
from flashlab.btc.module import BarsDataModule, ForecasterModule, OptimizerConfig, one_line
from flashlab.btc.prepare import BAR_BYTES, PreparedSet, open_set
from flashlab.btc.profile import FIRST_STEP, STEPS, Profile
from flashlab.btc.windows import part_windows
from flashlab.btc.world import TIMEOUT, SameStart, choose_size, lost_peers
from flashlab.errors import UserError, alone_in, write_text, writing
from flashlab.machine import git_commit, identify, memory

Section = TypeVar("Section", DataConfig, ModelConfig, OptimizerConfig, "TrainerConfig")
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
            one, and is all that a CPU can do; auto is captured on one GPU.
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
    data, model, optimizer, trainer, seed = _plain(data), _plain(model), _plain(optimizer), _plain(trainer), int(seed)
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
    record_path = run / "run.json"
    # Of the processes that train together, each of which runs this function, one writes and speaks.
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    say = print if is_first else lambda *args, **kwargs: None
    with writing(run):
        exists = record_path.exists() or (run / "checkpoints").exists()
    if is_first and exists and not resume:
        raise UserError(f"{run} holds a run already; add --resume to continue it, or choose another --run")
    if exists and resume:
        before = read_record(run)
        if (finished := before.get("finished")) is not None:
            if before.get("trained_on") != _fingerprint(prepared):
                raise UserError(f"{run} was trained on other bars than {data.path} holds; choose another --run")
            if before.get("shape") != [config["model"], config["optimizer"]]:
                raise UserError(f"{run} was trained with other model or optimizer options; choose another --run")
            say(f"{run} is trained already ({finished['steps']:,} steps); choose another --run to train anew")
            return 0
    accelerator = _choose_accelerator(trainer)
    precision = _choose_precision(trainer, accelerator)
    check_context(prepared, data.context_length)
    _check(prepared, data, model)
    backend = _resolve_backend(model, data, accelerator, precision)
    captured, why_plain = _choose_step(trainer, accelerator, precision)
    data, where = _choose_place(prepared, data, accelerator, captured)
    resident = captured and not data.stream
    datamodule = BarsDataModule(prepared, data, trainer.max_steps, seed, resident=resident)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # between Lightning and torch
    torch.set_float32_matmul_precision("high")
    seed_everything(seed, workers=True, verbose=False)
    module = make_module(config, prepared)
    module.captured = captured
    for block in module.forecaster.blocks:
        block.backend = backend  # type: ignore[assignment]
    checkpoint = _last_good_checkpoint(run, module) if resume else None
    record: dict[str, Any] = {
        "schema_version": 1,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git_commit(),
        "machine": identify(),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "attention_backend": backend,
        "trained_on": _fingerprint(prepared),
        "shape": [config["model"], config["optimizer"]],
    }
    alone = ExitStack()
    if is_first:
        busy = "is being trained by another process; wait for it, or choose another --run"
        alone.enter_context(alone_in(run, busy))
        write_text(run / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_text(record_path, json.dumps(record, indent=1))

    checkpoints = Checkpoints(run, trainer.checkpoint_every_n_steps, checkpoint)
    best, early_stopping = BestCheckpoint(run), EarlyStopping("val/loss", patience=trainer.early_stopping_patience)
    has_bar = sys.stdout.isatty()
    progress = Progress(refresh_rate=trainer.log_every_n_steps) if has_bar else ProgressLines()
    world_size = trainer.devices * trainer.num_nodes
    skipped = FIRST_STEP + STEPS if trainer.profile else 0
    speed = Speed(data.batch_size * data.context_length * world_size, skipped)
    callbacks: list[Callback] = [best, progress, speed]
    if optimizer.average_decay:
        callbacks.append(AverageWeights(optimizer.average_decay))
    callbacks += [early_stopping, checkpoints, SameStart(run)]
    if trainer.profile:
        callbacks.append(Profile(run))
    lightning = Trainer(
        accelerator=accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=(Replicas if captured else DDPStrategy)(timeout=TIMEOUT) if world_size > 1 else "auto",
        precision=precision,
        max_epochs=1,  # of EndlessBatches, whose one pass is the whole run: steps count, not epochs
        max_steps=trainer.max_steps,
        val_check_interval=min(trainer.val_every_n_steps, trainer.max_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=trainer.log_every_n_steps,
        gradient_clip_val=trainer.gradient_clip_val,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(run, name=None, version="", default_hp_metric=False),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_progress_bar=has_bar,
    )
    say(
        f"{run}: {record['parameters']:,} parameters, {lightning.max_steps:,} steps on {accelerator} ({where}; "
        f"{why_plain or 'steps captured'}){f', resumed from {checkpoint}' if checkpoint else ''}"
    )
    started = time.perf_counter()
    # Under torchrun a process may wait for others that do not come: until training starts, a signal ends it at once.
    handlers = {} if is_torchelastic_launched() else checkpoints.listen()
    hook = threading.excepthook
    threading.excepthook = _hide_os_errors
    try:
        with warnings.catch_warnings(), writing(run), lost_peers(run):
            for idle in (
                "dataloader .*(workers|resumable)",
                "Checkpoint directory .* not empty",
                "number of training batches",
                "capturable=True",  # the first steps are not captured
            ):
                warnings.filterwarnings("ignore", f".*{idle}")
            lightning.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Stopped:
        asked = signal.Signals(checkpoints.signal or signal.SIGTERM)
        say(
            f"{run}: stopped by {asked.name} at step {lightning.global_step:,}; continue with --resume",
            file=sys.stderr,
        )
        # Lightning kills the first of several when another ends with a code; torchrun takes 0 for the end of the run.
        return 128 + asked if is_first or is_torchelastic_launched() else 0
    finally:
        alone.close()
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if early_stopping.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
        raise UserError(
            f"{run}: the validation loss is not finite at step {lightning.global_step:,}; start another --run with a "
            "lower --optimizer.lr"
        )
    record["finished"] = {
        "steps": lightning.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "best_val_loss": float(best.best_model_score) if best.best_model_score is not None else None,
        "precision": lightning.precision,
        "step": "captured" if captured else "plain",
        **speed.summary(),
    }
    if accelerator == "gpu":
        record["finished"]["peak_memory_mib"] = round(torch.cuda.max_memory_reserved() / 2**20)
    if is_first:
        write_text(record_path, json.dumps(record, indent=1))
    say(
        f"{run}: trained {lightning.global_step:,} steps in {record['finished']['seconds']} s; "
        f"score it with `flashlab evaluate {run}`"
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


def _last_good_checkpoint(run: Path, module: ForecasterModule) -> Path | None:
    """Find the newest checkpoint that loads, and make sure that it is of this module."""
    damaged = []
    for path in (run / "checkpoints" / LAST, run / "checkpoints" / PREVIOUS):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            trained_with = {name: checkpoint["hyper_parameters"][name] for name in module.hparams}
            checkpoint["state_dict"], checkpoint["loops"], checkpoint["optimizer_states"]
            checkpoint[BarsDataModule.__name__]
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged file fails in as many ways as there are bytes
            damaged.append(f"{path} is damaged ({one_line(error)})")
            continue
        for section, before in trained_with.items():
            now = module.hparams[section]
            if before != now:
                what = "other bars"
                if isinstance(now, dict):
                    key = next(key for key in now if before.get(key) != now[key])
                    what = f"{section}.{key} {before.get(key)}, this asks for {now[key]}"
                raise UserError(
                    f"{path} was trained with {what}; resume with {run / 'config.yaml'}, or choose another --run"
                )
        for line in damaged:
            print(f"{line}; going on from {path.name}", file=sys.stderr)
        return path
    if damaged:
        raise UserError(f"{damaged[0]}, and there is no good one before it; choose another --run to start anew")
    return None


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


def _fingerprint(prepared: PreparedSet) -> dict[str, Any]:
    """Tell one prepared set from another that holds other bars, or splits them otherwise."""
    manifest = prepared.manifest
    sources = [source["sha256"] for source in manifest["cleaning"]["sources"]]
    return {"sources": sources, "missing": manifest["missing"], "split": manifest["split"]}


def _choose_accelerator(config: TrainerConfig) -> str:
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--trainer.accelerator gpu: torch sees no GPU here; `flashlab doctor` says why")
    if config.accelerator != "cpu" and torch.cuda.is_available():
        if config.devices > torch.cuda.device_count():
            raise UserError(f"--trainer.devices {config.devices}: this machine has {torch.cuda.device_count()} GPU(s)")
        return "gpu"
    return "cpu"


def _resolve_backend(model: ModelConfig, data: DataConfig, accelerator: str, precision: str) -> str:
    """Choose the attention backend once for the whole run."""
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    length, heads = data.context_length, model.num_heads
    shape = (data.batch_size, length, length, heads, heads, model.width // heads)
    return resolve(model.backend, AttentionSpec(*shape, dtype, device, causal=True, needs_grad=True))


def _choose_precision(config: TrainerConfig, accelerator: str) -> Any:
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if accelerator == "gpu" and torch.cuda.is_bf16_supported() else "32-true"


def _choose_step(config: TrainerConfig, accelerator: str, precision: str) -> tuple[bool, str]:
    """Say whether steps are captured, and if not why."""
    why_not = None
    if accelerator != "gpu":
        why_not = "there is no GPU"
    elif precision == "16-mixed":
        why_not = "a scaled loss needs the host at every step"
    elif not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "cc", "clang")))):
        why_not = "torch.compile finds no C compiler (install gcc)"
    if config.step == "captured" and why_not:
        raise UserError(f"--trainer.step captured cannot run here: {why_not}; leave it at auto")
    if config.step == "auto" and config.devices * config.num_nodes > 1:
        why_not = why_not or "on several GPUs captured steps are not measured yet (--trainer.step captured tries them)"
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


def _hide_os_errors(args: threading.ExceptHookArgs) -> None:
    """Let TensorBoard's writing thread fail in silence: what it met is raised again where the next value is logged."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def read_record(run: Path) -> dict[str, Any]:
    """Read a run's run.json."""
    try:
        return json.loads((run / "run.json").read_text())
    except (FileNotFoundError, ValueError):  # killed before or while it was written
        return {}


def _plain(section: Section) -> Section:
    """Turn jsonargparse's numbers and tuples into what YAML and a checkpoint without pickled code can hold."""
    return type(section)(**json.loads(json.dumps(asdict(section))))
