"""Measure how fast GPT-2 generates with its key-value cache, beside computing all positions again for every token.

    python examples/gpt2/sampling.py --out runs/gpt2_sampling.json

The weights are random. In float32 both draw the same tokens; in bfloat16 two may be too close to tell apart.
"""

import shlex
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from training_step import shape

from flashlab.cli import script
from flashlab.gpt2 import report
from flashlab.gpt2.model import GPT
from flashlab.gpt2.sample import generate
from flashlab.machine import check_result, provenance, write_result

METHOD = {
    "tokens_per_s": "of all sequences, from the call to the last token; median of the repeats after one that warms up",
    "tokens_per_s_without_cache": "all positions anew for each token, launched kernel by kernel since the length "
    "changes; with the cache a step is one CUDA graph, where the backend allows it",
    "same_tokens": "share of the tokens that both draw alike, of sequences that are alike up to there",
}


def sampling(
    *,
    preset: str = "gpt2",
    new_tokens: PositiveInt = 512,
    prompt: PositiveInt = 16,
    batch_sizes: list[PositiveInt] = [1, 16],  # noqa: B006 - not changed
    repeats: PositiveInt = 3,
    out: Path = Path("runs/gpt2_sampling.json"),
) -> None:
    """Generate tokens with the cache and without.

    Args:
        preset: shape, see `flashlab.gpt2.config.PRESETS`; also tiny.
        new_tokens: how many are generated.
        prompt: tokens before them.
        batch_sizes: sequences side by side.
        repeats: how often each is timed.
        out: result file.
    """
    check_result(out)
    if not torch.cuda.is_available() and preset != "tiny":
        print("there is no GPU: any preset but tiny takes long", file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")
    command = shlex.join(["python", "examples/gpt2/sampling.py", *sys.argv[1:]])
    record: dict[str, Any] = provenance("gpt2_sampling") | {"command": command, "method": METHOD, "rows": []}
    torch.manual_seed(0)
    model = GPT(shape(preset, block_size=prompt + new_tokens)).eval().to(device)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for batch_size in batch_sizes:
            tokens = torch.randint(model.config.vocab_size, (batch_size, prompt), device=device)
            drawn, speed = {}, {}
            for use_cache in (True, False):
                taken = []
                for _ in range(repeats + 1):
                    begin = perf_counter()
                    drawn[use_cache] = torch.stack(list(generate(model, tokens, new_tokens, use_cache=use_cache)))
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    taken.append(perf_counter() - begin)
                speed[use_cache] = batch_size * new_tokens / median(taken[1:])
            same = (drawn[True] == drawn[False]).cumprod(dim=0).double().mean()
            record["rows"].append(
                {
                    "preset": preset,
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch_size": batch_size,
                    "new_tokens": new_tokens,
                    "tokens_per_s": round(speed[True], 1),
                    "tokens_per_s_without_cache": round(speed[False], 1),
                    "times": round(speed[True] / speed[False], 2),
                    "same_tokens": round(float(same), 4),
                }
            )
            write_result(out, record)
    report.show(report.sampling(out))
    print(f"wrote {out}")


if __name__ == "__main__":
    script(sampling)
