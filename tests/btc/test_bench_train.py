import json
from dataclasses import asdict

import pytest
import torch
import yaml

from flashlab.btc import contestants
from flashlab.btc.bench import bench_train, draw, efficiency
from flashlab.btc.contestants import Cell, measure
from flashlab.btc.dataset import DataConfig
from flashlab.btc.model import ModelConfig
from flashlab.btc.module import ForecasterModule, OptimizerConfig
from flashlab.btc.profile import union
from flashlab.cli import main

TINY = {
    "data": {"context_length": 32, "stride": 16},
    "model": {"width": 16, "num_layers": 1},
    "trainer": {"accelerator": "cpu", "val_every_n_steps": 60, "log_every_n_steps": 5},
}
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@cpu_only
def test_what_can_run_is_measured_and_what_cannot_says_why(prepared, config, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench_train(data=str(prepared), configs=[config], batch_sizes=[4], steps=40, out=out) == 0
    record = json.loads(out.read_text())
    rows = {row["contestant"]: row for row in record["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "published": "unsupported",
        "plain": "ok",
        "captured": "unsupported",
        "bare": "unsupported",
    }
    assert "there is no GPU" in rows["captured"]["reason"]
    plain = rows["plain"]
    assert plain["bars_per_s"] == pytest.approx(4 * 32 / plain["ms_per_step"] * 1e3, rel=1e-3)
    assert plain["kernels"][0]["ms_per_step"] >= plain["kernels"][-1]["ms_per_step"] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "captured, tiny, 1 x 4 windows: " in printed
    assert str(tmp_path) not in json.dumps(record["rows"])
    bars = draw([plain]).axes[0].patches
    assert [bar.get_width() for bar in bars] == [plain["ms_per_step"], plain["busy_ms_per_step"]]


def test_several_gpus_are_compared_with_one_of_the_same_loop():
    keys = ("contestant", "config", "batch_size", "devices", "bars_per_s")
    cells = [("plain", "default", 8, 1, 3), ("captured", "default", 8, 1, 10), ("captured", "default", 8, 4, 36)]
    rows = [dict(zip(keys, cell, strict=True)) for cell in [*cells, ("captured", "default", 16, 4, 40)]]
    assert [efficiency(row, rows) for row in rows] == [None, None, 0.9, None]


def test_a_loop_that_fails_leaves_its_reason(prepared, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(TINY | {"model": {"width": 15}}))
    row = measure(Cell("plain", broken, 4, 1), str(prepared), 10, tmp_path)
    assert row["status"] == "unsupported"
    assert row["reason"].startswith("--model.num_heads 2 must divide --model.width 15 ")


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_bare_step_averages_weights_where_training_does(decay, prepared, tmp_path, monkeypatch):
    class Step(Exception):  # noqa: N818 - stands for the step, which needs a GPU
        pass

    def step(loss, optimizer, clip, dtype, after=None):
        raise Step(after is not None)

    monkeypatch.setattr(contestants, "CapturedStep", step)
    monkeypatch.setattr(ForecasterModule, "cuda", lambda module: module)
    config = {"data": asdict(DataConfig(path=str(prepared), **TINY["data"])), "model": asdict(ModelConfig())}
    config |= {"optimizer": asdict(OptimizerConfig(average_decay=decay)), "trainer": {"gradient_clip_val": 0.5}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(Step, match=str(decay > 0)):
        contestants.bare_step(str(prepared), 4, 10, tmp_path)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--configs no/such.yaml", "--configs no/such.yaml: there is no such file"),
        ("--contestants bare", "name both"),
        ("--data no/set", "no/set"),
        ("--out bench.png", "--out bench.png: the result is JSON; name a file that ends in .json"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(prepared, config, tmp_path, capsys, options, complaint):
    arguments = ["--data", str(prepared), "--configs", str(config), "--out", str(tmp_path / "out.json")]
    assert main(["bench", "train", *arguments, *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (tmp_path / "out.json").exists()


def test_overlapping_kernels_count_once():
    assert union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert union([]) == 0
