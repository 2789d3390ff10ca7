"""The played card's driver: what torch.cuda (or torch.xpu), autocast and bitsandbytes' CUDA kernels say and do while one is played.

Import bitsandbytes first, as here: it then loads its CPU library, whose kernels give the numbers.
"""

from __future__ import annotations

import ast
import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import torch
import torch.utils._device
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.card import graphs
from tests.card.attention import attend
from tests.card.played import Card, PlayedCard, playing

MOST_ROWS = 1536  # of bitsandbytes' fused product
NEW = bnb.nn.Params4bit.__new__
RUN = PlayedCard.run
RMS_NORM = torch.nn.functional.rms_norm


@contextmanager
def played(*args: Any, **kwargs: Any) -> Iterator[PlayedCard]:
    """A card (arguments as of PlayedCard) is there within the block."""
    card = PlayedCard(*args, **kwargs)
    with ExitStack() as stack:
        patch = functools.partial(_patch, stack)
        module = torch.get_device_module(card.device)
        for name, value in _functions(card).items():
            patch(module, name, value)
            if "rng_state" in name:
                patch(module.random, name, value)
        if card.device.type == "cuda":
            for name, value in graphs.functions(card).items():
                patch(module, name, value)
            patch(torch.version, "cuda", "12.8")
            patch(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)
        torch.utils._device._device_constructors()  # cached: `with torch.device("meta")` looks functions up by identity
        for name in ("tensor", "as_tensor"):
            patch(torch, name, _on_the_host_first(getattr(torch, name)))
        patch(torch.Tensor, "to", _with_a_number(torch.Tensor.to))
        patch(torch.Tensor, card.device.type, lambda tensor, *_, **__: tensor.to(card.device))
        patch(torch.nn.functional, "scaled_dot_product_attention", attend)
        patch(torch.nn.functional, "rms_norm", _normed)
        patch(torch, "autocast", Autocast)
        patch(torch.amp, "autocast", Autocast)
        patch(
            transformers.AutoModelForCausalLM, "from_pretrained", staticmethod(_loading(transformers.AutoModelForCausalLM.from_pretrained))
        )
        patch(functional, "name2qmap", {})  # what bitsandbytes keeps from one call to the next
        patch(functional, "get_paged", _paged)
        patch(functional, "fill", lambda a, value, **_: a.fill_(value))
        patch(functional, "prefetch_tensor", lambda a, to_cpu=False: None)
        patch(bnb.nn.Params4bit, "__new__", staticmethod(_params4bit))
        patch(bnb.nn.Params4bit, "to", _moved_4bit(bnb.nn.Params4bit.to))
        patch(bnb.nn.Params4bit, "from_prequantized", staticmethod(_from_prequantized))
        with card.on():
            patch(threading.Thread, "run", _within(card, threading.Thread.run))
            yield card


def _within(card: PlayedCard, run: Callable[..., Any]) -> Callable[..., Any]:
    """Threads that start while a card is played play it too: a dispatch mode is a thread's own."""

    def run_within(thread: threading.Thread) -> Any:
        with card:
            return run(thread)

    return run_within


def _patch(stack: ExitStack, where: Any, name: str, value: Any) -> None:
    there = name in vars(where)
    was = vars(where)[name] if there else None
    setattr(where, name, value)
    stack.callback(setattr, where, name, was) if there else stack.callback(delattr, where, name)


def _functions(card: PlayedCard) -> dict[str, Any]:
    """torch.cuda's, by name; torch.xpu's are a part of them."""
    memory, model = card.memory, card.model
    name = f"played {card.name}"
    properties = types.SimpleNamespace(
        name=name, total_memory=int(card.total), multi_processor_count=model.multiprocessors, major=model.capability[0], minor=model.capability[1],
        gcnArchName="", warp_size=32,
    )  # fmt: skip

    def limit(fraction: float, _: Any = None) -> None:
        memory.capacity += min(0.0, fraction * card.total - memory.capacity) if fraction < 1 else 0.0
        card.fraction = fraction

    def first(value: Callable[[], Any]) -> Callable[..., Any]:
        return lambda *_, **__: value()

    return {
        "is_available": first(lambda: True), "device_count": first(lambda: 1), "current_device": first(lambda: 0), "_lazy_init": first(lambda: None),
        "init": first(lambda: None), "is_initialized": first(lambda: True), "get_device_properties": first(lambda: properties),
        "get_device_name": first(lambda: name), "get_device_capability": first(lambda: model.capability),
        "is_bf16_supported": lambda including_emulation=True: model.capability >= (8, 0) or including_emulation,
        "mem_get_info": first(lambda: (int(memory.capacity - memory.reserved), int(card.total))),
        "memory_reserved": first(lambda: memory.reserved), "memory_allocated": first(lambda: memory.allocated),
        "max_memory_allocated": first(lambda: memory.peak_allocated), "max_memory_reserved": first(lambda: memory.peak_reserved),
        "reset_peak_memory_stats": first(memory.reset_peaks), "empty_cache": first(memory.empty_cache),
        "synchronize": first(lambda: card.wait("synchronize")), "set_per_process_memory_fraction": limit,
        "get_per_process_memory_fraction": first(lambda: card.fraction), "manual_seed_all": first(lambda: None), "manual_seed": first(lambda: None),
        "get_rng_state": first(lambda: torch.zeros(16, dtype=torch.uint8)), "set_rng_state": first(lambda: None),
        "get_rng_state_all": first(lambda: [torch.zeros(16, dtype=torch.uint8)]), "set_rng_state_all": first(lambda: None),
        "cudart": first(lambda: types.SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)),
        "set_device": first(lambda: None), "ipc_collect": first(lambda: None),
    }  # fmt: skip


def _with_a_number(to: Any) -> Any:
    """`cuda` without a number, or a number alone, asks C++ which device that is."""

    def plain(x: Any) -> Any:
        if isinstance(x, (str, torch.device)) and torch.device(x) == torch.device(playing().device.type):
            return playing().device
        return x

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and type(args[0]) is int:
            args = (playing().device, *args[1:])
        args = tuple(plain(x) if not isinstance(x, str) or ":" not in x else x for x in args)
        return to(tensor, *args, **{key: plain(value) if key == "device" else value for key, value in kwargs.items()})

    return moved


def _on_the_host_first(make: Any) -> Any:
    """torch.tensor(…, device="cuda") asks C++ for a guard that a CPU build hasn't: made on the host, then moved."""

    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is not None and torch.device(device).type == playing().device.type:
            return make(data, *args, **kwargs).to(playing().device)
        return make(data, *args, **kwargs) if device is None else make(data, *args, device=device, **kwargs)

    return made


def _loading(load: Any) -> Any:
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        if isinstance(places := kwargs.get("device_map"), dict):  # a number alone asks C++ which kind of device there is
            kwargs["device_map"] = {
                key: f"{playing().device.type}:{value}" if isinstance(value, int) else value for key, value in places.items()
            }
        return load(*args, **kwargs)

    return from_pretrained


# -- autocast: C++'s doesn't see played tensors

NARROW = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}
WIDE = {
    "softmax",
    "log_softmax",
    "cross_entropy",
    "nll_loss",
    "kl_div",
    "exp",
    "log",
    "pow",
    "sum",
    "logsumexp",
    "cumsum",
    "prod",
    "norm",
    "layer_norm",
}


class _Casting(TorchFunctionMode):
    """Inputs of products in the narrow type, those of sums and exponentials in float32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        dtype = self.dtype if name in NARROW else torch.float32 if name in WIDE else None

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Card) and x.is_floating_point() and x.dtype != dtype else x

        if dtype is not None:
            args, kwargs = tuple(map(cast, args)), {key: cast(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


REAL_AUTOCAST = torch.autocast


class Autocast(REAL_AUTOCAST):  # type: ignore[valid-type,misc]
    """torch's, for the played card too."""

    def __enter__(self) -> Any:
        self.modes: list[_Casting] = getattr(self, "modes", [])
        made = super().__enter__()
        if self.device == playing().device.type and self._enabled:
            self.modes.append(_Casting(self.fast_dtype))
            self.modes[-1].__enter__()
        return made

    def __exit__(self, *error: Any) -> Any:
        if self.device == playing().device.type and self._enabled:
            self.modes.pop().__exit__(*error)
        return super().__exit__(*error)


# -- bitsandbytes


class Card4bit(Card):
    """What Params4bit is on the card: quantised when it is moved there."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        if device is None or device.type != playing().device.type or self.bnb_quantized:
            return self
        packed, state = functional.quantize_4bit(
            self.detach().contiguous(), blocksize=self.blocksize, compress_statistics=self.compress_statistics, quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )  # fmt: skip
        if self.module is not None:
            self.module.quant_state = state
        return _params4bit(None, packed, **{**vars(self), "quant_state": state, "bnb_quantized": True})


DEFAULTS: dict[str, Any] = {
    "blocksize": 64, "compress_statistics": True, "quant_type": "fp4", "quant_state": None, "quant_storage": torch.uint8, "bnb_quantized": False, "module": None,
}  # fmt: skip


def _params4bit(cls: Any, data: Any = None, requires_grad: bool = False, **attributes: Any) -> Any:
    if not isinstance(data, Card):
        return NEW(cls, data, requires_grad, **attributes)
    made = Card4bit(data.inner)
    for name, default in DEFAULTS.items():
        value = attributes.get(name, default)
        setattr(made, name, default if value is None else value)
    made._is_param = True
    return made


def _moved_4bit(to: Any) -> Any:
    def moved(weight: Any, *args: Any, **kwargs: Any) -> Any:
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        if isinstance(weight, Card) or device is None or device.type != playing().device.type:
            return to(weight, *args, **kwargs)
        return _params4bit(None, weight.data.to(playing().device), **vars(weight)).to(playing().device)

    return moved


def _from_prequantized(
    data: Tensor, quantized_stats: Any, requires_grad: bool = False, device: Any = "cuda", module: Any = None, **_: Any
) -> Any:
    state = functional.QuantState.from_dict(qs_dict=quantized_stats, device=torch.device(device))
    made = _params4bit(
        None, data.to(device), blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type, quant_state=state,
        bnb_quantized=True, module=module,
    )  # fmt: skip
    if module is not None:
        module.quant_state = state
    return made


def _normed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch's fused norm: one kernel, though a CPU build has it in pieces."""
    if not isinstance(x, Card):
        return RMS_NORM(x, *args, **kwargs)
    card = playing()
    before = card.counts.copy()
    y: Any = RMS_NORM(x, *args, **kwargs)
    card.counts = before
    card.kernel("rms_norm", 1, x.inner, y.inner)
    found: Tensor = y
    return found


def _paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    made: Any = torch.zeros(shape, dtype=dtype)
    made.is_paged, made.page_deviceid = True, 0
    playing().paged += made.nbytes
    found: Tensor = made
    return found


def _product(self: PlayedCard, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Kernels and passing memory of bitsandbytes' 4-bit product, by its own choice between the fused kernel and dequantising."""
    if func is torch.ops.bitsandbytes.gemm_4bit.default and isinstance(args[0], Card):
        a, (n, k) = args[0], (args[2][0], args[0].shape[-1])
        rows = a.numel() // k
        fused = (
            rows <= MOST_ROWS and k % args[4] == 0 and fused_4bit(self.model.capability, self.model.multiprocessors, a.dtype, rows, n, k)
        )
        self.counts.products[f"{'fused' if fused else 'dequantised'}, {rows} rows"] += 1
        self.counts.bytes += n * k / 2 + n * k / 64 + (a.numel() + rows * n) * a.element_size()
        if fused:
            self.counts.kernels["4-bit product, fused"] += 1
        else:
            self.passing(n * k / 64, n * k / 16, n * k / 16, n * k * a.element_size())
            self.counts.kernels["4-bit product, dequantised"] += 4  # scales, their offset, weights, product
            self.counts.bytes += 2 * n * k * a.element_size()
    return RUN(self, func, args, kwargs)


PlayedCard.run = _product  # type: ignore[method-assign]


def fused_4bit(capability: tuple[int, int], multiprocessors: int, dtype: torch.dtype, rows: int, out: int, inside: int) -> bool:
    """bitsandbytes' own choice."""
    space = _choice()
    space["_gpu_dispatch_props"] = lambda _: (multiprocessors, *capability)
    return bool(space["_gemm_4bit_use_custom_cuda"](0, dtype, rows, out, inside))


@functools.cache
def _choice() -> Any:
    """Cut out of bitsandbytes' CUDA backend, which can't be imported without the CUDA library."""
    tree = ast.parse((Path(bnb.__file__).parent / "backends/cuda/ops.py").read_text("utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_gemm_4bit_use_custom_cuda"]
    wanted[0].decorator_list = []
    space: dict[str, Any] = {"torch": torch, "_GEMM_4BIT_CUSTOM_FLOOR_M": 4}
    exec(compile(ast.Module(wanted, []), "gemm_4bit", "exec"), space)
    return space
