"""A merged model as a folder in Hugging Face format, written shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from iqlite.base.loading import read_tokenizer
from iqlite.export.merge import DTYPES, Merge, write_safetensors
from iqlite.export.stored import Stored
from iqlite.model.rendering import Thinking
from iqlite.model.template import Chat
from iqlite.run.rundir import RunDir

JOB = "merge.json"
INDEX = "model.safetensors.index.json"


def opened(run: RunDir, adapter: Path, *, base: str, scale: float, dtype: str | None) -> tuple[Merge, Chat]:
    """A run's adapter and its base, to be summed: `base` is "trained" (the weights that the adapter learned on) or "stored"."""
    recipe = run.recipe()
    stored = Stored.find(recipe.model.base, recipe.folder, recipe.model.revision)
    compute = DTYPES[run.environment()["compute_dtype"]] if base == "trained" else torch.float32
    nf4 = base == "trained" and recipe.model.quantization == "nf4"
    merge = Merge(stored, adapter, nf4=nf4, compute=compute, scale=scale, dtype=DTYPES[dtype] if dtype else None)
    return merge, chat_of(stored, recipe.model.thinking)


def chat_of(stored: Stored, thinking: Thinking = "auto") -> Chat:
    """The base's tokenizer and its way to write requests."""
    from transformers import GenerationConfig

    tokenizer = read_tokenizer(str(stored.folder), stored.name)
    try:
        eos = GenerationConfig.from_pretrained(stored.folder).eos_token_id
    except OSError:
        eos = getattr(stored.config, "eos_token_id", None)
    return Chat(tokenizer, eos, thinking)


def write_folder(making: Path, merge: Merge, chat: Chat, job: Mapping[str, Any], wrote: Callable[[int], None] = lambda _: None) -> None:
    """Fills `making` with the merged shards, configuration, tokenizer and template. What an interrupted call for the same `job` left stays.

    Memory: a few float32 copies of the largest tensor.
    """
    stored = merge.stored
    if making.is_dir() and _text(making / JOB) != json.dumps(job):
        shutil.rmtree(making)
    making.mkdir(parents=True, exist_ok=True)
    (making / JOB).write_text(json.dumps(job), "utf-8")
    weight_map: dict[str, str] = {}
    for shard in stored.shards:
        layout = merge.layout(shard)
        weight_map |= dict.fromkeys(layout, shard.name)
        if (making / shard.name).is_file():
            wrote(sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values()))
        else:
            write_safetensors(making / shard.name, layout, merge.tensors(shard), wrote)
    if len(stored.shards) > 1 or next(iter(stored.shards)).name != "model.safetensors":
        index = {"metadata": {"total_size": merge.bytes()}, "weight_map": dict(sorted(weight_map.items()))}
        (making / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    config = stored.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = next(iter(merge.layout(next(iter(stored.shards))).values()))[0]
    config.save_pretrained(making)
    chat.tokenizer.save_pretrained(making)
    if chat.default_template:
        (making / "chat_template.jinja").write_text(chat.template, "utf-8")
    if (stored.folder / "tokenizer.model").is_file():
        shutil.copyfile(stored.folder / "tokenizer.model", making / "tokenizer.model")
    generation = json.loads(_text(stored.folder / "generation_config.json") or "{}")
    (making / "generation_config.json").write_text(
        json.dumps({**generation, "eos_token_id": list(chat.stop_ids)}, indent=2) + "\n", "utf-8"
    )
    (making / JOB).unlink()


def licence_of(stored: Stored) -> str | None:
    """The base's licence, where its files tell."""
    if stored.gguf is not None:
        import gguf

        field = gguf.GGUFReader(stored.gguf).fields.get("general.license")
        return str(field.contents()) if field else None
    for line in (_text(stored.folder / "README.md") or "").split("\n")[:60]:
        if line.startswith("license:"):
            return line.partition(":")[2].strip().strip("\"'")
    return None


def _text(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None
