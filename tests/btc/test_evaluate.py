import errno
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from flashlab.btc.bars import FEATURES
from flashlab.btc.baselines import BASELINES, LAGS
from flashlab.btc.prepare import open_set, prepare
from flashlab.btc.simulate import simulate_bars
from flashlab.cli import main

TINY = (
    "--data.context_length 32 --data.stride 16 --data.batch_size 8 --model.width 16 --model.num_layers 1 "
    "--optimizer.lr 0.01 --optimizer.warmup_steps 3 --trainer.max_steps 40 --trainer.val_every_n_steps 20 "
    "--trainer.accelerator cpu"
)


def evaluate(run, *options):
    """Evaluate, and return the metrics and the forecasts kept."""
    assert main(["evaluate", str(run), *map(str, options)]) == 0
    with np.load(run / "forecasts.npz") as arrays:
        return json.loads((run / "metrics.json").read_text()), dict(arrays)


def change_weights(run, change):
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for name, weight in checkpoint["state_dict"].items():
        checkpoint["state_dict"][name] = change(name, weight)
    torch.save(checkpoint, path)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_every_observed_bar_of_a_part_is_scored_once(run, prepared, part):
    opened = open_set(prepared)
    bars, (begin, end) = opened.bars(), opened.manifest["split"]["parts"][part]
    expected = bars.minute[begin:end][bars.observed[begin:end]]
    metrics, arrays = evaluate(run, "--part", part)
    if part == "train":  # which begins with the series: the first bars have too little before them
        expected = expected[expected >= arrays["minute"][0]]
        assert arrays["minute"][0] == bars.minute[LAGS]
    assert sorted(arrays["minute"]) == expected.tolist()
    assert metrics["rows"] == len(expected)
    assert metrics["run"]["part"] == part
    assert metrics["run"]["training"]["finished"]["steps"] == 40


def test_scores_are_those_of_the_csv(run, bars_csv):
    """Persistence and the model, from the CSV and the forecasts kept, with pandas alone."""
    metrics, arrays = evaluate(run)
    bars = pd.read_csv(bars_csv).rename(columns=str.lower)
    bars = bars.set_index(bars["timestamp"] // 60)[list(FEATURES)]
    every = bars.reindex(range(bars.index[0], bars.index[-1] + 1))
    filled = every["close"].isna()
    every["close"] = every["close"].ffill()
    for price in ("open", "high", "low"):
        every[price] = every[price].mask(filled, every["close"])
    log_bars = np.log(every[["open", "high", "low", "close"]]).assign(volume=np.log1p(every["volume"].fillna(0)))
    truth = log_bars.loc[arrays["minute"]].to_numpy()
    forecasts = {"persistence": log_bars.shift(1).loc[arrays["minute"]].to_numpy(), "model": arrays["model"]}
    for name, forecast in forecasts.items():
        error = np.sqrt(((forecast - truth) ** 2).mean(axis=0))
        for feature, value in zip(FEATURES, error, strict=True):
            score = metrics["scores"][name][feature]
            found = np.log(score["rmse_factor"]) if feature == "volume" else score["rmse_bp"] * 1e-4
            assert found == pytest.approx(value, rel=1e-3)


def test_no_forecast_sees_its_own_bar_or_a_later_one(run, bars_csv, prepared, tmp_path):
    """Change the last bars of the CSV: what was forecast up to then stays, by the model and by every baseline."""
    bars = pd.read_csv(bars_csv)
    changed = bars.index >= len(bars) - 200
    bars.loc[changed, ["Open", "High", "Low", "Close"]] *= 1.2
    bars.loc[changed, "Volume"] *= 5
    bars.to_csv(tmp_path / "changed.csv", index=False)
    prepare([tmp_path / "changed.csv"], out=tmp_path / "set", context_length=32)
    _, before = evaluate(run, "--data", prepared)
    _, after = evaluate(run, "--data", tmp_path / "set")
    change = bars["Timestamp"][changed].iloc[0] // 60
    past = before["minute"] <= change
    assert 100 < past.sum() < len(past) - 100
    for name in ("model", *BASELINES):
        np.testing.assert_array_equal(after[name][past], before[name][past])
        assert (after[name][~past] != before[name][~past]).any(axis=1).all()


def test_no_baseline_reads_across_a_gap(run, bars_csv, tmp_path):
    bars = pd.read_csv(bars_csv)
    pd.concat([bars[:-550], bars[-250:]]).to_csv(tmp_path / "gap.csv", index=False)
    prepare([tmp_path / "gap.csv"], out=tmp_path / "set", context_length=32)
    _, arrays = evaluate(run, "--data", tmp_path / "set")
    after = arrays["minute"] - bars["Timestamp"].iloc[-250] // 60
    assert after[after >= 0].min() >= LAGS


def test_batches_and_checkpoints_can_be_chosen(run):
    _, best = evaluate(run)
    _, in_sevens = evaluate(run, "--batch_size", 7)
    metrics, last = evaluate(run, "--checkpoint", "last.ckpt")
    np.testing.assert_allclose(in_sevens["model"], best["model"], atol=1e-5)
    assert metrics["run"]["checkpoint"] == "last.ckpt"
    assert set(last) == {"minute", "truth", "model", *BASELINES}


def test_a_model_that_is_worse_is_printed_as_losing(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    change_weights(run, lambda name, weight: weight + 2.0 if name == "forecaster.output.bias" else weight)
    evaluate(run)
    printed = capsys.readouterr().out
    for feature in FEATURES:
        assert f"{feature.capitalize()}: loses to " in printed
    assert "wins" not in printed
    assert main(["report", str(run)]) == 0
    assert "loses to" in (run / "report.md").read_text()


def test_the_published_protocol_is_scored_on_its_windows(tmp_path):
    simulate_bars(8, seed=0).to_csv(tmp_path / "bars.csv", index=False)
    prepare([tmp_path / "bars.csv"], out=tmp_path / "set", split="seed", context_length=128, mask_filled=False)
    options = ["--data.path", str(tmp_path / "set"), *TINY.split(), "--data.context_length", "128"]
    assert main(["train", *options, "--trainer.max_steps", "2", "--run", str(tmp_path / "run")]) == 0
    metrics, _ = evaluate(tmp_path / "run")
    assert metrics["rows"] == 3 * (128 - LAGS + 1)  # three test windows; a target with 120 bars before it counts


@pytest.mark.parametrize(
    ("spoil", "options", "complaint"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), [], "best.ckpt does not exist: no validation"),
        (
            lambda run: None,
            ["--checkpoint", "other.ckpt"],
            "the checkpoints there are best.ckpt, last.ckpt",
        ),
        (lambda run: (run / "checkpoints" / "best.ckpt").write_bytes(b"PK"), [], "best.ckpt cannot be loaded"),
        (lambda run: (run / "checkpoints" / "best.ckpt").write_bytes(b""), [], "best.ckpt cannot be loaded"),
        (lambda run: (run / "config.yaml").unlink(), [], "is not a run"),
        (lambda run: (run / "config.yaml").write_text(""), [], "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").write_text("data: {path: x"), [], "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), [], "config.yaml is damaged"),
        (lambda run: (run / "run.json").write_text("{}"), [], "run.json is missing or damaged; name a whole run"),
        (lambda run: None, ["--data", "no/such/set"], "no/such/set is not a prepared set"),
        (lambda run: None, ["--part", "tset"], "part"),
        (lambda run: None, ["--batch_size", "0"], "batch_size"),
        (
            lambda run: change_weights(run, lambda name, weight: weight * torch.nan),
            [],
            "the forecast of model is not finite",
        ),
    ],
)
def test_what_cannot_be_scored_leaves_the_metrics_before(run, spoil, options, complaint, capsys):
    evaluate(run)
    spoil(run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    capsys.readouterr()
    assert main(["evaluate", str(run), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flashlab: error: ")
    assert complaint in line
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_no_run(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} is not a run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("shorter", "complaint"), [(16, "prepare it with --context_length 32"), (None, "is damaged")])
def test_another_set_must_fit_and_be_whole(run, prepared, bars_csv, shorter, complaint, tmp_path, capsys):
    if shorter:
        prepare([bars_csv], out=tmp_path / "set", context_length=shorter)
    else:
        shutil.copytree(prepared, tmp_path / "set")
        next((tmp_path / "set").rglob("*.bin")).write_bytes(b"")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(tmp_path / "set")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (run / "metrics.json").exists()


def test_bars_that_may_have_been_trained_on_are_not_scored_in_silence(run, prepared, bars_csv, tmp_path, capsys):
    """A test part moved within what was validation and test; then one that lies in what was trained on."""
    split = open_set(prepared).manifest["split"]
    validation, test = (np.datetime64(split["starts"][part][:-1]) for part in ("validation", "test"))
    for day, other in ((validation, None), (validation - 600, str(tmp_path / "set"))):
        prepare(
            [bars_csv], out=tmp_path / "set", context_length=32, validation_start=str(day), test_start=str(test - 60)
        )
        capsys.readouterr()
        metrics, _ = evaluate(run, "--data", tmp_path / "set")
        said = f"The training part of {other} is not what the model was trained on: it may know these bars."
        assert metrics["run"]["other_data"] == other
        assert (said in capsys.readouterr().out) == (other is not None)
    assert main(["report", str(run)]) == 0
    assert said.replace("_", r"\_") in (run / "report.md").read_text()

    change = yaml.safe_load((run / "config.yaml").read_text())
    change["data"]["path"] = other
    (run / "config.yaml").write_text(yaml.safe_dump(change))
    assert main(["evaluate", str(run)]) == 2
    assert f"{other} was prepared otherwise since {run} was trained on it" in capsys.readouterr().err


def test_a_full_disk_leaves_the_metrics_before(run, monkeypatch, capsys):
    def write_half(path, text):
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    evaluate(run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # too little for the forecasts
    try:
        assert main(["evaluate", str(run)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {run}: File too large" in capsys.readouterr().err
    monkeypatch.setattr(Path, "write_text", write_half)
    assert main(["evaluate", str(run)]) == 2
    assert f"cannot write {run}: No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
