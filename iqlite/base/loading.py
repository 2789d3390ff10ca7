"""Hub id, folder, GGUF file, Ollama or LM Studio name, or the embedded model → the one frozen base and its tokenizer.

NF4 with double quantisation through bitsandbytes, on CUDA and on a CPU. Compute is bfloat16 where the card has it, float16 on
older cards, float32 on a CPU. No remote code, no pickled weights. This module writes nothing but its cache of converted GGUF files.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from iqlite.base import unsloth
from iqlite.base.anatomy import FAULTS, Anatomy, auto_class
from iqlite.base.attention import repeat_keys
from iqlite.base.identity import Identity
from iqlite.base.names import explain, locate
from iqlite.base.shape import context_of
from iqlite.base.stored_types import check_files, is_packed
from iqlite.base.streaming import Streamed, move, stream
from iqlite.device import fuses_grouped_attention, here, is_card, total_gib
from iqlite.errors import BaseError, first_line
from iqlite.places import cache_folder


@dataclass(frozen=True)
class Base:
    """The frozen base in memory. `name` is what the recipe calls it, `backend` whose code loaded it."""

    name: str
    model: Any
    tokenizer: Any
    compute_dtype: torch.dtype
    quantization: str
    identity: Identity
    backend: str = "plain"
    streamed: Streamed | None = None  # what stands for layers that aren't in memory

    @cached_property
    def anatomy(self) -> Anatomy:
        """Its parts; of the bare model, so first asked for before adapters stand on it."""
        return Anatomy.of(self.model, self.name)

    @property
    def fused(self) -> bool:
        """True if unsloth's own forwards read it; on a machine without a card it leaves transformers' in place."""
        return self.backend == "unsloth" and unsloth.is_fused()

    @property
    def device(self) -> torch.device:
        """Where it computes; the embedding table may be elsewhere."""
        return self.anatomy.head.weight.device

    @property
    def context(self) -> int:
        """Longest sequence the model was made for, tokens."""
        return context_of(self.anatomy.config)


def load_base(
    name: str,
    quantization: str = "nf4",
    *,
    revision: str | None = None,
    beside: Path = Path(),
    embeddings: str = "card",
    backend: str = "plain",
    offload: Callable[[Mapping[str, Any]], int] = lambda _: 0,
    check: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Base:
    """Loads `name` (relative paths are looked up in `beside`); BaseError says in one sentence why it can't be had.

    `offload` says of the configuration how many layers are streamed. `check` sees the configuration before any weights are read, and raises what speaks against them. `backend` is "plain", or "unsloth" once
    `unsloth.prepare` has said so.
    """
    from transformers import AutoConfig, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of optional CPU kernels that nobody asked for
    device, dtype = here()
    source = locate(name, beside, revision)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision)
    loader, packed = auto_class(config, name), is_packed(config, name)
    if Path(source).is_dir():
        check_files(Path(source), name)
    plain = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    check(plain)
    layers_outside = offload(plain)
    if Path(source).is_dir():  # a download shows its progress; reading a folder needn't
        transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, "revision": revision}
    if packed:  # as it is stored, with its own settings but for what it computes in
        quantization = "nf4"
        check_bitsandbytes(device)
        options["config"] = config
        config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    elif quantization == "nf4":
        check_bitsandbytes(device)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    table_outside = embeddings == "host" and is_card(device)
    if is_card(device):
        here_first = layers_outside or table_outside  # what stays here mustn't need room there on its way
        options["device_map"] = {"": "cpu" if here_first else device.index if device.type == "cuda" else str(device)}
    tokenizer = read_tokenizer(source, name, revision)
    try:
        if backend == "unsloth":
            model, missing = unsloth.load(source, revision, quantization, dtype, device, context_of(config))
        else:
            model, found = loader.from_pretrained(source, output_loading_info=True, **options)
            missing = found["missing_keys"]
    except OSError as error:
        raise BaseError(explain(name, error, local=Path(source).is_dir())) from None
    except torch.OutOfMemoryError:
        free = total_gib(device)
        raise BaseError(f"base {name!r} doesn't fit this card's {free:.1f} GiB; choose a smaller base or quantization = \"nf4\".") from None
    except (*FAULTS, SafetensorError) as error:
        raise BaseError(f"base {name!r} can't be loaded: {first_line(error)}; download it again, or choose another base.") from None
    if missing:  # transformers would fill them with random numbers
        raise BaseError(f"base {name!r} lacks {len(missing)} of its weights, such as {min(missing)}; download it again.")
    model.requires_grad_(False)
    train_on_any_cpu(model)
    if not fuses_grouped_attention(device):
        repeat_keys(model)
    anatomy, streamed = Anatomy.of(model, name), None
    stays = embed_on_host(model) if table_outside else []
    if layers_outside:
        streamed = stream(model, anatomy.layers, layers_outside, device, cache_folder(), stays)
        anatomy = Anatomy.of(model, name)
    elif table_outside:
        move(model, device, but=stays)
    if quantization == "nf4" and not (streamed and device.type == "cpu"):
        let_go_of_files(model)
    identity = Identity.of(name, anatomy.config, anatomy.norm, anatomy.head.weight)
    return Base(name, model, tokenizer, dtype, quantization, identity, backend, streamed)


def read_tokenizer(source: str, name: str, revision: str | None = None) -> Any:
    """A base's tokenizer; BaseError says what it needs or what is wrong with its files."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, revision=revision)
    except OSError as error:
        raise BaseError(explain(name, error, local=Path(source).is_dir())) from None
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, FAULTS):  # tokenizers raises plain Exceptions; the rest isn't foreseen
            raise
        said = first_line(error)
        if re.search("sentencepiece|tiktoken|protobuf", str(error), re.IGNORECASE):
            raise BaseError(
                f"base {name!r} has a tokenizer.model and no tokenizer.json: pip install sentencepiece protobuf, which reading it needs."
            ) from None
        raise BaseError(
            f"base {name!r}: its tokenizer can't be read ({said}): update tokenizers and transformers (pip install -U transformers tokenizers), or download it again."
        ) from None


def embed_on_host(model: Any) -> list[nn.Module]:
    """Leaves an untied embedding table in the computer's memory: only the looked-up rows, [tokens, D], travel to the card. What stays there."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight is head.weight:
        return []
    table.to("cpu")
    table.register_forward_pre_hook(lambda _, given: (given[0].to("cpu"),))
    table.register_forward_hook(lambda _, __, found: found.to(head.weight.device))
    return [table]


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
