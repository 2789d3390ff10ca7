"""Exports, each read by somebody else: transformers' GGUF reader, llama.cpp's own converter and llama.cpp itself where they are at hand."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from iqlite.export.card import MANIFEST
from iqlite.export.gguf_file import BY_LLAMA_CPP, WRITTEN, Names
from iqlite.export.gguf_keys import ARCHITECTURE, rope_factors
from iqlite.export.ollama import Template, conversation, modelfile
from iqlite.export.stored import Stored
from iqlite.model.template import Chat
from iqlite.run.rundir import RunDir
from tests.helpers import llama_cpp
from tests.helpers.tiny import ARCHITECTURES, FAMILIES, TEMPLATES, make_model, make_tokenizer, save_tiny

IDS = torch.arange(40).reshape(2, 20)
GOLDEN = Path(__file__).parent / "golden"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def trained(run: RunDir) -> Any:
    """The run's policy by PEFT."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.recipe().model.base), str(run.adapter))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma2"])
def test_transformers_reads_the_gguf_as_the_policy(
    architecture: str, tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any]
) -> None:
    # its reader knows Gemma-2's own caps and scale only, not the tests'
    caps = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    run = make_run(model={"base": str(tiny(architecture, **(caps if architecture == "gemma2" else {})))})
    code, _, err = iqlite("export", run.path, "--to", "gguf", "-o", "model.gguf", "--quant", "f32")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(logits(model), logits(trained(run)), atol=2e-4)
    manifest = json.loads(Path("model.gguf.json").read_text())
    assert manifest["made"] == {"format": "gguf", "scale": 1.0, "base_weights": "trained", "quantization": "f32"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_s_tensors_have_their_names(architecture: str, tiny: Callable[..., Path]) -> None:
    stored = Stored.find(str(tiny(architecture)))
    names = Names(stored)
    found = [names.of(key) for keys in stored.shards.values() for key in keys]
    known = {name.format(bid=bid) for name in gguf.TENSOR_NAMES.values() for bid in range(2)}
    assert len(set(found)) == len(found)
    assert all(name.rpartition(".")[0] in known for name in found)
    assert set(ARCHITECTURES) < set(ARCHITECTURE) <= {*ARCHITECTURES, *FAMILIES}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_gguf_adapter_holds_the_same_difference(
    architecture: str, tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any]
) -> None:
    """scale · B·A of the adapter file is merged minus base of the model files, both as llama.cpp arranges them."""
    run = make_run(model={"base": str(tiny(architecture))})
    for to, path, scale in (("gguf-adapter", "a.gguf", 1), ("gguf", "one.gguf", 1), ("gguf", "zero.gguf", 0)):
        quant = [] if to == "gguf-adapter" else ["--quant", "f32"]
        code, _, err = iqlite("export", run.path, "--to", to, "-o", path, "--scale", scale, *quant)
        assert code == 0, err
    adapter, one, zero = (gguf.GGUFReader(path) for path in ("a.gguf", "one.gguf", "zero.gguf"))
    fields = {name: field.contents() for name, field in adapter.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == ("adapter", "lora", architecture)
    parts = {tensor.name: tensor.data for tensor in adapter.tensors}
    weights = [{tensor.name: tensor.data for tensor in reader.tensors} for reader in (one, zero)]
    changed = {name for name in weights[0] if not np.array_equal(weights[0][name], weights[1][name])}
    assert changed == {name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")} and len(changed) == 14
    for name in changed:
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        assert np.allclose(b @ a * (fields["adapter.lora.alpha"] / a.shape[0]), weights[0][name] - weights[1][name], atol=1e-5)


@pytest.mark.parametrize("quant", [*WRITTEN])
def test_quantised_types_stay_close(
    quant: str, tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any]
) -> None:
    run = make_run(model={"base": str(tiny())})
    assert iqlite("export", run.path, "--to", "gguf", "-o", "q.gguf", "--quant", quant)[0] == 0
    assert iqlite("merge", run.path, "-o", "merged", "--no-check")[0] == 0
    exact = load_file("merged/model.safetensors")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader("q.gguf").tensors}
    down = read["blk.0.ffn_down.weight"]
    found = gguf.quants.dequantize(down.data, down.tensor_type)
    error = np.abs(found - exact["model.layers.0.mlp.down_proj.weight"].numpy()).max() / np.abs(found).max()
    bits = {"f32": 24, "f16": 11, "bf16": 8, "q8_0": 8, "q5_0": 5, "q5_1": 5, "q4_0": 4, "q4_1": 4}[quant]
    assert error <= 2.0 ** -(bits - 1)
    assert down.tensor_type.name.lower() == quant and read["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_hf_and_peft_exports_load_without_iqlite(make_run: Callable[..., RunDir], iqlite: Callable[..., Any]) -> None:
    run = make_run()
    for to in ("hf", "peft"):
        code, _, err = iqlite("export", run.path, "--to", to, "-o", to)
        assert code == 0, err
        assert (Path(to) / MANIFEST).is_file() and (Path(to) / "README.md").read_text().startswith("---\nbase_model:")
    expected = logits(trained(run))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("hf")), expected, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(run.recipe().model.base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, "peft")), expected)
    assert iqlite("export", run.path, "--to", "peft", "-o", "half", "--scale", 0.5)[0] == 0
    assert iqlite("export", run.path, "--to", "hf", "-o", "half-merged", "--scale", 0.5)[0] == 0
    half = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.recipe().model.base), "half")
    assert torch.allclose(logits(half), logits(AutoModelForCausalLM.from_pretrained("half-merged")), atol=1e-4)


def test_llama_3_s_stretched_rotations_are_transformers_own() -> None:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    }  # fmt: skip
    model = make_model("llama", rope_parameters=rope, head_dim=64)
    plain = make_model("llama", head_dim=64)
    stretched = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    factors = rope_factors(model.config)
    assert factors is not None and torch.allclose(torch.tensor(factors), stretched, rtol=1e-5)
    assert len({round(f, 3) for f in factors}) > 3 and rope_factors(plain.config) is None


@pytest.mark.parametrize("architecture", ARCHITECTURE)
def test_it_is_what_llama_cpp_s_own_converter_writes(
    architecture: str, tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any]
) -> None:
    convert = llama_cpp.converter()
    # the converter leaves Gemma 3's unused rows of the vocabulary out, which only tests have
    own = {"vocab_size": len(make_tokenizer()), "num_hidden_layers": 6, "layer_types": None} if architecture == "gemma3_text" else {}
    run = make_run(model={"base": str(tiny(architecture, **own))})
    assert iqlite("export", run.path, "--to", "gguf", "-o", "ours.gguf", "--quant", "f16")[0] == 0
    assert iqlite("merge", run.path, "-o", "merged", "--no-check")[0] == 0
    convert(Path("merged"), Path("theirs.gguf"))
    ours, theirs = gguf.GGUFReader("ours.gguf"), gguf.GGUFReader("theirs.gguf")
    tensors = [{t.name: t for t in reader.tensors} for reader in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert tensors[0][name].tensor_type == tensor.tensor_type and np.array_equal(tensors[0][name].data, tensor.data), name
    fields = [{name: f.contents() for name, f in reader.fields.items() if name.startswith(f"{theirs.fields['general.architecture'].contents()}.")} for reader in (ours, theirs)]  # fmt: skip
    for name, value in fields[1].items():
        assert fields[0].get(name) == pytest.approx(value), name


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("none", "chatml")])
def test_the_modelfile_of_known_templates(template: str) -> None:
    chat = Chat(make_tokenizer(template, adds_bos=template in ("llama2", "llama3", "mistral", "gemma")))
    text = modelfile(chat, "./model.gguf", "./adapter.gguf")
    golden = GOLDEN / f"{template}.Modelfile"
    assert text == golden.read_text("utf-8")
    for token in chat.stop_ids:
        assert f'PARAMETER stop "{chat.tokenizer.decode([token])}"' in text
    made = Template.of(chat)
    assert made.is_exact(chat), template
    for system in (None, "Be brief."):
        turns = conversation(system, answered=False)
        expected = chat.render(chat.describe(turns, None), answer=True)
        assert made.render(turns) == expected.removeprefix("<s>" if chat.adds_bos else "")


def test_what_can_t_be_exported_is_one_sentence(
    make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    run = make_run()
    (tmp_path / "there.gguf").write_text("mine")
    cases = [
        (["--to", "gguf", "-o", "m.gguf", "--quant", "q9"], ["q9", "q8_0", *BY_LLAMA_CPP]),
        (["--to", "gguf", "-o", "m.gguf", "--quant", "Q4_K_M"], ["llama-quantize", "q8_0"]),
        (["--to", "gguf-adapter", "-o", "m.gguf", "--quant", "q8_0"], ["q8_0", "f32"]),
        (["--to", "peft", "-o", "m", "--quant", "q8_0"], ["--quant", "peft"]),
        (["--to", "gguf", "-o", "there.gguf"], ["exists already", "--force"]),
        (["--to", "gguf", "-o", "m.gguf", "--scale", "nan"], ["--scale"]),
    ]
    for options, words in cases:
        code, _, err = iqlite("export", run.path, *options)
        assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert sorted(path.name for path in tmp_path.glob("*m*") if path.suffix in (".gguf", "")) == []
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert iqlite("export", run.path, "--to", "gguf-adapter", "-o", "there.gguf", "--force")[0] == 0
    assert gguf.GGUFReader("there.gguf").tensors


def test_llama_cpp_s_quantiser_is_used_where_it_is(
    make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool's contract alone, by a stand-in: what it is called with, and what becomes of its failure."""
    tool = tmp_path / "tools" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\ntest "$3" = Q4_K_M || { echo "bad type $3" >&2; exit 1; }\ncp "$1" "$2"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP", str(tool.parent))
    run = make_run()
    code, _, err = iqlite("export", run.path, "--to", "gguf", "-o", "m.gguf", "--quant", "q4_k_m")
    assert code == 0, err
    assert gguf.GGUFReader("m.gguf").tensors and not list(tmp_path.glob("*.f16"))
    code, _, err = iqlite("export", run.path, "--to", "gguf", "-o", "n.gguf", "--quant", "q6_k")
    assert code == 2 and "bad type Q6_K" in err and not Path("n.gguf").exists()


@pytest.mark.parametrize("family", ["phi3", "stablelm", "lfm2", "falcon_h1", "granitemoehybrid", "qwen3_moe", "gemma3"])
def test_other_architectures_go_through_llama_cpp_s_converter(
    family: str, tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A script of that name on PATH, which runs llama.cpp's converter as the other tests do (its table of tokenizers hasn't ours)."""
    llama_cpp.converter()
    run = make_run(model={"base": str(tiny(family))})
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / "convert-hf-to-gguf"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.helpers import llama_cpp\nllama_cpp.converter(sys.argv[5])(Path(sys.argv[1]), Path(sys.argv[3]))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    code, _, err = iqlite("export", run.path, "--to", "gguf", "-o", "model.gguf", "--quant", "f32")
    assert code == 0, err
    reader = gguf.GGUFReader("model.gguf")
    assert any(tensor.name.startswith("blk.0.") for tensor in reader.tensors)
    assert sorted(path.name for path in Path().glob("*model.gguf*")) == ["model.gguf", "model.gguf.json", "model.gguf.md"]


def test_without_the_converter_it_says_how_to_get_it(
    tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    run = make_run(model={"base": str(tiny("phi3"))})
    code, _, err = iqlite("export", run.path, "--to", "gguf", "-o", "model.gguf")
    assert code == 2 and "a GGUF of a phi3 model is written by llama.cpp's converter, which isn't here: set LLAMA_CPP" in err
    assert not Path("model.gguf").exists()


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill", "qwen3_5_nothink"])
def test_a_modelfile_keeps_what_opens_the_answer(name: str) -> None:
    """An empty thought stands before the answer that is to come and not before earlier ones, as in training."""
    import trl

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    chat = Chat(tokenizer)
    template = Template.of(chat)
    asked = conversation(None, answered=True)[:1]
    assert template.render(asked) == chat.render(chat.describe(asked, None), answer=True)
    assert template.opening.endswith("</think>\n\n") and template.go().endswith(template.opening)


def test_the_next_command_is_one_that_a_shell_takes(make_run: Callable[..., RunDir], iqlite: Callable[..., Any]) -> None:
    run = make_run(name="Mein Lauf ü")
    code, out, err = iqlite("export", run.path, "--to", "ollama", "-o", "my out")
    assert code == 0, err
    assert "ollama create Mein-Lauf -f 'my out/Modelfile'" in " ".join(out.split())


def test_a_kill_between_a_file_and_its_card_is_made_good(
    make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path
) -> None:
    out, command = tmp_path / "a.gguf", ["export", make_run().path, "-o", tmp_path / "a.gguf", "--to", "gguf"]
    assert iqlite(*command)[0] == 0
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("a.gguf*")}
    assert set(whole) == {"a.gguf", "a.gguf.json", "a.gguf.md"}
    out.with_name("a.gguf.md").rename(out.with_name(".making-a.gguf.md"))
    assert iqlite(*command)[0] == 2
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*a.gguf*")} == whole


def test_an_adapter_for_a_gguf_that_iqlite_cannot_name_the_tensors_of_is_refused(
    make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", "stablelm", merges=True)
    llama_cpp.converter("f32")(folder, tmp_path / "base.gguf")
    run = make_run(model={"base": str(tmp_path / "base.gguf")})
    code, _, err = iqlite("export", run.path, "--to", "gguf-adapter", "-o", "adapter.gguf")
    assert code == 2 and "a GGUF of a stablelm model can't be written: export the whole model with --to gguf" in err
