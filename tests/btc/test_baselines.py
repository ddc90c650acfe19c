import numpy as np
import pytest

from flashlab.btc.baselines import BASELINES, LAGS, VOLUME, VolumeAutoregression


@pytest.fixture
def log_bars():
    """Bars of a random walk whose volume is autocorrelated."""
    rng = np.random.default_rng(0)
    bars = rng.normal(size=(20_000, 5)).cumsum(axis=0) * 1e-3 + 8
    for row in range(2, len(bars)):
        bars[row, VOLUME] = 1 + 0.5 * bars[row - 1, VOLUME] + 0.3 * bars[row - 2, VOLUME] + rng.normal()
    return bars


TRAIN_ROWS = np.arange(LAGS, 15_000)


def test_forecasts_by_hand():
    bars = np.tile([1.0, 4.0, 0.5, 2.0, 7.0], (300, 1)) + np.arange(300)[:, None]
    rows = np.array([200, 150])  # in any order
    persistence, last_close, ar120 = (forecast(bars, rows, np.arange(LAGS, 300)) for forecast in BASELINES.values())
    np.testing.assert_allclose(persistence, [[200, 203, 199.5, 201, 206], [150, 153, 149.5, 151, 156]])
    np.testing.assert_allclose(last_close, [[201, 201, 201, 201, 206], [151, 151, 151, 151, 156]])
    np.testing.assert_allclose(ar120, [[201, 201, 201, 201, 207], [151, 151, 151, 151, 157]])  # it sees the trend


@pytest.mark.parametrize("name", BASELINES)
def test_no_forecast_sees_its_own_bar_or_a_later_one(name, log_bars):
    rows = np.arange(16_000, 16_200)
    forecast = BASELINES[name](log_bars, rows, TRAIN_ROWS)
    log_bars[16_100:] += 1
    moved = (BASELINES[name](log_bars, rows, TRAIN_ROWS) != forecast).any(axis=1)
    assert rows[moved].min() == 16_101


def test_autoregression_is_ordinary_least_squares(log_bars):
    design = np.array([[*log_bars[row - LAGS : row, VOLUME], 1] for row in TRAIN_ROWS])
    expected = np.linalg.lstsq(design, log_bars[TRAIN_ROWS, VOLUME])[0]
    model = VolumeAutoregression(log_bars, TRAIN_ROWS)
    np.testing.assert_allclose([*model.weights, model.intercept], expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(model.weights[-2:], [0.3, 0.5], atol=0.03)  # the newest lag comes last
    np.testing.assert_allclose(model.predict(TRAIN_ROWS[:500]), design[:500] @ expected)


def test_autoregression_of_a_constant_volume_is_that_volume(log_bars):
    log_bars[:, VOLUME] = 3
    np.testing.assert_allclose(VolumeAutoregression(log_bars, TRAIN_ROWS).predict(np.array([19_000])), 3)


@pytest.mark.parametrize("row", [LAGS - 1, 20_000])
def test_a_row_without_enough_rows_before_it_is_refused(row, log_bars):
    with pytest.raises(ValueError, match="needs 120 rows before it"):
        VolumeAutoregression(log_bars, TRAIN_ROWS).predict(np.array([row]))
