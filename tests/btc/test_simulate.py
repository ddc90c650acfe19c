import gzip
from hashlib import sha256

import numpy as np
import pytest

from flashlab.btc.bars import FEATURES, Bars, fill_missing, log_features, read_bars, segments
from flashlab.btc.simulate import simulate, simulate_bars
from flashlab.cli import main

MAX_GAP = 240  # minutes


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Bars:
    """The default data, read as any other source."""
    path = tmp_path_factory.mktemp("data") / "simulated.csv.gz"
    simulate(out=path)
    read, cleaning = read_bars([path])
    assert cleaning.kept == cleaning.rows  # nothing impossible, no duplicate, in order
    assert cleaning.out_of_order == 0
    return read


@pytest.fixture(scope="module")
def logs(bars) -> np.ndarray:
    return log_features(bars.values)


def autocorrelation(series: np.ndarray, lag: int) -> float:
    centred = series - series.mean()
    return float((centred[lag:] * centred[:-lag]).mean() / centred.var())


def test_the_seed_names_the_bytes(tmp_path):
    paths = [tmp_path / name for name in ("a.csv.gz", "another name.csv.gz", "b.csv", "c.csv.gz")]
    for path, seed in zip(paths, (1, 1, 1, 2), strict=True):
        simulate(out=path, days=2, seed=seed)
    first, again, plain, other = (path.read_bytes() for path in paths)
    assert sha256(first).digest() == sha256(again).digest()
    assert gzip.decompress(first) == plain
    assert first != other
    assert plain.startswith(b"Timestamp,Open,High,Low,Close,Volume\n")
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # nothing temporary is left


def test_minutes_are_missing_in_ones_and_in_long_gaps(bars):
    missing = np.diff(bars.minute) - 1
    assert 0.01 < missing[missing > 0].sum() / (bars.minute[-1] - bars.minute[0]) < 0.06
    assert (missing == 1).sum() > 500
    assert 1 <= (missing > MAX_GAP).sum() <= 5
    assert len(segments(fill_missing(bars, MAX_GAP))) == (missing > MAX_GAP).sum() + 1


def test_returns_have_fat_tails_and_clustered_volatility(logs):
    """As the real bars of 2016 and 2017: excess kurtosis of 59 and 622, |return| autocorrelation of 0.31 at 10 minutes.

    The bounds are for one lucky or unlucky history too; an unclustered Gaussian walk has 0 and 0.
    """
    returns = np.diff(logs[:, 3])
    assert 8e-4 < returns.std() < 25e-4
    assert np.mean(returns**4) / np.var(returns) ** 2 - 3 > 10
    size = np.minimum(np.abs(returns), np.quantile(np.abs(returns), 0.999))
    for lag, least in ((1, 0.25), (10, 0.2), (60, 0.12), (360, 0.06), (1440, 0.03)):
        assert autocorrelation(size, lag) > least, lag
    assert -0.25 < autocorrelation(returns, 1) < -0.1  # the bounce, and nothing else:
    assert abs(autocorrelation(returns, 3)) < 0.03


def test_volume_is_persistent_goes_with_volatility_and_has_a_daily_and_weekly_rhythm(bars, logs):
    volume, ranges = logs[:, 4], logs[:, 1] - logs[:, 2]
    for lag, least in ((1, 0.5), (10, 0.4), (60, 0.25), (1440, 0.1)):
        assert autocorrelation(volume, lag) > least, lag
    assert np.corrcoef(volume, ranges)[0, 1] > 0.35  # real: 0.41 to 0.57
    hour, day = bars.minute // 60 % 24, (bars.minute // 1440 + 3) % 7
    assert volume[(hour >= 14) & (hour < 18)].mean() > volume[hour < 6].mean() + 0.3
    assert ranges[(hour >= 14) & (hour < 18)].mean() > 1.2 * ranges[hour < 6].mean()
    assert volume[day < 5].mean() > volume[day >= 5].mean() + 0.1


def test_linear_regression_beats_persistence_on_every_feature(bars, logs):
    """The default data must be worth learning: even a model as plain as this wins on the last fifth of the bars."""
    lags = 20
    close = logs[:, 3:4]
    relative = np.concatenate([logs[:, :3] - close, np.diff(close, axis=0, prepend=close[:1]), logs[:, 4:]], axis=1)
    inputs = np.concatenate([relative[lags - lag : -lag] for lag in range(1, lags + 1)], axis=1)
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    now, following = logs[lags - 1 : -1], logs[lags:]
    base = np.concatenate([np.repeat(now[:, 3:4], 4, axis=1), np.zeros((len(now), 1))], axis=1)
    train = np.arange(len(now)) < 0.8 * len(now)
    fitted, target = inputs[train], (following - base)[train]
    weights = np.linalg.solve(fitted.T @ fitted, fitted.T @ target)

    test = ~train & (bars.minute[lags:] - bars.minute[:-lags] == lags)
    error = (base + inputs @ weights - following)[test]
    skill = 1 - np.sqrt((error**2).mean(0) / ((now - following)[test] ** 2).mean(0))
    for name, reached, least in zip(FEATURES, skill, (0.35, 0.08, 0.08, 0.035, 0.15), strict=True):
        assert reached > least, (name, reached)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--days", "0"], "--days 0: expected 1 to 5000"),
        (["--days", "9999"], "--days 9999: expected 1 to 5000"),
        (["--days", "1.5"], "days"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--out", "{}"], "expected a file, .csv or .csv.gz"),
        (["--out", "{}/bars.zip"], "expected a file, .csv or .csv.gz"),
        (["--out", "{}/kept.csv/bars.csv"], "cannot write"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, capsys, arguments, said):
    (tmp_path / "kept.csv").write_text("kept")
    arguments = [argument.format(tmp_path) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "kept.csv")]
    assert main(["data", "simulate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.csv"]
    assert (tmp_path / "kept.csv").read_text() == "kept"


def test_a_full_disk_leaves_the_earlier_file(tmp_path, capsys, monkeypatch):
    (out := tmp_path / "bars.csv").write_text("earlier")

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pandas.DataFrame.to_csv", refuse)
    assert main(["data", "simulate", "--days", "1", "--out", str(out)]) == 2
    assert "No space left on device; free space" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("bars.csv", "earlier")]


@pytest.mark.parametrize("days", [1, 14, 31])
def test_any_number_of_days(days):
    bars = simulate_bars(days, seed=days)
    assert 0.8 * 1440 * days < len(bars) <= 1440 * days
    assert bars["Timestamp"].is_monotonic_increasing
    assert bars["Timestamp"].iloc[-1] < 1735689600  # 2025-01-01
