"""iqlite from Python: load or build a recipe, train it, ask what came of it, compare. The verbs of the command line use the same functions.

    import iqlite

    recipe = iqlite.load_recipe({"behavior": {"wanted": "You are kind.", "unwanted": "You are mean."}, "prompts": {"train": "prompts.jsonl"}})
    run = iqlite.train(recipe, out="runs/kind", progress=lambda step, total, metrics: print(step, total, metrics["kl/policy_superior"]))
    print(run.answer(["How do I boil an egg?"]), run.answer(["How do I boil an egg?"], by="base"))

Everything raises `iqlite.IqliteError` with a sentence for a person where the command line would exit with code 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from iqlite.errors import AimError, PromptsError, RunError
from iqlite.machine import ranks
from iqlite.places import RUNS
from iqlite.recipe.reading import load_recipe as load_file
from iqlite.recipe.reading import overridden, parse_recipe, to_data
from iqlite.recipe.schema import Recipe
from iqlite.run.files import check_space, free_name
from iqlite.run.findings import JUDGEMENTS
from iqlite.run.lock import Lock
from iqlite.run.rundir import AIM, RunDir, Unwritten, check_replaceable
from iqlite.training.trackers import check_trackers, tracked

if TYPE_CHECKING:
    from iqlite.aim.look import Look
    from iqlite.evaluation.compare import Comparison
    from iqlite.records import Messages, StepMetrics
    from iqlite.training.monitors import Verdict
    from iqlite.training.session import Session

ADAPTERS_ON_DISK = 12  # adapter, best and checkpoints with two moments each, one of each being written
Voice = Literal["policy", "base", "superior", "prompted"]


class Listener(Protocol):
    """What a run says before its first step."""

    def note(self, text: str) -> None:
        """Something that happens now, or that is worth knowing."""

    def looking(self, total: int) -> Callable[[int], None]:
        """`total` answers are drawn to see where the target points; what is returned is told of so many more."""

    def looked(self, look: Look | None, why_not: str) -> None:
        """What was seen, before the run's folder exists; None and why, where nobody looked."""


class Quiet:
    """A listener that says nothing."""

    def note(self, text: str) -> None: ...
    def looked(self, look: Look | None, why_not: str) -> None: ...
    def looking(self, total: int) -> Callable[[int], None]:
        return lambda rows: None


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, beside: str | Path = ".") -> Recipe:
    """A validated recipe from a file, the name of a shipped one, or tables as a recipe's TOML has them.

    `overrides` are "table.key=value" as after --set; relative paths in tables are looked up in `beside`. RecipeError says what is wrong.
    """
    if isinstance(source, Mapping):
        return parse_recipe(overridden(source, overrides), Path(beside) / "recipe.toml")
    return load_file(Path(source), overrides)


def begin(
    recipe: Recipe, out: str | Path | None = None, *, resume: bool = False, force: bool = False, listener: Listener | None = None
) -> tuple[Session, RunDir]:
    """(session, run directory) of a recipe that is ready for its next step: loaded, looked at, its folder made or opened.

    `force` replaces a folder, and goes on where memory seems too small or the target points the wrong way. AimError, with nothing written, where it
    does; RunError for a folder that is there, can't be resumed or is being trained. The run is locked until its `release`. Of several processes
    one has the run directory, the others a stand-in that writes nothing.
    """
    listener = listener or Quiet()
    check_trackers(recipe)
    ranks.check_enough(recipe, ranks.size())
    path = Path(out) if out else (RUNS / recipe.path.stem if resume or force else free_name(RUNS, recipe.path.stem))
    leads = ranks.rank() == 0
    existing = _existing(path, resume=resume, force=force) if leads else None  # what can't be is said before torch is imported
    backend = _backend(recipe)

    from iqlite.aim.look import WRONG
    from iqlite.machine.sizes import within_memory
    from iqlite.training.opening import environment, open_session

    joined = ranks.join()
    placement = joined.told(existing.environment()["placement"] if existing else None)
    with within_memory(recipe, "with --set, and start again with --force"):
        session = open_session(
            recipe, say=listener.note, placement=placement, must_fit=not (force or resume), backend=backend, ranks=joined
        )
    found = environment(session)
    joined.check_same({"recipe": to_data(recipe), "prompts": found["prompts"], "base": found["base"], "versions": found["packages"]})
    if leads:
        check_space(path, ADAPTERS_ON_DISK * 4 * session.policy.size)
    if existing:
        existing.check_same(recipe, found)
        existing.take_over(recipe)
    if resume:
        return session, existing or Unwritten(path)
    seen = _look(session, listener, force=force)
    if not leads:
        return session, Unwritten(path)
    run = RunDir.create(path, recipe, found, force=force)
    run.lock()
    if seen:
        run.write_sealed(AIM, json.dumps(seen.record(forced=seen.verdict == WRONG), indent=2) + "\n")
    return session, run


def _backend(recipe: Recipe) -> str:
    """Whose code trains. unsloth is imported here, before transformers and PEFT, which it changes."""
    from iqlite.base import unsloth

    asked, model = recipe.model.backend, recipe.model
    if asked == "plain" or (asked == "auto" and (model.offload != "none" or not unsloth.installed())):
        return "plain"
    import torch

    from iqlite.base.names import shape_of

    kind = shape_of(model.base, recipe.folder, model.revision).model_type
    return unsloth.prepare(asked, kind, card=torch.cuda.is_available())


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> Run:
    """Trains a recipe into `out` (runs/NAME, numbered if that exists). `progress` is told of each step, of how many, and its metrics.

    What the command line prints, monitors' verdicts included, stands in the run's metrics and in `Run.result`.
    """
    from iqlite.machine.sizes import within_memory
    from iqlite.training.loop import train as run_steps

    session, run = begin(recipe, out, resume=resume, force=force)
    told = _Told(progress if session.ranks.leads else None)
    with run.held(), within_memory(recipe, "in the recipe"), tracked(told, run, recipe) as report:
        run_steps(session, run, report)
    return Run(run)


def open_run(path: str | Path) -> Run:
    """A run that was trained before; RunError if the folder isn't one."""
    return Run(RunDir.open(Path(path)))


@dataclass(frozen=True)
class TokenReward:
    """One token of an answer, in nats: `described` is log π̃/π_ref, what the descriptions reward, `trained` log π_θ/π_ref, what training changed."""

    text: str
    described: float
    trained: float

    @property
    def reward(self) -> float:
        """log π̃/π_θ: what a training step would reward it with now."""
        return self.described - self.trained


class Run:
    """A run directory, and its models: loaded when the first answer is asked for, and kept."""

    def __init__(self, folder: RunDir):
        self.folder = folder

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder.path

    @property
    def recipe(self) -> Recipe:
        """What was trained, with every default."""
        return self.folder.recipe()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A line for each step, as in metrics.jsonl (docs/run-directory.md)."""
        return self.folder.metrics()

    @property
    def result(self) -> dict[str, Any] | None:
        """How it ended: step, total, why, best_step, best_kl; None before it has."""
        return self.folder.result()

    @cached_property
    def session(self) -> Session:
        """The base in memory with the run's adapter on it."""
        from iqlite.training.opening import open_run as opened

        return opened(self.folder)

    def answer(
        self, prompts: Sequence[str | Messages], by: Voice = "policy", *, temperature: float = 0.7, top_p: float = 0.9,
        tokens: int | None = None, seed: int = 0,
    ) -> list[str]:  # fmt: skip
        """An answer to each prompt by the trained policy, the bare base, the base prompted with the wanted description, or the superior policy.

        A prompt is a text, or chat turns. `temperature` 0 is greedy; `tokens` at most, as in training without it. The same seed gives the same answer.
        """
        from iqlite.chat.superior import superior_answers
        from iqlite.machine.sizes import within_memory
        from iqlite.model.sampling import Sampler

        if by not in get_args(Voice):
            raise RunError(f"by={by!r} isn't one of {', '.join(get_args(Voice))}.")
        if not prompts:
            return []
        session = self.session
        if by == "prompted" and session.wanted is None:
            raise RunError(f"{self.path}: this run has no description to prompt the base with; ask by='base', 'policy' or 'superior'.")
        requests = [self._request(one) for one in prompts]
        sampler = Sampler(seed, tokens or session.recipe.rollout.max_new_tokens, temperature, top_p, "answer")
        with within_memory(session.recipe, "in that file, and ask again"):
            if by == "superior":
                rollout = superior_answers(session, requests, sampler)
            else:
                role = "policy" if by == "policy" else "reference"
                rollout = session.answers(role, requests, sampler, description=session.wanted if by == "prompted" else None)
        return [session.chat.text(rollout.response_ids(row)) for row in range(len(requests))]

    def rewards(self, prompt: str | Messages, answer: str) -> list[TokenReward]:
        """The reward of each token of a text, as an answer to a prompt."""
        from iqlite.chat.speaker import Speaker
        from iqlite.recipe.pairs import answer_ids

        session = self.session
        ids = answer_ids(session.chat, answer)
        found = Speaker(session.policy, session.chat, True, session).rewards(self._request(prompt), ids)
        return [TokenReward(*one) for one in zip(session.chat.pieces(ids), found["described"], found["trained"], strict=True)]

    def compare(self, *others: Run, judge: str | None = None, seeds: int = 3, count: int | None = None, safety: bool = False) -> Comparison:
        """This run beside its base, the prompted base and other runs of one base, on held-out prompts; by the recipe's measure, another's name,
        reward:NAME or URL#MODEL.

        What is found is also kept in the run, as `iqlite compare` does.
        """
        from rich.console import Console

        from iqlite.evaluation.compare import Question, compare
        from iqlite.evaluation.judges import named, rubric_of
        from iqlite.scoring.measures import NAMES
        from iqlite.terminal import Watch

        judging = named(judge, rubric_of(self.recipe), self.path / JUDGEMENTS) if judge and judge not in NAMES else None
        self.__dict__.pop("session", None)  # one base in memory at a time
        question = Question(seeds=seeds, count=count, safety=safety)
        found = compare([self.folder, *(other.folder for other in others)], question, judge, judging, Watch(Console(quiet=True)))
        found.keep(self.folder)
        return found

    def _request(self, prompt: str | Messages) -> Messages:
        """A prompt as a request of at most what the base's context has room for; PromptsError for what is none."""
        from iqlite.recipe.requests import parse_request
        from iqlite.training.opening import room_of

        request = parse_request(prompt)
        if request is None:
            raise PromptsError(f"{str(prompt)[:80]!r} isn't a prompt: give a text, or chat turns that end with the user's.")
        session = self.session
        return session.chat.cut(request, room_of(session.recipe, session.chat, session.policy.base))


class _Told:
    """A reporter that tells a callback of the steps."""

    def __init__(self, progress: Callable[[int, int, Mapping[str, float]], None] | None):
        self.progress = progress

    def step(self, metrics: StepMetrics, total: int) -> None:
        if self.progress:
            self.progress(metrics.step, total, metrics.values)

    def sample(self, step: int, prompt: str, draw: Callable[[], tuple[str, str]]) -> None: ...
    def verdict(self, step: int, verdict: Verdict) -> None: ...


def _existing(path: Path, *, resume: bool, force: bool) -> RunDir | None:
    """The run to resume, or None for a new one; says early what can't be."""
    if resume and force:
        raise RunError("--resume goes on with a run and --force replaces it: give one of them.")
    if resume:
        run = RunDir.open(path)
        run.lock()
        run.recover()
        return run
    check_replaceable(path, force=force)
    if force and path.is_dir():
        Lock(path).release()  # one that is being trained isn't replaced
    return None


def _look(session: Session, listener: Listener, *, force: bool) -> Look | None:
    """Whether the target points the right way; AimError where it points the wrong one, unless that is forced."""
    from iqlite.aim.look import WRONG, chosen, look, sentence
    from iqlite.evaluation.beginning import advice, unsaid
    from iqlite.machine.sizes import within_memory

    recipe = session.recipe
    if not recipe.judge.aim:
        listener.looked(None, "")
        return None
    if recipe.superior.estimator == "adapter":
        listener.looked(None, "not looked at, since a superior made of adapters can't be heard before training")
        return None
    answerers = 3 if session.wanted else 2
    with within_memory(recipe, "with --set, and start again"):
        seen = look(session, progress=listener.looking(answerers * len(chosen(session))))
        seen = replace(seen, beginning=advice(unsaid(session), recipe))
    if seen.verdict == WRONG and not force:
        raise AimError(sentence(seen, recipe.path))
    listener.looked(seen, "")
    return seen
