"""A training step as a CUDA graph.

A step of a small model is hundreds of kernels of some microseconds each, and a host that launches them one by one
cannot keep up. Here the whole step (forward, backward, clipping, optimiser, averaged weights) is compiled where that
helps, recorded once, and then asked for with a single launch. Where several processes train together it is two graphs
with the exchange of gradients between them: outside of a graph NCCL notices when another process is gone.
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
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._steps = 0
        self._batch: Tensor | None = None
        self._together = dist.is_initialized()
        self.loss = self.gradient_norm = self._sums = self._lr

    def __call__(self, batch: Tensor) -> None:
        """Take one step; `loss` and `gradient_norm` then hold its figures, on the GPU."""
        if self._batch is None:
            self._batch = torch.empty_like(batch)
        self._batch.copy_(batch)
        self._lr.fill_(self._optimizer.param_groups[0]["lr"])
        self._steps += 1
        if self._steps <= WARM_UP_STEPS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run(lambda part: part())
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            self._run(self._replay)

    def _run(self, run: Callable[[Callable[[], None]], None]) -> None:
        if self._together:
            run(self._backward)
            dist.all_reduce(self._sums)
            run(self._update)
        else:
            run(self._whole)

    def _replay(self, part: Callable[[], None]) -> None:
        name = part.__name__
        if name not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # one reads what the other left
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                part()
            self._graphs[name] = graph
        self._graphs[name].replay()

    def _whole(self) -> None:
        self._backward()
        self._update()

    def _backward(self) -> None:
        self._optimizer.zero_grad()
        assert self._batch is not None
        with torch.autocast("cuda", self._dtype, enabled=self._dtype is not None, cache_enabled=False):
            total, count = self._loss(self._batch)
        with torch.autocast("cuda", enabled=False):
            if self._together:  # how much counts in all is known once it has been added up
                total.backward()
                self._sums = parameters_to_vector([total.detach(), count, *self._gradients()])
            else:
                self.loss = total / count
                self.loss.backward()

    def _update(self) -> None:
        with torch.autocast("cuda", enabled=False):
            if self._together:
                self.loss = self._sums[0] / self._sums[1]
                vector_to_parameters(self._sums[2:] / self._sums[1], self._gradients())
            self.gradient_norm = clip_grad_norm_(self._parameters, self._clip, foreach=True)
            rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr
            self._optimizer.step()
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if self._after is not None:
                self._after()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]


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
