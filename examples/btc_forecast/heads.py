"""Compare head shapes of equal parameters, by speed and by what the forecasts are worth.

    python examples/btc_forecast/heads.py data/real --out runs/heads.json

Trains the default preset with 8 heads of 8, 4 of 16, 2 of 32 and 1 of 64, one after the other so that each has the GPU
to itself, and scores each run. What is trained already is not trained again.
"""

import json
import shlex
import sys
from pathlib import Path

from flashlab.cli import script
from flashlab.machine import provenance, write_result
from flashlab.worker import run_flashlab

HERE = Path(__file__).parent
NUM_HEADS = (8, 4, 2, 1)


def flashlab(*arguments: object) -> None:
    if code := run_flashlab(*arguments, stdout=sys.stderr).returncode:
        sys.exit(code)  # it has said why


def heads(
    data: str,
    out: Path = Path("runs/heads.json"),
    runs: Path = Path("runs/heads"),
    config: list[Path] = [HERE / "default.yaml"],  # noqa: B006 - not changed
    seed: int = 0,
) -> None:
    """Train and score the four head shapes.

    Args:
        data: prepared set.
        out: result file.
        runs: folder of the runs.
        config: configurations laid over each other.
        seed: of initial weights and order of windows.
    """
    configs = [word for path in config for word in ("--config", path)]
    folders = [runs / f"{count}-heads-seed-{seed}" for count in NUM_HEADS]
    for count, run in zip(NUM_HEADS, folders, strict=True):
        options = ["--model.num_heads", count, "--data.path", data, "--seed", seed, "--run", run, "--resume"]
        flashlab("train", *configs, *options)
    for run in folders:
        flashlab("evaluate", run)
    rows = []
    for count, run in zip(NUM_HEADS, folders, strict=True):
        record, metrics = (json.loads((run / name).read_text()) for name in ("run.json", "metrics.json"))
        rows.append(
            {
                "num_heads": count,
                "head_dim": metrics["run"]["config"]["model"]["width"] // count,
                "parameters": record["parameters"],
                "attention_backend": record["attention_backend"],
                **{key: record["finished"].get(key) for key in ("ms_per_step", "bars_per_s", "best_val_loss")},
                "skill": {
                    f"{feature} over {baseline}": skill["skill"]
                    for baseline, features in metrics["skill"].items()
                    for feature, skill in features.items()
                },
                "average_r2": metrics["scores"]["model"]["average"]["r2"],
                "volume_r2": metrics["scores"]["model"]["volume"]["r2"],
            }
        )
    command = shlex.join(["python", "examples/btc_forecast/heads.py", *sys.argv[1:]])
    write_result(out, provenance("btc_heads") | {"command": command, "rows": rows})
    print(f"wrote {out}")


if __name__ == "__main__":
    script(heads, as_positional=True)
