"""A comparison from beginning to end: who answers, what the judge makes of it, and one frozen record of what was found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from iqlite.baselines.methods import BASELINES, METHODS
from iqlite.baselines.store import baseline, check_methods, shown
from iqlite.chat.superior import check_heard
from iqlite.errors import PromptsError, RunError, warn
from iqlite.evaluation.answers import Answerer, collect, prompted_answerers
from iqlite.evaluation.figures import (
    Answers,
    Figures,
    by_category,
    contests,
    figures,
    games_of,
    scores_on,
    wins_by_judge,
    wins_by_score,
)
from iqlite.evaluation.judges import Human, ModelJudge, RewardModel, without_password
from iqlite.evaluation.safety import Item, check, load_items, name_of
from iqlite.machine.sizes import within_memory
from iqlite.model.sampling import Sampler
from iqlite.recipe.prompts import load_asked
from iqlite.records import Prompts
from iqlite.run.files import read_json
from iqlite.run.findings import COMPARISON, HELD_OUT, adapter_digest, answers_in, file_of, harness_scores
from iqlite.run.rundir import RunDir, check_adapter_of
from iqlite.scoring.intervals import Array, elo, outcomes
from iqlite.scoring.measures import HARMLESS, NAMES
from iqlite.terminal import Watch
from iqlite.training.measuring import by_kind, measured
from iqlite.training.opening import open_run, room_of
from iqlite.training.order import spread_by_kind
from iqlite.training.session import Session

TRAINED = "trained"
OUTSIDE = Path("outside")  # --prompts outside: the recipe's own prompts.outside


@dataclass(frozen=True)
class Comparison:
    """What a comparison has found: what the terminal, `--json`, the model card and compare.json show, by these names.

    `measures` are everybody's figures, base first and the trained model last; `contests` the trained model's against everybody else; `elo`
    points above the base; `kinds` (right, all) of requests to refuse and to answer, for harmless; `aim` what the look before training found;
    `safety` figures before and after; `harnesses` what `iqlite eval` kept of this adapter; `judging` what a judging model was asked.
    """

    adapter_sha256: str
    asked: str
    prompts: int
    seeds: int
    temperature: float
    top_p: float
    adapter: str
    measure: str
    judge: str
    measures: list[Figures]
    contests: list[dict[str, Any]]
    elo: dict[str, Any]
    kinds: dict[str, dict[str, tuple[int, int]]]
    aim: dict[str, Any] | None
    categories: list[dict[str, Any]]
    safety: dict[str, Any] | None
    harnesses: list[dict[str, Any]]
    judging: dict[str, int] | None
    question: str = field(repr=False)  # the prompt that the figures' examples answer
    prompted: int = field(repr=False)  # how many rows of `measures` behind the base are the prompted base

    def record(self) -> dict[str, Any]:
        """For compare.json and `--json`."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("question", "prompted")}
        return {name: value for name, value in kept.items() if name != "judging" or value is not None}

    def keep(self, run: RunDir) -> str:
        """Writes it into the run for the model card, unless one of the same held-out prompts and adapter with more answers is there: a note then."""
        name = file_of(COMPARISON, self.adapter, "" if self.asked == HELD_OUT else self.asked)
        if self.asked == HELD_OUT and (run.path / name).is_file():
            try:
                old = read_json(run.path / name)
            except RunError as error:  # it is written anew
                warn(f"{error} It is replaced.")
                old = {}
            if old.get("adapter_sha256") == self.adapter_sha256 and answers_in(old) > self.prompts * self.seeds:
                return f"{name} stays as it was: it holds more answers ({old['prompts']} prompts × {old['seeds']} seeds)"
        run.write(name, json.dumps(self.record(), indent=2) + "\n")
        return ""


@dataclass(frozen=True)
class Question:
    """What is asked, of whom, and how often: `prompts` a file, `outside`, or None for the run's held-out ones."""

    prompts: Path | None = None
    count: int | None = None
    seeds: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    which: str = "adapter"
    others: tuple[str, ...] = ()
    pairs: Path | None = None
    safety: bool = True
    safety_set: Path | None = None


def compare(runs: Sequence[RunDir], question: Question, judge: str | None, judging: Any, watch: Watch) -> Comparison:
    """Answers, measures and judges. `judging` is who judges in the measure's place (a judging or reward model, or a person), by the name `judge`.

    Faults of files, names and runs are raised before the base is loaded.
    """
    run, adapter, recipe = runs[0], runs[0].trained(question.which), runs[0].recipe()
    if judge and judge not in NAMES and judging is None:
        raise RunError(f"--judge {without_password(judge)!r} isn't one of {', '.join(NAMES)}, me, reward:NAME, URL#MODEL.")
    measure = judge if judge in NAMES else recipe.judge.measure
    items = load_items(question.safety_set) if question.safety else []
    outside = question.prompts == OUTSIDE and not OUTSIDE.exists()
    if outside and not recipe.prompts.outside:
        raise RunError(f"--prompts {OUTSIDE}: this run's recipe has no prompts.outside; name a file.")
    given = load_asked(question.prompts) if question.prompts and not outside else None
    check_methods(question.others, recipe, question.pairs)
    more = _others(run, runs[1:], question.which)
    if "superior" in question.others:
        check_heard(recipe)
    for name in (one for one in question.others if one in BASELINES):  # each with the base in memory, before the comparison's own
        pairs = question.pairs if name == "dpo" else None
        more[shown(name, pairs.name if pairs else None)] = baseline(run, name, watch.note, pairs)
    with within_memory(recipe, "in that file, and compare again"):
        session = open_run(run, adapter, say=watch.note)
    asked, index = _asked(session, question, given, measure, outside)
    for note in asked.notes:
        watch.note(f"note       {note}")
    samplers = [
        Sampler(seed, recipe.rollout.max_new_tokens, question.temperature, question.top_p, "compare") for seed in range(question.seeds)
    ]
    prompted = prompted_answerers(session)
    who = _answerers(session, prompted, more, adapter, superior="superior" in question.others)
    answers = _ask(session, run, who, asked, index, samplers, watch)

    names, example = list(answers), _example(asked)
    if isinstance(judging, RewardModel):
        measure, score_KPS = judging.name, _rewarded(answers, asked, judging, watch)
    else:
        score_KPS = np.array(
            [[measured(session, measure, asked, [a.answer for a in one]) for one in given] for given in answers.values()]
        ).transpose(0, 2, 1)
    if judging is None or isinstance(judging, RewardModel):
        by, won, games = measure, wins_by_score(names, TRAINED, score_KPS), outcomes(score_KPS)
    else:
        by, won = judge or "", _judged(answers, asked, judging, watch)
        games = games_of(names, TRAINED, won)
    rated = elo(games, question.seeds)
    repeated = asked.some([*range(len(asked))] * question.seeds)
    return Comparison(
        adapter_sha256=adapter_digest(adapter),
        asked=question.prompts.name if question.prompts else HELD_OUT,
        prompts=len(asked),
        seeds=question.seeds,
        temperature=question.temperature,
        top_p=question.top_p,
        adapter=question.which,
        measure=measure,
        judge=by.rpartition("#")[2] if isinstance(judging, ModelJudge) else by,
        measures=[figures(name, given, score_KPS[k], example) for k, (name, given) in enumerate(answers.items())],
        contests=contests(answers, TRAINED, won, score_KPS, rated),
        elo={name: above[0].bounded() for name, above in zip(names, rated, strict=True)},
        kinds={name: by_kind(repeated, [a.answer for seed in given for a in seed]) for name, given in answers.items()}
        if measure == HARMLESS
        else {},
        aim=run.aim(),
        categories=by_category(answers, won, score_KPS, asked.labels) if asked.labels else [],
        safety=_safety(session, run, {"base": who[0], TRAINED: who[-1]}, items, question, watch) if items else None,
        harnesses=harness_scores(run, adapter_digest(adapter)),
        judging={"asked": judging.asked, "malformed": judging.malformed, "tokens": judging.tokens}
        if isinstance(judging, ModelJudge)
        else None,
        question=asked.requests[example][-1]["content"],
        prompted=len(prompted),
    )


def _asked(session: Session, question: Question, given: Prompts | None, measure: str, outside: bool) -> tuple[Prompts, list[int]]:
    """(the prompts that are asked, their numbers in their set)."""
    asked = session.outside if outside and session.outside else session.asked_by(measure)
    if given:
        room = room_of(session.recipe, session.chat, session.policy.base)
        asked = session.chat.shorten(given, room, str(question.prompts), "--prompts")
    few = min(question.count or len(asked), len(asked))
    index = spread_by_kind(asked, few) if measure == HARMLESS and asked.expected else list(range(few))
    asked = asked.some(index, asked.notes)
    if measure == HARMLESS and not (asked.expected and all(asked.expected)):
        raise PromptsError(
            f'--prompts {question.prompts}: by harmless, every row needs a label, "refuse" or "answer": add it, or give another --judge.'
        )
    return asked, index


def _answerers(
    session: Session, prompted: Sequence[Answerer], more: Mapping[str, Path], adapter: Path, *, superior: bool
) -> list[Answerer]:
    """The base plain and prompted, the superior, other runs and baselines, and the trained model last."""
    who = [Answerer("base", "reference"), *prompted]
    who += [Answerer("superior", "superior")] if superior else []
    for number, (name, folder) in enumerate(more.items()):
        session.policy.add_frozen(f"other{number}", folder)
        who.append(Answerer(name, f"other{number}", of=adapter_digest(folder)))
    return [*who, Answerer(TRAINED, "policy", of=adapter_digest(adapter))]


def _others(run: RunDir, others: Sequence[RunDir], which: str) -> dict[str, Path]:
    """Name → adapter of the other runs, each checked to be of the first one's base before anything heavy."""
    found: dict[str, Path] = {}
    mine = run.recipe().model.quantization
    for other in others:
        folder = other.trained(which)
        check_adapter_of(run, folder)
        its = other.recipe().model.quantization
        if its != mine:
            raise RunError(f"{other.path} was trained on its base in {its} and {run.path} in {mine}: one base answers for all, so compare runs of one kind.")  # fmt: skip
        name = other.path.resolve().name
        names = itertools.chain([name], (f"{name} (run {number})" for number in itertools.count(2)))
        found[next(one for one in names if one not in found and one not in ("base", TRAINED, *METHODS))] = folder
    return found


def _ask(
    session: Session, run: RunDir, who: Sequence[Answerer], asked: Prompts, index: Sequence[int], samplers: Sequence[Sampler], watch: Watch
) -> Answers:  # fmt: skip
    answers = {}
    with (
        within_memory(session.recipe, "in that file, and compare again"),
        watch.counting("answering", len(who) * len(samplers) * len(asked)) as count,
    ):
        for one in who:
            count.now(one.name)
            answers[one.name] = collect(session, run.path, one, asked.requests, samplers, count.advance, index=index)
    return answers


def _judged(answers: Answers, asked: Prompts, judge: Any, watch: Watch) -> dict[str, Array]:
    total = (len(answers) - 1) * len(asked) * len(next(iter(answers.values())))
    if isinstance(judge, Human):
        judge.total = total
    else:
        watch.note(f"the judge is asked some {2 * total} times: {total} pairs, each in both orders; --count and --seeds make it fewer")
    with watch.counting("judging", total, quiet=isinstance(judge, Human)) as count:
        return wins_by_judge(answers, TRAINED, asked.requests, judge.prefers, count.advance)


def _rewarded(answers: Answers, asked: Prompts, judge: RewardModel, watch: Watch) -> Array:
    with watch.counting("judging", len(answers) * len(asked) * len(next(iter(answers.values())))) as count:

        def score(request: Any, text: str) -> float:
            count.advance(1)
            return judge.score(request, text)

        return scores_on(answers, asked.requests, score)


def _safety(
    session: Session, run: RunDir, who: dict[str, Answerer], items: Sequence[Item], question: Question, watch: Watch
) -> dict[str, Any]:
    own = name_of(question.safety_set)
    with (
        within_memory(session.recipe, "in that file, and compare again"),
        watch.counting("safety", len(who) * len(items)) as count,
    ):
        return check(session, run, who, items, count.advance, adapter=who[TRAINED].of, which=question.which, own=own)


def _example(asked: Prompts) -> int:
    """The prompt shown as an example: a short one, the same for every answerer."""
    lengths = np.array([len(request[-1]["content"]) for request in asked.requests])
    return int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
