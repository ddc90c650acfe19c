"""Measure how fast GPT-2 trains here: tokens per second, model FLOPs utilisation and memory, beside transformers.

    python examples/gpt2/bench.py --out runs/gpt2_bench.json

Every row is a process of its own. Tokens per step are equal in all rows, whatever the length of the sequences.
"""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from training_step import METHOD, Job, measure, require_whole, shape, warn_without_gpu

from flashlab.attention.interface import require_name
from flashlab.cli import script
from flashlab.errors import replacing
from flashlab.gpt2 import report
from flashlab.machine import check_result, provenance, write_result

LENGTHS = [1024, 2048, 4096, 8192]
BACKENDS = ["standard", "flash_attention_2", "auto"]
CLAIM = "Dao et al. (2022), abstract: GPT-2 at length 1024 trains 3 times as fast as Hugging Face's implementation"


def bench(
    *,
    presets: list[str] = ["gpt2"],  # noqa: B006 - not changed
    lengths: list[PositiveInt] = LENGTHS,
    backends: list[str] = BACKENDS,
    hugging_face: list[str] = ["eager", "sdpa"],  # noqa: B006
    tokens_per_step: PositiveInt = 2**16,
    steps: PositiveInt = 20,
    compiled: bool = torch.cuda.is_available(),
    dropout: float = 0.0,
    out: Path = Path("runs/gpt2_bench.json"),
) -> None:
    """Measure training steps of presets over lengths and attention backends.

    Args:
        presets: shapes, see `flashlab.gpt2.config.PRESETS`; also tiny.
        lengths: tokens per sequence.
        backends: attention backends.
        hugging_face: attention of transformers' GPT-2, which is measured where transformers is installed; [] for none.
        tokens_per_step: tokens of an optimiser step, a multiple of each length.
        steps: how many are timed.
        compiled: compile this project's model by torch.compile.
        dropout: of all models.
        out: result file.
    """
    if hugging_face and find_spec("transformers") is None:
        print("transformers is not installed: measured without it", file=sys.stderr)
        hugging_face = []
    for preset in presets:
        shape(preset)
    for backend in backends:
        require_name(backend)
    for length in lengths:
        require_whole(tokens_per_step, length)
    contestants = [("flashlab", backend) for backend in backends] + [("transformers", name) for name in hugging_face]
    check_result(out)
    command = shlex.join(["python", "examples/gpt2/bench.py", *sys.argv[1:]])
    record: dict[str, Any] = provenance("gpt2_bench") | {"command": command, "method": METHOD, "claim": CLAIM}
    record["rows"] = []
    warn_without_gpu()
    with TemporaryDirectory(prefix="flashlab-") as folder:
        for preset in presets:
            for length in lengths:
                for implementation, backend in contestants:
                    print(f"{preset}, {length:,} tokens, {implementation} {backend} ... ", end="", file=sys.stderr)
                    config = shape(preset, block_size=length, backend=backend, dropout=dropout)
                    job = Job(config, implementation, tokens_per_step, compiled, steps=steps)
                    row = measure(job, Path(folder) / "log")
                    record["rows"].append({"preset": preset, "implementation": implementation, **row})
                    write_result(out, record)  # what was measured stays, whatever becomes of the next
    report.show(report.bench(out))
    if any(row["status"] == "ok" for row in record["rows"]):
        with replacing(out.with_suffix(".png")) as partial:
            report.draw(record["rows"]).savefig(partial, format="png")
        print(f"wrote {out.with_suffix('.png')}")
    print(f"claimed: {CLAIM}")
    print(f"wrote {out}")


if __name__ == "__main__":
    script(bench)
