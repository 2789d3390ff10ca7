"""`iqlite init`: a commented recipe with the shipped everyday prompts beside it, ready to train."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from iqlite.base.names import EMBEDDED
from iqlite.commands.options import Force
from iqlite.errors import RecipeError
from iqlite.places import shipped_recipes
from iqlite.terminal import clean
from iqlite.terminal import console as terminal

TEMPLATE = """\
# {name}: a behaviour described in words. Train it with:
#     iqlite train {file}
# Everything that isn't here has a default; `iqlite recipe` lists every key with what it does.

[model]
base = {base}                  # hub id, model folder, .gguf file, ollama:NAME:TAG, lmstudio:NAME, or the embedded smollm2-135m-instruct
quantization = "nf4"           # nf4 keeps the base in 4 bits; none keeps it as it is

[behavior]
# Two sentences alike in form and length and opposite in meaning: only what differs between them is trained.
wanted = {wanted}
unwanted = {unwanted}
placement = "auto"             # system | user | auto: where the description stands

[prompts]
# What the policy is asked while it learns: the requests your users would type, without any description.
{prompts}

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

[judge]
# {why}
# tone (cheerful words) | shorter (fewer words) | refusal | compliance | harmless (refuses what it should, answers what it should) | described
measure = {measure}
"""
LONGEST_NAME = 100
EVERYDAY = """\
train = "prompts/everyday.jsonl"
eval = "prompts/everyday-heldout.jsonl"
# contrary = "prompts/mine.jsonl"   # prompts on which the behaviour is NOT wanted: they are trained to stay as the base is"""
CAREFUL = """\
train = ["prompts/harmful.jsonl", "prompts/everyday.jsonl"]
eval = "prompts/harmful-heldout.jsonl"
# Requests that only sound harmful: they are trained to be answered as the base answers them, so that not everything is refused.
contrary = "prompts/lookalikes.jsonl\""""
TONE = frozenset(["cheerful", "cheery", "warm", "friendly", "happy", "joyful", "enthusiastic", "encouraging", "optimistic", "positive", "kind", "gloomy", "sad", "cold", "grumpy", "harsh", "unfriendly", "pessimistic", "negative", "discouraging", "rude", "mean"])  # fmt: skip
LENGTH = frozenset(
    ["short", "brief", "briefly", "concise", "concisely", "terse", "tersely", "succinct", "long", "lengthy", "verbose", "length"]
)
REFUSAL = frozenset(["decline", "declines", "refuse", "refuses", "harmful", "harm", "hurt", "dangerous", "unsafe", "harmless", "illegal"])
WHY = {
    "tone": "Both descriptions are about a tone, so that cheerful words are counted.",
    "shorter": "The descriptions are about length, so that words are counted.",
    "harmless": "The descriptions are about harm, so that refusals count where they are right and answers where they are.",
    "described": "The base itself judges, by its own two readings: for any behaviour, but it is the target's own eye; read the answers too.",
}
EXAMPLES = (
    'iqlite init kind --wanted "You are kind." --unwanted "You are unkind."',
    'iqlite init kind --base ollama:llama3.2:1b --wanted "…" --unwanted "…"',
)


def derived(wanted: str, unwanted: str) -> str:
    """The measure that two descriptions are about, by the words in them; described where none is plain."""
    words = [{word.strip(".,;:!?\"'()").lower() for word in text.split()} for text in (wanted, unwanted)]
    if any(words[side] & REFUSAL for side in (0, 1)):
        return "harmless"
    if all(words[side] & LENGTH for side in (0, 1)):
        return "shorter"
    return "tone" if all(words[side] & TONE for side in (0, 1)) else "described"


def init(
    name: Annotated[str, typer.Argument(help="Name of the new recipe; NAME.toml is written.")],
    wanted: Annotated[str, typer.Option(help="The wanted behaviour, in a sentence or two.")],
    unwanted: Annotated[str, typer.Option(help="The unwanted behaviour, alike in form and opposite in meaning.")],
    base: Annotated[
        str, typer.Option(help="Hub id, model folder, .gguf file, ollama:NAME:TAG, lmstudio:NAME, or the embedded model.")
    ] = EMBEDDED,
    measure: Annotated[
        str | None,
        typer.Option(help="What answers are scored by; without it, what the descriptions are about (iqlite recipe measure lists them)."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer in training, tokens.")] = 48,
    force: Force = False,
) -> None:
    """Write a recipe with prompts beside it, ready to train."""
    from iqlite.recipe.reading import load_recipe
    from iqlite.recipe.wording import lint

    console = terminal()
    path = Path(name if name.endswith(".toml") else f"{name}.toml")
    if Path(name).name.strip(".") == "" or not name.isprintable() or name.endswith(("/", "\\")) or len(path.name) > LONGEST_NAME:
        raise RecipeError(f"init {name[:LONGEST_NAME]!r} isn't a name for a recipe: give it a short one, such as kind.")
    if path.exists() and not force:
        raise RecipeError(f"{path} exists already: choose another name, or replace it with --force.")
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in {"base": base, "wanted": wanted, "unwanted": unwanted}.items()}
    measure = measure or derived(wanted, unwanted)
    prompts = CAREFUL if measure in ("harmless", "refusal") else EVERYDAY
    text = TEMPLATE.format(
        name=path.stem,
        file=shlex.quote(str(path)),
        tokens=tokens,
        prompts=prompts,
        measure=json.dumps(measure),
        why=WHY.get(measure, "As you asked."),
        **quoted,
    )
    making = path.with_name(f".making-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        making.write_text(text, "utf-8")
        recipe = load_recipe(making)  # what wouldn't train isn't written
        files = [Path(one).name for source in (recipe.prompts.train, recipe.prompts.eval, recipe.prompts.contrary) if source for one in (source if isinstance(source, tuple) else (source,)) if isinstance(one, str)]  # fmt: skip
        (path.parent / "prompts").mkdir(exist_ok=True)
        for file in files:
            if not (path.parent / "prompts" / file).exists():
                shutil.copyfile(shipped_recipes() / "prompts" / file, path.parent / "prompts" / file)
        os.replace(making, path)
    except RecipeError as error:
        raise RecipeError(str(error).replace(str(making), str(path))) from None
    except OSError as error:
        raise RecipeError(f"{path} can't be written ({error.strerror}): choose another folder.") from None
    finally:
        making.unlink(missing_ok=True)
    console.print(f"wrote {path}; answers are scored by {measure}: {WHY.get(measure, 'as you asked.')}", markup=False)
    for note in lint(wanted, unwanted):
        console.print(f"[yellow]{clean(note)}[/]")
    quoted_path = shlex.quote(str(path))
    console.print(f"next:  iqlite probe {quoted_path}   (does it aim true?)   or  iqlite train {quoted_path}", markup=False)
