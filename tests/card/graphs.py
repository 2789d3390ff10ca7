"""CUDA graphs, streams and torch's warnings of waits on the played card: a graph is replayed without its Python, and counts as one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.card.played import PlayedCard, playing
from tests.helpers.recorded import Recording

REPLAY = "replay of a graph"


class Stream:
    """One of several. The played card works off all of them as they come, but for copies to it: these are there as late as may be, once waited for."""

    cuda_stream = 0

    def __init__(self, *_: Any):
        self.copies: list[Callable[[], Any]] = []

    def record_event(self) -> Callable[[], None]:
        """What was asked of the stream so far, once it's waited for."""
        until = len(self.copies)

        def done() -> None:
            for at, job in enumerate(self.copies[:until]):
                job()
                self.copies[at] = lambda: None

        return done

    def wait_event(self, event: Callable[[], None]) -> None:
        event()

    def wait_stream(self, other: Stream) -> None:
        other.record_event()()

    def synchronize(self) -> None:
        playing().wait("stream")


class CUDAGraph:
    """A recording and what it costs to replay it."""

    recording: Recording

    def replay(self) -> None:
        card = playing()
        before = card.counts.copy()
        self.recording.replay()
        moved = card.counts.bytes
        card.counts = before
        card.counts.kernels[REPLAY] += 1
        card.counts.bytes = moved


@contextmanager
def graph(cuda_graph: CUDAGraph, **_: Any) -> Iterator[None]:
    """Records into a graph; what is done within counts for nothing, and waiting fails as it does on a card."""
    card = playing()
    card.wait("synchronize")
    card.memory.empty_cache()
    before, card.patient = card.counts.copy(), False
    cuda_graph.recording = Recording()
    try:
        with cuda_graph.recording:
            yield
    finally:
        card.patient = True
        cuda_graph.recording.rewind()
        card.counts = before


@contextmanager
def stream(entered: Stream) -> Iterator[None]:
    card = playing()
    card.side = entered.copies
    try:
        yield
    finally:
        card.side = None


def functions(card: PlayedCard) -> dict[str, Callable[..., Any]]:
    """torch.cuda's, by name."""

    def set_mode(mode: Any) -> None:
        card.patient = mode not in ("error", 2)

    return {
        "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream, "current_stream": Stream, "set_sync_debug_mode": set_mode,
        "get_sync_debug_mode": lambda: 0 if card.patient else 2, "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
