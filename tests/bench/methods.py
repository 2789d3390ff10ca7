"""Every method under one recipe, base, prompts, adapter shape and number of sampled tokens: one table a behaviour.

    python -m tests.bench.methods cheerful untrained iqlite sft dpo [--seeds 0 1 2] [--rates 1]
    python -m tests.bench.methods cheerful sdft --alphas 0 0.5 1 --rates 0.333 1 3 --seeds 0
    python -m tests.bench.methods cheerful rloo grpo --groups 4 --rates 1 3 [--times 4]
    python -m tests.bench.methods concise iqlite --set superior.strength=2
    python -m tests.bench.methods cheerful table

Trains one variant after the other (`--rates` and `--times` multiply the recipe's learning rate and steps; `--set` changes the recipe) and lets
it answer all held-out prompts, temperature 0.7 and top-p 0.9, with the noise of `iqlite compare`. `untrained`: base, superior, and the prompted
base in each placement, with and without demonstrations where the recipe has some, at temperatures 0.7, 0 and 1 (the superior at 0.7). What is found is
written to tests/bench/results/methods/TASK/, a file a variant and seed; what is there isn't done again. `table` prints it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from iqlite.evaluation.answers import Answerer, collect, prompted_answerers
from iqlite.evaluation.curves import Point, of_run
from iqlite.model.sampling import Sampler
from iqlite.places import shipped_recipes
from iqlite.recipe.reading import load_recipe
from iqlite.records import Prompts
from iqlite.run.journal import SAMPLES, Journal
from iqlite.run.rundir import RunDir
from iqlite.training.measuring import measured
from iqlite.training.opening import open_session
from iqlite.training.order import spread
from iqlite.training.session import Session
from tests.bench.methods_table import RESULTS, table
from tests.bench.rivals import BY_REWARD, KINDS, Variant, train


def is_answer(text: str) -> float:
    """1 if the text is a JSON object with the one key "answer", and a text in it."""
    try:
        found = json.loads(text)
    except ValueError:
        return 0.0
    return float(
        isinstance(found, dict) and list(found) == ["answer"] and isinstance(found["answer"], str) and bool(found["answer"].strip())
    )


def first_person(text: str) -> float:
    """The share of sentences in which the speaker is."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
    return sum(bool(SPEAKER.search(part)) for part in sentences) / max(1, len(sentences))


SPEAKER = re.compile(r"\b(I|my|me|mine|myself)\b")
OUT = Path("runs/bench/methods")
BEHAVIOURS = Path(__file__).parent / "behaviours"
SCORES: dict[str, Callable[[str], float]] = {"json": is_answer, "first-person": first_person}  # behaviours that no measure of iqlite's sees
FEW = 24  # held-out prompts of the curves, at temperature 1
TEMPERATURES = (0.7, 0.0, 1.0)


def path_of(task: str) -> Path:
    """The behaviour's recipe, shipped or beside this script."""
    return next(p for p in (BEHAVIOURS / f"{task}.toml", shipped_recipes() / f"{task}-135m.toml") if p.is_file())


def settings_of(task: str, variant: Variant, seed: int) -> list[str]:
    """What a variant changes in it, as `--set` takes it."""
    plain = load_recipe(path_of(task)).train
    steps = plain.steps or 0
    points = 10 if variant.method == "iqlite" else 5  # of the curve; iqlite is at the mark soonest
    changed = {
        "train.seed": seed,
        "train.learning_rate": plain.learning_rate * variant.rate,
        "train.steps": steps * variant.times,
        "train.eval_every": max(2, steps // points) * variant.times,
        "prompts.eval_count": FEW,
        "judge.aim": False,
    }
    return [*(f"{key}={json.dumps(value)}" for key, value in changed.items()), *variant.settings]


def scores(task: str, session: Session, asked: Prompts, texts: list[str]) -> list[float]:
    """Each answer's by the behaviour's measure."""
    if task in SCORES:
        return [SCORES[task](text) for text in texts]
    return [round(float(score), 4) for score in measured(session, session.recipe.judge.measure, asked, texts)]


def answers_of(task: str, session: Session, who: Answerer, temperature: float) -> dict[str, Any]:
    """Scores and words of its answers to all held-out prompts, in their order, how many ended, and how strange they are to the base."""
    asked, recipe = session.asked_by(session.recipe.judge.measure), session.recipe
    sampler = Sampler(0, recipe.rollout.max_new_tokens, temperature, 0.9 if temperature == TEMPERATURES[0] else 1.0, "compare")
    answers = collect(session, None, who, asked.requests, [sampler], lambda _: None)[0]
    texts = [answer.answer for answer in answers]
    tokens = sum(answer.tokens for answer in answers)
    return {
        "scores": scores(task, session, asked, texts),
        "words": [len(text.split()) for text in texts],
        "ended": sum(answer.ended for answer in answers) / len(answers),
        "nats": sum((answer.nll or 0.0) * answer.tokens for answer in answers) / max(1, tokens),
        "kinds": list(asked.expected or ()),
        "example": texts[0],
    }


def untrained(task: str) -> None:
    """Base, prompted base and superior."""
    session = open_session(load_recipe(path_of(task)))
    who = {"base": Answerer("base", "reference"), "superior": Answerer("superior", "superior")}
    for one in prompted_answerers(session):
        who[one.name.replace("prompted", "told")] = one
        if one.description and one.description.demonstrations:
            who[one.name.replace("prompted", "told") + ", no demonstrations"] = replace(
                one, description=replace(one.description, demonstrations=())
            )
    for name, one in who.items():
        if file_of(task, Variant(name), 0).exists():
            continue
        answers = {f"{t:g}": answers_of(task, session, one, t) for t in (TEMPERATURES if one.role != "superior" else TEMPERATURES[:1])}
        written(task, Variant(name), 0, {"answers": answers})


def curve_of(task: str, session: Session, folder: Path) -> list[Point]:
    """A rival's held-out answers on the way, by the behaviour's measure."""
    work, by_step = Journal(folder), defaultdict(list)
    at = {0: (0.0, 0.0)} | {line["step"]: (line["tokens"], line["seconds"]) for line in work.metrics()}
    for line in work.lines(SAMPLES):
        by_step[line["step"]].append(line["answer"])
    found = []
    for step, texts in sorted(by_step.items()):
        values = scores(task, session, session.eval.some(spread(range(len(session.eval)), len(texts))), texts)
        error = statistics.stdev(values) / len(values) ** 0.5
        words = statistics.fmean(len(text.split()) for text in texts)
        tokens, seconds = at[step]
        found.append(Point(step, float(step), tokens, seconds, statistics.fmean(values), error, words))
    return found


def run_of(recipe: Path, path: Path, settings: Sequence[str]) -> RunDir:
    """iqlite's run of a recipe with settings, trained now unless it is there."""
    if not (path / "result.json").exists():
        words = [part for one in settings for part in ("--set", one)] + ["--resume"] * path.exists()
        subprocess.run([sys.executable, "-m", "iqlite", "train", str(recipe), "--out", str(path), "--no-safety", *words], check=True)
    return RunDir.open(path)


def trained(task: str, variant: Variant, seed: int) -> None:
    """A variant, trained and asked."""
    path = OUT / task / file_of(task, variant, seed).stem
    settings = settings_of(task, variant, seed)
    session = open_session(load_recipe(path_of(task)))
    if variant.method == "iqlite":
        run = run_of(path_of(task), path, settings)
        curve, folder = of_run(run, SCORES.get(task)), run.trained("adapter")
    else:
        if not (path / "done").exists():
            train(variant, load_recipe(path_of(task), settings), session.placement, path)
            (path / "done").touch()
        curve, folder = curve_of(task, session, path), path
    session.policy.add_frozen("other", folder)
    who = Answerer(str(variant), "other", of=str(folder))
    answers = {f"{temperature:g}": answers_of(task, session, who, temperature) for temperature in TEMPERATURES[:2]}
    written(task, variant, seed, {"answers": answers, "curve": [asdict(point) for point in curve]})


def written(task: str, variant: Variant, seed: int, found: dict[str, Any]) -> None:
    """A file of its own."""
    file = file_of(task, variant, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"name": str(variant), "method": variant.method, "seed": seed, **found}, ensure_ascii=False) + "\n", "utf-8")


def file_of(task: str, variant: Variant, seed: int) -> Path:
    """Where a variant's figures are kept."""
    return RESULTS / task / (re.sub(r"[^\w.=-]+", "_", str(variant), flags=re.ASCII).strip("_") + f"-{seed}.json")


def variants(methods: Sequence[str], asked: argparse.Namespace) -> Iterator[Variant]:
    """All that is asked for."""
    for method, rate in itertools.product(methods, asked.rates):
        alphas = asked.alphas if method == "sdft" else [None]
        groups = asked.groups if method in BY_REWARD else [None]
        for alpha, group in itertools.product(alphas, groups):
            yield Variant(method, rate, asked.times, alpha, group, tuple(asked.set))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("what", nargs="+", choices=["untrained", "iqlite", *KINDS, "table"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0])
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--alphas", nargs="+", type=float, default=[1.0])
    parser.add_argument("--groups", nargs="+", type=int, default=[4])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    if "untrained" in asked.what:
        untrained(asked.task)
    methods = [name for name in asked.what if name not in ("untrained", "table")]
    for seed in asked.seeds:
        for variant in variants(methods, asked):
            if not file_of(asked.task, variant, seed).exists():
                trained(asked.task, variant, seed)
    if "table" in asked.what:
        print(table(asked.task))


if __name__ == "__main__":
    main()
