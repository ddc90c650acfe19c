"""Forecast bar by bar: keys and values of past bars are kept, so that a new bar costs one position of the forecaster.

The window over which the forecaster looks begins with the first bar. When it holds a whole context and another bar
comes, it begins anew with the last half of it: the windows are those of `windows.rolling_windows`, and each forecast is
what `Forecaster` makes of the whole window, within rounding. A window that lost its first bar with every new one would
not do: the keys and values that are kept know, from the layers below, of bars that had left it.
"""

import numpy as np
import torch

from flashlab.btc.bars import FEATURES
from flashlab.btc.model import Forecaster, rotation_angles


class Stream:
    """The forecaster in front of a series that grows.

    Args:
        forecaster: in evaluation, on the device where it is to run.
        context_length: S, bars in the longest window; what it was trained on.
    """

    def __init__(self, forecaster: Forecaster, context_length: int) -> None:
        config, device = forecaster.config, forecaster.input.weight.device
        head_dim = config.width // config.num_heads
        self.forecaster, self.context_length, self.length = forecaster, context_length, 0
        self.bars = torch.zeros(1, context_length, len(FEATURES), device=device)
        self.rotation = rotation_angles(context_length, head_dim, device)
        places = (1, context_length, config.num_heads, head_dim)
        self.caches = [
            (torch.zeros(places, device=device), torch.zeros(places, device=device)) for _ in forecaster.blocks
        ]

    def append(self, bar: np.ndarray) -> np.ndarray:
        """Take the next bar, float32 ``[5]`` with a volume of NaN if it was filled, and forecast the one after it.

        Returns:
            float64 ``[5]``, log units.
        """
        known = self.length
        if self.length == self.context_length:
            kept = self.context_length // 2
            self.bars[:, :kept] = self.bars[:, -kept:].clone()
            self.length, known = kept, 0  # at other positions, and with less before them: all of them anew
        self.bars[0, self.length] = torch.from_numpy(np.array(bar))
        self.length += 1
        return self._forecast(known)

    def replace_last(self, bar: np.ndarray) -> np.ndarray:
        """Take another bar in place of the last one, as `append`."""
        self.length -= 1  # what is beyond it in the caches is not read, and written over
        return self.append(bar)

    def clear(self) -> None:
        """Forget all bars."""
        self.length = 0

    @torch.inference_mode()
    def _forecast(self, known: int) -> np.ndarray:
        """Run the forecaster over the window's bars from `known` on: `Forecaster.forward` with caches."""
        model = self.forecaster
        inputs, past = model.frame.encode(self.bars[:, : self.length], known)
        rotation = self.rotation[:, known : self.length]
        x = model.input(inputs)
        for block, (keys, values) in zip(model.blocks, self.caches, strict=True):
            x = block(x, rotation, (keys, values, known))
        return model.frame.decode(model.output(model.norm(x)), past).log_bars[0, -1].double().cpu().numpy()
