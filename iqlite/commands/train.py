"""`iqlite train`: a recipe in, a run directory with the trained adapter out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from iqlite.base.identity import ADAPTER_WEIGHTS
from iqlite.commands.options import Json, Set
from iqlite.terminal import clean, counting, duration, facts
from iqlite.terminal import console as terminal

if TYPE_CHECKING:
    from iqlite.aim.look import Look
    from iqlite.recipe.schema import Recipe
    from iqlite.run.rundir import RunDir
    from iqlite.training.loop import Outcome
    from iqlite.training.session import Session

INTERRUPTED = 130


EXAMPLES = (
    "iqlite train cheerful-135m",
    "iqlite train mine.toml --set train.steps=40 --out runs/longer",
)


def train(
    recipe_path: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe, or the name of one that comes with iqlite, such as cheerful-135m.")
    ],
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/NAME, numbered if that exists.")] = None,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what is there; start even if memory seems too small or the target points the wrong way."),
    ] = False,
    safety: Annotated[bool, typer.Option("--safety/--no-safety", help="At the end: harm, over-refusal and bias before and after.")] = True,
    as_json: Json = False,
) -> None:
    """Train a described behaviour into a LoRA adapter."""
    from iqlite.recipe.reading import load_recipe
    from iqlite.recipe.wording import lint

    recipe = load_recipe(recipe_path, overrides or [])  # a fault in it is reported before torch is imported
    console = terminal(stderr=as_json)
    for note in lint(recipe.behavior.wanted, recipe.behavior.unwanted):
        console.print(f"[yellow]{clean(note)}[/]")

    from iqlite.api import begin

    with ExitStack() as bars:
        session, run = begin(recipe, out, resume=resume, force=force, listener=_Begins(console, recipe, bars))

    with run.held():
        outcome, safe = _steps(console, recipe, session, run, safety=safety)
    session.ranks.leave()
    if not session.ranks.leads:
        raise typer.Exit(INTERRUPTED if outcome.why == "interrupted" else 0)
    _conclude(console, run, recipe.path, overrides or [], out, outcome, safe, safety=safety, as_json=as_json)
    raise typer.Exit(INTERRUPTED if outcome.why == "interrupted" else 0)


def _steps(console: Console, recipe: Recipe, session: Session, run: RunDir, *, safety: bool) -> tuple[Outcome, dict[str, Any] | None]:
    """Trains, and looks at what it did to safety."""
    from iqlite.machine.sizes import within_memory
    from iqlite.training.loop import train as run_steps
    from iqlite.training.progress import TrainingView, finish_the_step
    from iqlite.training.trackers import tracked

    total, first = recipe.total_steps(len(session.train)), run.last_step() + 1
    facts(console, derived(recipe, session, run.path, total, session.policy.size))
    view = TrainingView(console, total, first, recipe.judge.measure, run.metrics())
    with (
        within_memory(recipe, "with --set, and start again with --force"),
        finish_the_step(console, session.ranks) as interrupt,
        tracked(view, run, recipe, lambda text: console.print(f"[dim]{clean(text)}[/]")) as report,
        view,
    ):
        outcome = run_steps(session, run, report, lambda: interrupt.asked)
    return outcome, _safety(session, run, console) if safety and outcome.why != "interrupted" else None


class _Begins:
    """What a person sees of a run before its first step."""

    def __init__(self, console: Console, recipe: Recipe, bars: ExitStack):
        self.console, self.recipe, self.bars = console, recipe, bars

    def note(self, text: str) -> None:
        self.console.print(f"[dim]{clean(text)}[/]")

    def looking(self, total: int) -> Callable[[int], None]:
        bar = self.bars.enter_context(counting(self.console, "looking where the target points"))  # not while a base is downloaded
        task = bar.add_task("", total=total)
        return lambda rows: bar.advance(task, rows)

    def looked(self, look: Look | None, why_not: str) -> None:
        from iqlite.aim.look import RIGHT, WRONG, sentence

        self.bars.close()
        if look is None:
            if why_not:
                self.note(f"aim: {why_not}")
            return
        text = sentence(look, self.recipe.path)
        if look.verdict == WRONG:
            text = f"forced: {text.partition(' Nothing was trained')[0]}"
        self.console.print(f"[{ {RIGHT: 'green', WRONG: 'bold red'}.get(look.verdict, 'yellow') }]{clean(text)}[/]")
        if look.beginning:
            self.console.print(f"[bold yellow]{clean(look.beginning)}[/]")


def _safety(session: Session, run_dir: RunDir, console: Console) -> dict[str, Any]:
    """The small safety set before and after, whatever the run was about: a cheerful tone mustn't cost a refusal unseen."""
    from safetensors.torch import load_file

    from iqlite.evaluation.answers import Answerer
    from iqlite.evaluation.safety import a_few, check, load_items
    from iqlite.machine.sizes import within_memory
    from iqlite.run.findings import adapter_digest

    leads = session.ranks.leads
    state, of = session.ranks.handed(*((load_file(run_dir.adapter / ADAPTER_WEIGHTS), adapter_digest(run_dir.adapter)) if leads else ({},)))
    session.policy.load_state(state)  # a monitor's stop leaves the best, not the last
    who = {"base": Answerer("base", "reference"), "trained": Answerer("trained", "policy", of=of)}
    items = load_items()
    some = a_few(items)
    with within_memory(session.recipe, "and run iqlite compare"), counting(console, "safety before and after") as progress:
        task = progress.add_task("", total=2 * len(some))
        return check(session, run_dir, who, items, lambda rows: progress.advance(task, rows), adapter=who["trained"].of, some=some)


def derived(recipe: Recipe, session: Session, path: Path, total: int, parameters: int) -> dict[str, str]:
    """What will be trained from what, and the numbers that follow from the recipe."""
    from iqlite.device import peak_gib
    from iqlite.model.sampling import SPOKEN_TEMPERATURE

    base, rollout, superior = session.policy.base, recipe.rollout, recipe.superior
    passes = total * rollout.prompts_per_step / len(session.train)
    settings = ", ".join(f"{name} {value:g}" for name, value in superior.settings().items())
    return {
        "base": f"{base.name} ({base.quantization}, computed in {str(base.compute_dtype).removeprefix('torch.')} on {session.policy.device})",
        "adapter": f"LoRA of rank {session.policy.rank}, {parameters / 1e6:.1f} M parameters" + (f", from {recipe.adapter.start}" if recipe.adapter.start else ""),
        "behaviour": session.wanted.text if session.wanted else f"adapter {superior.adapter}",
        "superior": f"{superior.estimator} ({settings}), read by the {superior.weights} weights",
        "objective": recipe.objective.name,
        "prompts": f"{len(session.train)} to train on, {len(session.eval)} held out"
        + (f"; {len(session.contrary)} contrary ones, {recipe.contrary_per_step} a step" if session.contrary else ""),
        "judged by": recipe.judge.measure,
        "steps": f"{total} of {rollout.prompts_per_step} prompts × at most {rollout.max_new_tokens} tokens ({passes:.1f} passes over the prompts)",
        "samples": f"shown on the way as in a chat, at temperature {SPOKEN_TEMPERATURE:g}; training draws its own at {rollout.temperature:g}",
        "memory": f"{peak_gib(session.policy.device):.1f} GiB in use once loaded",
        "run": str(path),
    } | ({"note": " ".join(session.notes)} if session.notes else {})  # fmt: skip


def _conclude(
    console: Console, run_dir: RunDir, recipe_path: Path, overrides: Sequence[str], out: Path | None, outcome: Outcome,
    safe: dict[str, Any] | None, *, safety: bool, as_json: bool,
) -> None:  # fmt: skip
    from iqlite.machine.ranks import launched_by
    from iqlite.run.files import json_numbers

    if as_json:
        print(json.dumps({"run": str(run_dir.path), **json_numbers(vars(outcome)), "safety": safe}))
        return
    if outcome.why == "interrupted":
        settings = [part for override in overrides for part in ("--set", override)]
        settings += [] if safety else ["--no-safety"]
        again = shlex.join([*launched_by(), "train", str(recipe_path), *settings, "--out", str(out or run_dir.path), "--resume"])
        console.print(f"stopped after step {outcome.step} of {outcome.total}; go on with:  {again}", markup=False)
        return
    seconds = sum(line.get("time/step_s", 0.0) + line.get("time/eval_s", 0.0) for line in run_dir.metrics())
    ended = "finished" if outcome.why == "finished" else f"stopped by the monitor “{outcome.why}”"
    console.print(f"{ended} after {outcome.step} step{'' if outcome.step == 1 else 's'} and {duration(seconds)}.", markup=False)
    best = "" if outcome.why == "finished" else " (the best one)"
    shown = {"adapter": f"{run_dir.adapter}{best}", "best": f"{run_dir.best} (step {outcome.best_step}, held-out KL {outcome.best_kl:z.3f})", "metrics": str(run_dir.path / "metrics.jsonl"), "samples": str(run_dir.path / "samples.jsonl")}  # fmt: skip
    if not run_dir.best.is_dir():  # no evaluation was finite
        del shown["best"]
    facts(console, shown)
    console.print(_measured(run_dir), markup=False)
    if safe:
        from iqlite.evaluation.safety import show_safety

        show_safety(console, safe)
    console.print(f"next:  iqlite compare {shlex.quote(str(run_dir.path))}", markup=False)


def _measured(run_dir: RunDir) -> str:
    """The measure of held-out answers before and after, in a sentence."""
    measure = run_dir.recipe().judge.measure
    evaluated = [line for line in run_dir.metrics() if line.get("eval/measure") is not None]
    if not evaluated:
        return f"{measure} wasn't measured."
    adapter = run_dir.step_of(run_dir.adapter)
    last = next((line for line in reversed(evaluated) if line["step"] <= adapter), evaluated[-1])
    return f"{measure} of held-out answers: {last['eval/measure']:.2f} at step {last['step']}, the base's {last['eval/measure_base']:.2f}."
