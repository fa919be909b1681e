"""Work on a GPU that is recorded once and replayed: a small step costs more to start, kernel by kernel, than to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Replay:
    """`work(*inputs)` as a CUDA graph, for other inputs of these shapes.

    What it reads and writes besides its inputs must stay where it is. Its output is overwritten by the next call.
    """

    def __init__(self, work: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.inputs, self.graph = tuple(x.clone() for x in inputs), torch.cuda.CUDAGraph()
        # On a stream of its own, as recording asks for. Not by `torch.cuda.graph`, which frees all memory that is kept
        # for later, each time.
        stream = torch.cuda.Stream(self.inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            work(*self.inputs)  # libraries set themselves up at their first call, which cannot be recorded
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.output = work(*self.inputs)
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream(stream.device).wait_stream(stream)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output for these inputs."""
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        self.graph.replay()
        return self.output
