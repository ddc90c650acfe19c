import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics import functional as torchmetrics

from flashlab.btc.metrics import (
    MINUTES_PER_DAY,
    ROWS,
    evaluate_forecasts,
    load_metrics,
    score,
    skill,
    skill_in_words,
    verdicts,
)
from flashlab.errors import UserError

SCALER = SimpleNamespace(mean=np.array([7.0, 7.0, 7.0, 7.0, 2.0]), std=np.array([0.5, 0.5, 0.5, 0.5, 1.5]))


def walk(days=30, seed=0, sigma=1e-3):
    """Minutes, a random walk of log prices with independent volumes, and the forecast that repeats the last bar."""
    rng = np.random.default_rng(seed)
    bars = rng.normal(size=(days * MINUTES_PER_DAY + 1, 5)).cumsum(axis=0) * sigma + 7
    bars[:, 4] = rng.normal(2, 1.5, size=len(bars))
    return np.arange(days * MINUTES_PER_DAY), bars[1:], bars[:-1]


def test_scores_by_hand():
    truth = np.array([[1.0] * 5, [2.0] * 5, [6.0] * 5])  # mean 3, variance 14 / 3
    error = np.array([[1.0] * 5, [-1.0] * 5, [2.0] * 5])
    table = score(truth, error, SCALER.std)
    expected = {"mse": 2, "rmse": 2**0.5, "mae": 4 / 3, "mape": (1 / 1 + 1 / 2 + 2 / 6) / 3, "r2": 1 - 2 / (14 / 3)}
    assert table["average"] == pytest.approx(
        expected | {"rmse_bp": 2**0.5 * 0.5 * 10_000, "mae_bp": 4 / 3 * 0.5 * 10_000}
    )
    assert table["volume"] == pytest.approx(
        expected | {"rmse_factor": np.exp(2**0.5 * 1.5), "mae_factor": np.exp(4 / 3 * 1.5)}
    )


def test_scores_are_those_of_torchmetrics():
    rng = np.random.default_rng(0)
    truth, error = rng.normal(size=(5000, 5)), 0.3 * rng.normal(size=(5000, 5))
    table = score(truth, error, SCALER.std)
    oracles = {
        "mse": torchmetrics.mean_squared_error,
        "mae": torchmetrics.mean_absolute_error,
        "mape": torchmetrics.mean_absolute_percentage_error,
        "r2": torchmetrics.r2_score,
    }
    for metric, oracle in oracles.items():
        by_feature = [
            oracle(torch.tensor(f + e), torch.tensor(f)).item() for f, e in zip(truth.T, error.T, strict=True)
        ]
        scores = [table[feature][metric] for feature in ("open", "high", "low", "close", "volume")]
        assert scores == pytest.approx(by_feature, rel=1e-9)
        assert table["average"][metric] == pytest.approx(np.mean(by_feature), rel=1e-9)


def test_r2_of_a_good_price_forecast_is_exact():
    truth = np.random.default_rng(0).normal(size=(60, 5))
    error = 1e-4 * truth[:, ::-1]
    expected = 1 - np.float64(
        ((error[:, 0].astype(np.longdouble)) ** 2).mean() / truth[:, 0].astype(np.longdouble).var()
    )
    r2 = score(truth, error, SCALER.std)["open"]["r2"]
    assert 0 < 1 - r2 == pytest.approx(1 - expected, rel=1e-6)  # 1e-8 below 1, which torchmetrics calls 1


def test_persistence_on_a_random_walk_errs_by_the_size_of_a_step():
    minute, truth, persistence = walk(sigma=12e-4)
    metrics = evaluate_forecasts(minute, truth, {"model": persistence}, SCALER)
    for feature in ("open", "high", "low", "close"):
        scores = metrics["scores"]["model"][feature]
        assert scores["rmse_bp"] == pytest.approx(12, rel=0.02)
        assert scores["mae_bp"] == pytest.approx(12 * (2 / np.pi) ** 0.5, rel=0.02)
        assert scores["r2"] > 0.99  # although there is nothing to forecast
    assert metrics["scores"]["model"]["volume"]["r2"] == pytest.approx(-1, abs=0.03)  # twice the variance


def test_skill_of_a_baseline_against_itself_is_zero_and_a_tie():
    minute, truth, persistence = walk()
    metrics = evaluate_forecasts(minute, truth, {"model": persistence, "persistence": persistence}, SCALER)
    for result in metrics["skill"]["persistence"].values():
        assert result == {"skill": 0, "standard_error": 0, "verdict": "ties"}


def test_skill_is_the_share_of_the_error_saved_and_averages_over_features():
    minute, truth, persistence = walk()
    saved = np.array([0.5, 0.25, 0.0, -0.1, 0.1])
    model = truth + (persistence - truth) * (1 - saved)
    metrics = evaluate_forecasts(minute, truth, {"model": model, "persistence": persistence}, SCALER)
    results = metrics["skill"]["persistence"]
    assert [result["skill"] for result in results.values()] == pytest.approx([*saved, saved.mean()], abs=1e-9)


@pytest.mark.parametrize(
    ("result", "sentence", "cell"),
    [
        ((0.7512, 0.003, "wins"), "beats last close by 75.1 % (SE 0.3 %)", "+75.1 ± 0.3 % wins"),
        ((-0.004, 0.0002, "loses"), "loses to last close by 0.40 % (SE 0.02 %)", "-0.40 ± 0.02 % loses"),
        ((-0.004, 0.12, "ties"), "ties with last close (-0.4 %, SE 12.0 %)", "-0.4 ± 12.0 % ties"),
        (
            (0.1, None, "undecided"),
            "undecided against last close (+10.0 %; a standard error takes two",
            "+10.0 % undecided",
        ),
        ((-0.1, None, "loses"), "loses to last close by 10.0 % (a standard error takes two days)", "-10.0 % loses"),
        ((None, None, "loses"), "loses to last close, which makes no error at all", "loses"),
    ],
)
def test_verdicts_say_who_wins(result, sentence, cell):
    result = dict(zip(("skill", "standard_error", "verdict"), result, strict=True))
    metrics = {
        "scores": {"last_close": {row: {"mse": 1.0} for row in ROWS}},
        "skill": {"last_close": dict.fromkeys(ROWS, result)},
    }
    assert [line for _, line in verdicts(metrics)][3].startswith(f"Close: {sentence}")
    assert skill_in_words(result) == cell


def test_lost_verdicts_come_first_and_equal_baselines_are_named_once():
    minute, truth, persistence = walk()
    forecasts = {
        "model": persistence + np.array([0, 0, 0, 1e-3, 0]),
        "persistence": persistence,
        "last_close": persistence,
    }
    first, *others = evaluate_forecasts(minute, truth, forecasts, SCALER)["verdicts"]
    assert first.startswith("Close: loses to persistence (here the same as last close) by ")
    assert [line.split(":")[0] for line in others] == ["Average", "Open", "High", "Low", "Volume"]


def test_scores_and_errors_do_not_depend_on_the_order_of_rows():
    minute, truth, persistence = walk(days=5)
    model = persistence * 0.9 + 0.1 * 7
    order = np.random.default_rng(1).permutation(len(minute))
    first = evaluate_forecasts(minute, truth, {"model": model, "persistence": persistence}, SCALER)
    second = evaluate_forecasts(
        minute[order], truth[order], {"model": model[order], "persistence": persistence[order]}, SCALER
    )
    for row, result in first["skill"]["persistence"].items():
        assert list(second["skill"]["persistence"][row].values())[:2] == pytest.approx(list(result.values())[:2])


def test_standard_error_respects_autocorrelation():
    """The jackknife over blocks tells how much the skill scatters; one over single minutes is far too sure."""
    worlds, days, rows_a_day, memory = 200, 40, 96, 0.95
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(days * rows_a_day, worlds, 5))
    volatility = np.empty_like(noise)  # log volatility remembers for hours: loud days, quiet days
    volatility[0] = noise[0]
    for row in range(1, len(noise)):
        volatility[row] = memory * volatility[row - 1] + (1 - memory**2) ** 0.5 * noise[row]
    # The model is good at quiet times and bad at loud ones, so that its skill depends on how many loud ones there were.
    baseline = (rng.normal(size=noise.shape) * np.exp(0.5 * volatility)) ** 2
    model = baseline * np.exp(0.4 * volatility)

    def errors(block):
        by_block = [squared.reshape(-1, block, worlds, 5).sum(axis=1) for squared in (model, baseline)]
        results = [skill(by_block[0][:, world], by_block[1][:, world])["open"] for world in range(worlds)]
        return np.array([(result["skill"], result["standard_error"]) for result in results]).T

    skills, jackknife = errors(block=rows_a_day)
    _, naive = errors(block=1)
    assert jackknife.mean() == pytest.approx(skills.std(), rel=0.25)
    assert naive.mean() < 0.6 * skills.std()


@pytest.mark.parametrize(("days", "block_days", "blocks"), [(3, 1, 3), (45, 2, 23), (184, 7, 27)])
def test_blocks_are_up_to_a_week_long(days, block_days, blocks):
    minute = np.arange(0, days * MINUTES_PER_DAY, 60)
    truth = np.random.default_rng(0).normal(size=(len(minute), 5))
    metrics = evaluate_forecasts(minute, truth, {"model": truth / 2}, SCALER)
    assert (metrics["days"], metrics["block_days"], metrics["blocks"]) == (days, block_days, blocks)


def test_numbers_that_do_not_exist_are_null():
    minute, truth, persistence = walk(days=1)
    truth[:, 4] = persistence[:, 4] = 0  # no trade at all
    model = persistence + 1e-4
    metrics = evaluate_forecasts(minute, truth, {"model": model, "persistence": persistence}, SCALER)
    metrics = json.loads(json.dumps(metrics, allow_nan=False))
    assert metrics["scores"]["model"]["volume"]["r2"] is None
    assert metrics["skill"]["persistence"]["volume"] == {"skill": None, "standard_error": None, "verdict": "loses"}
    better = evaluate_forecasts(minute, truth, {"model": persistence, "worse": model}, SCALER)["skill"]["worse"]["open"]
    assert better["standard_error"] is None  # a single day
    assert better["verdict"] == "undecided"
    assert "Volume: loses to persistence, which makes no error at all" in metrics["verdicts"]


def test_a_forecast_that_is_not_finite_is_refused():
    minute, truth, persistence = walk(days=1)
    persistence = persistence.copy()
    persistence[3:5, 2] = np.nan
    with pytest.raises(
        UserError, match=r"forecast of model is not finite at 2 of 1440 rows: take an earlier checkpoint"
    ):
        evaluate_forecasts(minute, truth, {"model": persistence}, SCALER)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": 99}', "version 99"),
    ],
)
def test_metrics_that_cannot_be_read_are_named(content, complaint, tmp_path):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=rf"metrics\.json.*{complaint}.*`flashlab evaluate` writes it anew"):
        load_metrics(tmp_path / "metrics.json")
