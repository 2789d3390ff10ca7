"""A played card on a machine without one: tensors that say they lie on it, and a dispatch mode that does what the card would.

A `Card` tensor's numbers lie in a plain CPU tensor, `inner`, or with `numbers=False` in a meta tensor that has a shape only. `PlayedCard` runs each
operation on the inner tensors, raises what CUDA would for mixed devices, counts kernels, waits of the host (with the line that caused
them) and copies, and plays the allocator by the lifetime of storages. Where it and a real card differ, the card is right.
Entered by `driver.played`, which stands in for the driver's functions too.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.card.allocator import GIB, MIB, Allocator

aten: Any = torch.ops.aten
CONTEXT = 480 * MIB  # of a driver's context, which no allocator knows of: what iqlite plans with
WORKSPACE = 8519680  # bytes that cuBLAS keeps for a handle below compute capability 9.0
HOST_TENSORS = ("set_",)  # operations that may be given a host's tensor


@dataclass(frozen=True)
class Model:
    """A card's data sheet: multiprocessors, compute capability, GB/s of memory."""

    multiprocessors: int
    capability: tuple[int, int]
    bandwidth: float


MODELS = {
    "RTX 4090": Model(128, (8, 9), 1008),
    "RTX 4070": Model(46, (8, 9), 504),
    "RTX 3060": Model(28, (8, 6), 360),
    "RTX 2070": Model(36, (7, 5), 448),
}
VIEWS = {"_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size", "set_", "record_stream", "detach_"}
ROOM_ONLY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_"}
WRITTEN_IN_PLACES = {"index_copy_", "index_fill_"}  # what is written counts, and not all that it is written into
SEVERAL = {"topk": 3, "sort": 3, "nonzero": 4, "embedding_dense_backward": 4, "constant_pad_nd": 2, "isin": 2, "linalg_vector_norm": 2}


class Card(Tensor):
    """A tensor on the played card. For C++ it lies on meta, since autograd in a CPU build knows no card; for Python on the card."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Card:
        made: Card = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, layout=inner.layout, device="meta"
        )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda self: playing().device)  # type: ignore[assignment]
    is_cuda = property(lambda self: playing().device.type == "cuda")  # type: ignore[assignment]
    is_xpu = property(lambda self: playing().device.type == "xpu")  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:  # type: ignore[override]
        return 0

    def tolist(self) -> Any:
        playing().wait("tolist")
        return known(self).tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:  # saved as what it is on the host; who loads it moves it
        return known(self).__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Card({tuple(self.shape)}, {self.dtype}, {'shape only' if self.inner.is_meta else known(self)})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return playing().run(func, args, kwargs or {})


_PLAYING: list[PlayedCard] = []


def playing() -> PlayedCard:
    """The card that is played now."""
    assert _PLAYING, "a Card outside the play"
    return _PLAYING[-1]


def known(tensor: Card) -> Tensor:
    """A Card's numbers on the host; zeros where it has a shape only."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.inner.is_meta else tensor.inner.detach()


def blank(shape: Any, dtype: torch.dtype) -> Tensor:
    """A shape without numbers."""
    with _disable_current_modes():
        return torch.empty(shape, dtype=dtype, device="meta")


def shape_of(tensor: Tensor) -> Tensor:
    """The same tensor without its numbers."""
    return tensor if tensor.is_meta else torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


@dataclass
class Counts:
    """What the card was asked to do: kernels by name, waits of the host and uploads by line, attention and 4-bit products by kind, bytes moved."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    bytes: float = 0.0

    def copy(self) -> Counts:
        return Counts(*(Counter(c) for c in (self.kernels, self.waits, self.attention, self.products)), self.bytes)

    def since(self, before: Counts) -> Counts:
        """What came after `before`, a copy taken then."""
        pairs = (
            (self.kernels, before.kernels),
            (self.waits, before.waits),
            (self.attention, before.attention),
            (self.products, before.products),
        )
        return Counts(*(now - then for now, then in pairs), self.bytes - before.bytes)


class PlayedCard(TorchDispatchMode):
    """A card of a model and size; see the module. `kind` is what torch calls its device: cuda or xpu."""

    def __init__(self, model: str = "RTX 4090", gib: float = 24.0, *, numbers: bool = True, expandable: bool = True, kind: str = "cuda"):
        super().__init__()
        self.name, self.model, self.numbers, self.device = model, MODELS[model], numbers, torch.device(kind, 0)
        self.total, self.fraction = gib * GIB, 1.0
        self.memory = Allocator(self.total - CONTEXT, expandable)
        self.counts = Counts()
        self.patient = True  # False: a wait of the host is an error
        self.side: list[Any] | None = None  # copies of the stream that is entered, beside the one that computes
        self.paged = 0  # bytes of bitsandbytes' paged tensors, which lie on the host
        self._storages: dict[int, tuple[Any, Any]] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Every tensor made on the card within the block is a played one."""
        lifted = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        _PLAYING.append(self)
        self.memory.malloc(WORKSPACE)
        try:
            with self:
                yield
        finally:
            _PLAYING.remove(self)
            torch._C._set_only_lift_cpu_tensors(lifted)  # type: ignore[attr-defined]

    # -- memory

    def own(self, inner: Tensor) -> Card:
        """A tensor of the card's: its storage takes memory for as long as it lives."""
        storage = inner.untyped_storage()
        key = storage._cdata
        if key not in self._storages and storage.nbytes():
            block = self.memory.malloc(storage.nbytes())

            def gone(_: Any) -> None:
                if self._storages.get(key, (None, None))[1] is block:
                    del self._storages[key]
                    self.memory.free(block)

            self._storages[key] = (weakref.ref(storage, gone), block)
        return Card(inner)

    def passing(self, *sizes: float) -> None:
        """What a kernel's wrapper takes and gives back again."""
        for block in [self.memory.malloc(int(size)) for size in sizes]:
            self.memory.free(block)

    # -- counts

    def wait(self, what: str) -> None:
        """The host waits for the card."""
        if not self.patient:
            raise RuntimeError(f"called a synchronizing CUDA operation ({what}) [played]")
        self.counts.waits[f"{what} @ {caller()}"] += 1

    def kernel(self, name: str, count: int, *tensors: Any) -> None:
        self.counts.kernels[name] += count
        self.counts.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def _count(self, func: Any, name: str, flat: list[Any], out: Any) -> None:
        if name in VIEWS or name in ROOM_ONLY or func.is_view or name == "gemm_4bit":
            return
        inside = [x.inner for x in flat if isinstance(x, Card)]
        if name in WRITTEN_IN_PLACES:
            self.kernel(name, 1, inside[-1], inside[-1])
            return
        if name in ("addmm", "baddbmm") and inside[0].dim() == 2:  # in place there is nothing to copy
            self.kernel("addmm's copy", 1, inside[0], inside[0])
        self.kernel(name, -(-len(inside) // 100) if name.startswith("_foreach") else SEVERAL.get(name, 1), *inside, *tree_leaves(out))

    # -- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, on the card if one of its tensors or the asked device is there."""
        kwargs.pop("pin_memory", None)
        given = flattened(args, kwargs)
        cards = [x for x in given if isinstance(x, Card)]
        device = None if (asked := kwargs.get("device")) is None else torch.device(asked)
        if device is not None and device.type == "meta" and (cards or torch._C._current_graph_task_id() != -1):
            device = self.device  # from C++, which takes a Card for a tensor on meta
            kwargs = {**kwargs, "device": device}
        if not cards and (device is None or device.type != self.device.type):
            of_a_number = (
                device is not None
                and device.type == "meta"
                and func in (aten.scalar_tensor.default, aten.full.default, aten.empty.memory_format)
            )
            if self.numbers and of_a_number and not (isinstance(args[0], (list, tuple)) and args[0]):
                return self.own(func(*args, **{**kwargs, "device": torch.device("cpu")}))  # a Python number beside a Card
            return func(*args, **kwargs)
        name = name_of(func)
        if func is aten._to_copy.default:
            return self._moved(args[0], kwargs)
        if func is aten.copy_.default:
            return self._copied(args[0], args[1], waits=not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])))
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            found = args[0].inner
            return func(found) if not found.is_meta else 1.0 if found.dtype.is_floating_point else found.dtype == torch.bool or 1
        if name in ("equal", "nonzero", "masked_select", "_unique2", "repeat_interleave"):
            self.wait(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            return self._indexed(func, name, args, kwargs)
        strangers = [
            x for x in given if isinstance(x, Tensor) and not isinstance(x, Card) and x.dim() and not getattr(x, "is_paged", False)
        ]
        if cards and strangers and name not in HOST_TENSORS:
            shapes = [tuple(x.shape) for x in strangers]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {self.device} and cpu! ({func}: {shapes}) [played]"
            )
        return self._done(func, name, args, kwargs)

    def _done(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        given = flattened(args, kwargs)
        shapes_only = any(isinstance(x, Card) and x.inner.is_meta for x in given)
        schema = func._schema
        writes = schema.is_mutable
        written = {i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write} if writes else set()
        if shapes_only and writes:
            target = next((args[i] for i in sorted(written) if i < len(args)), None)
            if isinstance(target, Card) and not target.inner.is_meta:  # what is known stays as it was
                self._count(func, name, given, None)
                return target
        where = torch.device("meta" if shapes_only or (not self.numbers and _makes_numbers(name, given, args, kwargs)) else "cpu")

        def plain(x: Any) -> Any:
            if isinstance(x, Card):
                return shape_of(x.inner) if shapes_only else x.inner
            if isinstance(x, Tensor):
                return shape_of(x) if shapes_only else x
            return where if isinstance(x, torch.device) else x

        inner_kwargs = {key: _mapped(plain, value) for key, value in kwargs.items()}
        compute = _wide_product if func._overloadname.startswith("dtype") and name in ("mm", "bmm", "addmm", "baddbmm") else func
        out = compute(*(_mapped(plain, x) for x in args), **inner_kwargs)
        self._count(func, name, given, out)
        mine = {id(x.inner): x for x in given if isinstance(x, Card)}
        if writes:  # returns the very tensor that it was given to write to
            sources = [args[i] if i < len(args) else kwargs.get(schema.arguments[i].name) for i in sorted(written)]
            mine |= {id(x.inner): x for x in sources if isinstance(x, Card)}
        if isinstance(out, Tensor):
            return mine[id(out)] if id(out) in mine else self.own(out)
        return tree_map(lambda y: (mine[id(y)] if id(y) in mine else self.own(y)) if isinstance(y, Tensor) else y, out)

    # -- moving

    def _moved(self, source: Tensor, kwargs: dict[str, Any]) -> Any:
        device = source.device if kwargs.get("device") is None else torch.device(kwargs["device"])
        rest = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
        there = device.type == self.device.type
        if isinstance(source, Card) and there:
            if rest.get("dtype") in (None, source.dtype) and rest.get("memory_format") in (None, torch.preserve_format):
                return Card(source.inner)  # C++ takes it for a move from meta; on a real card it isn't called
            inner = aten._to_copy.default(source.inner, **rest)
            self.kernel("cast", 1, source.inner, inner)
            return self.own(inner)
        if isinstance(source, Card):
            self.wait(f"to the host [{_size(source)}]")
            if source.inner.is_meta:
                return torch.zeros(source.shape, dtype=rest.get("dtype", source.dtype))
            return aten._to_copy.default(source.inner, **rest) if rest.get("dtype") not in (None, source.dtype) else source.inner.clone()
        if not kwargs.get("non_blocking"):
            self.wait(f"upload [{_size(source)}]")
        inner = aten._to_copy.default(source, **rest) if rest else source.clone()
        if not self.numbers and inner.dtype.is_floating_point and inner.numel() > 4096:
            inner = shape_of(inner)
        return self.own(inner)

    def _copied(self, target: Tensor, source: Tensor, *, waits: bool = True) -> Tensor:
        if self.side is not None and not waits:
            self.side.append(functools.partial(self._copied, target, source, waits=False))
            return target
        if isinstance(target, Card) and isinstance(source, Card):
            self.kernel("copy_", 1, source.inner, target.inner)
            if target.inner.is_meta or not source.inner.is_meta:
                target.inner.copy_(shape_of(source.inner) if target.inner.is_meta else source.inner)
        elif isinstance(target, Card):
            if source.dim() and waits:
                self.wait(f"upload [{_size(source)}]")
            if not target.inner.is_meta:
                target.inner.copy_(source)
        else:
            assert isinstance(source, Card)
            if waits:
                self.wait(f"to the host [{_size(source)}]")
            target.copy_(known(source))
        return target

    def _indexed(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        target, indices, *values = args
        flat = [x for x in (*indices, *values[:1]) if isinstance(x, Tensor) and x.dim()]
        if not isinstance(target, Card):
            if any(isinstance(x, Card) for x in flat):
                raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu) [played] {func}")
            return func(target, indices, *(known(v) if isinstance(v, Card) else v for v in values), **kwargs)
        if values and isinstance(values[0], Tensor) and values[0].dim() and not isinstance(values[0], Card):
            raise RuntimeError(f"Expected all tensors to be on the same device ({self.device} self, cpu values) [played] {func}")
        found: list[Any] = []
        for index in indices:
            inner = index.inner if isinstance(index, Card) else index
            if inner is not None and not isinstance(index, Card):
                self.wait(f"index by the host [{_size(inner)}]")
            if inner is not None and inner.dtype in (torch.bool, torch.uint8):
                self.wait(f"nonzero of a mask [{_size(inner)}]")
                found += inner.nonzero().unbind(1) if target.inner.is_meta else [inner]
            else:
                found.append(inner)
        shapes_only = target.inner.is_meta or any(i is not None and i.is_meta for i in found)
        if shapes_only:
            found = [None if i is None else shape_of(i) for i in found]
        given = [v.inner if isinstance(v, Card) else v for v in values]
        if shapes_only:
            given = [shape_of(v) if isinstance(v, Tensor) else v for v in given]
        if name in ("index_put_", "_index_put_impl_"):
            self.kernel(name, 1, *given)
            if target.inner.is_meta or not (shapes_only or any(isinstance(v, Tensor) and v.is_meta for v in given)):
                func(target.inner, found, *given, **kwargs)
            return target
        out = func(shape_of(target.inner) if shapes_only else target.inner, found, *given, **kwargs)
        self.kernel(name, 1, out, out)
        return self.own(out)


def caller() -> str:
    """The nearest line of iqlite, and of the library that it called."""
    frame: Any = sys._getframe(2)
    library = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if "/iqlite/" in file and "site-packages" not in file:
            return f"iqlite/{file.rsplit('/iqlite/', 1)[1]}:{frame.f_lineno} {frame.f_code.co_name}" + (f" ← {library}" if library else "")
        if not library and any(part in file for part in ("/transformers/", "/peft/", "/bitsandbytes/", "/trl/")):
            library = f"{file.rsplit('site-packages/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return library or "?"


@functools.cache
def name_of(func: Any) -> str:
    """An operation's name without its namespace and overload."""
    return str(func._schema.name).split("::")[1]


def flattened(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Arguments with lists and tuples laid open one level deep, as ATen's are."""
    flat: list[Any] = []
    for x in (*args, *kwargs.values()):
        flat.extend(x) if type(x) in (list, tuple) else flat.append(x)
    return flat


def _mapped(change: Any, x: Any) -> Any:
    return type(x)([change(y) for y in x]) if type(x) in (list, tuple) else change(x)


def _makes_numbers(name: str, given: list[Any], args: Any, kwargs: dict[str, Any]) -> bool:
    """True if an operation on known tensors makes floats, which stay unknown."""
    dtype = kwargs.get("dtype") or next((x.dtype for x in given if isinstance(x, Card)), None)
    if dtype is None:
        number = args[1] if name == "full" else args[0] if name in ("arange", "scalar_tensor") else 1.0
        return isinstance(number, float)
    return bool(dtype.is_floating_point)


def _wide_product(*args: Any, out: Tensor | None = None, alpha: float = 1, beta: float = 1) -> Tensor:
    """cuBLAS' product of 16-bit matrices with a result of 32 bits, which CPUs haven't: [summand,] matrix, matrix, type."""
    *summand, a, b, dtype = args
    made = alpha * (a.to(dtype) @ b.to(dtype))
    for one in summand:
        made += beta * one
    return made if out is None else out.copy_(made)


def _size(tensor: Tensor) -> str:
    size = tensor.numel() * tensor.element_size()
    return f"{size:,} B" if size > 4096 else "small"
