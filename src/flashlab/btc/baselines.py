"""Forecasts a person could make without a model: what a trained one is judged against.

Every baseline sees what the model sees, the bars before the one it forecasts, and is scored by the same evaluator.
"""

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from flashlab.btc.bars import FEATURES

LAGS = 120  # minutes of past volume the autoregression reads
CLOSE, VOLUME = FEATURES.index("close"), FEATURES.index("volume")
PRICES = [index for index in range(len(FEATURES)) if index != VOLUME]

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def persistence(log_bars: Floats, rows: Rows, train_rows: Rows) -> Floats:
    """Repeat the last bar."""
    return log_bars[rows - 1]


def last_close(log_bars: Floats, rows: Rows, train_rows: Rows) -> Floats:
    """Forecast the last close for all four prices, and the last volume."""
    forecast = log_bars[rows - 1]
    forecast[:, PRICES] = forecast[:, [CLOSE]]
    return forecast


def ar120(log_bars: Floats, rows: Rows, train_rows: Rows) -> Floats:
    """Forecast the last close for all four prices, and the volume from a linear autoregression on 120 minutes."""
    forecast = last_close(log_bars, rows, train_rows)
    forecast[:, VOLUME] = VolumeAutoregression(log_bars, train_rows).predict(rows)
    return forecast


# The one table of baselines: name -> function of (log bars ``[N, F]``, rows to forecast ``[M]``, training rows).
BASELINES: dict[str, Callable[[Floats, Rows, Rows], Floats]] = {
    "persistence": persistence,
    "last_close": last_close,
    "ar120": ar120,
}


class VolumeAutoregression:
    """A linear autoregression of log1p volume on its last 120 values, fitted by ordinary least squares.

    Args:
        log_bars: the series ``[N, F]``, natural log of prices and log1p of volume.
        train_rows: rows ``[T]`` to fit on; like every row asked for, each has 120 rows of its own segment before it.
    """

    def __init__(self, log_bars: Floats, train_rows: Rows) -> None:
        self.volume = np.ascontiguousarray(log_bars[:, VOLUME])
        self._require_lags(train_rows)
        gram = np.zeros((LAGS + 1, LAGS + 1))
        moment = np.zeros(LAGS + 1)
        windows = sliding_window_view(self.volume, LAGS)
        for start in range(0, len(train_rows), 8192):  # normal equations by parts: the whole design would take 2 GB
            rows = train_rows[start : start + 8192]
            design = np.ones((len(rows), LAGS + 1))
            design[:, :LAGS] = windows[rows - LAGS]
            gram += design.T @ design
            moment += design.T @ self.volume[rows]
        # Least squares and not `solve`: a volume that is constant over the training rows makes the equations singular.
        solution = np.linalg.lstsq(gram, moment)[0]
        self.weights, self.intercept = solution[:LAGS], solution[LAGS]

    def predict(self, rows: Rows) -> Floats:
        """Forecast log1p volume of the given rows ``[M]``."""
        self._require_lags(rows)
        return (np.correlate(self.volume, self.weights, mode="valid") + self.intercept)[rows - LAGS]

    def _require_lags(self, rows: Rows) -> None:
        if not len(rows) or rows.min() < LAGS or rows.max() >= len(self.volume):
            raise ValueError(f"rows must lie in [{LAGS}, {len(self.volume)}): each needs {LAGS} rows before it")
