"""The forecaster: a causal transformer over minute bars that forecasts the next bar at every position.

Shapes: B batch, S context length, W width, H heads, D = W / H head dimension, F = 5 features in the order of
`bars.FEATURES`, I inputs per bar, K averages. Log units: natural log of prices, log1p of volume.

A `Forecaster` is a transformer between the two halves of a frame: the frame turns bars into network inputs, and
network outputs into a forecast in log units. `LevelFrame` is the published one (z-scores in, z-scores out).
`RelativeFrame` reads and forecasts moves relative to the last close, in units of the recent range, so that what it
learned at one price and volatility holds at another.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from flashlab.attention import attention, attention_with_kvcache

OPEN, HIGH, LOW, CLOSE, VOLUME = range(5)
PRICES = slice(0, 4)
SMOOTH_L1_BETAS = (0.2, 1.0, 1.0, 1.0, 2.0)  # below it an error counts squared; the open's is small: it has outliers
HALF_LIVES = (1.0, 4.0, 16.0, 60.0, 240.0, 960.0)  # minutes; the last average is the unit of moves and volumes
VOLUME_AVERAGE = 2  # of the half-lives, the average that a volume forecast starts from
WARM_UP = 16  # reported bars that a window must have shown before its forecasts count in the loss
FLOOR = 0.05  # of the unit, added to every range: after minutes that stood still something may move
SMALLEST_RANGE = 2e-5  # 0.2 basis points: keeps a market that stands still from dividing by zero


@dataclass(frozen=True)
class ModelConfig:
    """The forecaster's shape.

    Args:
        width: W, features per position.
        num_layers: transformer blocks.
        num_heads: H attention heads; they divide the width.
        mlp_ratio: hidden features of an MLP per feature of the width.
        frame: relative reads and forecasts moves in units of the recent range; level z-scores, as published.
        backend: attention backend; auto takes the best that can run.
    """

    width: PositiveInt = 64
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 2
    mlp_ratio: PositiveInt = 4
    frame: Literal["relative", "level"] = "relative"
    backend: str = "auto"


class Forecast(NamedTuple):
    """A forecast of the bar after each position.

    Attributes:
        log_bars: ``[B, S, F]``, log units.
        unit: ``[B, S, F]``, the size of error that the loss counts as 1.
        last_close: ``[B, S]``, log of the last close that was known.
    """

    log_bars: Tensor
    unit: Tensor
    last_close: Tensor


def to_log_bars(bars: Tensor) -> Tensor:
    """Take logs of prices and log1p of volume (NaN, a filled minute, as 0): ``[..., F]`` to ``[..., F]``."""
    return torch.cat([bars[..., PRICES].log(), bars[..., VOLUME:].nan_to_num().log1p()], dim=-1)


class LevelFrame(nn.Module):
    """z-scores in, z-scores out.

    `encode` turns bars ``[B, S, F]`` into network inputs ``[B, S, I]`` and what `decode` needs beside the network's
    outputs for a forecast. From position `since` on, that is: what comes before is history, of which a stream has the
    inputs already.
    """

    mean: Tensor
    std: Tensor
    num_inputs = 5
    num_outputs = 5

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def encode(self, bars: Tensor, since: int = 0) -> tuple[Tensor, Any]:
        log_bars = to_log_bars(bars[:, since:])
        return (log_bars - self.mean) / self.std, log_bars[..., CLOSE]

    def decode(self, outputs: Tensor, last_close: Any) -> Forecast:
        return Forecast(outputs * self.std + self.mean, self.std.expand_as(outputs), last_close)

    def loss(self, forecast: Forecast, target: Tensor) -> Tensor:
        """Smooth L1 of each feature's error in z-scores: ``[B, S, F]``."""
        error = (forecast.log_bars - target) / forecast.unit
        return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")


class Past(NamedTuple):
    """What a relative forecast starts from."""

    close: Tensor  # [B, S]
    unit: Tensor  # [B, S]: the slowest average of the range
    ranges: Tensor  # [B, S, 3 * (1 + K)]: the last range, move up to the high, move down to the low, and their averages
    volume: Tensor  # [B, S]: an average of log volume, as z-score


class RelativeFrame(LevelFrame):
    """Moves relative to the last close in, moves relative to the last close out.

    Open and close are the last close plus a move. High and low are the last close plus and minus a positive mixture of
    past ranges, whose weights are the network's outputs: a mixture stays a plausible range however wild the market.
    Volume is a recent average plus a change.
    """

    betas: Tensor
    num_inputs = 6 + 2 * (len(HALF_LIVES) - 1)
    num_mixed = 3 * (1 + len(HALF_LIVES))
    num_outputs = 3 + 2 * num_mixed

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__(mean, std)
        self.register_buffer("betas", torch.tensor(SMOOTH_L1_BETAS), persistent=False)

    def encode(self, bars: Tensor, since: int = 0) -> tuple[Tensor, Past]:
        log_bars = to_log_bars(bars)
        volume = (log_bars[..., VOLUME] - self.mean[VOLUME]) / self.std[VOLUME]
        last_close = torch.cat([log_bars[:, :1, OPEN], log_bars[:, :-1, CLOSE]], dim=1)
        moves = log_bars[..., PRICES] - last_close[..., None]
        up, down = moves[..., HIGH].abs(), moves[..., LOW].abs()
        true_range = moves[..., HIGH].clamp(min=0) - moves[..., LOW].clamp(max=0)

        past = torch.stack([true_range, up, down, volume], dim=-1)
        averages = exponential_averages(past, HALF_LIVES, since)  # [B, S, 4, K]
        bars, log_bars, volume, moves, past = (x[:, since:] for x in (bars, log_bars, volume, moves, past))
        ranges, volumes = averages[..., :3, :], averages[..., 3, :]
        unit = ranges[..., :1, -1].clamp(min=SMALLEST_RANGE)
        inputs = torch.cat(
            [
                torch.asinh(moves / unit),
                (volume - volumes[..., -1])[..., None],
                bars[..., VOLUME:].isfinite().to(moves.dtype),
                torch.log(ranges[..., 0, :-1] / unit + 0.02),
                volume[..., None] - volumes[..., :-1],
            ],
            dim=-1,
        )
        ranges = torch.cat([past[..., :3, None], ranges], dim=-1).flatten(-2) + FLOOR * unit
        return inputs, Past(log_bars[..., CLOSE], unit[..., 0], ranges, volumes[..., VOLUME_AVERAGE])

    def decode(self, outputs: Tensor, past: Any) -> Forecast:
        close, unit, ranges, volume = past
        to_open, to_close, to_volume, *_ = outputs.unbind(-1)
        weights = F.softplus(outputs[..., 3:].unflatten(-1, (2, self.num_mixed)) - 3.5)  # small at first
        up, down = (weights * ranges[..., None, :]).sum(-1).unbind(-1)
        log_bars = torch.stack(
            [
                close + unit * to_open,
                close + up,
                close - down,
                close + unit * to_close,
                (volume + to_volume) * self.std[VOLUME] + self.mean[VOLUME],
            ],
            dim=-1,
        )
        units = torch.cat([unit[..., None].expand(*unit.shape, 4), self.std[VOLUME].expand(*unit.shape, 1)], dim=-1)
        return Forecast(log_bars, units, close)

    def loss(self, forecast: Forecast, target: Tensor) -> Tensor:
        """Smooth L1 for open, close and volume, gamma deviance for the ranges to high and low: ``[B, S, F]``.

        The gamma deviance y / m + log m has the mean as its best forecast, as squared error has, but weighs errors in
        proportion, so that the wildest minutes do not drown the rest.
        Source: Patton (2011), "Volatility forecast comparison using imperfect volatility proxies" (QLIKE).
        """
        error = ((forecast.log_bars - target) / forecast.unit).abs()
        losses = torch.where(error < self.betas, error.square() / (2 * self.betas), error - self.betas / 2)
        from_close = [
            torch.stack([bars[..., HIGH] - forecast.last_close, forecast.last_close - bars[..., LOW]], dim=-1)
            for bars in (forecast.log_bars, target)
        ]
        mean, actual = ((move / forecast.unit[..., HIGH : LOW + 1]) for move in from_close)
        mean = mean.clamp(min=1e-3)
        ranges = actual.clamp(min=0) / mean + mean.log()
        return torch.cat([losses[..., :HIGH], ranges, losses[..., CLOSE:]], dim=-1)


def exponential_averages(x: Tensor, half_lives: tuple[float, ...], since: int = 0) -> Tensor:
    """Average the past of each position, the present included, with exponentially falling weights.

    Args:
        x: ``[B, S, C]``.
        half_lives: positions after which a weight has halved, K of them.
        since: the first position whose averages are wanted.

    Returns:
        ``[B, S - since, C, K]``; near the start over what there is, weights summing to 1.
    """
    batch, length, channels = x.shape
    weights = averaging_weights(length, half_lives, since, x.dtype, x.device)
    averages = weights.flatten(0, 1) @ x.transpose(0, 1).flatten(1)
    return averages.view(len(half_lives), length - since, batch, channels).permute(2, 1, 3, 0)


@torch.compiler.assume_constant_result  # a compiled step holds the table, instead of making it anew
def averaging_weights(
    length: int, half_lives: tuple[float, ...], since: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the weights ``[K, S - since, S]`` of `exponential_averages`."""
    position = torch.arange(length, device=device, dtype=dtype)
    age = position[since:, None] - position
    half_life = torch.tensor(half_lives, device=device, dtype=dtype)[:, None, None]
    weights = torch.where(age >= 0, torch.exp2(-age / half_life), 0.0)
    return weights / weights.sum(-1, keepdim=True)


class Block(nn.Module):
    """A pre-norm transformer block: causal attention with rotary positions, then an MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.backend = config.num_heads, config.backend
        width, hidden = config.width, config.width * config.mlp_ratio
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor, rotation: Tensor, cache: tuple[Tensor, Tensor, int] | None = None) -> Tensor:
        """Map ``[B, S, W]`` to ``[B, S, W]``; with a cache (keys, values, positions so far) go on where it ends."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # [B, S, H, D]
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is None:
            mixed = attention(q, k, v, backend=self.backend, causal=True)
        else:
            mixed = attention_with_kvcache(q, *cache, k=k, v=v, backend=self.backend, causal=True)
        x = x + self.attention_out(mixed.flatten(-2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


@torch.compiler.assume_constant_result  # likewise; sines of thousands cost more than the attention that needs them
def rotation_angles(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Return cosine and sine ``[2, S, 1, D / 2]`` of the rotary angles.

    Source: Su et al. (2021), "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(length, device=device)[:, None, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Apply rotary positions to ``[B, S, H, D]``, dimension i paired with i + D / 2."""
    cos, sin = rotation.unbind()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Forecaster(nn.Module):
    """Forecast the bar after each position from the bars up to it.

    Args:
        config: the shape.
        mean: of the log features over the training part, ``[F]``.
        std: likewise.

    Raises:
        ValueError: the heads do not divide the width, or the frame is unknown.
    """

    def __init__(self, config: ModelConfig, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.config = config
        self.frame: Any = FRAMES[config.frame](mean, std)
        self.input = nn.Linear(self.frame.num_inputs, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        self.output = nn.Linear(config.width, self.frame.num_outputs)
        self._initialise()

    def _initialise(self) -> None:
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):  # blocks start near the identity, as GPT-2's
                nn.init.normal_(weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)

    def forward(self, bars: Tensor) -> Forecast:
        """Forecast from bars ``[B, S, F]`` as stored: prices and volume, NaN where a minute was filled."""
        with torch.autocast(bars.device.type, enabled=False):  # logs of prices need float32
            inputs, past = self.frame.encode(bars)
            rotation = rotation_angles(bars.shape[1], self.config.width // self.config.num_heads, bars.device)
        x = self.input(inputs).float()
        for block in self.blocks:
            x = block(x, rotation)
        return self.frame.decode(self.output(self.norm(x)).float(), past)

    def loss(self, bars: Tensor, weights: Tensor, mask_filled: bool) -> tuple[Tensor, Tensor]:
        """Add up the loss of the forecasts of bars 2 to S + 1 over the bars that count.

        Args:
            bars: ``[B, S + 1, F]``.
            weights: of the features, ``[F]``.
            mask_filled: leave filled minutes out.

        Returns:
            The sum of the losses, and how many bars count, at least 1.
        """
        forecast = self(bars[:, :-1])
        counts = bars[:, 1:, VOLUME].isfinite() | (not mask_filled)
        with torch.autocast(bars.device.type, enabled=False):
            counts &= bars[:, :-1, VOLUME].isfinite().cumsum(1) >= WARM_UP
            losses = (self.frame.loss(forecast, to_log_bars(bars[:, 1:])) * weights).sum(-1)
            return torch.where(counts, losses, 0.0).sum(), counts.sum().clamp(min=1).to(losses.dtype)


FRAMES = {"level": LevelFrame, "relative": RelativeFrame}
