"""The command line: help at once, and every kind of bad input as one sentence with exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
import torch
import typer
from safetensors import SafetensorError

from iqlite.cli import app
from iqlite.model.policy import Policy
from tests.helpers.tiny import make_tokenizer, save_tiny

HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "datasets"]
ALSO = ["iqlite.recipe.schema", "psutil"]  # what no verb needs before it begins


@pytest.fixture
def recipe(data: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """recipe(train={…}, …) → a recipe file with the tables merged in; a value None drops the key."""

    def write(**tables: dict[str, Any]) -> Path:
        merged = {name: {**data.get(name, {}), **tables.get(name, {})} for name in {**data, **tables}}
        merged = {name: {key: value for key, value in table.items() if value is not None} for name, table in merged.items()}
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(merged), "utf-8")
        return tmp_path / "recipe.toml"

    return write


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_help_recipes_plans_and_misspelt_paths_import_no_torch(tmp_path: Path) -> None:
    misspelt = ("train nothing.toml", "probe nothing.toml", "compare nothing", "merge nothing -o x", "chat runs/nothing")
    there = ["train", "cheerful-135m", "--out", str(tmp_path)]  # a folder that exists, and is no run
    for command in (
        ["--help"],
        ["train", "--help"],
        ["--version"],
        ["recipe"],
        ["plan", "cheerful-135m"],
        there,
        *map(str.split, misspelt),
    ):
        code = (
            f"import sys; sys.argv = ['iqlite', *{command!r}]\nfrom iqlite.cli import main\ntry: main()\nexcept SystemExit: pass\n"
            f"sys.exit(sorted(set({HEAVY + ([] if len(command) > 1 or command == ['recipe'] else ALSO)!r}) & set(sys.modules)) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_is_whole_sentences_and_ends_with_examples(
    iqlite: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    group: Any = typer.main.get_command(app)
    out = iqlite("--help")[1]
    for name, command in group.commands.items():
        first = command.help.partition("\n")[0]
        assert f"  {name:<7}  {first}\n" in out and first.endswith(".")
        lines = iqlite(name, "--help")[1].rstrip().splitlines()
        at = lines.index("  Examples:")
        assert 1 <= len(lines) - at - 1 <= 2 and max(map(len, lines)) <= 80
        for line in lines[at + 1 :]:
            assert line.startswith(f"    iqlite {name}")
            command.make_context(name, shlex.split(line)[2:])  # UsageError for an option that there isn't
    assert "--install-completion" in out and "--show-completion" not in out


def test_the_shell_completes_verbs_and_options() -> None:
    for typed, expected in (("iqlite tr", "train"), ("iqlite plan --ca", "--card")):
        asked = {"_IQLITE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        code = "from iqlite.cli import app; app(prog_name='iqlite')"
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False)
        assert done.stdout.split() == [expected], done.stderr


def test_help_names_the_verbs(iqlite: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = iqlite("--help")
    assert code == 0 and all(verb in out for verb in ("train", "compare", "init", "recipe"))
    code, out, _ = iqlite("recipe", "--json")
    rows = json.loads(out)
    assert {"model.base", "superior.strength", "objective.gamma", "train.steps"} <= {row["key"] for row in rows}


Spoil = Callable[[Path, Callable[..., Path], Callable[..., Path]], Path]


def broken_gguf(folder: Path, recipe: Callable[..., Path], _: object) -> Path:
    (folder / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    return recipe(model={"base": "broken.gguf"})


def pickled_base(folder: Path, recipe: Callable[..., Path], _: object) -> Path:
    made = save_tiny(folder / "pickled")
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    return recipe(model={"base": "pickled"})


def foreign_adapter(folder: Path, recipe: Callable[..., Path], _: object) -> Path:
    from iqlite.base.loading import load_base

    save_tiny(folder / "other-base", seed=3)
    (folder / "theirs").mkdir()
    Policy(load_base(str(folder / "other-base"), "none"), rank=2, alpha=4.0, seed=0).save_adapter(folder / "theirs")
    return recipe(adapter={"start": "theirs"})


def prompts(text: str, **limits: Any) -> Spoil:
    def spoil(folder: Path, recipe: Callable[..., Path], _: object) -> Path:
        (folder / "train.jsonl").write_text(text, "utf-8")
        return recipe(prompts=limits) if limits else recipe()

    return spoil


def changed(**tables: Any) -> Spoil:
    return lambda _, recipe, __: recipe(**tables)


def not_text(folder: Path, recipe: Callable[..., Path], _: object) -> Path:
    (folder / "train.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')  # Latin-1
    return recipe()


def gguf_of_another_architecture(folder: Path, recipe: Callable[..., Path], _: object) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "phi.gguf", "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return recipe(model={"base": "phi.gguf"})


def adapter_on_the_head(folder: Path, recipe: Callable[..., Path], tiny: Callable[..., Path]) -> Path:
    from iqlite.base.loading import load_base

    (folder / "headed").mkdir()
    Policy(load_base(str(tiny()), "none"), rank=2, alpha=4.0, seed=0).save_adapter(folder / "headed")
    config = json.loads((folder / "headed" / "adapter_config.json").read_text())
    (folder / "headed" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "lm_head"]}))
    return recipe(adapter={"start": "headed"})


def not_toml(folder: Path, *_: object) -> Path:
    (folder / "recipe.toml").write_text("[model\nbase = 3", "utf-8")
    return folder / "recipe.toml"


LONG = json.dumps({"prompt": "word " * 600})
BAD: dict[str, tuple[Spoil, list[str]]] = {
    "unknown key": (changed(train={"lerning_rate": 1.0}), ["recipe.toml", "train.lerning_rate", "learning_rate"]),
    "wrong type": (changed(rollout={"max_new_tokens": "many"}), ["recipe.toml", "rollout.max_new_tokens", "'many'", "integer"]),
    "negative learning rate": (changed(train={"learning_rate": -0.1}), ["recipe.toml", "train.learning_rate", "-0.1", "greater than 0"]),
    "a rate that isn't finite": (changed(train={"learning_rate": float("inf")}), ["recipe.toml", "train.learning_rate", "finite"]),
    "endless epochs": (changed(train={"steps": None, "epochs": 1e300}), ["recipe.toml", "train.epochs", "10000"]),
    "no room for a prompt": (changed(rollout={"max_new_tokens": 10_000}), ["recipe.toml", "rollout.max_new_tokens", "10000", "lower"]),
    "half a character": (prompts('{"prompt": "\\ud800"}\n'), ["prompts.train", "1 malformed row"]),
    "not TOML": (not_toml, ["recipe.toml", "TOML", "line 1"]),
    "missing prompt file": (changed(prompts={"train": "nowhere.jsonl"}), ["recipe.toml", "prompts.train", "nowhere.jsonl", "relative to the recipe"]),
    "prompt file of another kind": (changed(prompts={"train": "recipe.toml"}), ["prompts.train", ".toml", ".jsonl"]),
    "empty prompt set": (prompts("\n\n"), ["recipe.toml", "prompts.train", "train.jsonl", "no usable prompt", '{"prompt"']),
    "all prompts malformed": (prompts('{"foo": 1}\n[]\n'), ["prompts.train", "2 malformed rows skipped (line 1, 2)"]),
    "prompts not text": (not_text, ["recipe.toml", "prompts.train", "train.jsonl", "mend the file"]),
    "all prompts exceed max_tokens": (prompts(f"{LONG}\n", max_tokens=100), ["recipe.toml", "prompts.train", "train.jsonl", "prompts.max_tokens"]),
    "all prompts exceed the context": (prompts(f"{LONG}\n", max_tokens=100_000), ["recipe.toml", "prompts.train", "train.jsonl", "context"]),
    "one prompt only": (prompts('{"prompt": "why?"}\n', eval=None), ["recipe.toml", "prompts.train", "train.jsonl", "prompts.eval"]),
    "wanted equal to unwanted": (changed(behavior={"unwanted": "You are  kind."}), ["recipe.toml", "behavior", "You are kind.", "opposite"]),
    "unwanted missing": (changed(behavior={"unwanted": None}), ["behavior.unwanted", "prompted"]),
    "unknown estimator": (changed(superior={"estimator": "magic"}), ["superior.estimator", "magic", "contrastive"]),
    "unknown objective": (changed(objective={"name": "dpo"}), ["objective.name", "dpo", "full-kl"]),
    "unknown setting": (changed(superior={"strengh": 2.0}), ["superior.strengh", "strength"]),
    "adapter of another base": (foreign_adapter, ["theirs", "other-base"]),
    "missing adapter": (changed(adapter={"start": "nothing"}), ["nothing", "adapter_config.json"]),
    "unreadable GGUF": (broken_gguf, ["broken.gguf", "can't be read", "download it again"]),
    "GGUF of another architecture": (gguf_of_another_architecture, ["phi.gguf", "'phi3'", "can't convert", "the original model's folder"]),
    "adapter on the head": (adapter_on_the_head, ["headed", "LM head"]),
    "pickled weights only": (pickled_base, ["pickled", "pickled weights aren't loaded", "safetensors"]),
    "a path that is none": (changed(prompts={"train": "a\0b"}), ["a null character is in it", "name another path"]),
    "missing base": (changed(model={"base": "./nothing"}), ["./nothing", "no such file or folder"]),
    "hub model without network": (changed(model={"base": "allenai/OLMo-2-1124-7B-SFT"}), ["allenai/OLMo-2-1124-7B-SFT", "model.base"]),
    "hub prompts without network": (changed(prompts={"train": {"dataset": "nobody/nothing"}}), ["prompts.train", "nobody/nothing", "local file"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_sentence(
    fault: str, iqlite: Callable[..., tuple[int, str, str]], recipe: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    spoil, words = BAD[fault]
    path = spoil(tmp_path, recipe, tiny)
    before = files(tmp_path)
    code, _, err = iqlite("train", path, "--out", tmp_path / "run")
    assert code == 2
    said = err.strip()
    assert said.startswith("iqlite: ") and "\n" not in said and "Traceback" not in said
    assert all(word in said for word in words), said
    assert files(tmp_path) == before


def test_missing_recipe_and_run(iqlite: Callable[..., tuple[int, str, str]], recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe()
    code, _, err = iqlite("train", "recipes.toml")
    assert code == 2 and "did you mean recipe.toml?" in err
    code, _, err = iqlite("compare", "runs/nothing")
    assert code == 2 and "isn't a run directory" in err
    code, _, err = iqlite("train", "recipe.toml", "--set", "steps=3")
    assert code == 2 and "table.key=value" in err
    code, _, err = iqlite("train", "recipe.toml", "--out", "run", "--resume")
    assert code == 2 and "isn't a run directory" in err
    code, _, err = iqlite("train", "recipe.toml", "--resume", "--force")
    assert code == 2 and "one of them" in err
    code, _, err = iqlite("train", "recipe.toml", "--nonsense")
    assert code == 2 and "--nonsense" in err
    assert "run" not in files(tmp_path)


def test_bitsandbytes_missing(
    iqlite: Callable[..., tuple[int, str, str]], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, _, err = iqlite("train", recipe(model={"quantization": "nf4"}), "--out", "run")
    assert code == 2 and "bitsandbytes" in err and 'quantization = "none"' in err and err.count("\n") == 1
    assert not Path("run").exists()


def test_no_space_before_and_during_a_run(
    iqlite: Callable[..., tuple[int, str, str]], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = iqlite("train", recipe(), "--out", "run")
    assert code == 2 and "run needs" in err and "--out" in err and err.count("\n") == 1
    assert not Path("run").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    write = Path.write_text

    def full(self: Path, *arguments: Any, **options: Any) -> int:
        if self.name == "state.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments, **options)

    def full_in_safetensors(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # its own kind of error

    for where, name, fault in ((Path, "write_text", full), (safetensors.torch, "save_file", full_in_safetensors)):
        monkeypatch.setattr(where, name, fault)
        code, _, err = iqlite("train", "recipe.toml", "--out", "run", "--force")
        assert code == 2 and "no space left" in err and err.count("\n") == 1
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert not list(Path("run/checkpoints").glob("step-*"))  # no half checkpoint
        code, _, err = iqlite("train", "recipe.toml", "--out", "run", "--resume")
        assert code == 0, err


def test_a_whole_run_through_the_command_line(
    iqlite: Callable[..., tuple[int, str, str]], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """train, the run directory's files, --force and numbered names, --json, compare and its last line."""
    recipe()
    code, out, err = iqlite("train", "recipe.toml")
    assert code == 0, err
    assert "next:  iqlite compare runs/recipe" in out and "step 3/3" in out and "left" in out
    assert {"recipe.toml", "environment.json", "metrics.jsonl", "samples.jsonl", "result.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "best/adapter_model.safetensors", "checkpoints/step-000003/state.safetensors"} <= files(tmp_path / "runs/recipe")  # fmt: skip
    assert not [name for name in files(tmp_path / "runs") if ".making" in name or ".old" in name]
    code, out, err = iqlite("train", "recipe.toml", "--json", "--set", "train.steps=1")
    assert code == 0 and json.loads(out)["run"] == "runs/recipe-2" and json.loads(out)["total"] == 1
    code, _, err = iqlite("train", "recipe.toml", "--out", "runs/recipe")
    assert code == 2 and "--resume" in err and "--force" in err
    code, _, _ = iqlite("train", "recipe.toml", "--out", "runs/recipe", "--force", "--set", "train.steps=1")
    assert code == 0 and json.loads((tmp_path / "runs/recipe/result.json").read_text())["step"] == 1
    code, _, err = iqlite("train", "recipe.toml", "--out", "runs/recipe", "--resume")
    assert code == 2 and "train.steps was 1 and is 3" in err
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    code, _, err = iqlite("train", "recipe.toml", "--out", "precious", "--force")
    assert code == 2 and "won't delete" in err and (tmp_path / "precious" / "thesis.txt").exists()
    shutil.copy(tmp_path / "recipe.toml", tmp_path / "precious" / "recipe.toml")  # a recipe of the user's doesn't make it a run
    code, _, err = iqlite("train", "recipe.toml", "--out", "precious", "--force")
    assert code == 2 and "won't delete" in err and (tmp_path / "precious" / "thesis.txt").exists()
    code, _, err = iqlite("train", "recipe.toml", "--out", "precious/thesis.txt", "--force")
    assert code == 2 and "won't delete" in err and (tmp_path / "precious" / "thesis.txt").read_text() == "mine"
    code, _, err = iqlite("compare", "runs/recipe", "--adapter", "elsewhere")
    assert code == 2 and "--which 'elsewhere'" in err
    code, _, err = iqlite("compare", "precious")
    assert code == 2 and "isn't a run directory" in err
    code, out, _ = iqlite("compare", "runs/recipe", "--seeds", "2")
    last = out.strip().splitlines()[-1]
    assert code == 0 and [part.split("=")[0] for part in last.split()] == ["described", "base", "prompted", "trained"]
    code, out, _ = iqlite("compare", "runs/recipe", "--json", "--seeds", "3", "--count", "3")
    result = json.loads(out)
    assert result["prompts"] == 3 and [m["name"] for m in result["measures"]] == [
        "base",
        "prompted (system turn)",
        "prompted (user turn)",
        "trained",
    ]
    assert json.loads((tmp_path / "runs/recipe/compare.json").read_text()) == result


def test_init_writes_a_recipe_that_trains_unchanged(
    iqlite: Callable[..., tuple[int, str, str]], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    options = ["--base", tiny(), "--wanted", 'You say "yes" kindly, déjà vu\\.', "--unwanted", "You say no."]
    code, out, err = iqlite("init", "mine", *options, "--tokens", "4")
    assert code == 0, err
    assert "scored by described" in out and "next:  iqlite probe mine.toml" in out
    assert files(tmp_path) == {"mine.toml", "prompts", "prompts/everyday.jsonl", "prompts/everyday-heldout.jsonl"}
    code, _, err = iqlite("init", "mine", *options)
    assert code == 2 and "exists already" in err
    for name in ("", "..", "sub/", "two\nlines", "x" * 300):
        code, _, err = iqlite("init", name, *options)
        assert code == 2 and "isn't a name" in err and err.count("\n") == 1
    code, _, err = iqlite("init", "same", "--wanted", "Be kind.", "--unwanted", "Be kind.")
    assert code == 2 and "same.toml" in err and "say the same" in err and "same.toml" not in files(tmp_path)
    code, out, err = iqlite("train", "mine.toml", "--set", "train.steps=1", "--set", "prompts.eval_count=2")
    assert code == 0, err
    assert 'You say "yes" kindly' in out
    assert json.loads((tmp_path / "runs/mine/result.json").read_text())["why"] == "finished"


def test_what_a_model_writes_can_t_reach_the_terminal_s_controls(
    iqlite: Callable[..., tuple[int, str, str]], recipe: Callable[..., Path], data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"[red]{n}[/red]\x1b]0;owned\x07"}) + "\n" for n in range(4)))
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "eval.jsonl")
    code, out, err = iqlite("train", recipe(rollout={"max_new_tokens": 64}), "--out", "run", "--set", "train.steps=1")
    assert code == 0 and "[red]" in out  # shown as it is, not as markup
    code, shown, _ = iqlite("compare", "run", "--seeds", "1")
    for text in (out, err, shown):
        assert not {c for c in text if not c.isprintable() and c != "\n"}


def test_a_model_whose_tokenizer_has_no_template_trains(
    iqlite: Callable[..., tuple[int, str, str]], recipe: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny(), tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    make_tokenizer("none").save_pretrained(folder)
    code, out, err = iqlite("train", recipe(model={"base": "plain"}), "--out", "run")
    assert code == 0 and "has no chat template" in out, err


def test_out_of_memory_is_one_sentence(
    iqlite: Callable[..., tuple[int, str, str]], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)  # where the optimizer's state first needs memory
    code, _, err = iqlite("train", recipe(), "--out", "run")
    assert code == 2 and "memory is full" in err and "rollout.max_new_tokens" in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available() or os.name == "nt", reason="this torch uses the card, or a script can't stand for nvidia-smi")
def test_a_card_that_isnt_used_is_said(
    iqlite: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4070, 11000'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, out, err = iqlite("train", recipe(), "--out", "run")
    said = "install the CUDA build" if torch.version.cuda is None else "update its driver"
    assert code == 0 and "NVIDIA GeForce RTX 4070 isn't used, since" in out and said in out, err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "isn't used" not in iqlite("train", recipe(), "--out", "hidden")[1]


def test_a_narrow_encoding_loses_a_sign_and_not_the_run(data: dict[str, Any], tmp_path: Path) -> None:
    """What Windows does for redirected output; the tone of the answers, and their signs, are the model's."""
    (tmp_path / "r.toml").write_text(tomli_w.dumps(data), "utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "iqlite", "train", "r.toml", "--out", "run", "--no-safety", "--force"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("cp1252", "replace")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    shown = subprocess.run([sys.executable, "-m", "iqlite", "recipe"], env=environment, capture_output=True, check=False)
    assert shown.returncode == 0
