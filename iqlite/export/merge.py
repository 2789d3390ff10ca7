"""Base + adapter as one set of weights, a tensor at a time: W + s·B·A summed in float32 and cast once. Never the whole model.

W is the base as it was trained on (NF4, dequantised) or as it is stored. Rounding the sum into 4 bits again is never done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iqlite.base.identity import ADAPTER_WEIGHTS, check_adapter, check_mergeable
from iqlite.errors import BaseError
from iqlite.export.stored import STORED, Stored

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in STORED.items()}


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

        self.stored, self.nf4, self.compute, self.dtype = stored, nf4 and not stored.packed, compute, dtype
        check_mergeable(adapter)
        scale = check_adapter(adapter, stored.identity()).scale * scale
        state = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()}
        self.deltas: dict[str, tuple[Tensor, Tensor, float]] = {}
        for name, a_rI in state.items():
            layer, _, part = name.partition(".lora_A.")
            if part:
                self.deltas[f"{layer}.weight"] = (a_rI, state[f"{layer}.lora_B.{part}"], scale)
        strange = [name for name in self.deltas if name not in stored.linear]
        if strange:
            raise BaseError(f"{adapter} adapts {strange[0]}, which {stored.name} has no linear layer for: use it with its own base.")

    def tensors(self, shard: Path) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor) for each of a shard's, in its file's order; one at a time is in memory, and the pages it was read from."""
        for name in self.stored.shards[shard]:
            yield name, self.merged(name, self.stored.tensor(name))

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """W + s·B·A: summed in float32, cast once."""
        out, in_model = self.dtype or weight.dtype, self.stored.in_model[name]
        if in_model in self.stored.linear:
            weight = as_trained(weight, self.compute) if self.nf4 else weight.to(self.compute).float()
        if in_model in self.deltas:
            a_rI, b_Or, scale = self.deltas[in_model]
            weight = torch.addmm(weight.float(), b_Or, a_rI, alpha=scale)
        return weight.to(out)

    def layout(self, shard: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
        """(dtype, shape) of what `tensors` will give."""
        return {name: (self.dtype or dtype, shape) for name, (dtype, shape) in self.stored.layout(shard).items()}

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
