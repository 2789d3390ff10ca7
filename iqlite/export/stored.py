"""A base's weights as they lie in its files: under which names, in which types, which of them a LoRA may stand on.

Files may call a tensor otherwise than the model does (composite models, experts): transformers' own table of renamings says how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from iqlite.base.anatomy import Anatomy, empty
from iqlite.base.identity import Identity
from iqlite.base.names import explain, find_gguf, locate
from iqlite.base.stored_types import check_inside
from iqlite.errors import BaseError, first_line

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PACKED = ".quant_state.bitsandbytes__"  # in the name of what bitsandbytes keeps beside a packed tensor


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

            wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "README.md"]
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
            except OSError as error:
                raise BaseError(explain(name, error)) from None
        return cls(name, folder, AutoConfig.from_pretrained(folder, trust_remote_code=False), find_gguf(name, beside))

    @property
    def packed(self) -> bool:
        """True if the files hold 4-bit weights of bitsandbytes: there are no others to merge into than these, dequantised."""
        return bool(self._states)

    @cached_property
    def shards(self) -> dict[Path, list[str]]:
        """The weights' files, with the names of the tensors in each; a tied head isn't written twice."""
        found = {}
        for shard, keys in self._files.items():
            kept = [key for key in keys if not any(key.startswith(f"{weight}.") for weight in self._states)]
            found[shard] = [key for key in kept if not (self.tied and self.in_model[key] == self._head)]
        missing = set(self._parameters) - set(self.in_model.values()) - ({self._head} if self.tied else set())
        if missing:
            raise BaseError(f"base {self.name!r} lacks {len(missing)} of its weights, such as {min(missing)}; download it again.")
        return found

    @cached_property
    def in_model(self) -> dict[str, str]:
        """What the model calls each tensor of the files; a tensor that it doesn't have (another part's) keeps its name."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        changes = get_model_conversion_mapping(self._model, add_legacy=True)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        has = dict.fromkeys(self._parameters, True)
        prefix = self._model.base_model_prefix
        return {
            key: key if key in has else rename_source_key(key, renamings, converters, prefix, has)[0]
            for keys in self._files.values()
            for key in keys
        }

    @cached_property
    def linear(self) -> frozenset[str]:
        """The model's names of the decoder's linear maps, which are quantised and (all but a few) adapted."""
        inside = {id(module) for module in self._anatomy.decoder.modules() if isinstance(module, nn.Linear)}
        inside.discard(id(self._anatomy.head))
        return frozenset(f"{name}.weight" for name, module in self._model.named_modules() if id(module) in inside)

    @cached_property
    def tied(self) -> bool:
        """True if the head is the embedding."""
        return self._model.get_input_embeddings().weight is self._anatomy.head.weight

    def opened(self, shard: Path) -> Any:
        """A shard, to be used in a with block; BaseError if it can't be read."""
        try:
            return safe_open(shard, "pt")
        except (OSError, SafetensorError) as error:
            raise BaseError(f"base {self.name!r}: {shard} can't be read ({first_line(error)}); download it again.") from None

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name in the files, a packed one dequantised. The file is mapped for it alone: pages of a mapping count as
        resident until it ends."""
        shard = next(shard for shard, names in self._files.items() if name in names)
        with self.opened(shard) as file:
            found: Tensor = file.get_tensor(name)
            if name in self._states:
                from bitsandbytes.functional import QuantState, dequantize_4bit

                parts = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in self._states[name]}
                found = dequantize_4bit(found, QuantState.from_dict(parts, device=torch.device("cpu")))
            return found

    def layout(self, shard: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
        """(dtype, shape) of a shard's tensors as `tensor` gives them; BaseError for a type that can't be summed into."""
        found = {}
        with self.opened(shard) as file:
            for name in self.shards[shard]:
                if name in self._states:
                    state = bytes(file.get_tensor(next(key for key in self._states[name] if PACKED in key)).tolist())
                    told = json.loads(state.decode("utf-8"))
                    found[name] = (getattr(torch, told["dtype"]), list(told["shape"]))
                    continue
                part = file.get_slice(name)
                if part.get_dtype() not in STORED:
                    raise BaseError(
                        f"base {self.name!r} stores {name} as {part.get_dtype()}, which can't be merged into: take the model's 16-bit original."
                    )
                found[name] = (STORED[part.get_dtype()], part.get_shape())
        return found

    def identity(self) -> Identity:
        """What tells this base from another."""
        files = {there: key for key, there in self.in_model.items()}
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        head = self.tensor(files[self._embedding if self.tied else self._head])
        norm = names.get(id(self._anatomy.norm))  # a model without any vector is told by its head alone
        return Identity.of(self.name, self._anatomy.config, head.flatten() if norm is None else self.tensor(files[norm]).clone(), head)

    @cached_property
    def _files(self) -> dict[Path, list[str]]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            check_inside(names, self.name)
        elif (self.folder / "model.safetensors").is_file():
            names = {"model.safetensors"}
        else:
            names = {path.name for path in self.folder.glob("*.safetensors")}
        found = {}
        for name in sorted(names):
            with self.opened(self.folder / name) as file:
                keys = [key for key in file.keys() if not key.endswith(".inv_freq")]  # noqa: SIM118 - not a dict
                # Masks and positions that some files hold are made anew by the model.
                found[self.folder / name] = [key for key in keys if file.get_slice(key).get_dtype() not in ("BOOL", "I64", "I32")]
        return found

    @cached_property
    def _states(self) -> dict[str, list[str]]:
        """Packed tensors, with what bitsandbytes keeps beside each."""
        keys = {key for keys in self._files.values() for key in keys}
        packed = {key.partition(PACKED)[0] for key in keys if PACKED in key}
        return {name: [key for key in keys if key.startswith(f"{name}.")] for name in packed}

    @cached_property
    def _model(self) -> Any:
        return empty(self.config, self.name)

    @cached_property
    def _anatomy(self) -> Anatomy:
        return Anatomy.of(self._model, self.name)

    @cached_property
    def _parameters(self) -> Mapping[str, Tensor]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    @cached_property
    def _head(self) -> str:
        return next(f"{name}.weight" for name, module in self._model.named_modules() if module is self._anatomy.head)

    @property
    def _embedding(self) -> str:
        table = self._model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self._model.named_modules() if module is table)
