"""A training step as one CUDA graph.

A step of a small model is hundreds of kernels of some microseconds each, and a host that launches them one by one
cannot keep up. Here the whole step (forward, backward, exchange between GPUs, clipping, optimiser, averaged weights) is
compiled where that helps, recorded once, and then asked for with a single launch.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

WARM_UP_STEPS = 3  # run as they come, which compiles, allocates and connects; the next is recorded


class CapturedStep:
    """One optimiser step per call, from the fourth on as a replay of a recorded one.

    The batches must all have one shape. Between steps the weights may be changed in place; the learning rate is read
    from the optimiser's first group at each call.

    Args:
        loss: from a batch to a loss summed over what counts, and how much counts; it is compiled.
        optimizer: fused, of parameters on one GPU.
        gradient_clip_val: largest norm of the gradient.
        dtype: of autocast, or None for none.
        after: what else is to happen after the optimiser's step, on the GPU.
    """

    def __init__(
        self,
        loss: Callable[[Tensor], tuple[Tensor, Tensor]],
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float,
        dtype: torch.dtype | None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self._loss, self._optimizer, self._after = torch.compile(loss, dynamic=False), optimizer, after
        self._clip, self._dtype = gradient_clip_val, dtype
        for group in optimizer.param_groups:
            group["capturable"] = True
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._lr = torch.zeros((), device=self._parameters[0].device)
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        self._batch: Tensor | None = None
        self.loss = self.gradient_norm = self._lr

    def __call__(self, batch: Tensor) -> None:
        """Take one step; `loss` and `gradient_norm` then hold its figures, on the GPU."""
        if self._batch is None:
            self._batch = torch.empty_like(batch)
        self._batch.copy_(batch)
        self._lr.fill_(self._optimizer.param_groups[0]["lr"])
        self._steps += 1
        if self._graph is None and self._steps <= WARM_UP_STEPS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(self._batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._step(self._batch)
            self._graph = graph
        self._graph.replay()

    def _step(self, batch: Tensor) -> None:
        self._optimizer.zero_grad()
        with torch.autocast("cuda", self._dtype, enabled=self._dtype is not None, cache_enabled=False):
            total, count = self._loss(batch)
        count = mean_over_processes(count)
        with torch.autocast("cuda", enabled=False):
            loss = total / count
            loss.backward()
            self.loss = loss.detach()
            if dist.is_initialized():
                exchanged = [self.loss, *(parameter.grad for parameter in self._parameters)]
                vector_to_parameters(mean_over_processes(parameters_to_vector(exchanged)), exchanged)
            self.gradient_norm = clip_grad_norm_(self._parameters, self._clip, foreach=True)
            rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr
            self._optimizer.step()
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if self._after is not None:
                self._after()


def mean_over_processes(x: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes that train together; of one alone, the tensor."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class Replicas(DDPStrategy):
    """Lightning's processes with a model each, whose gradients the captured step exchanges: no wrapper does."""

    def configure_ddp(self) -> None:
        """Give all processes the weights of the first."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, 0)
