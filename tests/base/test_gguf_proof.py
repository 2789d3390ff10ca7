"""A conversion is held against its file: the right one passes by far, and each way in which one was wrong before is refused, and nothing kept."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from iqlite.base import gguf_files
from iqlite.base.gguf_files import convert_gguf, tensors_of
from iqlite.base.gguf_header import gguf_header
from iqlite.base.gguf_proof import kl_to_file, prove
from iqlite.base.names import embedded
from iqlite.errors import BaseError
from iqlite.export.gguf_file import write_model
from iqlite.export.merge import Merge
from iqlite.export.stored import Stored
from iqlite.places import making
from iqlite.run.rundir import RunDir
from tests.helpers.tiny import make_tokenizer

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "llama3": ROPE,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
}


@pytest.fixture
def written(make_run: Callable[..., RunDir], tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """written(architecture, rope) → (a GGUF file, the model that it was written from)."""

    def make(architecture: str = "llama", rope: dict[str, Any] | None = None) -> tuple[Path, Any]:
        config = {"rope_parameters": {"rope_theta": 10000.0, **rope}} if rope else {}
        base = tiny(architecture, merges=True, **config)
        run = make_run(f"run-{architecture}", model={"base": str(base), "quantization": "none"})
        merge = Merge(Stored.find(str(base)), run.adapter)
        file = tmp_path / f"{architecture}.gguf"
        tokenizer = make_tokenizer(merges=True)
        write_model(file, merge, tokenizer, (int(tokenizer.eos_token_id),), quant="f32", name="it")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        own = dict(model.named_parameters())
        shard = next(iter(merge.stored.shards))
        with torch.no_grad():
            for name, tensor in merge.tensors(shard):
                own[name].copy_(tensor)
        return file, model

    return make


def against(file: Path, model: Any) -> float:
    fields, _ = gguf_header(file)
    return kl_to_file(model, {t.name: t for t in tensors_of(file)}, str(fields["general.architecture"]), fields)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_file_s_own_logits_are_the_model_s(scaling: str, written: Callable[..., tuple[Path, Any]]) -> None:
    """Computed from metadata and tensors alone, beside transformers' model of the same weights: below a billionth of a nat."""
    file, model = written("llama", SCALINGS[scaling])
    assert against(file, model) < 1e-8
    if scaling != "none":  # and a scaling that got lost isn't
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        assert against(file, model) > 1e-3


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_rotations_and_parts(architecture: str, written: Callable[..., tuple[Path, Any]]) -> None:
    """The two halves of a head, biases, norms of queries and keys."""
    file, model = written(architecture)
    assert against(file, model) < 1e-8


@pytest.mark.real
def test_the_embedded_model_is_proved() -> None:
    """Quantised weights of a real model, dequantised twice: by transformers into the cache, and by the gguf library here."""
    folder = convert_gguf(embedded(), "smol")
    assert against(embedded(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)) < 1e-8


def spoilt(model: Any, how: str) -> None:
    layer = model.model.layers[1]
    with torch.no_grad():
        if how == "random":
            layer.mlp.down_proj.weight.normal_()
        elif how == "transposed rows":
            layer.self_attn.q_proj.weight.copy_(layer.self_attn.q_proj.weight.flip(0))
        else:
            layer.input_layernorm.weight.add_(0.01)


@pytest.mark.parametrize("how", ["random", "transposed rows", "a norm"])
def test_other_values_are_refused_by_name(how: str, written: Callable[..., tuple[Path, Any]]) -> None:
    file, model = written()
    fields, _ = gguf_header(file)
    tensors = {t.name: t for t in tensors_of(file)}
    prove(model, tensors, "llama", fields, "it")
    spoilt(model, how)
    with pytest.raises(BaseError, match=r"the conversion changed blk\.1\."):
        prove(model, tensors, "llama", fields, "it")


def test_a_tensor_without_a_place_is_refused(written: Callable[..., tuple[Path, Any]]) -> None:
    """Llama's file with biases, which transformers' model of it has no place for."""
    file, model = written()
    tensors = {t.name: t for t in tensors_of(file)}
    tensors["blk.0.attn_q.bias"] = tensors["blk.0.attn_norm.weight"]
    with pytest.raises(BaseError, match=r"holds 1 tensors that the converted model has no place for, such as blk\.0\.attn_q\.bias"):
        prove(model, tensors, "llama", gguf_header(file)[0], "it")


def test_a_conversion_that_lost_the_scaling_is_not_kept(
    written: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As before the scaling was carried over: the proof alone finds it."""
    monkeypatch.setenv("IQLITE_CACHE", str(tmp_path / "cache"))
    file, _ = written("llama", SCALINGS["linear"])
    with monkeypatch.context() as lost:
        lost.setattr(gguf_files, "correct", lambda *_: None)
        with pytest.raises(BaseError, match="says something else than the file"):
            convert_gguf(file, "it")
    assert not list((tmp_path / "cache").iterdir())
    assert json.loads((convert_gguf(file, "it") / "config.json").read_text())["rope_parameters"]["factor"] == 4.0
    assert gguf.GGUFReader(file).fields["llama.rope.scaling.factor"].contents() == 4.0


def test_what_a_killed_conversion_left_is_cleared_by_the_next(
    written: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It can be as large as the model. Another process's that lives, or another computer's, stays."""
    monkeypatch.setenv("IQLITE_CACHE", str(tmp_path / "cache"))
    file, _ = written()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine, other = making("x").name.split("x")[1], f"-elsewhere-{gone.pid}"
    digest = gguf_files._digest([file])
    for left in (
        f"-{socket.gethostname()}-{gone.pid}",
        f"-{socket.gethostname()}-{gone.pid}.out",
        f"-{socket.gethostname()}-{os.getppid()}",
        other,
    ):
        (tmp_path / "cache" / f"making-{digest}{left}").mkdir(parents=True)
    convert_gguf(file, "it")
    assert mine == f"-{socket.gethostname()}-{os.getpid()}"
    assert sorted(path.name.removeprefix(f"making-{digest}") for path in (tmp_path / "cache").glob("making-*")) == sorted(
        [other, f"-{socket.gethostname()}-{os.getppid()}"]
    )
