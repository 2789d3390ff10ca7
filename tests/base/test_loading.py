"""Every way to name a base: a folder, a GGUF file with or without a suffix, Ollama's and LM Studio's stores, the embedded model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from iqlite.base.loading import load_base
from iqlite.base.names import EMBEDDED, embedded, explain, find_gguf, is_hub_id, locate
from iqlite.errors import BaseError
from iqlite.places import cache_folder
from tests.helpers.tiny import make_tokenizer, save_tiny


def refusal(name: str, beside: Path = Path()) -> str:
    with pytest.raises(BaseError) as caught:
        locate(name, beside)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, with the converted models where they are."""
    monkeypatch.setenv("IQLITE_CACHE", str(cache_folder()))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def put_into_ollama(store: Path, model: str, tag: str, source: Path) -> Path:
    """A model as Ollama keeps it: a manifest, and a blob named by its digest, without a suffix."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    blob = store / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True)
    blob.symlink_to(source)
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / model / tag
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:00", "size": 1},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": source.stat().st_size},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}), "utf-8")
    return blob


def test_a_folder_is_looked_up_beside_the_recipe(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert locate(str(tiny())) == str(tiny().resolve())
    save_tiny(tmp_path / "mine")
    assert locate("mine", tmp_path) == str((tmp_path / "mine").resolve())
    base = load_base("mine", "none", beside=tmp_path)
    assert base.compute_dtype == torch.float32 and base.context == 1024
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.real
def test_one_gguf_under_all_its_names_is_one_conversion(home: Path) -> None:
    """By its path, by a link without a suffix, in Ollama's and in LM Studio's store, and in a folder of its own."""
    source = embedded()
    expected = locate(EMBEDDED)
    assert Path(expected).is_relative_to(cache_folder())
    put_into_ollama(home / ".ollama" / "models", "smol", "135m", source)
    for folder in (home / ".lmstudio" / "models" / "someone" / "smol", home / "plain"):
        folder.mkdir(parents=True)
        (folder / "model.gguf").symlink_to(source)
    (home / "plain" / "mmproj-model.gguf").symlink_to(source)  # a projector isn't a model of its own
    (home / "blob-without-a-suffix").symlink_to(source)
    for name in (
        "ollama:smol:135m",
        "lmstudio:someone/smol",
        "lmstudio:someone/smol/model.gguf",
        str(source),
        "blob-without-a-suffix",
        "plain",
    ):
        assert locate(name, home) == expected, name


@pytest.mark.real
def test_converted_weights_are_gguf_s_own_dequantised_ones() -> None:
    """The gguf library's dequantisation, and Llama's q and k rows put back from the order that GGUF stores them in."""
    folder = Path(locate(EMBEDDED))
    found = load_file(next(folder.glob("*.safetensors")))
    config = json.loads((folder / "config.json").read_text())
    tensors = {t.name: t for t in gguf.GGUFReader(embedded()).tensors}

    def dequantised(name: str) -> torch.Tensor:
        tensor = tensors[name]
        return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    assert torch.equal(found["model.embed_tokens.weight"], dequantised("token_embd.weight"))
    for theirs, ours in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"), ("ffn_down", "mlp.down_proj"), ("attn_norm", "input_layernorm")):  # fmt: skip
        for layer in (0, 29):
            assert torch.equal(found[f"model.layers.{layer}.{ours}.weight"], dequantised(f"blk.{layer}.{theirs}.weight"))
    for theirs, ours, heads in (("attn_q", "q_proj", config["num_attention_heads"]), ("attn_k", "k_proj", config["num_key_value_heads"])):
        stored, unpermuted = dequantised(f"blk.7.{theirs}.weight"), found[f"model.layers.7.self_attn.{ours}.weight"]
        size = len(stored) // heads
        for head in range(heads):
            for row in range(size // 2):  # GGUF interleaves the two halves of each head
                assert torch.equal(stored[head * size + 2 * row], unpermuted[head * size + row])
                assert torch.equal(stored[head * size + 2 * row + 1], unpermuted[head * size + size // 2 + row])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.decode(tokenizer("A cat, déjà vu.").input_ids) == "A cat, déjà vu."


def test_ollama_s_names_of_other_registries(home: Path) -> None:
    source = embedded()
    blob = put_into_ollama(home / ".ollama" / "models", "x", "y", source)
    manifests = home / ".ollama" / "models" / "manifests"
    layers = json.loads((manifests / "registry.ollama.ai" / "library" / "x" / "y").read_text())
    for place in ("hf.co/owner/Model-GGUF/Q4_K_M", "registry.ollama.ai/owner/model/latest", "my.host:5000/team/model/3b"):
        (manifests / place).parent.mkdir(parents=True, exist_ok=True)
        (manifests / place).write_text(json.dumps(layers))
    for name in ("hf.co/owner/Model-GGUF:Q4_K_M", "owner/model", "my.host:5000/team/model:3b"):
        assert find_gguf(f"ollama:{name}") == blob, name
    assert refusal("ollama:hf.co/owner/other:Q4_K_M").endswith("run: ollama pull hf.co/owner/other:Q4_K_M")
    adapted = {**layers, "layers": [*layers["layers"], {"mediaType": "application/vnd.ollama.image.adapter", "digest": "sha256:1"}]}
    (manifests / "registry.ollama.ai" / "library" / "x" / "tuned").write_text(json.dumps(adapted))
    assert "a model with an adapter of its own" in refusal("ollama:x:tuned")


def test_ollama_and_lm_studio_names_that_aren_t_there(home: Path) -> None:
    assert refusal("ollama:llama3.2:3b").endswith("run: ollama pull llama3.2:3b")
    assert "LM Studio has no such model" in refusal("lmstudio:someone/nothing")
    (home / "not-gguf").write_bytes(b"something else entirely")
    put_into_ollama(home / "store", "broken", "latest", home / "not-gguf")
    os.environ["OLLAMA_MODELS"] = str(home / "store")
    try:
        assert "is missing or isn't GGUF" in refusal("ollama:broken")
        (home / "store" / "manifests" / "registry.ollama.ai" / "library" / "broken" / "latest").write_text("{}")
        assert "names no model" in refusal("ollama:broken")
    finally:
        del os.environ["OLLAMA_MODELS"]
    two = home / "two"
    two.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (two / name).write_bytes(b"GGUF")
    assert "holds 2 GGUF models (a.gguf, b.gguf)" in refusal("two", home)


def test_what_can_t_be_loaded_is_one_sentence(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file or folder" in refusal("./nothing")
    assert "no such file or folder" in refusal("model.gguf")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal("empty", tmp_path)
    (tmp_path / "text.gguf").write_text("hello")
    assert "first bytes aren't GGUF" in refusal("text.gguf", tmp_path)
    monkeypatch.setenv("IQLITE_CACHE", str(tmp_path / "cache"))
    for name, content in (
        ("magic.gguf", b"GGUF"),
        ("garbage.gguf", b"GGUF" + bytes(range(256)) * 4),
        ("half.gguf", embedded().read_bytes()[:50_000]),
    ):
        (tmp_path / name).write_bytes(content)
        said = refusal(name, tmp_path)
        assert "can't be read" in said and "download it again" in said
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())  # nothing half-written
    pickled = save_tiny(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "pickled weights aren't loaded" in refusal("pickled", tmp_path)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(BaseError, match="no linear maps"):
        load_base("gpt2", "none", beside=tmp_path)
    strange = save_tiny(tmp_path / "strange")
    (strange / "config.json").write_text(json.dumps({"model_type": "made-up", "auto_map": {"AutoConfig": "evil.Config"}}))
    (strange / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert "has no code for a model of type 'its own', and a model's own code isn't run here" in refusal("strange", tmp_path)
    cut = save_tiny(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(BaseError, match="can't be"):
        load_base("cut", "none", beside=tmp_path)
    lacking = save_tiny(tmp_path / "lacking")
    kept = {n: t for n, t in load_file(lacking / "model.safetensors").items() if "layers.1.mlp" not in n}
    save_file(kept, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"lacks 3 of its weights, such as model\.layers\.1\.mlp"):
        load_base("lacking", "none", beside=tmp_path)
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("IQLITE_CACHE", str(tmp_path / "a-file"))
    assert "can't be written" in refusal(EMBEDDED)


def test_a_hub_model_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal("allenai/OLMo-2-1124-7B-SFT")
    assert "isn't in the local cache and the hub can't be reached" in said and "model.base" in said
    assert "accept its licence" in explain("a/b", OSError("401 Client Error. You are trying to access a gated repo."))
    assert "neither a folder here nor a model on the hub" in explain("a/b", OSError("a/b is not a valid model identifier listed on …"))
    assert "HF_HOME" in explain("a/b", OSError(28, "No space left on device"))


def test_names_of_hub_models() -> None:
    assert is_hub_id("Qwen/Qwen2.5-7B-Instruct")
    assert not any(map(is_hub_id, (EMBEDDED, "./a/b", "/a/b", "ollama:a/b", "a/b.gguf", "a/b/c")))
