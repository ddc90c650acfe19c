"""One training step of GPT-2, timed in a process of its own: what bench.py and ablation.py have in common."""

import gc
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashlab.attention import attention
from flashlab.errors import UserError
from flashlab.gpt2 import config as config_module
from flashlab.gpt2 import model as model_module
from flashlab.gpt2.config import GPTConfig, flops_per_token, num_parameters, preset
from flashlab.gpt2.hardware import peak_flops
from flashlab.gpt2.kernels import choose_kernels
from flashlab.gpt2.model import GPT
from flashlab.worker import Worker, WorkerLost

Row = dict[str, Any]
LIMIT_S = 900.0
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=257)  # for a test on a CPU
METHOD = {
    "step": "random tokens; forward and backward pass of all micro-batches, gradients clipped to norm 1, AdamW; "
    "bfloat16 by autocast on a GPU, float32 on a CPU",
    "ran": "what stood in place of auto",
    "ms_per_step": "median of the timed steps by the GPU's clock; as in training none waits for the GPU to end the one "
    "before; compiling and first steps do not count",
    "batch_size": "sequences in a micro-batch: those of a step, halved until they fit into memory",
    "mfu": "tokens_per_s times PaLM's count of operations per token, over the GPU's peak, peak_tflops",
    "peak_memory_mib": "the most that torch's allocator had given out, weights and optimiser included; none on a CPU",
}


@dataclass(frozen=True)
class Job:
    """What is timed.

    Args:
        config: shape of the model; block_size is the length of the sequences.
        implementation: flashlab, or transformers (whose attention is then config.backend: eager or sdpa).
        tokens_per_step: tokens of an optimiser step.
        compiled: the model is compiled by torch.compile.
        fused_adamw: AdamW is one kernel.
        padded: the table of tokens is padded.
        unfused: what is to be done apart: norm (with dropout) and rotary, which torch.compile must leave alone, and
            qkv, whose gradient is then put together from three.
        steps: how many are timed.
    """

    config: GPTConfig
    implementation: str = "flashlab"
    tokens_per_step: int = 2**16
    compiled: bool = True
    fused_adamw: bool = True
    padded: bool = True
    unfused: tuple[str, ...] = ()
    steps: int = 20


def shape(name: str, **changes: Any) -> GPTConfig:
    """Return a preset, or tiny, with what is to differ from it.

    Raises:
        UserError: there is no such preset, or no model can have this shape.
    """
    return replace(TINY, **changes) if name == "tiny" else preset(name, **changes)


def require_whole(tokens_per_step: int, length: int) -> None:
    """Refuse a step that sequences of a length do not fill.

    Raises:
        UserError: the tokens of a step are no multiple of the length.
    """
    if tokens_per_step % length:
        raise UserError(f"--tokens_per_step {tokens_per_step:,} is no multiple of the length {length:,}")


def warn_without_gpu() -> None:
    """Say beforehand what a measurement takes that is made for GPUs."""
    if not torch.cuda.is_available():
        minutes = f"{LIMIT_S / 60:.0f} minutes"
        print(
            f"there is no GPU: a row of any preset but tiny may take {minutes}, after which it is ended",
            file=sys.stderr,
        )


def measure(job: Job, log: Path) -> Row:
    """Time a job in a process of its own, and say why where that is not possible."""
    worker = Worker(log)
    try:
        figures = worker.call(train, job, timeout_s=LIMIT_S)
    except WorkerLost as error:
        figures = {"status": "failed", "reason": str(error)}
    except Exception as error:  # whatever it is, the others are still measured
        figures = {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        worker.stop()
    print(figures.get("reason") or f"{figures['tokens_per_s']:,} tokens/s", file=sys.stderr)
    compiled = job.compiled and job.implementation == "flashlab"
    return {**asdict(job.config), "tokens_per_step": job.tokens_per_step, "compiled": compiled, **figures}


def train(job: Job) -> Row:
    """Time steps with the largest micro-batch that fits."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = job.tokens_per_step // job.config.block_size
    if batch_size < 1 or job.tokens_per_step % job.config.block_size:
        raise ValueError(f"{job.tokens_per_step} tokens are no whole number of {job.config.block_size}")
    while True:
        try:
            return _train(job, batch_size, place)
        except torch.OutOfMemoryError:
            if batch_size % 2:
                raise
        batch_size //= 2
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _train(job: Job, batch_size: int, place: torch.device) -> Row:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    length, vocab_size = job.config.block_size, job.config.vocab_size
    config = job.config
    if job.implementation == "flashlab":
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        config = choose_kernels(config, batch_size, place, dtype)
    with place:
        model, loss_of = theirs(config) if job.implementation == "transformers" else ours(job, config)
    model.train()
    settings = {"fused": True} if job.fused_adamw else {"foreach": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **settings)
    tokens = torch.randint(vocab_size, (job.tokens_per_step // length, length + 1), device=place)
    parts = tokens.split(batch_size)
    autocast = torch.autocast("cuda", torch.bfloat16) if place.type == "cuda" else nullcontext()

    def step() -> None:
        for part in parts:
            with autocast:
                loss = loss_of(part[:, :-1], part[:, 1:]) / len(parts)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds(step, place, times=3)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(step, place, job.steps)
    tokens_per_s = job.tokens_per_step / taken
    peak = peak_flops(torch.cuda.get_device_name(), "bf16-mixed") if place.type == "cuda" else None
    model_flops = tokens_per_s * flops_per_token(job.config, length)
    return {
        "status": "ok",
        "reason": None,
        "ran": {name: getattr(config, name) for name in ("backend", "loss", "fused_mlp")}
        if job.implementation == "flashlab"
        else None,
        "parameters": num_parameters(job.config),
        "batch_size": batch_size,
        "ms_per_step": round(taken * 1e3, 3),
        "tokens_per_s": round(tokens_per_s),
        "model_tflops_per_s": round(model_flops / 1e12, 3),
        "peak_tflops": peak / 1e12 if peak else None,
        "mfu": round(model_flops / peak, 4) if peak else None,
        "peak_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20) if place.type == "cuda" else None,
    }


def ours(job: Job, config: GPTConfig) -> tuple[nn.Module, Any]:
    """Return this project's model, and its loss of tokens and targets, as `flashlab gpt2 train` computes it."""
    if not job.padded:
        config_module.PAD_TO = 1
    model = GPT(config)
    if "norm" in job.unfused:
        alone = (nn.LayerNorm, nn.RMSNorm, *([nn.Dropout] if config.dropout else []))
        for module in model.modules():
            if isinstance(module, alone):
                module.forward = torch.compiler.disable(module.forward)
    if "rotary" in job.unfused:
        model_module.rotate = torch.compiler.disable(model_module.rotate)
    if "qkv" in job.unfused:
        model_module.attention_qkvpacked = lambda qkv, **options: attention(*qkv.unbind(2), **options)
    if job.compiled:
        model.compile_parts()
    return model, model


def theirs(config: GPTConfig) -> tuple[nn.Module, Any]:
    """Return transformers' GPT-2 as its documentation trains it, and its loss."""
    import transformers

    settings = transformers.GPT2Config(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_positions=config.block_size,
        vocab_size=config.vocab_size,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation=config.backend,
    )
    model = transformers.GPT2LMHeadModel(settings)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(tokens).logits.float().flatten(0, 1), targets.flatten())

    return model, loss_of


def seconds(step: Any, place: torch.device, times: int) -> float:
    """Return the median time of steps, none of which waits for the GPU to end the one before."""
    if place.type == "cpu":
        clocks = [perf_counter()]
        for _ in range(times):
            step()
            clocks.append(perf_counter())
        return median(after - before for before, after in pairwise(clocks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return median(before.elapsed_time(after) / 1e3 for before, after in pairwise(events))
