"""`iqlite init`: a commented recipe with the shipped everyday prompts beside it, ready to train."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

from rich.console import Console

from iqlite.errors import RecipeError
from iqlite.recipe import load_recipe, shipped_recipes

TEMPLATE = """\
# {name}: a behaviour described in words. Train it with:
#     iqlite train {file}
# Everything that isn't here has a default; `iqlite recipe` lists every key with what it does.

[model]
base = {base}                  # hub id, model folder, .gguf file, ollama:NAME:TAG, or the embedded smollm2-135m-instruct
quantization = "nf4"           # nf4 keeps the base in 4 bits; none keeps it as it is

[behavior]
# Two sentences alike in form and length and opposite in meaning: only what differs between them is trained.
wanted = {wanted}
unwanted = {unwanted}
placement = "auto"             # system | user | auto: where the description stands

[prompts]
# What the policy is asked while it learns: the requests your users would type, without any description.
train = "prompts/everyday.jsonl"
eval = "prompts/everyday-heldout.jsonl"

[superior]
estimator = "contrastive"
strength = 3.0                 # 1/beta: how far beyond the base the target lies

[objective]
name = "full-kl"

[rollout]
prompts_per_step = 8
max_new_tokens = {tokens}

[train]
steps = 20                     # or epochs, one of them
learning_rate = 3e-4
seed = 0
"""
LONGEST_NAME = 100
PROMPTS = ("everyday.jsonl", "everyday-heldout.jsonl")


def run(name: str, base: str, wanted: str, unwanted: str, *, tokens: int, force: bool, console: Console) -> int:
    """Writes NAME.toml and prompts/; nothing existing is replaced without `force`. Returns the exit code."""
    path = Path(name if name.endswith(".toml") else f"{name}.toml")
    if Path(name).name.strip(".") == "" or not name.isprintable() or name.endswith(("/", "\\")) or len(path.name) > LONGEST_NAME:
        raise RecipeError(f"init {name[:LONGEST_NAME]!r} isn't a name for a recipe: give it a short one, such as kind.")
    if path.exists() and not force:
        raise RecipeError(f"{path} exists already: choose another name, or replace it with --force.")
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in {"base": base, "wanted": wanted, "unwanted": unwanted}.items()}
    text = TEMPLATE.format(name=path.stem, file=shlex.quote(str(path)), tokens=tokens, **quoted)
    making = path.with_name(f".making-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        making.write_text(text, "utf-8")
        load_recipe(making)  # what wouldn't train isn't written
        (path.parent / "prompts").mkdir(exist_ok=True)
        for file in PROMPTS:
            if not (path.parent / "prompts" / file).exists():
                shutil.copyfile(shipped_recipes() / "prompts" / file, path.parent / "prompts" / file)
        os.replace(making, path)
    except RecipeError as error:
        raise RecipeError(str(error).replace(str(making), str(path))) from None
    except OSError as error:
        raise RecipeError(f"{path} can't be written ({error.strerror}): choose another folder.") from None
    finally:
        making.unlink(missing_ok=True)
    console.print(f"wrote {path}\nnext:  iqlite train {shlex.quote(str(path))}", markup=False)
    return 0
