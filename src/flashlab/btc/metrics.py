"""Scores of forecasts, and whether one is really better than another.

All features are judged in log units (natural log of prices, log1p of volume) and given twice: as z-scores, the units
of the published table, and in units a reader can picture: basis points of price, a factor of volume.

Letters in shapes: M rows forecast, F features, B blocks of days.
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashlab.btc.bars import FEATURES
from flashlab.btc.baselines import PRICES, VOLUME
from flashlab.errors import UserError

SCHEMA_VERSION = 1
ROWS = (*FEATURES, "average")  # the rows of every table
TITLES = {"model": "model", "persistence": "persistence", "last_close": "last close", "ar120": "AR(120)"}

MINUTES_PER_DAY = 1440
BASIS_POINT = 1e-4
MAPE_FLOOR = 1.17e-6  # torchmetrics' guard against a division by zero

Floats = NDArray[np.float64]


class Scaler(Protocol):
    """Means and standard deviations ``[F]`` that turn log units into z-scores."""

    @property
    def mean(self) -> ArrayLike: ...
    @property
    def std(self) -> ArrayLike: ...


def evaluate_forecasts(
    minute: NDArray[np.int64], truth: Floats, forecasts: dict[str, Floats], scaler: Scaler
) -> dict[str, Any]:
    """Score forecasts and compare the first, the model's, with each of the others.

    Args:
        minute: minutes since 1970 ``[M]`` of the rows forecast; rows may repeat and come in any order.
        truth: what happened ``[M, F]``, in log units.
        forecasts: "model" first, then the baselines, each ``[M, F]`` in log units.
        scaler: the scaler of the prepared set.

    Returns:
        What `metrics.json` holds: plain values, None for a number that does not exist.

    Raises:
        UserError: a forecast holds a value that is not finite.
    """
    mean, std = np.asarray(scaler.mean, dtype=np.float64), np.asarray(scaler.std, dtype=np.float64)
    truth = (truth - mean) / std
    days = len(np.unique(minute // MINUTES_PER_DAY))
    block_days = min(7, max(1, days // 20))
    blocks, block = np.unique(minute // (block_days * MINUTES_PER_DAY), return_inverse=True)
    scores = {}
    squared: dict[str, Floats] = {}
    for name, forecast in forecasts.items():
        if broken := int((~np.isfinite(forecast)).any(axis=1).sum()):
            raise UserError(
                f"the forecast of {TITLES.get(name, name)} is not finite at {broken} of {len(truth)} rows: "
                "take an earlier checkpoint, or train again with a lower learning rate"
            )
        error = (forecast - mean) / std - truth
        scores[name] = score(truth, error, std)
        squared[name] = np.stack([np.bincount(block, weights=column) for column in (error**2).T], axis=1)
    model, *baselines = forecasts
    metrics = {
        "schema_version": SCHEMA_VERSION,
        "rows": len(minute),
        "distinct_rows": len(np.unique(minute)),
        "days": days,
        "block_days": block_days,
        "blocks": len(blocks),
        "start": f"{np.datetime64(int(minute.min()), 'm')}Z",
        "end": f"{np.datetime64(int(minute.max()), 'm')}Z",
        "scores": scores,
        "skill": {name: skill(squared[model], squared[name]) for name in baselines},
    }
    return metrics | {"verdicts": [line for _, line in verdicts(metrics)]}


def score(truth: Floats, error: Floats, std: Floats) -> dict[str, dict[str, float | None]]:
    """Score one forecast, for each feature and on average.

    The average is the mean over the five features; in basis points, over the four prices. torchmetrics is the oracle
    of the tests and not the implementation: its R2 calls any forecast perfect whose squared errors add up to less than
    1e-4, which those of a good price forecast do for a few hours.

    Args:
        truth: z-scores ``[M, F]`` of what happened.
        error: forecast minus truth ``[M, F]``, in z-scores.
        std: one z-score ``[F]`` in log units.
    """
    mse, mae = (error**2).mean(axis=0), np.abs(error).mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = np.where(np.ptp(truth, axis=0) > 0, 1 - mse / truth.var(axis=0), math.nan)  # what never changes has none
    mape = (np.abs(error) / np.maximum(np.abs(truth), MAPE_FLOOR)).mean(axis=0)
    z_scores = {"mse": mse, "rmse": np.sqrt(mse), "mae": mae, "mape": mape, "r2": r2}
    basis_points = {"rmse_bp": np.sqrt(mse) * std / BASIS_POINT, "mae_bp": mae * std / BASIS_POINT}
    factors = {"rmse_factor": np.exp(np.sqrt(mse) * std), "mae_factor": np.exp(mae * std)}
    table = {
        feature: {name: _number(by_feature[index]) for name, by_feature in (z_scores | real).items()}
        for index, feature in enumerate(FEATURES)
        for real in [factors if index == VOLUME else basis_points]
    }
    table["average"] = {name: _number(by_feature.mean()) for name, by_feature in z_scores.items()}
    table["average"] |= {name: _number(by_feature[PRICES].mean()) for name, by_feature in basis_points.items()}
    return table


def skill(model: Floats, baseline: Floats) -> dict[str, dict[str, Any]]:
    """Compare a model with a baseline: 1 - RMSE of the model / RMSE of the baseline, with its standard error.

    Errors of neighbouring minutes are alike, so a million of them say less than a million independent ones would. The
    standard error is therefore a jackknife that leaves out whole days, up to a week at a time while that leaves twenty
    blocks (calm and stormy weeks make it up to twice that of single days on real bars). The verdict is a tie
    within two standard errors. The average is the mean of the five skills, not the skill of the mean error: that would
    be the volume's alone.

    Source: Künsch, "The jackknife and the bootstrap for general stationary observations", Annals of Statistics 1989.

    Args:
        model: sums of squared errors ``[B, F]`` of the model, a row a block.
        baseline: those of the baseline over the same rows.
    """

    def skills(model: Floats, baseline: Floats) -> Floats:
        ratio = np.where((model == 0) & (baseline == 0), 1, np.sqrt(model / baseline))
        return np.append(1 - ratio, (1 - ratio).mean(axis=-1, keepdims=True), axis=-1)

    with np.errstate(divide="ignore", invalid="ignore"):  # a baseline without error, or a single block
        values = skills(model.sum(axis=0), baseline.sum(axis=0))
        left_out = skills(*(np.maximum(squared.sum(axis=0) - squared, 0) for squared in (model, baseline)))
        errors = np.sqrt((len(model) - 1) * left_out.var(axis=0)) if len(model) > 1 else np.full_like(values, math.nan)
    return {
        row: {"skill": _number(value), "standard_error": _number(error), "verdict": _verdict(value, error)}
        for row, value, error in zip(ROWS, values, errors, strict=True)
    }


def _verdict(value: float, error: float) -> str:
    if math.isnan(error):  # nothing tells how sure a gain is; a loss is called one all the same
        return "loses" if value < 0 else "undecided"
    return "wins" if value > 2 * error else "loses" if value < -2 * error else "ties"


def _number(value: float) -> float | None:
    """Return what JSON can hold."""
    return float(value) if math.isfinite(value) else None


def other_data(metrics: dict[str, Any]) -> list[str]:
    """Say that the bars scored may be among those that the model was trained on, where nothing rules it out."""
    path = metrics.get("run", {}).get("other_data")
    return (
        [f"The training part of {path} is not what the model was trained on: it may know these bars."] if path else []
    )


def verdicts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Put every comparison in words: pairs of verdict and sentence, the lost ones first."""
    lines = []
    for row in ROWS:
        for name, *same in distinct_baselines(metrics, row):
            result = metrics["skill"][name][row]
            against = TITLES.get(name, name)
            if same:
                against += f" (here the same as {' and '.join(TITLES.get(other, other) for other in same)})"
            lines.append((result["verdict"], f"{row.capitalize()}: {_in_words(result, against)}"))
    return sorted(lines, key=lambda line: ("loses", "undecided", "ties", "wins").index(line[0]))


def distinct_baselines(metrics: dict[str, Any], row: str) -> list[list[str]]:
    """Group the baselines that score the same on a feature, as all do that forecast the last close."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name in metrics["skill"]:
        groups.setdefault(tuple(metrics["scores"][name][row].values()), []).append(name)
    return list(groups.values())


def _in_words(result: dict[str, Any], against: str) -> str:
    value, error, verdict = result["skill"], result["standard_error"], result["verdict"]
    if value is None:
        return f"loses to {against}, which makes no error at all"
    if verdict == "undecided":
        return f"undecided against {against} ({percent(value, error, '+')}; a standard error takes two days)"
    if verdict == "ties":
        return f"ties with {against} ({percent(value, error, '+')}, SE {percent(error, error)})"
    known = "a standard error takes two days" if error is None else f"SE {percent(error, error)}"
    if verdict == "wins":
        return f"beats {against} by {percent(value, error)} ({known})"
    return f"loses to {against} by {percent(-value, error)} ({known})"


COMPARISONS = ("Feature", "RMSE", "Baseline", "Its RMSE", "Skill ± SE")


def comparisons(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Set the model beside every baseline: the rows of a table whose columns are `COMPARISONS`."""
    scores = metrics["scores"]
    return [
        (
            row.capitalize(),
            real_error(scores["model"][row], "rmse"),
            ", ".join(TITLES.get(name, name) for name in names),
            real_error(scores[names[0]][row], "rmse"),
            skill_in_words(metrics["skill"][names[0]][row]),
        )
        for row in ROWS
        for names in distinct_baselines(metrics, row)
    ]


def time_range(metrics: dict[str, Any]) -> str:
    """Print the first and the last minute scored."""
    first, last = (metrics[key].replace("T", " ").removesuffix("Z") for key in ("start", "end"))
    return f"{first} to {last} UTC"


def skill_in_words(result: dict[str, Any]) -> str:
    """Print one skill: "+75.1 ± 0.3 % wins"."""
    value, error, verdict = result["skill"], result["standard_error"], result["verdict"]
    if value is None or error is None:
        return verdict if value is None else f"{percent(value, None, '+')} {verdict}"
    return f"{percent(value, error, '+').removesuffix(' %')} ± {percent(error, error)} {verdict}"


def real_error(score: dict[str, float | None], metric: str) -> str:
    """Print an error in real units: basis points of price, or the factor of volume."""
    if f"{metric}_factor" in score:
        return f"factor {number(score[f'{metric}_factor'])}"
    return f"{number(score[f'{metric}_bp'])} bp"


def number(value: float | None, form: str = "#.3g") -> str:
    """Print a number that may not exist."""
    return "-" if value is None else format(value, form).removesuffix(".")


def percent(share: float, error: float | None, sign: str = "-") -> str:
    """Print a share in percent, down to the decimal place of its standard error."""
    decimals = min(max(1, -math.floor(math.log10(100 * error))), 4) if error else 1
    return f"{100 * share:{sign}.{decimals}f} %"


def load_metrics(path: Path) -> dict[str, Any]:
    """Read a `metrics.json`.

    Raises:
        UserError: the file is missing, not JSON, or of another schema version.
    """
    remedy = "`flashlab evaluate` writes it anew"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise UserError(f"{path} is not JSON ({error}); {remedy}") from None
    version = metrics.get("schema_version") if isinstance(metrics, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}, this flashlab reads {SCHEMA_VERSION}; {remedy}")
    return metrics
