"""Which device this is, and what it says of itself. The only module that asks torch about one.

`torch.get_device_module` gives CUDA's and ROCm's functions and XPU's under one name; MPS has few of them, and its memory is the computer's.
Only CUDA's are played in tests; what is here for the others was written from PyTorch's and bitsandbytes' sources and is untried.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

ALLOCATOR = {True: "PYTORCH_ALLOC_CONF", False: "PYTORCH_CUDA_ALLOC_CONF"}  # what torch reads, by whether it is 2.9 or newer
FROM_AMPERE = (8, 0)  # compute capability


def here() -> tuple[torch.device, torch.dtype]:
    """Where the base lives and what it computes in: a card with bfloat16, else float16; a CPU with float32."""
    if torch.cuda.is_available():  # ROCm's cards too
        ask_for_expandable_segments()
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16 if native else torch.float16
    if torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device()), torch.bfloat16
    if torch.backends.mps.is_available():
        return torch.device("mps", 0), torch.float16  # with bfloat16 the oldest of them would compute in float32
    return torch.device("cpu"), torch.float32


def ask_for_expandable_segments() -> None:
    """Asks CUDA's allocator for memory that grows in place, before it has given any: widths are chosen to the brim, and pieces of fixed size
    leave gaps that nothing fits. What the user has set stays. Windows and ROCm haven't got it."""
    if torch.version.cuda is None or os.name == "nt" or any(name in os.environ for name in ALLOCATOR.values()):
        return
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    os.environ[ALLOCATOR[newer]] = "expandable_segments:True"


def is_card(device: torch.device) -> bool:
    """True for all but a CPU."""
    return device.type != "cpu"


def multiplies_into_float32(device: torch.device) -> bool:
    """True where a product of 16-bit matrices can have a float32 result (cuBLAS)."""
    return device.type == "cuda" and torch.version.hip is None


def fuses_grouped_attention(device: torch.device) -> bool:
    """True where attention kernels take fewer keys than queries: from Ampere on; older cards would compute all of it in float32."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= FROM_AMPERE


def name_of(device: torch.device) -> str:
    """The card's name, or the CPU's architecture and threads."""
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "mps":
        return f"{platform.machine()} GPU"
    return str(_module(device).get_device_name(device))


def free_memory(device: torch.device) -> float:
    """Bytes that this process may use, what it uses now included: of the card as the driver reports it, or of the host.

    On Windows the driver spills to host memory instead of failing, at a tenth of the speed: there the allocator is told to stop
    at what is free.
    """
    if device.type == "cpu":
        import psutil

        free = float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
        limit = Path("/sys/fs/cgroup/memory.max")  # a container's
        text = limit.read_text("utf-8").strip() if limit.exists() else "max"
        return min(free, float(text)) if text.isdigit() else free
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    module = _module(device)
    free, total = module.mem_get_info(device)
    used = module.memory_reserved(device)
    if os.name == "nt":
        module.set_per_process_memory_fraction(min(module.get_per_process_memory_fraction(device), (free + used) / total), device)
    return float(min(free + used, module.get_per_process_memory_fraction(device) * total))


def total_gib(device: torch.device) -> float:
    """Memory of a card, GiB."""
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory()) / 2**30
    return float(_module(device).get_device_properties(device).total_memory) / 2**30


def peak_gib(device: torch.device) -> float:
    """Highest memory of this process so far, GiB: allocated on the card, or resident on a CPU."""
    if device.type == "mps":  # it keeps what it had, and no record of the peak
        return float(torch.mps.driver_allocated_memory()) / 2**30
    if device.type != "cpu":
        return float(_module(device).max_memory_allocated(device)) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def pinned(size: int, device: torch.device) -> torch.Tensor:
    """Bytes of the computer's memory that a card reads by itself. CUDA's are registered, since torch's own allocator rounds up to a power of two."""
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8, pin_memory=is_card(device))
    made = torch.empty(size, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(made.data_ptr(), size, 0)) != 0:  # too much for this system: copies then wait for the host
        return made
    weakref.finalize(made, runtime.cudaHostUnregister, made.data_ptr())
    return made


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given; a CPU has."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        _module(device).synchronize(device)


def let_go() -> None:
    """Gives back what nobody refers to any more: Python's cycles, and the allocator's cache of a card."""
    gc.collect()
    device, _ = here()
    if device.type != "cpu":
        _module(device).empty_cache()


def repeated(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Runs `step`, and returns what runs it again: on a CUDA card the replay of a graph, if it can be recorded as one; else `step` itself.

    `step` works on the same memory each time, takes no decision by a number on the device, and may be repeated after it has failed.
    """
    if device.type != "cuda":
        step()
        return step
    now, aside, waits = torch.cuda.current_stream(device), _aside(device), False
    aside.wait_stream(now)
    # The first run is the warm-up, on the stream that records. A recording that fails can leave the allocator in disorder, so torch tells first
    # whether the step waits for the host. The outer block restores the stream, which `torch.cuda.graph` doesn't after an error.
    with torch.cuda.stream(aside):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            waits = True
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        graph = None
        if waits:
            step()
        else:
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                    step()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                graph = None
    now.wait_stream(aside)
    return step if graph is None else graph.replay


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs are recorded on: one, since libraries keep their workspaces for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def is_out_of_memory(error: BaseException) -> bool:
    """True for a card's or a CPU allocator's out-of-memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
