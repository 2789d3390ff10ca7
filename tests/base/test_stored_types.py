"""Checkpoints as others store them: bitsandbytes' 4 bits are used as they are and merge dequantised; the rest is refused before any training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from iqlite.base.dequantised import READ
from iqlite.base.identity import Identity, check_adapter
from iqlite.base.loading import load_base
from iqlite.base.names import locate
from iqlite.errors import AdapterError, BaseError
from iqlite.model.linear import dense
from iqlite.run.rundir import RunDir
from tests.helpers.tiny import save_tiny

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture
def packed(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model as `save_pretrained` of a loaded 4-bit model writes it, with settings of its own."""
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    folder = tmp_path / "tiny-bnb-4bit"
    shutil.copytree(tiny(), folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny(), quantization_config=four).save_pretrained(folder)
    return folder


def test_four_bits_are_used_as_they_are(packed: Path) -> None:
    base = load_base(str(packed), "none")
    layers = [module for module in base.model.modules() if getattr(getattr(module, "weight", None), "quant_state", None) is not None]
    assert len(layers) == 14 and {layer.weight.quant_state.quant_type for layer in layers} == {"fp4"}
    assert {layer.compute_dtype for layer in layers} == {base.compute_dtype} and base.quantization == "nf4"


@pytest.mark.parametrize("weights", ["trained", "stored"])
def test_they_merge_dequantised(weights: str, packed: Path, make_run: Callable[..., RunDir], iqlite: Callable[..., Any]) -> None:
    run = make_run(model={"base": str(packed), "quantization": "nf4"})
    code, _, err = iqlite("merge", run.path, "-o", "merged", "--weights", weights, "--json", "--no-check")
    assert code == 0, err
    merged = load_file("merged/model.safetensors")
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    for name, module in load_base(str(packed), "nf4").model.named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            a_rI, b_Or = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            assert torch.allclose(merged[f"{name}.weight"], dense(module) + 2.0 * b_Or @ a_rI, atol=1e-6), name
    assert not any("quant" in key or "absmax" in key for key in merged)
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained("merged")(IDS).logits).all()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits by bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "eetq"}, "eetq"),
    ],
)
def test_other_quantisations_are_refused_by_name(told: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "it")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    with pytest.raises(BaseError, match=f"is stored as {said}.*take the model's 16-bit original"):
        load_base(str(folder), "nf4")


def fp8(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Linear maps as FP8 in blocks of 16 × 16 with a scale each: (what is stored, what that means in float64, what the configuration says)."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name in (name for name in weights if "proj" in name):
        rows, columns = weights[name].shape
        scale = torch.zeros(rows // 16, columns // 16)
        packed, plain = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), torch.zeros(rows, columns, dtype=torch.float64)
        for i in range(rows // 16):
            for j in range(columns // 16):
                block = (slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16))
                scale[i, j] = weights[name][block].abs().max() / 448
                packed[block] = (weights[name][block] / scale[i, j]).to(torch.float8_e4m3fn)
                plain[block] = packed[block].double() * scale[i, j].double()
        stored |= {name: packed, f"{name}_scale_inv": scale}
        meant[name] = plain
    return stored, meant, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def compressed(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The same in compressed-tensors' way, a scale a row."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name in (name for name in weights if "proj" in name):
        scale = weights[name].abs().amax(1, keepdim=True) / 448
        stored |= {name: (weights[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
        meant[name] = stored[name].double() * scale.double()
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**eight, "strategy": "channel"}, "input_activations": {**eight, "strategy": "token", "dynamic": True}}  # fmt: skip
    told = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
    return stored, meant, {**told, "ignore": ["lm_head"], "config_groups": {"group_0": group}}


def mxfp4(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Experts of random nibbles and exponents, 32 values a scale."""
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
    noise = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name in (name for name in weights if name.endswith(("gate_up_proj", "down_proj"))):
        experts, inputs, outputs = weights[name].shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=noise, dtype=torch.uint8)
        scales = torch.randint(118, 125, (experts, outputs, inputs // 32), generator=noise, dtype=torch.uint8)
        plain = [
            values[byte >> 4 if odd else byte & 15] * 2.0 ** (exponent - 127)
            for row, some in zip(blocks.flatten(0, 1).tolist(), scales.flatten(0, 1).tolist(), strict=True)
            for bytes_of, exponent in zip(row, some, strict=True)
            for byte in bytes_of
            for odd in (False, True)
        ]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = torch.tensor(plain, dtype=torch.float64).reshape(experts, outputs, inputs).transpose(1, 2)
    return stored, meant, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def store(folder: Path, how: Callable[..., Any]) -> tuple[dict[str, Tensor], set[str]]:
    """Rewrites a tiny model's files that way: (what its packed weights mean, all weights' names)."""
    weights = load_file(folder / "model.safetensors")
    stored, meant, told = how(weights)
    save_file({**{k: w for k, w in weights.items() if k not in meant}, **stored}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    return meant, set(weights)


@pytest.mark.parametrize(("family", "how"), [("llama", fp8), ("llama", compressed), ("gpt_oss", mxfp4)])
def test_eight_bits_and_others_are_dequantised_once(family: str, how: Callable[..., Any], tmp_path: Path, capfd: Any) -> None:
    """By transformers; here against loops in float64. The folder that is read is plain, whole and cached by content."""
    folder = save_tiny(tmp_path / "it", family)
    meant, names = store(folder, how)
    plain = Path(locate(str(folder)))
    got = load_file(plain / "model.safetensors")
    assert meant and set(got) == names and {w.dtype for w in got.values()} == {torch.bfloat16}
    for name, wanted in meant.items():
        assert torch.allclose(got[name].double(), wanted, rtol=2**-8, atol=0), name
    assert "quantization_config" not in json.loads((plain / "config.json").read_text()) and (plain / "chat_template.jinja").is_file()
    assert Path(locate(str(folder))) == plain and not list(plain.parent.glob("making-*"))
    assert "quantization_config" not in capfd.readouterr().err


def test_what_was_in_eight_bits_trains_and_merges(make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "it")
    meant, _ = store(folder, fp8)
    run = make_run(model={"base": str(folder), "quantization": "nf4"})
    code, _, err = iqlite("merge", run.path, "-o", "merged", "--weights", "stored", "--json", "--no-check")
    assert code == 0, err
    merged, adapter = load_file("merged/model.safetensors"), load_file(run.adapter / "adapter_model.safetensors")
    for name, plain in meant.items():
        a_rI, b_Or = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"].double() for part in "AB")
        assert torch.allclose(merged[name].double(), plain + 2.0 * b_Or @ a_rI, rtol=2**-8, atol=2**-9 * float(plain.abs().max())), (
            name
        )  # the base and the sum are rounded to bfloat16


def test_a_package_that_reading_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "it")
    store(folder, compressed)
    monkeypatch.setitem(READ, "compressed-tensors", "a_module_that_is_not_there")
    with pytest.raises(BaseError, match="stored as compressed-tensors, which needs one more package.*pip install compressed-tensors"):
        locate(str(folder))


def test_types_and_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    eight = save_tiny(tmp_path / "eight")
    weights = load_file(eight / "model.safetensors")
    save_file({key: w.to(torch.float8_e4m3fn) if w.ndim == 2 else w for key, w in weights.items()}, eight / "model.safetensors")
    with pytest.raises(BaseError, match="stores weights as F8_E4M3"):
        load_base(str(eight), "nf4")
    missing = save_tiny(tmp_path / "missing")
    keys = sorted(weights)
    (missing / "model.safetensors").unlink()
    save_file({key: weights[key] for key in keys[:5]}, missing / "model-00001-of-00002.safetensors")
    shards = {key: f"model-0000{1 + (key not in keys[:5])}-of-00002.safetensors" for key in keys}
    (missing / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(BaseError, match=r"lacks model-00002-of-00002\.safetensors, one of its 2 files of weights: download it again"):
        load_base(str(missing), "nf4")


def test_a_tokenizer_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "it")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "Unheard", "vocab": {}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BaseError, match=r"its tokenizer can't be read \(.*\): update tokenizers and transformers"):
        load_base(str(folder), "none")


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    plain = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        "base_model_name_or_path": "owner/It",
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file({f"model.layers.0.q_proj.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}, folder / "adapter_model.safetensors")
    return folder


OWN = Identity("owner/it", "llama", 8, 8, 1, (0.0,))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"trainable_token_indices": [1, 2]}, "trains single tokens' embeddings"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts the embedding"),
        ({"init_lora_weights": "pissa_niter_16"}, "begun by pissa_niter_16, which changes the base's own weights"),
        ({"init_lora_weights": "olora"}, "begun by olora"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "parameters that aren't linear maps"),
        ({"bias": "lora_only"}, "isn't a plain LoRA"),
        ({"use_dora": True}, "is a DoRA"),
        ({"init_lora_weights": "corda"}, "begun by corda"),
        ({"a_key_of_next_year": {"x": 1}}, r"is more than a plain LoRA \(a_key_of_next_year\)"),
        ({"r": "four"}, "names no rank"),
    ],
)
def test_adapters_with_parts_that_would_be_lost_are_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=said):
        check_adapter(adapter(tmp_path / "it", **config), OWN)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"m.lora_embedding_A": (4, 4), "m.lora_embedding_B": (4, 4)}, "holds m.lora_embedding_A, which is no pair of matrices"),
        ({"m.lora_A.weight": (4, 4), "m.lora_B.weight": (4, 4), "m.lora_B.bias": (4,)}, "holds m.lora_B.bias"),
        ({"m.lora_A.weight": (4, 4)}, "holds m.lora_A.weight"),
        ({"c.lora_A.weight": (4, 4, 1, 1), "c.lora_B.weight": (4, 4, 1, 1)}, "holds c.lora_A.weight"),
        ({}, "holds no weights"),
    ],
)
def test_what_a_file_holds_beside_pairs_of_matrices_is_refused(tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    """Whatever its configuration says."""
    folder = adapter(tmp_path / "it")
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=said):
        check_adapter(folder, OWN)


@pytest.mark.parametrize(
    "name",
    [
        "owner/It", "unsloth/It-bnb-4bit", "unsloth/it-unsloth-bnb-4bit", "C:\\\\models\\\\It", "/home/x/.cache/hub/models--owner--It/snapshots/" + "a" * 40,
        "/somewhere/checkpoint-20", None,
    ],
)  # fmt: skip
def test_a_base_by_another_name_is_accepted(name: str | None, tmp_path: Path) -> None:
    assert check_adapter(adapter(tmp_path / "it", base_model_name_or_path=name), OWN).rank == 4


def test_another_base_is_not(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="was trained on owner/other, not on owner/it.*take base_model_name_or_path out"):
        check_adapter(adapter(tmp_path / "it", base_model_name_or_path="owner/other"), OWN)
