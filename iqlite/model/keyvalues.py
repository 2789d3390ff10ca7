"""Keys and values kept between forwards: a prefix that many rows share, and the rows being decoded.

Every request starts alike (the template's head, a system turn, a description, demonstrations), so what the base makes of that start
is computed once, for one row, and put before the rows' own keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True)
class Prefix:
    """P tokens that rows begin with, and each layer's keys and values [1, heads, P, head size] for them."""

    ids: tuple[int, ...]
    keys: Sequence[Tensor]  # lists where layers are still to come
    values: Sequence[Tensor]

    @classmethod
    def of(cls, ids: Sequence[int], seen: Seen) -> Prefix:
        """What a forward over `ids` alone has shown to a cache."""
        used = [layer for layer in seen.layers if layer.is_initialized]  # some models' last layers share those of others
        return cls(tuple(ids), tuple(layer.keys for layer in used), tuple(layer.values for layer in used))

    def __len__(self) -> int:
        return len(self.ids)


class Seen(Cache):  # type: ignore[misc]
    """Notes the keys and values of one forward, once: a recomputed layer shows its own again."""

    def __init__(self, layers: int):
        super().__init__(layers=[_Seen() for _ in range(layers)])


class _Seen(DynamicLayer):  # type: ignore[misc]
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


def before_rows(prefixes: Sequence[Prefix | None], layers: int) -> Cache | None:
    """A cache in which row b starts with `prefixes[b]`, shorter ones padded on the left; it keeps nothing of what it is shown."""
    if longest_of(prefixes) == 0:
        return None
    return Cache(layers=[_Before(prefixes, layer) for layer in range(layers)])


def longest_of(prefixes: Sequence[Prefix | None]) -> int:
    """Tokens of the longest prefix; 0 if no row has one."""
    return max((len(prefix) for prefix in prefixes if prefix is not None), default=0)


def _started(prefixes: Sequence[Prefix | None], layer: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values [B, heads, P, head size] of what B rows start with, padded on the left with zeros to the longest prefix."""
    keys = _laid_out([None if prefix is None else prefix.keys[layer] for prefix in prefixes])
    return keys, _laid_out([None if prefix is None else prefix.values[layer] for prefix in prefixes])


def _laid_out(parts: Sequence[Tensor | None]) -> Tensor:
    """[B, heads, P, head size] of each row's own [1, heads, ≤ P, head size]; one of them at least is there."""
    distinct = {id(part): part for part in parts}
    there = [part for part in distinct.values() if part is not None]
    if len(distinct) == 1:  # the common case copies nothing before it has to
        return there[0].expand(len(parts), -1, -1, -1)
    longest = max(part.shape[2] for part in there)
    blank = there[0][:, :, :0]
    padded = {
        key: torch.nn.functional.pad(blank if part is None else part, (0, 0, longest - (0 if part is None else part.shape[2]), 0))
        for key, part in distinct.items()
    }
    return torch.cat([padded[id(part)] for part in parts])


class _Before(DynamicLayer):  # type: ignore[misc]
    """A layer's prefixes: they stand before what `update` is given, and stay as they are (so a recomputed forward sees the same).

    Rows with different prefixes need copies of them, which are made here and not before: then they are there for one layer at a time.
    """

    def __init__(self, prefixes: Sequence[Prefix | None], layer: int):
        super().__init__()
        self.prefixes, self.layer = prefixes, layer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = _started(self.prefixes, self.layer)
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def get_seq_length(self) -> int:
        return longest_of(self.prefixes)


class Decoding(Cache):  # type: ignore[misc]
    """Room for the keys and values of B rows being decoded, laid out once: row b's prefix, its prompt, `new` tokens to come.

    `prefixes[b]` is what row b starts with, shorter ones padded on the left; `room` is how many tokens a row may come to with all padding.
    `blank`: what isn't filled yet is zeros and not just anything, for who reads it too (behind a mask).
    """

    def __init__(self, layers: int, room: int, prefixes: Sequence[Prefix | None], *, blank: bool = False):
        super().__init__(layers=[_Roomy(room, prefixes, layer, blank) for layer in range(layers)])
        self.room = room

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values, once a forward has shown some."""
        found: torch.dtype = next(layer.keys.dtype for layer in self.layers if layer.is_initialized)
        return found

    def hold(self, slot_1: Tensor, span: int) -> None:
        """From now on a token's keys and values go where `slot_1` (int64 [1], on the device) says, and the first `span` places are read.

        The same memory then serves for every token, and no size changes.
        """
        for layer in self.layers:
            layer.slot_1, layer.span = slot_1, span

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        for layer in self.layers:
            layer.keep(rows)


class _Roomy(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values in a buffer that is filled from the front; no copying as it grows."""

    def __init__(self, room: int, prefixes: Sequence[Prefix | None], layer: int, blank: bool):
        super().__init__()
        self.room, self.prefixes, self.layer, self.blank = room, prefixes, layer, blank
        self.filled, self.span = longest_of(prefixes), 0
        self.slot_1: Tensor | None = None
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for name, states in (("keys", key_states), ("values", value_states)):
            make = states.new_zeros if self.blank else states.new_empty
            setattr(self, name, make(len(self.prefixes), states.shape[1], self.room, states.shape[3]))
        if self.filled:
            self.keys[:, :, : self.filled], self.values[:, :, : self.filled] = _started(self.prefixes, self.layer)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slot_1 is not None:
            self.keys.index_copy_(2, self.slot_1, key_states)
            self.values.index_copy_(2, self.slot_1, value_states)
            return self.keys[:, :, : self.span], self.values[:, :, : self.span]
        end = self.filled + key_states.shape[2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled

    def keep(self, rows: Tensor) -> None:
        if self.is_initialized:  # a layer that shares another's keys has none
            self.keys, self.values = self.keys[rows], self.values[rows]


class OwnCache(DynamicCache):  # type: ignore[misc]
    """transformers' own cache, whatever a model's layers keep."""

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        self.reorder_cache(rows.nonzero().squeeze(1))


def keeps_keys_only(config: Any) -> bool:
    """False if transformers' cache for a model has layers that keep anything but keys and values of each token."""
    keys_only = (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        getattr(cache_utils, "DummyLayer", DynamicLayer),
    )  # the last since transformers 5.20
    return all(type(layer) in keys_only for layer in DynamicCache(config=config).layers)
