"""Forward passes of a decoder that is given keys and values as tuples and returns them so: unsloth's.

It reads as `Forward` does, on the same rows; only what it keeps between reads is in another form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from iqlite.base.anatomy import Anatomy
from iqlite.model.forward import Forward
from iqlite.model.keyvalues import Prefix, Seen, before_rows


class Grown:
    """Keys and values of B rows being decoded, as the last read returned them: what they start with, and all that was read since."""

    def __init__(self, layers: int, prefixes: Sequence[Prefix | None]):
        before: Cache | None = before_rows(prefixes, layers)
        self.layers = (Seen(layers) if before is None else before).layers

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class TupleForward(Forward):
    """`Forward` over such a decoder. In training rows are read whole: with keys and values before them it would keep all activations."""

    def __init__(self, anatomy: Anatomy, device: torch.device, reader: Callable[[], str], moving: Callable[[], bool]):
        super().__init__(anatomy, device, reader, moving)
        self.network, self.decoder = anatomy.decoder, self._read
        self.steady = False  # what it keeps grows with every token

    def room(self, tokens: int, begun: Sequence[Prefix | None]) -> Any:
        """What keeps the rows being decoded."""
        return Grown(len(self.layers), begun)

    def begun(
        self,
        prompts: Sequence[Sequence[int]],
        shared: Sequence[Sequence[int]],
        *,
        longest: int,
        make: Callable[[tuple[int, ...]], Prefix] | None = None,
    ) -> list[Prefix | None]:
        """As `Forward.begun`; none in training."""
        return [None] * len(prompts) if torch.is_grad_enabled() else super().begun(prompts, shared, longest=longest, make=make)

    def _read(self, *, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **given: Any) -> Any:
        layers = [] if past_key_values is None else past_key_values.layers
        before = tuple((layer.keys, layer.values) for layer in layers if layer.is_initialized) or None
        longest = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        if longest > self.network.max_seq_length:  # with all padding; it would cut them
            self.network.max_seq_length = longest
        read = self.network(input_ids=input_ids, past_key_values=before, attention_mask=attention_mask, **given)
        if isinstance(past_key_values, (Seen, Grown)):
            for layer, (keys, values) in zip(layers, read.past_key_values, strict=True):
                layer.keys, layer.values, layer.is_initialized = keys, values, True
        return read
