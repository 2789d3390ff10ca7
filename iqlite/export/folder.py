"""A merged model as a folder in Hugging Face format, written shard by shard; and how far it is from the adapter on its own base."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iqlite.base.loading import load_base
from iqlite.export.merge import DTYPES, Merge, Stored, write_safetensors
from iqlite.method.loss import spans
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.recipe.prompts import Chat
from iqlite.recipe.schema import Recipe
from iqlite.records import Rollout
from iqlite.run.rundir import RunDir
from iqlite.training.readings import Reading, read
from iqlite.training.session import free_memory, open_session

JOB = "merge.json"
INDEX = "model.safetensors.index.json"
CHECK_PROMPTS, CHECK_TOKENS, CHECK_CHUNK = 8, 32, 64


def opened(run: RunDir, adapter: Path, *, base: str, strength: float, dtype: str | None) -> tuple[Merge, Chat]:
    """What a run's adapter and its base come to: `base` is "trained" (the weights that the adapter learned on) or "stored"."""
    recipe = run.recipe()
    stored = Stored.find(recipe.model.base, recipe.folder, recipe.model.revision)
    compute = DTYPES[run.environment()["compute_dtype"]] if base == "trained" else torch.float32
    nf4 = base == "trained" and recipe.model.quantization == "nf4"
    merge = Merge(stored, adapter, nf4=nf4, compute=compute, strength=strength, dtype=DTYPES[dtype] if dtype else None)
    return merge, chat_of(stored)


def chat_of(stored: Stored) -> Chat:
    """The base's tokenizer and its way to write requests."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(stored.folder, trust_remote_code=False)
    try:
        eos = GenerationConfig.from_pretrained(stored.folder).eos_token_id
    except OSError:
        eos = getattr(stored.config, "eos_token_id", None)
    return Chat(tokenizer, eos)


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


def fits_check(merge: Merge) -> bool:
    """Whether the merged model, unquantised, can be held in this machine's memory to be compared."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    weights = sum(torch.Size(shape).numel() for shard in merge.stored.shards for _, shape in merge.layout(shard).values())
    return weights * (4 if device.type == "cpu" else 2) * 1.2 + 2**30 < free_memory(device)


def kl_to_merged(
    recipe: Recipe, adapter: Path, placement: str, merged: Path, scratch: Path, *, strength: float, say: Callable[[str], None]
) -> float | None:
    """KL(adapter on its base ‖ merged) in nats a token, on answers of the policy to held-out prompts; None if memory doesn't do.

    One model in memory at a time: the first one's log-probabilities wait on the disk, [tokens, V] float32.
    """
    try:
        return _kl(recipe, adapter, placement, merged, scratch, strength, say)
    except torch.OutOfMemoryError:
        return None


def _kl(recipe: Recipe, adapter: Path, placement: str, merged: Path, scratch: Path, strength: float, say: Callable[[str], None]) -> float:
    session = open_session(recipe, start=adapter, placement=placement, say=say)
    session.policy.strengthen(strength)
    requests = session.eval.requests[:CHECK_PROMPTS]
    sampler = Sampler(recipe.train.seed, min(recipe.rollout.max_new_tokens, CHECK_TOKENS), stream="merge")
    rollout = session.answers("policy", requests, sampler)
    count, vocabulary = int(rollout.mask_BT.sum()), session.policy.head.linear.weight.shape[0]
    kept = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float32, shape=(count, vocabulary))
    chat, sizes = session.chat, session.sizes
    for at, logp_nV in _logps(session.policy, chat, rollout, "policy", sizes):
        kept[at] = logp_nV.numpy()
    del session
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"loading {merged.name}")
    policy = Policy(load_base(str(merged), "none"), rank=1, alpha=1.0, seed=0)
    total = 0.0
    for at, logp_nV in _logps(policy, chat, rollout, "reference", sizes):
        first_nV = torch.from_numpy(np.array(kept[at])).double()
        total += float((first_nV.exp() * (first_nV - logp_nV.double())).sum())
    return total / count


def _logps(policy: Policy, chat: Chat, rollout: Rollout, role: str, sizes: Any) -> Iterator[tuple[slice, Tensor]]:
    """(span, log-probabilities [n, V] on the host) of the response tokens, some at a time."""
    hidden_nD = read(policy, chat, rollout, [Reading("it", role)], sizes).hidden["it"][rollout.mask_BT]
    with torch.no_grad():
        for at in spans(len(hidden_nD), CHECK_CHUNK):
            yield at, policy.head(hidden_nD[at]).log_softmax(-1).cpu()


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
