"""Measure what each optimised component of GPT-2's training gains, by switching it off.

    python examples/gpt2/ablation.py --out runs/gpt2_ablation.json

The first row has everything on. Every other row differs from the one that it names in one thing alone, and is a process
of its own. docs/gpt2.md says which component of flash-attn's training code each stands for.
"""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from training_step import METHOD, Job, measure, require_whole, shape, warn_without_gpu

from flashlab.attention.interface import require_name
from flashlab.cli import script
from flashlab.gpt2 import report
from flashlab.machine import check_result, provenance, write_result


def jobs(base: Job) -> dict[str, tuple[str | None, Job]]:
    """List the rows: name, the row that it is compared with, and the job."""
    config = base.config
    rotary = replace(base, config=replace(config, position="rotary"))
    dropout = replace(base, config=replace(config, dropout=0.1))
    first, chunked = "everything on", "fused cross-entropy: by torch.compile alone"
    found: dict[str, tuple[str | None, Job]] = {
        first: (None, base),
        "FlashAttention: standard attention instead": (
            first,
            replace(base, config=replace(config, backend="standard")),
        ),
        "fused linear + cross-entropy: all logits kept": (first, replace(base, config=replace(config, loss="full"))),
        chunked: (first, replace(base, config=replace(config, loss="chunked"))),
        "fused dense: GELU behind the product by torch.compile": (
            first,
            replace(base, config=replace(config, fused_mlp=False)),
        ),
        "q, k, v in one tensor: three gradients, put together": (first, replace(base, unfused=("qkv",))),
        "residual stream: in float32": (first, replace(base, config=replace(config, residual_in_fp32=True))),
        "vocabulary: not padded": (chunked, replace(base, padded=False, config=replace(config, loss="chunked"))),
        "AdamW: not fused": (first, replace(base, fused_adamw=False)),
        "activation checkpointing: on": (first, replace(base, config=replace(config, activation_checkpointing=True))),
    }
    if base.compiled:
        found |= {
            "fused residual + LayerNorm: LayerNorm by itself": (first, replace(base, unfused=("norm",))),
            "with dropout": (None, dropout),
            "fused dropout + residual + LayerNorm: each by itself": (
                "with dropout",
                replace(dropout, unfused=("norm",)),
            ),
            "with rotary positions": (None, rotary),
            "fused rotary: by itself": ("with rotary positions", replace(rotary, unfused=("rotary",))),
            "torch.compile: off": (first, replace(base, compiled=False)),
        }
    return found


def ablation(
    *,
    preset: str = "gpt2",
    length: PositiveInt = 1024,
    backend: str = "auto",
    tokens_per_step: PositiveInt = 2**16,
    steps: PositiveInt = 20,
    compiled: bool = torch.cuda.is_available(),
    out: Path = Path("runs/gpt2_ablation.json"),
) -> int:
    """Measure training steps with everything on, and with one thing after the other off.

    Args:
        preset: shape, see `flashlab.gpt2.config.PRESETS`; also tiny.
        length: tokens per sequence.
        backend: attention backend.
        tokens_per_step: tokens of an optimiser step.
        steps: how many are timed.
        compiled: compile the model by torch.compile; without it the rows of what that fuses are left out.
        out: result file.
    """
    require_whole(tokens_per_step, length)
    require_name(backend)
    check_result(out)
    config = shape(preset, block_size=length, backend=backend)
    base = Job(config, tokens_per_step=tokens_per_step, compiled=compiled, steps=steps)
    command = shlex.join(["python", "examples/gpt2/ablation.py", *sys.argv[1:]])
    record: dict[str, Any] = provenance("gpt2_ablation") | {"command": command, "method": METHOD, "preset": preset}
    rows: dict[str, dict[str, Any]] = {}
    warn_without_gpu()
    with TemporaryDirectory(prefix="flashlab-") as folder:
        for name, (against, job) in jobs(base).items():
            print(f"{name} ... ", end="", file=sys.stderr)
            row = {"row": name, "against": against, **measure(job, Path(folder) / "log")}
            before = rows.get(against or "", {})
            if row["status"] == before.get("status") == "ok":
                row["slower"] = round(row["ms_per_step"] / before["ms_per_step"] - 1, 4)
                if row["peak_memory_mib"] is not None:
                    row["more_memory_mib"] = row["peak_memory_mib"] - before["peak_memory_mib"]
            rows[name] = row
            write_result(out, record | {"rows": list(rows.values())})  # what was measured stays
    report.show(report.ablation(out))
    print(f"wrote {out}")
    return int(any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    script(ablation)
