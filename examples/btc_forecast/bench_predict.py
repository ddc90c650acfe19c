"""Measure the stream of `flashlab predict RUN -` beside running the whole window for every bar."""

from json import dumps
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from jsonargparse.typing import PositiveInt

from flashlab.btc.bars import FEATURES
from flashlab.btc.model import Forecaster, ModelConfig
from flashlab.btc.simulate import simulate_bars
from flashlab.btc.stream import Stream
from flashlab.cli import script
from flashlab.errors import check_writable, write_text


@torch.inference_mode()
def bench(*, context_length: PositiveInt = 2048, samples: PositiveInt = 8, json: Path | None = None) -> None:
    """Print bars/s of both with the default model's shape, and their ratio.

    Args:
        context_length: bars in the longest window.
        samples: windows of which the whole forward is timed, from half a context to a whole one.
        json: file to write the figures to.
    """
    if json:
        check_writable("--json", json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forecaster = Forecaster(ModelConfig(), [9.0] * 5, [1.0] * 5).to(device).eval()
    columns = [name.capitalize() for name in FEATURES]
    bars = simulate_bars(context_length // 500 + 1, seed=0)[columns].to_numpy(np.float32)
    moved = context_length - context_length // 2
    stream = Stream(forecaster, context_length)
    for bar in bars[:context_length]:
        stream.append(bar)
    start = perf_counter()
    for bar in bars[context_length : context_length + moved]:  # from one move of the window to the next, one included
        stream.append(bar)
    streamed = moved / (perf_counter() - start)

    window = torch.from_numpy(bars[:context_length].copy())[None].to(device)
    lengths = np.linspace(context_length - moved + 1, context_length, samples).astype(int)
    forecaster(window).log_bars.cpu()  # warm up
    start = perf_counter()
    for length in lengths:
        forecaster(window[:, :length]).log_bars[0, -1].cpu()
    whole = samples / (perf_counter() - start)
    figures = {"stream_bars_per_s": streamed, "forward_bars_per_s": whole, "ratio": streamed / whole}
    print(*(f"{name:20} {value:8.1f}" for name, value in figures.items()), sep="\n")
    if json:
        write_text(json, dumps({"device": device, "context_length": context_length} | figures, indent=1))


if __name__ == "__main__":
    script(bench)
