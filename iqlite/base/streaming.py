"""A base larger than the card: its layers' weights wait outside and come by when they are read.

On a card they wait in the computer's pinned memory, and a ring of a few slots on the card is filled ahead on a copy stream. On a CPU they lie in a
mapped file, which the system reads and drops as it likes. A layer's parameters stay where they are for good: on views of its slot, or of the
file. What a forward kept of them for its backward pass is therefore only right once the layer has come by again: it must be recomputed.
"""

from __future__ import annotations

import functools
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iqlite.device import is_card, pinned

SLOTS = 2  # one in use, one on its way; our choice
ALIGNED = 256  # bytes between which a slot's tensors begin, as the allocator would have them


class Streamed(ABC):
    """The layers that come by. `visits` counts them: a pass of the weights visits each once. `loads` counts copies to a card, `moved` their bytes."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        self.visits = self.loads = 0
        self.moved = 0.0
        self._last = -1
        for at, layer in enumerate(layers):
            layer.forward = functools.partial(self._forward, at, layer.forward)

    def _forward(self, at: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        self.take(at)
        return forward(*args, **kwargs)

    def take(self, at: int) -> None:
        """Layer `at` of the streamed ones is there, for what is asked of the device from now on."""
        if at != self._last:
            self.visits += 1
            self._arrive(at, self._next(at))
            self._last = at

    @property
    def passes(self) -> float:
        """How often the streamed weights have come by."""
        return self.visits / len(self.layers)

    def _next(self, at: int) -> int:
        """The layer that is likely to be asked for after `at`: forwards from the first to the last and again, backwards down to the first."""
        count = len(self.layers)
        down = at == self._last - 1 or (at == self._last and at == count - 1)
        return max(0, at - 1) if down else (at + 1) % count

    @abstractmethod
    def _arrive(self, at: int, ahead: int) -> None:
        """Makes a layer be there, and begins with the one that is likely to be next."""


class Ring(Streamed):
    """Layers in pinned host memory, and SLOTS buffers on the card, each as large as the largest layer. Layer i is always read from slot i mod SLOTS."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device):
        super().__init__(layers)
        self.device = device
        places = [_laid_out([tensor for *_, tensor in _moving(layer)]) for layer in layers]
        size = max(end for _, end in places)
        self.host: list[Tensor] = []
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(SLOTS, len(layers)))]
        self.stream = torch.get_device_module(device).Stream(device) if is_card(device) else None
        self.copied: list[Any] = [None] * len(self.slots)
        self.holds: list[int | None] = [None] * len(self.slots)
        for at, (layer, (starts, end)) in enumerate(zip(layers, places, strict=True)):
            self.host.append(pinned(end, device))
            for (owner, name, tensor), start in zip(list(_moving(layer)), starts, strict=True):
                _view(self.host[at], start, tensor).copy_(tensor)
                _put(owner, name, _view(self.slots[at % len(self.slots)], start, tensor))
            move(layer, device, vectors_only=True)

    def _arrive(self, at: int, ahead: int) -> None:
        self._fill(at)
        if self.stream is not None:
            torch.get_device_module(self.device).current_stream(self.device).wait_event(self.copied[at % len(self.slots)])
        if ahead % len(self.slots) != at % len(self.slots):
            self._fill(ahead)

    def _fill(self, at: int) -> None:
        """Starts the copy of a layer into its slot; it waits for what was asked of the card so far, which may read what the slot holds."""
        slot = at % len(self.slots)
        if self.holds[slot] == at:
            return
        source = self.host[at]
        target = self.slots[slot][: len(source)]
        if self.stream is None:
            target.copy_(source)
        else:
            module = torch.get_device_module(self.device)
            self.stream.wait_stream(module.current_stream(self.device))
            with module.stream(self.stream):
                target.copy_(source, non_blocking=True)
                self.copied[slot] = self.stream.record_event()
        self.holds[slot] = at
        self.loads += 1
        self.moved += len(source)


class Mapped(Streamed):
    """Layers in a mapped file of the folder `beside`. It has no name any more, so that it goes with the process however that ends."""

    def __init__(self, layers: Sequence[nn.Module], rest: nn.Module, beside: Path):
        """`rest` is the whole model: what it has beside the layers goes into the file too."""
        super().__init__(layers)
        beside.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="offload-", dir=beside)
        Path(name).unlink()
        self.file = os.fdopen(handle, "r+b")
        self.maps: list[mmap.mmap] = []
        there: set[int] = set()
        for module in (*layers, rest):
            self._write(module, there)

    def _write(self, module: nn.Module, there: set[int]) -> None:
        """Writes what isn't yet `there`, and puts views of the file in its place: memory holds one module twice, never all."""
        found = [one for one in _moving(module) if one[2].data_ptr() not in there]
        own = {id(tensor): tensor for *_, tensor in found}  # a head may be the embedding
        starts, size = _laid_out(list(own.values()))
        begin = self.file.seek(0, os.SEEK_END)
        begin += -begin % mmap.ALLOCATIONGRANULARITY
        self.file.truncate(begin + max(size, 1))
        for tensor, start in zip(own.values(), starts, strict=True):
            self.file.seek(begin + start)
            self.file.write(tensor.data.contiguous().view(-1).view(torch.uint8).numpy().data)
        self.file.flush()
        self.maps.append(mmap.mmap(self.file.fileno(), max(size, 1), offset=begin))
        whole, begins = torch.frombuffer(self.maps[-1], dtype=torch.uint8), dict(zip(own, starts, strict=True))
        made: dict[int, Any] = {}
        for owner, name, tensor in found:
            if id(tensor) in made:
                setattr(owner, name, made[id(tensor)])
            else:
                _put(owner, name, _view(whole, begins[id(tensor)], tensor))
                made[id(tensor)] = getattr(owner, name)
                there.add(made[id(tensor)].data_ptr())

    def _arrive(self, at: int, ahead: int) -> None:
        if hasattr(mmap, "MADV_WILLNEED"):  # read ahead while this layer is computed
            self.maps[ahead].madvise(mmap.MADV_WILLNEED)


def evenly(layers: nn.ModuleList, count: int) -> list[nn.Module]:
    """`count` of the layers, spread evenly: while those between them compute, the next is on its way."""
    return [layers[(at * len(layers)) // count] for at in range(count)]


def stream(
    model: nn.Module, layers: nn.ModuleList, count: int, device: torch.device, folder: Path, stays: Sequence[nn.Module] = ()
) -> Streamed:
    """Streams `count` of a model's layers, all of which is in the computer's memory; the rest but what `stays` goes to the card. `folder` is for a CPU's file."""
    if not is_card(device):
        return Mapped(evenly(layers, count), model, folder)
    some = evenly(layers, count)
    move(model, device, but=[*some, *stays])
    return Ring(some, device)


def _moving(module: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    """(owner, attribute, tensor) of a module's matrices: weights of two dimensions or more, and the scales of those in 4 bits."""
    for inside in module.modules():
        for name, parameter in list(inside.named_parameters(recurse=False)):
            if parameter.dim() < 2:
                continue
            yield inside, name, parameter
            state = getattr(parameter, "quant_state", None)
            while state is not None:
                yield state, "absmax", state.absmax
                state = state.state2 if state.nested else None


def _put(owner: Any, name: str, view: Tensor) -> None:
    """Puts a view in a tensor's place; a parameter keeps its kind and what belongs to it."""
    old = getattr(owner, name)
    if getattr(old, "quant_state", None) is not None:
        from bitsandbytes.nn import Params4bit

        view = Params4bit(view, requires_grad=False, **vars(old))
    elif isinstance(owner, nn.Module):
        view = nn.Parameter(view, requires_grad=False)
    setattr(owner, name, view)


def move(module: nn.Module, device: torch.device, *, but: Sequence[nn.Module] = (), vectors_only: bool = False) -> None:
    """Moves a module's weights, buffers and tables to the card, without what is in the modules `but`. Weights that were one stay one."""
    outside = {id(inside) for left in but for inside in left.modules()}
    done: dict[int, nn.Parameter] = {}
    for inside in module.modules():
        if id(inside) in outside:
            continue
        for name, parameter in list(inside.named_parameters(recurse=False)):
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                state.to(device)
            if parameter.dim() < 2 or not vectors_only:
                if id(parameter) not in done:
                    if parameter.device != device:
                        _put(inside, name, parameter.data.to(device))
                    done[id(parameter)] = getattr(inside, name)
                setattr(inside, name, done[id(parameter)])
        for name, buffer in list(inside.named_buffers(recurse=False)):
            setattr(inside, name, buffer.to(device))


def _laid_out(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """(where each begins, bytes of all) one behind the other."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += tensor.nbytes + -tensor.nbytes % ALIGNED
    return starts, end


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """A part of a buffer of bytes as a tensor of another's type and shape."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
