"""Simulated minute bars: the embedded default data, with the regularities of real ones and none of their size.

Bars are not drawn but built from trades, so that the five features hang together as they do in a market:

- *Activity* is the log of the expected number of trades a minute, *tension* the log of the price move per trade. Each
  is a sum of AR(1) processes with half-lives from minutes to days; *news*, which also has the rhythm of the day, moves
  both alike, and activity has a weekly rhythm besides.
- The number of trades is Poisson; a minute without trades has no row. A minute's volatility is the move per trade times
  the square root of their number, so volatility clusters and goes with volume.
- Each trade moves the fair price by a Student-t step and is struck at the bid or at the ask with equal chance; the half
  spread is proportional to the move per trade. So the last close lies off the fair price, and a forecaster that sees
  where it fell in the range of the last minutes can say which way the next one will lean.
- Sizes are log-normal around a level that is an AR(1) process too.
- Outages of minutes to half a day leave longer gaps.

Source: Clark 1973 and Ane & Geman 2000 (returns are subordinated to trades), Andersen & Bollerslev 1997 (intraday
profiles), Corsi 2009 (volatility on several time scales), Roll 1984 (bid-ask bounce), Wyart et al. 2008 (the spread is
proportional to the volatility per trade).
"""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd

from flashlab.btc.bars import HEADER
from flashlab.errors import UserError, replacing

MINUTES_PER_DAY = 24 * 60
END = pd.Timestamp("2025-01-01", tz="UTC")  # fixed, so that a seed names the same file forever
MOST_DAYS = 5000  # from END back to 2011

START_PRICE = 30_000.0
TICK = 1.0
TRADES_PER_MINUTE = 9.0  # median
TRADE_SIZE = 0.5  # median, in coins
STEP = 1.8e-4  # median move of the fair price per trade, as a fraction: 5 basis points a minute
STEP_DEGREES_OF_FREEDOM = 5
HALF_SPREAD = 2.2  # in moves per trade
SIZE_SPREAD = 1.1  # standard deviation of the log of a trade's size

# AR(1) processes as (half-life in minutes, standard deviation of the log); news moves activity and tension alike.
NEWS = ((6, 0.3), (180, 0.25), (2 * MINUTES_PER_DAY, 0.2))
ACTIVITY = ((30, 0.35), (600, 0.35), (4 * MINUTES_PER_DAY, 0.35))
TENSION = ((60, 0.2), (MINUTES_PER_DAY, 0.25), (10 * MINUTES_PER_DAY, 0.25))
SIZE = ((10, 0.4), (240, 0.4), (2 * MINUTES_PER_DAY, 0.3))


def simulate(*, out: Path = Path("data/simulated.csv.gz"), days: int = 120, seed: int = 0) -> None:
    """Write realistic minute bars: clustered volatility, daily and weekly rhythm, bid-ask bounce, gaps.

    The same days and seed write the same bytes.

    Args:
        out: the file to write, a .csv or a .csv.gz; one that exists is replaced.
        days: days of bars, 1 to 5000.
        seed: which of the possible histories to write.
    """
    if not 1 <= days <= MOST_DAYS:
        raise UserError(f"--days {days}: expected 1 to {MOST_DAYS}")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more")
    if out.is_dir() or not out.name.endswith((".csv", ".csv.gz")):
        raise UserError(f"--out {out}: expected a file, .csv or .csv.gz, such as {Path('data/simulated.csv.gz')}")
    bars = simulate_bars(days, seed)
    with replacing(out) as partial, partial.open("wb") as file:
        if out.suffix == ".gz":  # without name and time in its header: the bytes depend on the bars alone
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
                bars.to_csv(packed, index=False, mode="wb")
        else:
            bars.to_csv(file, index=False, mode="wb")
    print(f"wrote {len(bars):,} bars of {days} days to {out}")


def simulate_bars(days: int, seed: int) -> pd.DataFrame:
    """Simulate the bars of the `days` before `END`.

    Returns:
        One row per minute with a trade, in the columns of the public data set: Unix seconds, prices in dollars, volume
        in coins.
    """
    rng = np.random.default_rng(seed)
    start = int(END.timestamp()) // 60 - days * MINUTES_PER_DAY
    minute = np.arange(start, start + days * MINUTES_PER_DAY)
    news = 0.3 * _daily_profile(minute) + _log_level(rng, len(minute), NEWS)
    activity = 0.7 * _daily_profile(minute) + _weekly_profile(minute) + news + _log_level(rng, len(minute), ACTIVITY)
    tension = news + _log_level(rng, len(minute), TENSION)
    size = _log_level(rng, len(minute), SIZE)
    trades = rng.poisson(TRADES_PER_MINUTE * np.exp(activity))

    log_price = np.log(START_PRICE)
    blocks = []
    for block in np.array_split(np.arange(len(minute)), -(-days // 30)):  # a month of trades at a time
        columns, log_price = _trade(rng, log_price, trades[block], STEP * np.exp(tension[block]), size[block])
        blocks.append(np.column_stack([minute[block][trades[block] > 0] * 60, columns]))
    bars = pd.DataFrame(np.concatenate(blocks), columns=HEADER.split(","))
    bars["Timestamp"] = bars["Timestamp"].astype("int64")
    return bars[~_is_out(rng, minute, days)[trades > 0]].reset_index(drop=True)


def _trade(
    rng: np.random.Generator, log_price: float, trades: np.ndarray, step: np.ndarray, log_size: np.ndarray
) -> tuple[np.ndarray, float]:
    """Trade for a while.

    Args:
        rng: source of chance.
        log_price: log of the fair price before the first trade.
        trades: int ``[M]``, trades in each minute.
        step: ``[M]``, standard deviation of the fair price's move at each trade of the minute.
        log_size: ``[M]``, level of the log of the sizes.

    Returns:
        Open, high, low, close and volume ``[N, 5]`` of the N minutes with a trade; the log of the fair price after.
    """
    step = np.repeat(step, trades)
    freedom = STEP_DEGREES_OF_FREEDOM
    moves = step * rng.standard_t(freedom, len(step)) * np.sqrt((freedom - 2) / freedom)
    fair = log_price + np.cumsum(moves)
    is_buy = rng.random(len(step)) < 0.5
    half_spread = HALF_SPREAD * step
    ask = np.ceil(np.exp(fair + half_spread) / TICK)
    bid = np.floor(np.exp(fair - half_spread) / TICK)
    price = np.maximum(np.where(is_buy, ask, bid), 1) * TICK
    volume = TRADE_SIZE * np.exp(np.repeat(log_size, trades) + SIZE_SPREAD * rng.standard_normal(len(step)))

    last = np.cumsum(trades)[trades > 0] - 1
    first = np.concatenate([[0], last[:-1] + 1])
    high, low = np.maximum.reduceat(price, first), np.minimum.reduceat(price, first)
    total = np.add.reduceat(volume, first).round(8)
    return np.column_stack([price[first], high, low, price[last], total]), float(fair[-1])


def _log_level(rng: np.random.Generator, length: int, processes: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Sum stationary AR(1) processes given as (half-life, standard deviation)."""
    total = np.zeros(length)
    for half_life, deviation in processes:
        phi = 0.5 ** (1 / half_life)
        noise = rng.standard_normal(length) * np.sqrt((1 + phi) / (1 - phi))
        noise[0] *= np.sqrt((1 - phi) / (1 + phi))  # the first value is already one of the stationary process
        total += deviation * pd.Series(noise).ewm(alpha=1 - phi, adjust=False).mean().to_numpy()
    return total


def _daily_profile(minute: np.ndarray) -> np.ndarray:
    """Log of the activity by time of day: quiet after midnight UTC, busiest when Europe and America both trade."""
    hour = minute / 60 % 24
    europe = np.exp(-(((hour - 10) / 3) ** 2))
    america = np.exp(-(((hour - 16) / 3.5) ** 2))
    return 0.3 * europe + 0.8 * america - 0.35


def _weekly_profile(minute: np.ndarray) -> np.ndarray:
    """Log of the activity by day of the week: weekends are quieter."""
    is_weekend = (minute // MINUTES_PER_DAY + 3) % 7 >= 5  # 1970-01-01 was a Thursday
    return np.where(is_weekend, -0.35, 0.0)


def _is_out(rng: np.random.Generator, minute: np.ndarray, days: int) -> np.ndarray:
    """Mark the minutes of outages: about two a month, from a quarter of an hour to half a day."""
    lengths = np.geomspace(15, 12 * 60, days // 15).astype(int)
    is_out = np.zeros(len(minute), bool)
    for start, length in zip(rng.integers(0, len(minute), len(lengths)), lengths, strict=True):
        is_out[start : start + length] = True
    return is_out
