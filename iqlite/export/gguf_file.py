"""GGUF files for llama.cpp, Ollama and LM Studio: a merged model, or a LoRA that is loaded beside its base's own GGUF file.

Names, types and layout are the gguf library's. One tensor at a time is in memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from iqlite.base.gguf_files import tensors_of
from iqlite.errors import AdapterError, RunError
from iqlite.export.gguf_keys import ARCHITECTURE, NORM_PLUS_ONE, ROTATED_IN_PAIRS, add_tokenizer, copy_metadata, describe, rope_factors

if TYPE_CHECKING:
    from torch import Tensor

    from iqlite.export.merge import Merge
    from iqlite.export.stored import Stored

Kind = gguf.GGMLQuantizationType
WRITTEN = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_0": (Kind.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q5_1": (Kind.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q4_0": (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (Kind.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
}
BY_LLAMA_CPP = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs")
FINE = ("token_embd.weight", "output.weight")  # kept at 8 bits where the layers have fewer
QUANTIZERS = ("llama-quantize", "quantize")


def check_quant(quant: str, *, own: bool = True) -> Path | None:
    """llama.cpp's tool where `quant` needs it, else None; RunError for an unknown type or a missing tool, before any work.

    Without `own` every type but those of llama.cpp's converter needs it.
    """
    if quant in WRITTEN and own:
        return None
    if quant not in (*BY_LLAMA_CPP, *WRITTEN):
        raise RunError(f"--quant {quant!r} isn't a type: choose one of {', '.join((*WRITTEN, *BY_LLAMA_CPP))}.")
    home = os.environ.get("LLAMA_CPP")
    places = [*([Path(home), Path(home) / "bin", Path(home) / "build" / "bin"] if home else []), Path("llama.cpp/build/bin")]
    for name in QUANTIZERS:
        found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))
        if found:
            return Path(found)
    raise RunError(
        f"--quant {quant} needs llama.cpp's llama-quantize, which is neither on PATH nor in $LLAMA_CPP: install llama.cpp, or choose one of {', '.join(WRITTEN)}."
    )


def write_model(
    path: Path,
    merge: Merge,
    tokenizer: Any,
    stop_ids: tuple[int, ...],
    *,
    quant: str,
    name: str,
    wrote: Callable[[int], None] = lambda _: None,
) -> None:
    """The merged model as one GGUF file, the layers' matrices in `quant` (a key of WRITTEN). `wrote` hears of the bytes read.

    A base that came from a GGUF file keeps all that file says of its tokenizer.
    """
    stored = merge.stored
    kind, file_type = WRITTEN[quant]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURE[stored.config.model_type]])
    if stored.gguf is not None:
        copy_metadata(writer, stored.gguf)
    else:
        writer.add_type(gguf.GGUFType.MODEL)
        describe(writer, stored.config)
        add_tokenizer(writer, tokenizer, stored.config.vocab_size, stop_ids)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = Names(stored)
    factors = rope_factors(stored.config)
    if stored.gguf is not None:  # its own, where it has one: transformers' reader doesn't see them
        kept = [tensor.data for tensor in tensors_of(stored.gguf) if tensor.name == "rope_freqs.weight"]
        factors = kept[0].tolist() if kept else None
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", [len(factors)], np.dtype(np.float32), 4 * len(factors), Kind.F32)
    kinds = {}
    for shard in stored.shards:
        for key, (_, shape) in merge.layout(shard).items():
            to = kinds[key] = _kind(names.of(key), shape, kind)
            stored_shape, dtype = _as_bytes(shape, to)
            writer.add_tensor_info(names.of(key), stored_shape, dtype, int(np.prod(stored_shape)) * dtype.itemsize, to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(np.array(factors, np.float32))
    for shard in stored.shards:
        for key, tensor in merge.tensors(shard):
            writer.write_tensor_data(gguf.quants.quantize(names.arranged(key, tensor.float()).numpy(), kinds[key]))
            wrote(tensor.nbytes)
    writer.close()


def quantize_with(tool: Path, source: Path, path: Path, quant: str) -> None:
    """llama.cpp's own tool, for the types that the library doesn't write."""
    done = subprocess.run([tool, source, path, quant.upper()], capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode or not path.is_file():
        said = ([line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["it said nothing"])[-1]
        raise RunError(f"{tool} failed on {quant} ({said}): choose one of {', '.join(WRITTEN)}, or another llama.cpp.")


def write_adapter(path: Path, merge: Merge, *, quant: str, name: str) -> None:
    """The LoRA in llama.cpp's format, for the base's own GGUF file: per adapted tensor lora_a [rank, in] and lora_b [out, rank]."""
    stored = merge.stored
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURE[stored.config.model_type]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = next(iter(merge.deltas.values()))[0].shape[0]
    scale = next(iter(merge.deltas.values()))[2]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * rank)  # llama.cpp divides by the rank again
    names = Names(stored)
    there = {tensor.name for tensor in tensors_of(stored.gguf)} if stored.gguf is not None else None
    dtype = np.float16 if quant == "f16" else np.float32
    for key, (a_rI, b_Or, _) in merge.deltas.items():
        name_there = names.of(key)
        if there is not None and name_there not in there:
            raise AdapterError(f"{stored.gguf} has no {name_there}, which the adapter changes: export with --to gguf instead.")
        writer.add_tensor(f"{name_there}.lora_a", a_rI.numpy().astype(dtype))
        writer.add_tensor(f"{name_there}.lora_b", names.arranged(key, b_Or).numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Names:
    """transformers' tensors as llama.cpp calls and arranges them."""

    def __init__(self, stored: Stored):
        self.config = stored.config
        self.map = gguf.get_tensor_name_map(ARCHITECTURE[self.config.model_type], self.config.num_hidden_layers)

    def of(self, key: str) -> str:
        """llama.cpp's name of a parameter."""
        found: str | None = self.map.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise AdapterError(f"{key} has no place in a GGUF of the architecture {self.config.model_type}: use --to peft or --to hf.")
        return found

    def arranged(self, key: str, tensor: Tensor) -> Tensor:
        """Its rows in llama.cpp's order: Llama's q and k rotate neighbours there and a head's halves here. Also for a LoRA's B."""
        kind, layer = self.config.model_type, key.rpartition(".")[0]
        if kind in NORM_PLUS_ONE and key.endswith("norm.weight"):
            return tensor + 1
        if kind in ROTATED_IN_PAIRS and layer.endswith(("q_proj", "k_proj")):
            heads = self.config.num_attention_heads if layer.endswith("q_proj") else self.config.num_key_value_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        return tensor


def _kind(name: str, shape: list[int], kind: Any) -> Any:
    """What a tensor is written as: float32 for norms and biases, 8 bits at least for embedding and head, float16 where blocks don't fit."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return Kind.F32
    if name in FINE and kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        kind = Kind.Q8_0
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def _as_bytes(shape: list[int], kind: Any) -> tuple[list[int], np.dtype[Any]]:
    """The shape and numpy type under which the library stores it."""
    if kind in (Kind.F32, Kind.F16):
        return shape, np.dtype(np.float32 if kind == Kind.F32 else np.float16)
    return list(gguf.quant_shape_to_byte_shape(shape, kind)), np.dtype(np.uint8)
