"""Hub id, folder, GGUF file, Ollama or LM Studio name, or the embedded model → the one frozen base and its tokenizer.

NF4 with double quantisation through bitsandbytes, on CUDA and on a CPU. Compute is bfloat16 where the card has it, float16 on
older cards, float32 on a CPU. No remote code, no pickled weights. This module writes nothing but its cache of converted GGUF files.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from iqlite.base.architectures import SUPPORTED
from iqlite.base.gguf_files import convert_gguf, find_gguf
from iqlite.base.identity import Identity
from iqlite.errors import BaseError


@dataclass(frozen=True)
class Base:
    """The frozen base in memory. `name` is what the recipe calls it."""

    name: str
    model: Any
    tokenizer: Any
    compute_dtype: torch.dtype
    quantization: str
    identity: Identity

    @property
    def device(self) -> torch.device:
        """Where it computes; the embedding table may be elsewhere."""
        found: torch.device = self.model.get_output_embeddings().weight.device
        return found

    @property
    def context(self) -> int:
        """Longest sequence the model was made for, tokens."""
        return int(self.model.config.max_position_embeddings)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """Where the base lives and what it computes in: CUDA with bfloat16, else float16; a CPU with float32."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16 if native else torch.float16
    return torch.device("cpu"), torch.float32


def load_base(
    name: str,
    quantization: str = "nf4",
    *,
    revision: str | None = None,
    beside: Path = Path(),
    embeddings: str = "card",
    check: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Base:
    """Loads `name` (relative paths are looked up in `beside`); BaseError says in one sentence why it can't be had.

    `check` sees the configuration before any weights are read, and raises what speaks against them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of optional CPU kernels that nobody asked for
    device, dtype = device_and_dtype()
    source = locate(name, beside, revision)
    check(AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision).to_dict())
    if Path(source).is_dir():  # a download shows its progress; reading a folder needn't
        transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, "revision": revision}
    if quantization == "nf4":
        check_bitsandbytes(device)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if device.type == "cuda":
        options["device_map"] = {"": device.index}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, revision=revision)
        model, found = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except OSError as error:
        raise BaseError(explain(name, error, local=Path(source).is_dir())) from None
    except torch.OutOfMemoryError:
        free = torch.cuda.get_device_properties(device).total_memory / 2**30
        raise BaseError(f"base {name!r} doesn't fit this card's {free:.1f} GiB; choose a smaller base or quantization = \"nf4\".") from None
    except (ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise BaseError(f"base {name!r} can't be loaded: {first_line(error)}; download it again, or choose another base.") from None
    if found["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(found["missing_keys"])
        raise BaseError(f"base {name!r} lacks {len(missing)} of its weights, such as {missing[0]}; download it again.")
    model.requires_grad_(False)
    train_on_any_cpu(model)
    if embeddings == "host":
        embed_on_host(model)
    if quantization == "nf4":
        let_go_of_files(model)
    return Base(
        name,
        model,
        tokenizer,
        dtype,
        quantization,
        Identity.of(name, model.config, model.get_decoder().norm.weight, model.get_output_embeddings().weight),
    )


def locate(name: str, beside: Path = Path(), revision: str | None = None) -> str:
    """A folder in Hugging Face format (GGUF files are converted first), or the hub id once its architecture is known to be supported."""
    from transformers import AutoConfig

    gguf = find_gguf(name, beside)
    if gguf is not None:
        return str(convert_gguf(gguf, name))
    folder = next((p for p in (beside / Path(name).expanduser(), Path(name).expanduser()) if p.is_dir()), None)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise BaseError(f"base folder {name!r} has no config.json: name a model folder in Hugging Face format, or a .gguf file.")
        if not any(folder.glob("*.safetensors")):
            raise BaseError(f"base folder {name!r} has no .safetensors weights (pickled weights aren't loaded): convert it to safetensors.")
    elif Path(name).suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise BaseError(f"base {name!r}: no such file or folder; paths are relative to the recipe.")
    source = str(folder.resolve()) if folder is not None else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision)
    except OSError as error:
        raise BaseError(explain(name, error, local=folder is not None)) from None
    except (ValueError, KeyError) as error:
        raise BaseError(f"base {name!r} can't be loaded: {first_line(error)}; choose one of: {', '.join(SUPPORTED)}.") from None
    if config.model_type not in SUPPORTED:
        raise BaseError(f"base {name!r}: the architecture {config.model_type!r} isn't supported; choose one of: {', '.join(SUPPORTED)}.")
    return source


def embed_on_host(model: Any) -> None:
    """Leaves an untied embedding table in the computer's memory: only the looked-up rows, [tokens, D], travel to the card."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight is head.weight or table.weight.device.type == "cpu":
        return
    table.to("cpu")
    table.register_forward_pre_hook(lambda _, given: (given[0].to("cpu"),))
    table.register_forward_hook(lambda _, __, found: found.to(head.weight.device))


def train_on_any_cpu(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking NF4 weights for inference on CPUs with avx512_bf16.

    It does so at the first forward in evaluation mode, and its packed product has no backward: after one rollout the base's
    layers would pass no gradient on, with no word said (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def let_go_of_files(model: nn.Module) -> None:
    """On a CPU, copies what still lies in the mapped weight file, so that the unquantised file doesn't stay resident beside the base.

    It was 0.4 GiB for a base of 0.16; and glibc keeps what loading freed (0.2 to 0.4 GiB) until it's asked to give it back.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def check_bitsandbytes(device: torch.device) -> None:
    """A real 4-bit product against its own dequantised weights; BaseError with one fix if bitsandbytes is missing or broken."""
    fix = 'reinstall it (pip install --force-reinstall bitsandbytes), or set quantization = "none"'
    try:
        import bitsandbytes as bnb
        import bitsandbytes.functional as functional

        weight = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        eye = torch.eye(64, device=device)
        wrong = (bnb.matmul_4bit(eye, packed.t(), state) - functional.dequantize_4bit(packed, state).t()).abs().max()
    except ImportError as error:
        raise BaseError(f'model.quantization = "nf4" needs bitsandbytes, which can\'t be imported ({first_line(error)}): {fix}.') from None
    except (RuntimeError, OSError, AttributeError, NotImplementedError) as error:
        raise BaseError(f'model.quantization = "nf4": bitsandbytes doesn\'t work on this machine ({first_line(error)}): {fix}.') from None
    if not wrong < 0.05:
        raise BaseError(f'model.quantization = "nf4": bitsandbytes multiplies wrongly on this machine (error {wrong:.3g}): {fix}.')


def explain(name: str, error: Exception, *, local: bool = False) -> str:
    """One sentence with what to do about a base that can't be had from the hub, or read from a folder here."""
    text = str(error).lower()
    if "gated" in text or re.search(r"\b40[13] client error", text):
        return (
            f"base {name!r} is gated or doesn't exist: accept its licence on its page and log in (hf auth login), or choose another base."
        )
    if "safetensors" in text or "pickle" in text:
        return f"base {name!r} has no safetensors weights (pickled weights aren't loaded): choose another base or convert it."
    if local:
        return f"base {name!r} can't be read: {first_line(error)}; mend or replace its files (model.base)."
    if "no space" in text:
        return f"base {name!r}: no space left on the disk that holds the model cache; free some, or set HF_HOME to another disk."
    if "not a valid model identifier" in text or re.search(r"\b404 client error|repository not found", text):
        return f"base {name!r} is neither a folder here nor a model on the hub: check the name (model.base)."
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return f"base {name!r} isn't in the local cache and the hub can't be reached{offline}: connect to the network, or set model.base to a local folder."


def first_line(error: BaseException) -> str:
    """The first line of a library's message, without a final full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
