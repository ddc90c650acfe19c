"""Score a trained forecaster beside its baselines, on the same bars and through the same metrics."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from jsonargparse.typing import PositiveInt
from rich.progress import track

from flashlab.btc.bars import Bars, log_features
from flashlab.btc.baselines import BASELINES, LAGS
from flashlab.btc.dataset import Windows
from flashlab.btc.metrics import evaluate_forecasts
from flashlab.btc.model import Forecaster
from flashlab.btc.module import load_forecaster
from flashlab.btc.prepare import PreparedSet, open_set
from flashlab.btc.report import print_summary
from flashlab.btc.train import check_context, fingerprint
from flashlab.btc.windows import part_windows, scored_windows
from flashlab.errors import UserError, writing
from flashlab.machine import identify
from flashlab.training.batches import loader
from flashlab.training.callbacks import BEST
from flashlab.training.run import read_record


def evaluate(
    run: Path,
    *,
    data: str | None = None,
    checkpoint: str = BEST,
    part: Literal["train", "validation", "test"] = "test",
    batch_size: PositiveInt = 64,
) -> None:
    """Score a trained forecaster beside its baselines.

    Writes metrics.json and forecasts.npz into the run folder and prints the result.

    Args:
        run: folder of the run.
        data: prepared set to score on; the one the run was trained on when not given.
        checkpoint: file under RUN/checkpoints.
        part: what is forecast.
        batch_size: windows at a time.

    Raises:
        UserError: there is no such run, checkpoint or set, the run's own set was prepared otherwise since, or the part
            has nothing to score.
    """
    config = read_config(run)
    prepared = open_set(data or config["data"]["path"])
    check_context(prepared, config["data"]["context_length"])
    other_data = _other_data(run, prepared, is_named=data is not None)
    module = load_forecaster(run / "checkpoints" / checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, forecast = forecast_part(
        module.forecaster.to(device).eval(), prepared, part, config["data"]["context_length"], batch_size, device
    )
    bars = prepared.bars()
    log_bars = log_features(bars.values)
    mask_filled = prepared.manifest["missing"]["mask_filled"]
    begins = np.array(prepared.manifest["segments"])[:, 0]
    counts = rows - begins[np.searchsorted(begins, rows, "right") - 1] >= LAGS  # which all baselines can forecast
    if mask_filled:
        counts &= bars.observed[rows]
    rows, forecast = rows[counts], forecast[counts]
    train_rows = _training_rows(prepared, bars, mask_filled)
    for name, found in ((part, rows), ("train", train_rows)):
        if not len(found):
            raise UserError(f"{prepared.path}: no bar of the {name} part has {LAGS} bars before it; prepare more bars")
    forecasts = {"model": forecast} | {
        name: baseline(log_bars, rows, train_rows) for name, baseline in BASELINES.items()
    }
    truth, minute = log_bars[rows], bars.minute[rows].astype(np.int64)
    metrics = evaluate_forecasts(minute, truth, forecasts, prepared.scaler)
    metrics["run"] = {
        "name": run.name,
        "part": part,
        "checkpoint": checkpoint,
        "other_data": other_data,
        "config": config,
        "training": read_record(run),
        "prepared": {key: prepared.manifest[key] for key in ("cleaning", "missing", "split", "bars", "start", "end")},
        "machine": identify(),
    }
    _write(run, metrics, {"minute": minute, "truth": truth, **forecasts})
    print_summary(metrics)


@torch.inference_mode()
def forecast_part(
    forecaster: Forecaster, prepared: PreparedSet, part: str, context_length: int, batch_size: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Forecast a part's bars.

    Returns:
        int64 ``[M]`` rows of the series, and float64 ``[M, 5]`` their forecasts in log units.
    """
    starts, firsts = scored_windows(prepared.manifest, part, context_length, LAGS)
    batches = loader(Windows(prepared, starts, context_length), batch_size=batch_size)
    position = np.arange(context_length)
    rows, forecasts = [], []
    for index, batch in enumerate(track(batches, f"forecast {part}", transient=True)):
        window = slice(index * batch_size, index * batch_size + len(batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            log_bars = forecaster(batch[:, :-1].to(device)).log_bars.double().cpu().numpy()
        scored = position >= firsts[window, None]
        forecasts.append(log_bars[scored])
        rows.append((starts[window, None] + 1 + position)[scored])
    return np.concatenate([*rows, np.zeros(0, np.int64)]), np.concatenate([*forecasts, np.zeros((0, 5))])


def _other_data(run: Path, prepared: PreparedSet, *, is_named: bool) -> str | None:
    """Return the path of a set whose training part is not what the run was trained on, None where it is.

    Raises:
        UserError: the run's own set was prepared otherwise since, or run.json is missing or damaged.
    """
    here = fingerprint(prepared)
    try:
        trained_on = read_record(run)["trained_on"]
        is_other = _training_part(trained_on) != _training_part(here)
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{run / 'run.json'} is missing or damaged; name a whole run, or train again") from None
    if trained_on != here and not is_named:
        raise UserError(
            f"{prepared.path} was prepared otherwise since {run} was trained on it; prepare it as it was, or score "
            f"what it holds now with --data {prepared.path}"
        )
    return prepared.path if is_other else None


def _training_part(fingerprint: dict[str, Any]) -> dict[str, Any]:
    split = fingerprint["split"]
    return fingerprint | {"split": split | {"parts": split["parts"].get("train"), "starts": None}}


def _training_rows(prepared: PreparedSet, bars: Bars, mask_filled: bool) -> np.ndarray:
    """List the rows that a baseline may be fitted on: those of the training part that have their lags in it."""
    split = prepared.manifest["split"]
    if split["kind"] == "seed":  # whose part is its windows
        length, is_target = split["context_length"], np.zeros(len(bars), bool)
        for start in part_windows(prepared.manifest, "train", length):
            is_target[start + LAGS : start + length + 1] = True
        rows = np.flatnonzero(is_target)
    else:
        rows = part_windows(prepared.manifest, "train", LAGS, stride=1) + LAGS
    return rows[bars.observed[rows]] if mask_filled else rows


def _write(run: Path, metrics: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    forecasts, scores = run / ".forecasts.npz", run / ".metrics.json"
    with writing(run):
        try:
            single = {name: array.astype(np.float32) if array.ndim > 1 else array for name, array in arrays.items()}
            np.savez(forecasts, allow_pickle=False, **single)
            scores.write_text(json.dumps(metrics, indent=1))
            forecasts.replace(run / "forecasts.npz")
            scores.replace(run / "metrics.json")
        finally:
            forecasts.unlink(missing_ok=True)
            scores.unlink(missing_ok=True)


def read_config(run: Path) -> dict[str, Any]:
    """Read a run's options.

    Raises:
        UserError: there is no run, or its config.yaml is damaged.
    """
    path, remedy = run / "config.yaml", "name a run, such as runs/simulated; `flashlab train` makes them"
    try:
        config = yaml.safe_load(path.read_text())
        config["data"]["path"], config["data"]["context_length"]
    except OSError as error:
        raise UserError(f"{run} is not a run ({path}: {error.strerror}); {remedy}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        raise UserError(f"{path} is damaged or not a run's; {remedy}") from None
    return config
