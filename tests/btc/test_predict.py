import contextlib
import errno
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from flashlab.btc.bars import HEADER, segments
from flashlab.btc.model import CLOSE, FRAMES, PRICES, VOLUME, WARM_UP, Forecaster, ModelConfig
from flashlab.btc.prepare import open_set
from flashlab.btc.stream import Stream
from flashlab.btc.windows import rolling_windows, scored_windows
from flashlab.cli import main

CONTEXT = 32
TINY = (
    f"--data.context_length {CONTEXT} --data.stride 16 --data.batch_size 8 --model.width 16 --model.num_layers 2 "
    "--optimizer.lr 0.01 --optimizer.warmup_steps 3 --trainer.max_steps 20 --trainer.val_every_n_steps 10 "
    "--trainer.accelerator cpu"
)
MEAN, STD = [9.0, 9.0, 9.0, 9.0, 2.0], [0.02, 0.02, 0.02, 0.02, 1.0]
# Log prices are near 9, where float32 has steps of 2^-20. Input, forecast and the close between them are rounded to it,
# and the sums in between are small beside it.
ROUNDING = 4 * 2.0**-20


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # another test may have left it lower
    yield request.param
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def stream(run, monkeypatch, capfd):
    """Pipe text into `flashlab predict RUN -`: exit code, forecasts printed, lines of stderr."""

    def pipe(text):
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(data)))
        capfd.readouterr()
        code = main(["predict", str(run), "-"])
        printed, said = capfd.readouterr()
        return code, table(printed) if printed else None, said.splitlines()

    return pipe


def table(text):
    assert text.startswith(HEADER + "\n")
    return pd.read_csv(BytesIO(text.encode()))


def predict(run, src, *options):
    assert main(["predict", str(run), str(src), *map(str, options)]) == 0
    return table((run / "forecasts.csv").read_text())


def bars_text(csv, rows):
    return pd.read_csv(csv).iloc[rows].to_csv(index=False)


def assert_same(found, expected):
    """The same forecasts within rounding, of prices and of 1 + volume."""
    np.testing.assert_array_equal(found["Timestamp"], expected["Timestamp"])
    for frame in (found, expected):
        frame["Volume"] += 1
    np.testing.assert_allclose(found, expected, rtol=ROUNDING, atol=0)


def forecaster(frame="relative", **shape):
    torch.manual_seed(0)
    model = Forecaster(ModelConfig(**({"width": 16, "num_layers": 2} | shape), frame=frame), MEAN, STD).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)  # as if it had learned something
    return model


def market(length):
    """Bars ``[N, F]`` near 8100, every seventh minute filled."""
    rng = np.random.default_rng(0)
    close = np.exp(9 + 1e-3 * rng.normal(size=length).cumsum())
    opened = close * np.exp(1e-4 * rng.normal(size=length))
    up, down = np.exp(rng.exponential(1e-3, size=(2, length)))
    bars = np.stack([opened, np.maximum(opened, close) * up, np.minimum(opened, close) / down, close, up * 8], axis=-1)
    bars[6::7, PRICES], bars[6::7, VOLUME] = bars[5::7, [CLOSE]][: len(bars[6::7])], np.nan
    return bars.astype(np.float32)


@torch.inference_mode()
def full_forward(model, bars):
    return model(torch.from_numpy(bars).to(model.input.weight.device)[None]).log_bars[0].double().cpu().numpy()


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("context_length", [48, 47, 17])
def test_a_stream_equals_the_full_forward_of_its_window(frame, context_length, device):
    """At every position, while the first window fills and after it has moved several times."""
    model, bars = forecaster(frame).to(device), market(160)
    stream, start, moved = Stream(model, context_length), 0, 0
    for last in range(len(bars)):
        if last - start == context_length:
            start, moved = last - context_length // 2, moved + 1
        expected = full_forward(model, bars[start : last + 1])[-1]
        np.testing.assert_allclose(stream.append(bars[last]), expected, rtol=0, atol=ROUNDING)
    assert moved >= 4


def test_the_default_model_streams_over_its_whole_context(device):
    model, bars = forecaster(width=64, num_layers=4).to(device), market(1100)
    stream = Stream(model, 1024)
    found = np.stack([stream.append(bar) for bar in bars])
    np.testing.assert_allclose(found[:1024], full_forward(model, bars[:1024]), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(found[1024:], full_forward(model, bars[512:])[512:], rtol=0, atol=ROUNDING)


def test_the_last_bar_of_a_stream_can_be_replaced():
    model, bars = forecaster(), market(60)
    stream, plain = Stream(model, 32), Stream(model, 32)
    for bar in bars:
        stream.append(bar * np.float32(1.01))
        stream.replace_last(bar * np.float32(0.99))
        np.testing.assert_allclose(stream.replace_last(bar), plain.append(bar), rtol=0, atol=ROUNDING)


def test_a_cleared_stream_is_as_new():
    model, bars = forecaster(), market(60)
    used = Stream(model, 32)
    for bar in bars:
        used.append(bar)
    used.clear()
    new = Stream(model, 32)
    for bar in bars[:20]:
        np.testing.assert_array_equal(used.append(bar), new.append(bar))


@pytest.mark.parametrize("context_length", [20, 21])
@pytest.mark.parametrize("lengths", [[1], [20], [21], [22], [31, 5, 200], [197]])
def test_rolling_windows_forecast_every_row_once_with_half_a_context_before_it(lengths, context_length):
    edges = np.cumsum([0, *lengths])
    runs = np.stack([edges[:-1], edges[1:]], axis=1)
    starts, stops, firsts = rolling_windows(runs, context_length)
    forecast = [row for first, stop in zip(firsts, stops, strict=True) for row in range(first, stop)]
    assert forecast == list(range(edges[-1]))
    assert (stops - starts <= context_length).all()
    begins = np.isin(starts, runs[:, 0])
    np.testing.assert_array_equal((firsts - starts)[~begins], context_length // 2)
    np.testing.assert_array_equal(firsts[begins], starts[begins])
    for start, stop in zip(starts, stops, strict=True):
        assert ((runs[:, 0] <= start) & (stop <= runs[:, 1])).any()


def test_a_file_gets_the_forecasts_that_evaluate_scores(run, prepared, bars_csv, monkeypatch, capsys):
    """The training part begins with the file: but for its last window, evaluate has the same windows there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # there evaluate rounds to bfloat16
    forecasts = predict(run, bars_csv)
    assert f"wrote {len(forecasts):,} forecasts, " in capsys.readouterr().out
    assert main(["evaluate", str(run), "--part", "train"]) == 0
    with np.load(run / "forecasts.npz") as arrays:
        minute, scored = arrays["minute"], arrays["model"]
    opened = open_set(prepared)
    first_row, *_, last_window = scored_windows(opened.manifest, "train", CONTEXT, 0)[0]
    shared = minute < opened.bars().minute[last_window + CONTEXT // 2]
    assert first_row == 0
    assert shared.sum() > 2000
    found = forecasts.set_index(forecasts["Timestamp"] // 60).loc[minute[shared]]
    log_bars = np.log(found[["Open", "High", "Low", "Close"]]).assign(Volume=np.log1p(found["Volume"]))
    expected = scored[shared]
    expected[:, VOLUME] = expected[:, VOLUME].clip(0)
    np.testing.assert_allclose(log_bars, expected, rtol=0, atol=ROUNDING)


def test_there_is_a_row_for_every_minute_after_the_warm_up(run, bars_csv, prepared):
    forecasts = predict(run, bars_csv, "--batch_size", 7)
    bars = open_set(prepared).bars()
    assert len(segments(bars)) == 1
    first = bars.minute[bars.observed][WARM_UP - 1]
    np.testing.assert_array_equal(forecasts["Timestamp"], np.arange(first + 1, bars.minute[-1] + 2) * 60)
    assert (forecasts[["Open", "High", "Low", "Close"]] > 0).all(axis=None)
    assert (forecasts["Volume"] >= 0).all()


def with_gaps(csv):
    """A short gap and two long ones, between which there is too little to warm up."""
    bars = pd.read_csv(csv).iloc[:1200]
    minute = (bars["Timestamp"] - bars["Timestamp"][0]) // 60
    return bars[~(minute.between(40, 60) | minute.between(200, 445) | minute.between(455, 455 + 300))]


def test_a_stream_prints_what_a_file_gets(run, stream, bars_csv, tmp_path):
    bars = with_gaps(bars_csv)
    bars.to_csv(tmp_path / "gaps.csv", index=False)
    expected = predict(run, tmp_path / "gaps.csv")
    assert np.diff(expected["Timestamp"]).max() > 240 * 60
    code, found, said = stream((tmp_path / "gaps.csv").read_text())
    assert code == 0
    assert_same(found, expected)
    assert len(said) == 2
    assert all("minutes are missing before" in line and "warming up anew" in line for line in said)


def test_a_run_that_took_rows_as_consecutive_does_so_again(run, stream, bars_csv, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["trained_on"]["missing"] = {"mode": "raw", "max_gap": None}
    (run / "run.json").write_text(json.dumps(record))
    bars = with_gaps(bars_csv)
    bars.to_csv(tmp_path / "gaps.csv", index=False)
    expected = predict(run, tmp_path / "gaps.csv")
    np.testing.assert_array_equal(expected["Timestamp"], bars["Timestamp"][WARM_UP - 1 :] + 60)
    code, found, said = stream((tmp_path / "gaps.csv").read_text())
    assert (code, said) == (0, [])
    assert_same(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda bars: bars.assign(Timestamp=bars["Timestamp"] * 1000),
        lambda bars: bars.assign(Timestamp=pd.to_datetime(bars["Timestamp"], unit="s")),
        lambda bars: bars[bars.columns[::-1]].assign(datetime="whenever").rename(columns=str.lower),
    ],
    ids=["milliseconds", "ISO-8601", "columns"],
)
def test_a_stream_may_look_as_a_file_may(stream, bars_csv, change):
    bars = pd.read_csv(bars_csv).iloc[:40]
    _, expected, _ = stream(bars.to_csv(index=False))
    code, found, said = stream(change(bars).to_csv(index=False))
    assert (code, said) == (0, [])
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{time},8,x,8,8,1", "'x' is not a number"),
        ("yesterday,8,8,8,8,1", "'yesterday' is not a number"),
        ("\x00\xff{{", "is not a number"),
        ("{time},8,8,8,8", "non finite"),
        ("{time},8,8,8,inf,1", "non finite"),
        ("{time},0,8,8,8,1", "price not positive"),
        ("{time},8,7,9,8,1", "high below low"),
        ("{time},8,7,7,7,1", "outside range"),
        ("{time},8,8,8,8,-1", "negative volume"),
        ("{time},8,100,8,100,8,8,1", "8 cells under a header of 6 columns"),
        ("4102444800,8,8,8,8,1", "its time is not between 2009 and tomorrow (Unix seconds, or ISO-8601)"),
        ("1262304000,8,8,8,8,1", "out of order"),
        (HEADER, None),
        ("", None),
        ("  \r", None),
    ],
)
def test_a_row_that_cannot_be_is_left_out_of_a_stream(stream, bars_csv, row, fault):
    lines = bars_text(bars_csv, range(40)).splitlines()
    _, expected, _ = stream("\n".join(lines))
    row = row.replace("{time}", lines[30].partition(",")[0])
    code, found, said = stream("\n".join([*lines[:30], row, *lines[30:]]))
    assert code == 0
    assert_same(found, expected)
    if fault is None:
        assert said == []
    else:
        (line,) = said
        assert line.startswith("flashlab: standard input, line 31 is left out: ")
        assert line.endswith(fault)


def test_a_minute_that_comes_again_replaces_the_last_bar(stream, bars_csv):
    lines = bars_text(bars_csv, range(60)).splitlines()
    code, plain, _ = stream("\n".join(lines))
    again = [line for line in lines[1:] for line in (",".join([*line.split(",")[:5], "5"]), line)]
    code, found, said = stream("\n".join([lines[0], *again]))
    assert (code, said) == (0, [])
    assert len(found) == 2 * (60 - WARM_UP + 1) + len(plain) - (60 - WARM_UP + 1)
    assert_same(found.groupby("Timestamp", as_index=False).last(), plain)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "standard input is empty"),
        ("\n\n", "standard input is empty"),
        (HEADER, "standard input has a header but no rows"),
        ("1,2,3,4,5,6\n" * 3, "standard input has no header"),
        (HEADER.replace("Close", "Last") + "\n1500000000,1,1,1,1,1\n", "has no column 'Close'"),
        (HEADER.replace(",", ";") + "\n1500000000;1;1;1;1;1\n", "separated by semicolons"),
        (b"\x7fELF\x00\x01\x02", "standard input is a binary file"),
        (gzip.compress(HEADER.encode(), mtime=0), "standard input is compressed"),
        (
            f"{HEADER}\n1500000000,1,1,1,1,1\n",
            "standard input: 1 bars, but forecasts begin after 16 without",
        ),
        (
            "\n".join([HEADER, *(f"{1500000000 + 300 * row},1,1,1,1,1" for row in range(50))]),
            "its rows are 300 seconds apart",
        ),
        (
            "\n".join([HEADER, *(f"{(1500000000 + 60 * row) * 10**6},1,1,1,1,1" for row in range(50))]),
            "its times seem to be in microseconds",
        ),
    ],
)
def test_a_stream_that_is_none_of_bars(stream, text, complaint):
    code, found, said = stream(text)
    assert (code, found) == (2, None)
    (line,) = said
    assert line.startswith("flashlab: error: ")
    assert complaint in line


def test_a_stream_without_standard_input(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["predict", str(run), "-"]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_a_stream_that_cannot_be_read(run, monkeypatch, capsys):
    def readline(limit):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(readline=readline)))
    assert main(["predict", str(run), "-"]) == 2
    assert "cannot read standard input: Input/output error" in capsys.readouterr().err


def change_weights(run, change):
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for name, weight in checkpoint["state_dict"].items():
        checkpoint["state_dict"][name] = change(weight)
    torch.save(checkpoint, path)


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
        (lambda run: (run / "config.yaml").unlink(), [], "is not a run"),
        (lambda run: (run / "config.yaml").write_text("data: {path: x"), [], "config.yaml is damaged"),
        (lambda run: (run / "run.json").unlink(), [], "run.json is missing or damaged"),
        (lambda run: None, ["--backend", "flash"], "no attention backend 'flash'"),
        (lambda run: None, ["--backend", "sdpa_cudnn"], "cannot run this call"),
        (lambda run: None, ["--batch_size", "0"], "batch_size"),
        (lambda run: change_weights(run, lambda weight: weight * torch.nan), [], "is not finite"),
        (lambda run: change_weights(run, lambda weight: weight * 1e6), [], "is not finite"),
        (lambda run: None, ["--out", "."], "--out .: expected a file to write"),
        (lambda run: None, ["--out", "bars.csv"], "--out bars.csv: expected a file to write, other than bars.csv"),
        (lambda run: None, ["--out", "bars.csv/forecasts.csv"], "cannot write bars.csv/forecasts.csv"),
        (lambda run: Path("bars.csv").write_text(f"{HEADER}\n1500000000,1,1,1,1,1\n"), [], "bars.csv: 1 bars, but"),
        (lambda run: Path("bars.csv").write_text(f"{HEADER}\n1500000000,1,1,x,1,1\n"), [], "line 2, column low: 'x'"),
        (lambda run: Path("bars.csv").unlink(), [], "bars.csv does not exist"),
    ],
)
def test_what_cannot_be_forecast_leaves_the_file_before(run, bars_csv, spoil, options, complaint, monkeypatch, capsys):
    monkeypatch.chdir(run)
    Path("bars.csv").write_text(bars_text(bars_csv, range(100)))
    predict(run, "bars.csv")
    spoil(run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    capsys.readouterr()
    assert main(["predict", str(run), "bars.csv", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flashlab: error: ")
    assert complaint in line
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_stream_has_no_file(run, capsys):
    assert main(["predict", str(run), "-", "--out", "forecasts.csv"]) == 2
    assert "--out does not go with -" in capsys.readouterr().err


def test_a_gz_holds_the_same(run, bars_csv, tmp_path):
    predict(run, bars_csv)
    for _ in range(2):
        assert main(["predict", str(run), str(bars_csv), "--out", str(tmp_path / "new" / "f.csv.gz")]) == 0
        packed = (tmp_path / "new" / "f.csv.gz").read_bytes()
        assert gzip.decompress(packed) == (run / "forecasts.csv").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.csv.gz"]


def test_a_full_disk_leaves_the_file_before(run, bars_csv, capsys):
    predict(run, bars_csv)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        assert main(["predict", str(run), str(bars_csv)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {run / 'forecasts.csv'}: File too large" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_stream_onto_a_full_disk(run, bars_csv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(bars_text(bars_csv, range(40)).encode())))
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["predict", str(run), "-"]) == 2
    assert "cannot write standard output: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["end of input", "Ctrl-C", "closed pipe"])
def test_a_stream_answers_at_once_and_ends_quietly(run, bars_csv, ending):
    header, *rows = bars_text(bars_csv, range(40)).splitlines(keepends=True)
    command = [sys.executable, "-m", "flashlab", "predict", str(run), "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1) as process:
        process.stdin.writelines([header, *rows[:WARM_UP]])
        assert process.stdout.readline() == HEADER + "\n"
        for row, following in zip(rows[WARM_UP - 1 : 20], rows[WARM_UP:21], strict=True):
            time = int(row.partition(",")[0])
            while True:  # until the newest bar's forecast is there, after those of the minutes that were missing
                forecast = int(process.stdout.readline().partition(",")[0])
                if forecast == time + 60:
                    break
            process.stdin.write(following)
        if ending == "end of input":
            process.stdin.close()
        elif ending == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.writelines(rows[21:])
        code, said = process.wait(60), process.stderr.read()
    expected = {"end of input": (0, ""), "Ctrl-C": (130, "flashlab: interrupted\n"), "closed pipe": (141, "")}
    assert (code, said) == expected[ending]
