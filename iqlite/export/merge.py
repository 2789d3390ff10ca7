"""Base + adapter as one set of weights, a tensor at a time: W + s·B·A summed in float32 and cast once. Never the whole model.

W is the base as it was trained on (NF4, dequantised) or as it is stored. Rounding the sum into 4 bits again is never done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iqlite.base.identity import ADAPTER_WEIGHTS, Identity, check_adapter, check_mergeable
from iqlite.base.names import explain, find_gguf, locate
from iqlite.errors import BaseError, first_line

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _STORED.items()}
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Stored:
    """A base's files. `gguf` is the file that a folder was converted from."""

    name: str
    folder: Path
    config: Any
    gguf: Path | None

    @classmethod
    def find(cls, name: str, beside: Path = Path(), revision: str | None = None) -> Stored:
        """Where a base's weights are on this disk; a hub model that isn't there yet is downloaded. BaseError if it can't be had."""
        from transformers import AutoConfig

        folder = Path(locate(name, beside, revision))
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "README.md"]
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
            except OSError as error:
                raise BaseError(explain(name, error)) from None
        return cls(name, folder, AutoConfig.from_pretrained(folder, trust_remote_code=False), find_gguf(name, beside))

    @cached_property
    def shards(self) -> dict[Path, list[str]]:
        """The weights' files, with the names of the tensors in each that the model uses."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        else:
            names = (
                {"model.safetensors"}
                if (self.folder / "model.safetensors").is_file()
                else {p.name for p in self.folder.glob("*.safetensors")}
            )
        found = {}
        for name in sorted(names):
            with self.opened(self.folder / name) as file:
                keys = [key for key in file.keys() if key in self.parameters]  # noqa: SIM118 - not a dict
                found[self.folder / name] = [key for key in keys if key != HEAD or not self.tied]
        missing = set(self.parameters) - {key for keys in found.values() for key in keys}
        missing -= {HEAD} if self.tied else set()
        if missing:
            raise BaseError(f"base {self.name!r} lacks {len(missing)} of its weights, such as {min(missing)}; download it again.")
        return found

    @cached_property
    def parameters(self) -> Mapping[str, bool]:
        """The names of the model's parameters; true for the weights of linear layers inside the decoder, which are quantised and adapted."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        head = model.get_output_embeddings()
        linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
        return {name: name in linear for name, _ in model.named_parameters(remove_duplicate=False)}

    @property
    def tied(self) -> bool:
        """True if the head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    def opened(self, shard: Path) -> Any:
        """A shard, to be used in a with block; BaseError if it can't be read."""
        try:
            return safe_open(shard, "pt")
        except (OSError, SafetensorError) as error:
            raise BaseError(f"base {self.name!r}: {shard} can't be read ({first_line(error)}); download it again.") from None

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name, as it is stored. The file is mapped for it alone: pages of a mapping count as resident until it ends."""
        shard = next(shard for shard, names in self.shards.items() if name in names)
        with self.opened(shard) as file:
            found: Tensor = file.get_tensor(name)
            return found

    def identity(self) -> Identity:
        """What tells this base from another."""
        return Identity.of(self.name, self.config, self.tensor(NORM).clone(), self.tensor(EMBEDDING if self.tied else HEAD))


class Merge:
    """An adapter summed into a base, tensor by tensor."""

    def __init__(
        self, stored: Stored, adapter: Path, *, nf4: bool = False, compute: torch.dtype = torch.float32, scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        """`nf4` takes the linear layers' weights through NF4 and back, as training had them in its `compute` dtype.

        `scale` multiplies the adapter; `dtype` is what is written, by default each tensor's own. AdapterError if the adapter isn't this base's.
        """
        from safetensors.torch import load_file

        self.stored, self.nf4, self.compute, self.dtype = stored, nf4, compute, dtype
        check_mergeable(adapter)
        scale = check_adapter(adapter, stored.identity()).scale * scale
        state = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()}
        self.deltas: dict[str, tuple[Tensor, Tensor, float]] = {}
        for name, a_rI in state.items():
            layer, _, part = name.partition(".lora_A.")
            if part:
                self.deltas[f"{layer}.weight"] = (a_rI, state[f"{layer}.lora_B.{part}"], scale)
        strange = [name for name in self.deltas if not stored.parameters.get(name)]
        if strange:
            raise BaseError(f"{adapter} adapts {strange[0]}, which {stored.name} has no linear layer for: use it with its own base.")

    def tensors(self, shard: Path) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor) for each of a shard's, in its file's order; one at a time is in memory, and the pages it was read from."""
        for name in self.stored.shards[shard]:
            yield name, self.merged(name, self.stored.tensor(name))

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """W + s·B·A: summed in float32, cast once."""
        out = self.dtype or weight.dtype
        if self.stored.parameters[name]:
            weight = as_trained(weight, self.compute) if self.nf4 else weight.to(self.compute).float()
        if name in self.deltas:
            a_rI, b_Or, scale = self.deltas[name]
            weight = torch.addmm(weight.float(), b_Or, a_rI, alpha=scale)
        return weight.to(out)

    def layout(self, shard: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
        """(dtype, shape) of what `tensors` will give."""
        with self.stored.opened(shard) as file:
            parts = {name: file.get_slice(name) for name in self.stored.shards[shard]}
            return {name: (self.dtype or _STORED[part.get_dtype()], part.get_shape()) for name, part in parts.items()}

    def bytes(self) -> int:
        """Size of the merged weights."""
        layouts = [layout for shard in self.stored.shards for layout in self.layout(shard).values()]
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layouts)


def as_trained(weight: Tensor, compute: torch.dtype) -> Tensor:
    """A weight through NF4 with double quantisation and back, float32: what the layer multiplied by while the adapter learned."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.to(compute), quant_type="nf4", compress_statistics=True)
    found: Tensor = dequantize_4bit(packed, state)
    return found.float()


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, list[int]]],
    tensors: Iterator[tuple[str, Tensor]],
    wrote: Callable[[int], None] = lambda _: None,
) -> None:
    """A safetensors file from tensors that come one by one in the layout's order; the library's own writer wants all of them at once.

    Its format: the header's length in 8 bytes, the header as JSON, the tensors' bytes. Atomic: written beside `path` and renamed.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in layout.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    making = path.with_name(f".making-{path.name}")
    with making.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            dtype, shape = layout[name]
            assert tensor.dtype == dtype and list(tensor.shape) == shape, name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            wrote(tensor.nbytes)
            del tensor  # one that wasn't changed is a view of its file's mapping, which the next is to open anew
    os.replace(making, path)
