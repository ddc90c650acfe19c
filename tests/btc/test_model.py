from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from flashlab.attention import AttentionSpec
from flashlab.attention.backends import BACKENDS
from flashlab.btc.model import (
    CLOSE,
    FRAMES,
    HALF_LIVES,
    HIGH,
    LOW,
    OPEN,
    PRICES,
    VOLUME,
    WARM_UP,
    Forecast,
    Forecaster,
    ModelConfig,
    RelativeFrame,
    exponential_averages,
    rotate,
    rotation_angles,
    to_log_bars,
)

PRESETS = Path(__file__).parents[2] / "examples" / "btc_forecast"
MEAN, STD = [9.0, 9.0, 9.0, 9.0, 2.0], [0.02, 0.02, 0.02, 0.02, 1.0]
ON_CPU = AttentionSpec(2, 48, 48, 2, 2, 8, torch.float32, torch.device("cpu"), causal=True, needs_grad=True)
CPU_BACKENDS = [name for name, backend in BACKENDS.items() if backend.why_not(ON_CPU) is None]
ONES = torch.ones(5)


def market(batch=2, length=48, seed=0):
    """Bars ``[B, S, F]`` of a random walk near 8100, every seventh minute filled."""
    rng = np.random.default_rng(seed)
    close = 9 + 1e-3 * rng.normal(size=(batch, length + 1)).cumsum(axis=1)
    opened, close = close[:, :-1] + 1e-4 * rng.normal(size=(batch, length)), close[:, 1:]
    up, down = rng.exponential(1e-3, size=(2, batch, length))
    high, low = np.maximum(opened, close) + up, np.minimum(opened, close) - down
    bars = np.exp(np.stack([opened, high, low, close, rng.normal(2, 1, size=close.shape)], axis=-1))
    bars[:, 6::7, PRICES] = bars[:, 5::7, [CLOSE]][:, : bars[:, 6::7].shape[1]]
    bars[:, 6::7, VOLUME] = np.nan
    return torch.tensor(bars, dtype=torch.float32)


def forecaster(frame="relative", backend="auto", **shape):
    torch.manual_seed(0)
    model = Forecaster(ModelConfig(**({"width": 16, "num_layers": 2} | shape), frame=frame, backend=backend), MEAN, STD)
    torch.nn.init.normal_(model.output.weight, std=0.3)  # as if it had learned something
    return model


def mean_loss(model, bars, weights, mask_filled):
    total, count = model.loss(bars, weights, mask_filled)
    return total / count


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("frame", FRAMES)
def test_no_forecast_sees_a_later_bar(frame, backend):
    model, bars, future = forecaster(frame, backend), market(), 30
    before = model(bars).log_bars
    for change in (lambda bars: bars * 1.5, lambda bars: bars * torch.tensor([1, 1, 1, 1, torch.nan])):
        changed = bars.clone()
        changed[:, future:] = change(bars[:, future:])
        after = model(changed).log_bars
        torch.testing.assert_close(after[:, :future], before[:, :future], rtol=0, atol=0)
        assert (after[:, future] != before[:, future]).any(dim=-1).all()  # the change is seen as soon as it happened


def test_another_currency_shifts_the_forecast_and_nothing_else():
    model, bars = forecaster(), market()
    shifted = model(bars * torch.tensor([7.0, 7, 7, 7, 1])).log_bars - model(bars).log_bars
    torch.testing.assert_close(
        shifted[..., PRICES], torch.full_like(shifted[..., PRICES], np.log(7)), rtol=0, atol=2e-5
    )
    torch.testing.assert_close(shifted[..., VOLUME], torch.zeros_like(shifted[..., VOLUME]), rtol=0, atol=2e-3)


def test_moves_are_from_the_close_before_in_units_of_the_recent_range():
    """Of pandas' making, a window at a time."""
    bars = market()
    inputs, past = RelativeFrame(MEAN, STD).encode(bars)
    for window in range(len(bars)):
        prices = np.log(pd.DataFrame(bars[window, :, PRICES].double().numpy()))
        moves = prices.sub(prices[CLOSE].shift(1).fillna(prices[OPEN][0]), axis=0)
        unit = (moves[HIGH].clip(lower=0) - moves[LOW].clip(upper=0)).ewm(halflife=HALF_LIVES[-1]).mean()
        np.testing.assert_allclose(inputs[window, :, PRICES], np.arcsinh(moves.div(unit, axis=0)), atol=5e-3)
        np.testing.assert_allclose(past.unit[window], unit, rtol=2e-3)
        np.testing.assert_array_equal(inputs[window, :, 5] == 0, bars[window, :, VOLUME].isnan())  # is it filled?


def test_the_mirrored_market_has_opposite_moves_and_the_same_volume():
    bars = market()
    mirrored = torch.cat([1 / bars[..., [OPEN, LOW, HIGH, CLOSE]], bars[..., VOLUME:]], dim=-1)
    frame = RelativeFrame(MEAN, STD)
    (inputs, past), (opposite, other) = frame.encode(bars), frame.encode(mirrored)
    torch.testing.assert_close(opposite[..., [OPEN, LOW, HIGH, CLOSE]], -inputs[..., PRICES], rtol=0, atol=1e-2)
    torch.testing.assert_close(opposite[..., 4:], inputs[..., 4:], rtol=0, atol=1e-2)  # volume, ranges, what was filled
    ranges, opposite_ranges = (of.ranges.unflatten(-1, (3, -1)) for of in (past, other))  # whole, up, down
    torch.testing.assert_close(opposite_ranges[..., [0, 2, 1], :], ranges, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.volume, past.volume, rtol=0, atol=0)


def degenerate(name):
    bars = market(length=64)
    if name == "flat price":
        bars[..., PRICES] = 8000.0
    elif name == "all filled":
        bars[..., PRICES], bars[..., VOLUME] = 8000.0, torch.nan
    elif name == "no volume":
        bars[..., VOLUME] = 0.0
    elif name == "jump after a flat price":
        bars[:, :40, PRICES], bars[:, 40:, PRICES] = 8000.0, 12_000.0
    elif name == "crash":
        bars[:, 40:, PRICES] *= 0.5
    elif name == "first bars filled":
        bars[:, :30, VOLUME] = torch.nan
    return bars


@pytest.mark.parametrize("mask_filled", [True, False])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(
    "name", ["flat price", "all filled", "no volume", "jump after a flat price", "crash", "first bars filled"]
)
def test_degenerate_bars_stay_finite(name, frame, mask_filled):
    model, bars = forecaster(frame), degenerate(name)
    loss = mean_loss(model, bars, ONES, mask_filled)
    loss.backward()
    assert loss.isfinite()
    assert model(bars).log_bars.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("half_life", HALF_LIVES)
def test_exponential_averages_are_those_of_pandas(half_life):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 200, 2)))
    averages = exponential_averages(x, (half_life, 1.0))
    for series in range(3):
        expected = pd.DataFrame(x[series].numpy()).ewm(halflife=half_life, adjust=True).mean()
        np.testing.assert_allclose(averages[series, :, :, 0].numpy(), expected)


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 40, 1, 8)
    rotation = rotation_angles(40, 8, q.device)
    scores = (rotate(q, rotation)[0, :, 0] @ rotate(k, rotation)[0, :, 0].T).double()
    for distance in (-7, 0, 3, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores[:, 0].unique().numel() == 40  # and no two distances look the same
    torch.testing.assert_close(rotate(q, rotation).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotate(q, rotation)[:, 0], q[:, 0])


@pytest.mark.parametrize(("feature", "side"), [(HIGH, 1), (LOW, -1)])
def test_the_range_loss_is_least_at_the_mean(feature, side):
    moves = torch.tensor(np.random.default_rng(0).exponential(1e-3, size=1000)).reshape(1, -1)
    unit, last_close = torch.full((1, 1000, 5), 5e-4), torch.full((1, 1000), 9.0, dtype=torch.double)
    target = last_close[..., None].repeat(1, 1, 5)
    target[..., feature] += side * moves

    def loss(move):
        log_bars = last_close[..., None].repeat(1, 1, 5)
        log_bars[..., feature] += side * move
        return RelativeFrame(MEAN, STD).loss(Forecast(log_bars, unit, last_close), target)[..., feature].mean()

    mean = moves.mean().requires_grad_()
    (slope,) = torch.autograd.grad(loss(mean), mean)
    assert abs(slope * mean) < 1e-6
    assert loss(mean) < min(loss(mean * 0.99), loss(mean * 1.01))


@pytest.mark.parametrize("mask_filled", [True, False])
@pytest.mark.parametrize("frame", FRAMES)
def test_the_loss_averages_over_the_bars_that_count(frame, mask_filled):
    """Those after the warm-up, and not the filled ones."""
    model, bars, weights = forecaster(frame), market(), torch.tensor([1.0, 2, 3, 4, 0.5])
    forecast, log_bars = model(bars[:, :-1]), to_log_bars(bars)
    losses = model.frame.loss(forecast, log_bars[:, 1:]) @ weights
    observed = bars[..., VOLUME].isfinite()
    counted = [
        losses[window, position]
        for window in range(len(bars))
        for position in range(bars.shape[1] - 1)
        if observed[window, : position + 1].sum() >= WARM_UP and (observed[window, position + 1] or not mask_filled)
    ]
    assert 20 < len(counted) < losses.numel() - 30
    torch.testing.assert_close(mean_loss(model, bars, weights, mask_filled), torch.stack(counted).mean())


@pytest.mark.parametrize(("mask_filled", "moves"), [(True, False), (False, True)])
def test_a_filled_minute_teaches_nothing(mask_filled, moves):
    model, bars = forecaster(), market()
    changed = bars.clone()
    bars[:, -1, VOLUME] = changed[:, -1, VOLUME] = torch.nan
    changed[:, -1, PRICES] *= 1.01
    assert bool(mean_loss(model, bars, ONES, mask_filled) != mean_loss(model, changed, ONES, mask_filled)) == moves


def test_untrained_it_forecasts_the_last_close():
    model, bars = Forecaster(ModelConfig(), MEAN, STD), market()
    forecast = model(bars)
    distance = (forecast.log_bars[..., [OPEN, CLOSE]] - bars[..., CLOSE:VOLUME].log()) / forecast.unit[..., :2]
    assert distance.abs().mean() < 0.3
    assert (forecast.log_bars[..., HIGH] > forecast.last_close).all()
    assert (forecast.log_bars[..., LOW] < forecast.last_close).all()


@pytest.mark.parametrize("name", ["default", "seed"])
def test_presets_have_the_published_size(name):
    preset = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    model = Forecaster(ModelConfig(**preset["model"]), MEAN, STD)
    assert 195_000 < sum(parameter.numel() for parameter in model.parameters()) < 210_000


@pytest.mark.parametrize("frame", FRAMES)
def test_one_batch_overfits(frame):
    bars = market(length=40)
    log_bars = to_log_bars(bars)[:, 1:]
    mean, std = log_bars.mean(dim=(0, 1)).tolist(), log_bars.std(dim=(0, 1)).tolist()
    torch.manual_seed(0)
    model = Forecaster(ModelConfig(width=32, num_layers=1, frame=frame), mean, std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, total_iters=250)

    def error():
        with torch.no_grad():
            forecast = model(bars[:, :-1])
        return ((forecast.log_bars - log_bars) / forecast.unit)[:, WARM_UP * 7 // 6 :].square().mean(dim=(0, 1))

    before = error()
    for _ in range(250):
        optimizer.zero_grad()
        mean_loss(model, bars, ONES, mask_filled=False).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        decay.step()
    assert (error() / before < 0.1).all(), error() / before


@pytest.mark.parametrize("frame", FRAMES)
def test_float32_is_precise_enough_at_the_price_of_a_bitcoin(frame):
    """The inputs differ from those of float64 by less than a hundredth of their unit."""
    bars = market() * torch.tensor([8.0, 8, 8, 8, 1])
    inputs = FRAMES[frame](MEAN, STD).encode(bars)[0]
    exact = FRAMES[frame](MEAN, STD).double().encode(bars.double())[0]
    torch.testing.assert_close(inputs.double(), exact, rtol=0, atol=0.01)


def test_bfloat16_is_for_the_network_and_not_for_prices():
    model, bars = forecaster(), market()
    exact = model(bars)
    with torch.autocast("cpu", torch.bfloat16):
        rough, loss = model(bars), mean_loss(model, bars, ONES, mask_filled=True)
    assert rough.log_bars.dtype == loss.dtype == torch.float32
    error = (rough.log_bars - exact.log_bars).abs() / exact.unit
    assert 0 < error.max() < 0.1
