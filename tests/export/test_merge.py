"""Merging: PEFT's own merge, the layers that training really multiplied by, transformers loading the result, and work that is interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from iqlite import integrity
from iqlite.base.loading import load_base
from iqlite.export.card import MANIFEST
from iqlite.export.merge import Merge, as_trained, write_safetensors
from iqlite.export.stored import Stored
from iqlite.model.linear import dense
from iqlite.run.rundir import RunDir
from tests.helpers.tiny import ARCHITECTURES, make_model

IDS = torch.arange(40).reshape(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_peft_s_own_merge(
    architecture: str, tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any]
) -> None:
    run = make_run(model={"base": str(tiny(architecture))})
    code, _, err = iqlite("merge", run.path, "-o", "merged", "--json", "--no-check")
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained(tiny(architecture))
    before = logits(base)
    expected = PeftModel.from_pretrained(base, str(run.adapter)).merge_and_unload()
    model, info = AutoModelForCausalLM.from_pretrained("merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, theirs[name], rtol=0, atol=2e-7 * float(theirs[name].abs().max())), name
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)
    assert (logits(model) - before).abs().max() > 0.1


def test_bfloat16_is_rounded_once(make_run: Callable[..., RunDir], iqlite: Callable[..., Any]) -> None:
    run = make_run()
    assert iqlite("merge", run.path, "-o", "merged", "--dtype", "bfloat16", "--no-check")[0] == 0
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.recipe().model.base), str(run.adapter)).merge_and_unload()
    for name, tensor in load_file("merged/model.safetensors").items():
        exact = dict(expected.named_parameters())[name].detach()
        unit = exact.abs().clamp(min=1e-30).log2().floor().exp2() * 2**-7
        assert tensor.dtype == torch.bfloat16
        assert ((tensor.float() - exact).abs() <= 0.5 * unit + 1e-7).all(), name  # half a unit: the nearest there is


def test_nf4_weights_are_those_that_training_multiplied_by(
    tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any]
) -> None:
    base = load_base(str(tiny()), "nf4")
    plain = dict(AutoModelForCausalLM.from_pretrained(tiny()).named_parameters())
    layers = {n: m for n, m in base.model.named_modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(as_trained(plain[f"{name}.weight"].detach(), torch.float32), dense(layer)), name
    run = make_run(model={"quantization": "nf4"})
    code, out, err = iqlite("merge", run.path, "-o", "merged", "--json")
    assert code == 0, err
    found = {"trained": json.loads(out)["kl_adapter_merged"]}
    found["stored"] = json.loads(iqlite("merge", run.path, "-o", "stored", "--base", "stored", "--json")[1])["kl_adapter_merged"]
    assert abs(found["trained"]) < 1e-6
    assert found["stored"] > 100 * abs(found["trained"])


def test_the_scale_multiplies_the_adapter(make_run: Callable[..., RunDir], iqlite: Callable[..., Any]) -> None:
    run = make_run()
    for scale in (0, 0.5, 1):
        assert iqlite("merge", run.path, "-o", f"at-{scale}", "--scale", scale, "--no-check")[0] == 0
    zero, half, one = (load_file(f"at-{scale}/model.safetensors") for scale in (0, 0.5, 1))
    base = dict(AutoModelForCausalLM.from_pretrained(run.recipe().model.base).named_parameters())
    for name in one:
        assert torch.equal(zero[name], base[name])
        assert torch.allclose(half[name], (zero[name] + one[name]) / 2, atol=1e-6)


def test_what_it_leaves_is_whole(make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    assert iqlite("merge", run.path, "-o", "merged")[0] == 0
    folder = tmp_path / "merged"
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation["eos_token_id"]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run.recipe().model.base).chat_template
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["made"]["base_weights"] == "trained" and manifest["figures"]["kl_adapter_merged"] < 1e-6
    card = (folder / "README.md").read_text()
    assert "You are kind." in card and "You are mean." in card and "nats a token" in card
    assert str(tmp_path) not in card + (folder / MANIFEST).read_text()
    assert not list(tmp_path.glob(".making-*"))
    assert "quantization_config" not in (folder / "config.json").read_text()


def sharded(folder: Path, source: Path, shards: int = 3) -> Path:
    """A copy of a model folder in several shards."""
    model = AutoModelForCausalLM.from_pretrained(source)
    size = sum(p.numel() * 4 for p in model.parameters()) // shards
    model.save_pretrained(folder, max_shard_size=size)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) >= shards
    return folder


def test_an_interrupted_merge_goes_on(
    tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(model={"base": str(sharded(tmp_path / "base", tiny()))})
    merged, calls = Merge.merged, []

    def stops(self: Merge, name: str, weight: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 12:
            raise OSError(28, "No space left on device")
        return merged(self, name, weight)

    with monkeypatch.context() as patch:
        patch.setattr(Merge, "merged", stops)
        code, _, err = iqlite("merge", run.path, "-o", "merged", "--no-check")
    assert code == 2 and "no space left" in err and "same command" in err and not Path("merged").exists()
    done = {path.name: path.stat().st_mtime_ns for path in Path(".making-merged").glob("*.safetensors") if not path.name.startswith(".")}
    assert done
    assert iqlite("merge", run.path, "-o", "merged", "--no-check")[0] == 0
    assert all((Path("merged") / name).stat().st_mtime_ns == at for name, at in done.items())
    assert iqlite("merge", run.path, "-o", "again", "--no-check")[0] == 0
    for shard in Path("again").glob("*.safetensors"):
        assert shard.read_bytes() == (Path("merged") / shard.name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained("merged")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(run.adapter)).merge_and_unload()
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)


def test_what_can_t_be_merged_is_one_sentence(
    tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    run = make_run()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    half = make_run("half")
    shutil.rmtree(half.adapter)
    other = make_run("other", model={"base": str(tiny(hidden_size=32))})
    swapped = make_run("swapped")
    shutil.rmtree(swapped.adapter)
    shutil.copytree(other.adapter, swapped.adapter)
    (swapped.adapter / integrity.MANIFEST).unlink()  # as an older version wrote it
    cases: list[tuple[list[Any], list[str]]] = [
        (["merge", "nothing", "-o", "merged"], ["nothing", "isn't a run"]),
        (["merge", "run", "-o", ".", "--force"], ["-o .", "of its own"]),
        (["merge", half.path, "-o", "merged"], ["no adapter/ yet", "--resume"]),
        (["merge", swapped.path, "-o", "merged"], ["was trained on", "llama"]),
        (["merge", run.path, "-o", "there"], ["exists already", "--force"]),
        (["merge", run.path, "-o", "there", "--force"], ["won't delete"]),
        (["merge", run.path, "-o", "merged", "--scale", "nan"], ["--scale"]),
        (["merge", run.path, "-o", "merged", "--adapter", "worst"], ["worst", "best"]),
    ]
    for command, words in cases:
        code, _, err = iqlite(*command)
        assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = iqlite("merge", run.path, "-o", "merged")
    assert code == 2 and "free" in err
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".making-*")) and (tmp_path / "there" / "mine.txt").exists()


def test_layers_of_different_rank_are_refused(make_run: Callable[..., RunDir], iqlite: Callable[..., Any]) -> None:
    run = make_run()
    file = run.adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    (run.adapter / integrity.MANIFEST).unlink()  # changed by its owner, who says so
    file.write_text(json.dumps(config | {"rank_pattern": {"q_proj": 2}}))
    assert "rank_pattern" in iqlite("merge", run.path, "-o", "merged")[2]
    file.write_text(json.dumps(config | {"use_dora": True}))
    assert "DoRA" in iqlite("merge", run.path, "-o", "merged")[2]


def test_the_writer_s_files_are_the_library_s(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).half(), "c": torch.randn(2, 2, 2).bfloat16(), "d": torch.zeros(0, 4)}
    layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "ours.safetensors", layout, iter(tensors.items()))
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


def test_a_tied_head_is_written_once(tiny: Callable[..., Path]) -> None:
    folder = tiny("llama", tie_word_embeddings=True)
    model = make_model("llama", tie_word_embeddings=True)
    stored = Stored.find(str(folder))
    names = [name for names in stored.shards.values() for name in names]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    assert len(names) == len(dict(model.named_parameters()))
    assert stored.identity().same_base(load_base(str(folder), "none").identity)
