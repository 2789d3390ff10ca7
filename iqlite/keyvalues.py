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
from transformers.cache_utils import Cache, DynamicLayer


@dataclass(frozen=True)
class Prefix:
    """P tokens that rows begin with, and each layer's keys and values [1, heads, P, head size] for them."""

    ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, ids: Sequence[int], seen: Seen) -> Prefix:
        """What a forward over `ids` alone has shown to a cache."""
        return cls(tuple(ids), tuple(layer.keys for layer in seen.layers), tuple(layer.values for layer in seen.layers))

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


def before_rows(prefixes: Sequence[Prefix | None]) -> Cache | None:
    """A cache in which row b starts with `prefixes[b]`, shorter ones padded on the left; it keeps nothing of what it is shown."""
    distinct = list({id(p): p for p in prefixes if p is not None}.values())
    if not distinct:
        return None
    longest = max(map(len, distinct))
    layers = []
    for layer in range(len(distinct[0].keys)):
        if len(distinct) == 1 and None not in prefixes:  # the common case copies nothing before it has to
            kept = [part[layer].expand(len(prefixes), -1, -1, -1) for part in (distinct[0].keys, distinct[0].values)]
        else:
            kept = [torch.cat([_padded(p, layer, longest, which, distinct[0]) for p in prefixes]) for which in ("keys", "values")]
        layers.append(_Before(*kept))
    return Cache(layers=layers)


def _padded(prefix: Prefix | None, layer: int, longest: int, which: str, like: Prefix) -> Tensor:
    if prefix is None:
        shape = getattr(like, which)[layer].shape
        blank: Tensor = getattr(like, which)[layer].new_zeros(1, shape[1], longest, shape[3])
        return blank
    part: Tensor = getattr(prefix, which)[layer]
    return torch.nn.functional.pad(part, (0, 0, longest - len(prefix), 0))


class _Before(DynamicLayer):  # type: ignore[misc]
    """A layer's prefix: it stands before what `update` is given, and stays as it is (so a recomputed forward sees the same)."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


class Decoding(Cache):  # type: ignore[misc]
    """Room for the keys and values of B rows being decoded, laid out once: a prefix, the prompts, `new` tokens to come."""

    def __init__(self, layers: int, rows: int, room: int, prefix: Prefix | None):
        super().__init__(layers=[_Roomy(rows, room, prefix, layer) for layer in range(layers)])

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        for layer in self.layers:
            layer.keep(rows)


class _Roomy(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values in a buffer that is filled from the front; no copying as it grows."""

    def __init__(self, rows: int, room: int, prefix: Prefix | None, layer: int):
        super().__init__()
        self.rows, self.room, self.filled = rows, room, 0
        self.keys: Tensor
        self.values: Tensor
        self.start = None if prefix is None else (prefix.keys[layer], prefix.values[layer])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for name, states in (("keys", key_states), ("values", value_states)):
            setattr(self, name, states.new_empty(self.rows, states.shape[1], self.room, states.shape[3]))
        if self.start is not None:
            self._append(*self.start)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states)
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def _append(self, keys: Tensor, values: Tensor) -> None:
        end = self.filled + keys.shape[2]
        self.keys[:, :, self.filled : end] = keys
        self.values[:, :, self.filled : end] = values
        self.filled = end

    def get_seq_length(self) -> int:
        return self.filled if self.is_initialized else (0 if self.start is None else self.start[0].shape[2])

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]
