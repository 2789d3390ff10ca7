"""Layer by layer: one pass of the weights for all batches of a step, forwards and backwards, for layers that are streamed.

The decoder is called once for each batch with layers that do nothing, which tells what the real ones are to be called with; then every layer,
once it is there, does all batches; then the decoder is called again with layers that hand on what came of it, for what stands after them.
Backwards each layer is computed again, a batch at a time, and its gradient goes down with it: batches add to an adapter's gradient in
the order in which they would one by one, so that the result is the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from iqlite.model.forward import Batch, Forward
from iqlite.model.keyvalues import Prefix, Seen

Turn = Callable[[str, int], AbstractContextManager[None]]
"""(role, layer) → a block in which that layer reads as that role, with a gradient for "" alone."""


class Rows:
    """Some rows on their way through the layers: what each layer is called with beside the states, and the states as they are now."""

    def __init__(self, forward: Forward, given: dict[str, Any]):
        self.forward, self.given = forward, given
        self.calls: list[tuple[Any, Any]] = []
        self.inputs: list[Tensor] = []  # of each layer, for the backward pass
        self.gradient: Tensor | None = None
        self.hidden: Tensor
        with _instead(forward.layers, self._note):
            forward.decoder(**given)

    def _note(self, at: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert at == len(self.calls), "layers aren't called one after the other"
        if at == 0:
            self.hidden = hidden
        self.calls.append((args, kwargs))
        return self.hidden

    def through(self, at: int, hidden: Tensor) -> Tensor:
        """What layer `at` makes of the states."""
        args, kwargs = self.calls[at]
        found: Tensor = self.forward.layers[at](hidden, *args, **kwargs)
        return found

    def ended(self) -> Tensor:
        """The last hidden states, after the final norm."""
        with _instead(self.forward.layers, lambda *_, **__: self.hidden):
            found: Tensor = self.forward.decoder(**self.given).last_hidden_state
        return found

    @property
    def ready(self) -> Tensor:
        """The states as they are now, on the card."""
        return self._here(self.hidden)

    def hand_down(self, gradient: Tensor | None) -> None:
        """Keeps the gradient in the states that a layer was given, for the layer below."""
        self.gradient = None if gradient is None else self._away(gradient)

    @property
    def handed(self) -> Tensor | None:
        """The gradient in what the layer that is next on the way down gave."""
        return None if self.gradient is None else self._here(self.gradient)

    def on(self, at: int) -> None:
        """Through layer `at`; its input is kept for the backward pass where there will be one."""
        if torch.is_grad_enabled():
            self.inputs.append(self.hidden)
        self.hidden = self._away(self.through(at, self._here(self.hidden)).detach())

    def take_input(self, at: int) -> Tensor:
        """The states that layer `at` was given, as a leaf; below the first layer nothing asks for a gradient."""
        return self._here(self.inputs.pop()).detach().requires_grad_(at > 0)

    def _away(self, states: Tensor) -> Tensor:
        """To where states wait while other batches go through a layer: the computer's memory, if the forward's inputs do."""
        if not self.forward.offload:
            return states
        waiting = torch.empty(states.shape, dtype=states.dtype, pin_memory=self.forward.device.type == "cuda")
        return waiting.copy_(states, non_blocking=True)

    def _here(self, states: Tensor) -> Tensor:
        return states.to(self.forward.device, non_blocking=True)


class Start(Rows):
    """The prefix that other rows stand behind; its keys and values are there as far as the layers have come."""

    def __init__(self, forward: Forward, ids: Sequence[int]):
        self.seen = Seen(len(forward.layers))
        self.prefix = Prefix(tuple(ids), [], [])
        super().__init__(
            forward, {"input_ids": torch.tensor([list(ids)], device=forward.device), "past_key_values": self.seen, "use_cache": True}
        )

    def through(self, at: int, hidden: Tensor) -> Tensor:
        """As `Rows.through`; what the layer kept of the prefix is shown to the rows behind it."""
        found = super().through(at, hidden)
        layer = self.seen.layers[at]
        for kept, states in ((self.prefix.keys, layer.keys), (self.prefix.values, layer.values)):
            assert isinstance(kept, list)
            kept[at:] = [states]
        self.seen.layers[at] = type(layer)()  # a recomputed layer shows its own again
        return found


class Way:
    """One batch through all layers: its rows, and before them the prefixes that are read for it."""

    def __init__(self, forward: Forward, batch: Batch, made: dict[tuple[str, tuple[int, ...]], Prefix]):
        """`made` are prefixes that other batches of the same pass read already; weights in training read theirs anew for each batch."""
        self.batch, self.starts = batch, list[Start]()

        def make(ids: tuple[int, ...]) -> Prefix:
            found = forward.kept(ids) or made.get((batch.role, ids))
            if found is None:
                self.starts.append(Start(forward, ids))
                found = self.starts[-1].prefix
                if batch.role:
                    made[batch.role, ids] = found
            return found

        longest = max(map(len, batch.prompts)) + max(map(len, batch.responses))
        self.begun = forward.begun(batch.prompts, batch.shared, longest=longest, make=make)
        self.rows = Rows(forward, forward.inputs(batch.prompts, batch.responses, self.begun))
        self.all: list[Rows] = [*self.starts, self.rows]
        self.leaf: Tensor

    @property
    def trains(self) -> bool:
        """True if a backward pass follows."""
        return self.batch.role == ""

    def on(self, at: int) -> None:
        """Through layer `at`."""
        for rows in self.all:
            rows.on(at)
        if self.trains:  # of a prefix in training nothing is kept but its layers' inputs
            for start in self.starts:
                start.prefix.keys[at] = start.prefix.values[at] = None  # type: ignore[index]

    def states(self) -> Tensor:
        """The states that predict the responses, with a gradient down to `leaf` in training."""
        batch, self.rows.hidden = self.batch, self.rows.ready
        if self.trains:
            self.leaf = self.rows.hidden = self.rows.hidden.detach().requires_grad_()
        return self.rows.forward.predicting(self.rows.ended(), batch.prompts, batch.responses, self.begun, batch.width)

    def back(self, at: int) -> None:
        """Adds layer `at`'s part of the gradient, and hands the rest down."""
        leaves = [rows.take_input(at) for rows in self.all]
        made = [rows.through(at, leaf) for rows, leaf in zip(self.all, leaves, strict=True)]
        ends = [(out, rows.handed) for out, rows in zip(made, self.all, strict=True) if rows.gradient is not None]
        torch.autograd.backward([out for out, _ in ends], [gradient for _, gradient in ends])
        for rows, leaf in zip(self.all, leaves, strict=True):
            rows.hand_down(leaf.grad)


class Layerwise:
    """Batches through a forward's layers in one pass; batches in training that are known to come next go along, and wait until they are asked for."""

    def __init__(self, forward: Forward, turn: Turn, preparing: Callable[[str], AbstractContextManager[None]]):
        self.forward, self.turn, self.preparing = forward, turn, preparing
        self.waiting: tuple[Sequence[Batch], list[Way]] = ((), [])

    def read(self, batches: Sequence[Batch], ahead: Sequence[Batch] = ()) -> Iterator[Tensor]:
        """Each batch's states, in order; a loss of those in training is to be backpropagated before the next are asked for."""
        asked, ways = self.waiting
        self.waiting = ((), [])
        if not ways or list(asked) != list(batches):
            del ways
            ways = self._forwards([*batches, *ahead])
            self.waiting = (ahead, ways[len(batches) :])
            ways = ways[: len(batches)]
        for way in ways:
            with self.preparing(way.batch.role):
                states = way.states()
            yield states
            del states
            if way.trains:
                way.rows.hand_down(way.leaf.grad)
                del way.leaf
            del way.rows.hidden
        self._backwards([way for way in ways if way.trains])

    def _forwards(self, batches: Sequence[Batch]) -> list[Way]:
        made: dict[tuple[str, tuple[int, ...]], Prefix] = {}
        ways = []
        for batch in batches:
            with self.preparing(batch.role):
                ways.append(Way(self.forward, batch, made))
        for at in range(len(self.forward.layers)):
            for way in ways:
                with self.turn(way.batch.role, at):
                    way.on(at)
        for way in ways:
            with self.preparing(way.batch.role):
                for start in way.starts:
                    self.forward.keep(start.prefix)
        return ways

    def _backwards(self, ways: Sequence[Way]) -> None:
        with self.forward.whole():
            for at in reversed(range(len(self.forward.layers) if ways else 0)):
                for way in ways:
                    with self.turn("", at):
                        way.back(at)


def goes(forward: Forward) -> bool:
    """True if a decoder's layers are called one after the other and share nothing but what they are called with."""
    if getattr(forward.config, "num_kv_shared_layers", 0):
        return False
    with torch.no_grad():
        try:
            calls = Rows(forward, {"input_ids": torch.tensor([[1, 2]], device=forward.device), "use_cache": False}).calls
        except (AssertionError, TypeError, ValueError, RuntimeError):
            return False
    return len(calls) == len(forward.layers) and not any(isinstance(value, dict) for _, kwargs in calls for value in kwargs.values())


@contextmanager
def _instead(layers: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block `forward` (with the layer's number first, if it notes them) stands for every layer's own."""
    real = [layer.forward for layer in layers]
    try:
        for at, layer in enumerate(layers):
            layer.forward = functools.partial(forward, at)
        yield
    finally:
        for layer, own in zip(layers, real, strict=True):
            layer.forward = own
