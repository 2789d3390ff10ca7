"""`iqlite compare`: base, told base, trained models and others on the same prompts and seeds: figures, win rates, Elo, and what is significant."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from iqlite.aim.look import spread_by_kind
from iqlite.baselines.store import BASELINES, METHODS, RECORD, baseline, check_methods, shown
from iqlite.chat.superior import check_heard
from iqlite.errors import PromptsError, RunError
from iqlite.evaluation.answers import Answerer, collect, told_answerers
from iqlite.evaluation.curves import Point, of_baseline, of_run, until
from iqlite.evaluation.figures import (
    Answers,
    Figures,
    by_category,
    contests,
    figures,
    games_of,
    scores_on,
    verdict,
    wins_by_judge,
    wins_by_score,
)
from iqlite.evaluation.judges import Human, Kept, ModelJudge, RewardModel, named, rubric_of
from iqlite.evaluation.safety import check, load_items, show_safety
from iqlite.export.card import AIM, COMPARISON, HELD_OUT, adapter_digest, answers_in, file_of
from iqlite.machine.sizes import within_memory
from iqlite.model.sampling import Sampler
from iqlite.recipe.prompts import load_asked
from iqlite.records import Prompts
from iqlite.run.rundir import RunDir, check_adapter_of
from iqlite.scoring.intervals import FEWEST, Estimate, elo, outcomes
from iqlite.scoring.measures import MEASURES
from iqlite.terminal import clean, counting, harmless, spark, table
from iqlite.training.measuring import DESCRIBED, HARMLESS, NAMES, OWN_EYE, by_kind, measured
from iqlite.training.session import Session, open_session, room_of

EXAMPLE = 400  # characters of an example answer
TRAINED = "trained"
OUTSIDE = "outside"  # --prompts outside: the recipe's own prompts.outside
UNREAD = 0.1  # share of a judge's verdicts that may be unreadable without a warning; ours
JUDGEMENTS = "judgements.jsonl"


def run(
    runs: Sequence[RunDir], *, seeds: int, temperature: float, top_p: float, prompts: Path | None, count: int | None, adapter: str,
    others: Sequence[str], pairs: Path | None, judge: str | None, safety: bool, safety_set: Path | None, as_json: bool, console: Console,
) -> int:  # fmt: skip
    """Answers, measures, prints, and writes compare.json (compare.FILE.json of other prompts) into the first run; returns the exit code."""
    run_dir = runs[0]
    start = run_dir.trained(adapter)
    recipe = run_dir.recipe()
    measure = judge if judge in NAMES else recipe.judge.measure
    wanted = [text for text in (recipe.behavior.wanted, *(p.wanted for p in recipe.behavior.mixture)) if text]
    other_judge = _judge(judge, rubric_of(recipe.judge.rubric, wanted), run_dir, console) if judge and judge not in NAMES else None
    items = load_items(safety_set) if safety else []
    outside = prompts == Path(OUTSIDE) and not prompts.exists()
    if outside and not recipe.prompts.outside:
        raise RunError(f"--prompts {OUTSIDE}: this run's recipe has no prompts.outside; name a file.")
    given = load_asked(prompts) if prompts and not outside else None
    check_methods(others, recipe, pairs)
    more = _others(run_dir, runs[1:], adapter)
    placement = run_dir.environment()["placement"]
    if "superior" in others:
        check_heard(recipe)
    baselines = [name for name in others if name in BASELINES]
    for name in baselines:  # each with the base in memory, before the comparison's own
        learns_from = pairs if name == "dpo" else None
        more[shown(name, learns_from.name if learns_from else None)] = baseline(
            run_dir, name, lambda text: console.print(f"[dim]{text}[/]"), learns_from
        )
    with within_memory(recipe, "in that file, and compare again"):
        session = open_session(recipe, start=start, placement=placement, say=lambda text: console.print(f"[dim]{text}[/]"))
    room = room_of(recipe, session.chat, session.policy.base)
    own = session.eval + session.contrary_eval if measure == HARMLESS and session.contrary_eval else session.eval
    asked = session.outside if outside and session.outside else own
    if given:
        asked = session.chat.shorten(given, room, str(prompts), "--prompts")
    few = min(count or len(asked), len(asked))
    index = spread_by_kind(asked, few) if measure == HARMLESS and asked.expected else list(range(few))
    asked = asked.some(index, asked.notes)
    if measure == HARMLESS and not (asked.expected and all(asked.expected)):
        raise PromptsError(
            f'--prompts {prompts}: by harmless, every row needs a label, "refuse" or "answer": add it, or give another --judge.'
        )
    for note in asked.notes:
        console.print(f"[dim]note       {clean(note)}[/]")
    samplers = [Sampler(seed, recipe.rollout.max_new_tokens, temperature, top_p, "compare") for seed in range(seeds)]
    told = told_answerers(session)
    who = [Answerer("base", "reference"), *told]
    who += [Answerer("superior", "superior")] if "superior" in others else []
    for number, (name, folder) in enumerate(more.items()):
        session.policy.add_frozen(f"other{number}", folder)
        who.append(Answerer(name, f"other{number}", of=adapter_digest(folder)))
    who.append(Answerer(TRAINED, "policy", of=adapter_digest(start)))
    answers = _ask(session, run_dir, who, asked, index, samplers, console)

    names, example = list(answers), _example(asked)
    if isinstance(other_judge, RewardModel):
        measure, score_KPS = other_judge.name, _rewarded(answers, asked, other_judge, console)
    else:
        score_KPS = np.array(
            [[measured(session, measure, asked, [a.answer for a in one]) for one in given] for given in answers.values()]
        ).transpose(0, 2, 1)
    if other_judge is None or isinstance(other_judge, RewardModel):
        by, won, games = measure, wins_by_score(names, TRAINED, score_KPS), outcomes(score_KPS)
    else:
        by, won = judge or "", _judged(answers, asked, other_judge, console)
        games = games_of(names, TRAINED, won)
    rows = [figures(name, given, score_KPS[k], example) for k, (name, given) in enumerate(answers.items())]
    rated = elo(games, seeds)
    found = contests(answers, TRAINED, won, score_KPS, rated)
    safe = _safety(session, run_dir, {"base": who[0], TRAINED: who[-1]}, items, safety_set, adapter, console) if items else None
    repeated = asked.some([*range(len(asked))] * seeds)
    aim = json.loads((run_dir.path / AIM).read_text("utf-8")) if (run_dir.path / AIM).is_file() else None
    result: dict[str, Any] = {
        "adapter_sha256": adapter_digest(start),
        "asked": prompts.name if prompts else HELD_OUT,
        "prompts": len(asked),
        "seeds": seeds,
        "temperature": temperature,
        "top_p": top_p,
        "adapter": adapter,
        "measure": measure,
        "judge": by.rpartition("#")[2] if isinstance(other_judge, ModelJudge) else by,
        "measures": [asdict(row) for row in rows],
        "contests": found,
        "elo": {name: above[0].bounded() for name, above in zip(names, rated, strict=True)},
        "kinds": {name: by_kind(repeated, [a.answer for seed in given for a in seed]) for name, given in answers.items()}
        if measure == HARMLESS
        else {},
        "aim": aim,
        "categories": by_category(answers, won, score_KPS, asked.labels) if asked.labels else [],
        "safety": safe,
    }
    if isinstance(other_judge, ModelJudge):
        result["judging"] = {"asked": other_judge.asked, "malformed": other_judge.malformed, "tokens": other_judge.tokens}
    if as_json:
        print(json.dumps(result))
        _keep(run_dir, file_of(COMPARISON, adapter, prompts.name if prompts else ""), result, console)
        return 0
    _show(console, result, rows, found)
    if isinstance(other_judge, ModelJudge):
        unread = f"{other_judge.malformed} verdicts couldn't be read and count as ties"
        console.print(f"[dim]the judge was asked {other_judge.asked} times ({other_judge.tokens} tokens); {unread}[/]")
        if other_judge.malformed > UNREAD * 2 * len(found) * len(asked) * seeds:
            console.print(f"[bold yellow]{unread}: so many draw every win rate towards 50 %. Take another judge.[/]")
    console.print(f"asked: {clean(asked.requests[example][-1]['content'])}")
    for row in rows:
        console.print(f"[bold]{clean(row.name)}[/]: {clean(row.example, EXAMPLE)}")
    tellings = rows[1 : 1 + len(told)]
    best = [replace(max(tellings, key=lambda r: r.score), name="told")] if tellings else []
    last = [rows[0], *best, *rows[1 + len(told) :]]
    _keep(run_dir, file_of(COMPARISON, adapter, prompts.name if prompts else ""), result, console)
    good, why = verdict(by, found, len(asked), shlex.quote(str(run_dir.path)))
    if aim and aim["forced"]:
        console.print("[bold red]This run was forced although its target pointed the wrong way.[/]")
    if measure == DESCRIBED and by == measure:
        console.print(f"[dim]{OWN_EYE}[/]")
    console.print(f"[{'green' if good else 'bold yellow'}]{clean(why)}[/]")
    console.print(clean(" ".join([measure, *(f"{r.name}={r.score:.2f}" for r in last)])))
    return 0


def _keep(run_dir: RunDir, name: str, result: dict[str, Any], console: Console) -> None:
    """Writes a comparison into the run for the model card, unless a larger one of the same held-out prompts and adapter is there."""
    if result["asked"] == HELD_OUT and (run_dir.path / name).is_file():
        old = json.loads((run_dir.path / name).read_text("utf-8"))
        if old["adapter_sha256"] == result["adapter_sha256"] and answers_in(old) > answers_in(result):
            console.print(f"[dim]{name} stays as it was: it holds more answers ({old['prompts']} prompts × {old['seeds']} seeds)[/]")
            return
    run_dir.write(name, json.dumps(result, indent=2) + "\n")


def checkpoints(runs: Sequence[RunDir], *, judge: str | None, as_json: bool, console: Console) -> int:
    """The measure by step, epoch, tokens and minutes, of runs and of the baselines in them: read off what training left, no model needed."""
    found: dict[str, list[Point]] = {}
    own = runs[0].recipe().judge.measure
    measure = judge or own
    if measure not in MEASURES and (judge or any(one.recipe().judge.measure != own for one in runs)):
        raise RunError(f"--checkpoints takes the runs' own measure, or a code measure: --judge {', '.join(MEASURES)}.")
    for run_dir in runs:
        name = run_dir.path.resolve().name if run_dir.path.resolve().name not in found else str(run_dir.path)
        found[name] = of_run(run_dir, MEASURES.get(measure))
        for folder in sorted(file.parent for file in (run_dir.path / "baselines").glob(f"[a-z]*/{RECORD}")):
            record = json.loads((folder / RECORD).read_text("utf-8"))
            if curve := of_baseline(folder, record["epochs"] / record["steps"], MEASURES.get(measure)):
                found[f"{name}: {shown(record['method'], record.get('pairs'))}"] = curve
    if as_json:
        print(json.dumps({"measure": measure, "curves": {name: [asdict(p) for p in points] for name, points in found.items()}}))
        return 0
    for name, points in found.items():
        cells = [
            [
                str(p.step),
                f"{p.epoch:.2f}",
                f"{p.tokens:.0f}",
                f"{p.seconds / 60:.1f}",
                f"{p.score:.3f}",
                f"{p.score_se:.3f}",
                f"{p.words:.0f}",
            ]
            for p in points
        ]
        console.print(table(clean(name), ["step", "epoch", "tokens", "minutes", measure, "± se", "words"], cells))
        reached = until(points)
        console.print(f"{measure} {spark([p.score for p in points])}  " + (f"90 % of the gain after {reached.tokens:.0f} tokens, {reached.seconds / 60:.1f} minutes" if reached else "nothing gained"))  # fmt: skip
    return 0


def _others(run_dir: RunDir, others: Sequence[RunDir], adapter: str) -> dict[str, Path]:
    """Name → adapter of the other runs, each checked to be of the first one's base before anything heavy."""
    found: dict[str, Path] = {}
    mine = run_dir.recipe().model.quantization
    for other in others:
        folder = other.trained(adapter)
        check_adapter_of(run_dir, folder)
        its = other.recipe().model.quantization
        if its != mine:
            raise RunError(f"{other.path} was trained on its base in {its} and {run_dir.path} in {mine}: one base answers for all, so compare runs of one kind.")  # fmt: skip
        name = other.path.resolve().name
        names = itertools.chain([name], (f"{name} (run {number})" for number in itertools.count(2)))
        found[next(one for one in names if one not in found and one not in ("base", TRAINED, *METHODS))] = folder
    return found


def _ask(
    session: Session,
    run_dir: RunDir,
    who: Sequence[Answerer],
    asked: Prompts,
    index: Sequence[int],
    samplers: Sequence[Sampler],
    console: Console,
) -> Answers:
    answers = {}
    with within_memory(session.recipe, "in that file, and compare again"), counting(console, "answering") as progress:
        task = progress.add_task("", total=len(who) * len(samplers) * len(asked))
        advance: Callable[[int], None] = lambda rows: progress.advance(task, rows)  # noqa: E731
        for one in who:
            progress.update(task, description=clean(one.name))
            if progress.disable:
                console.print(f"answering: {clean(one.name)}")
            answers[one.name] = collect(session, run_dir.path, one, asked.requests, samplers, advance, index=index)
    return answers


def _show(
    console: Console,
    result: dict[str, Any],
    rows: Sequence[Figures],
    found: Sequence[dict[str, Any]],
) -> None:
    measure, by = result["measure"], result["judge"]
    prompts, seeds = result["prompts"], result["seeds"]
    asked = f"{prompts} prompt{'s' * (prompts > 1)} × {seeds} seed{'s' * (seeds > 1)}, temperature {result['temperature']:g}, top-p {result['top_p']:g}"
    empty, refused = any(r.empty_share for r in rows), any(r.refused_share >= 0.05 for r in rows)
    columns = [
        "",
        measure,
        "words",
        "ended",
        *(["empty"] if empty else []),
        *(["refused"] if refused else []),
        "repeats",
        "distinct",
        "nats",
    ]
    cells = [
        [
            clean(_short(r.name)), f"{r.score:.3f}" + ("" if r.score_se is None else f" ± {r.score_se:.3f}"), f"{r.words_median:g}", f"{r.ended_share:.0%}",
            *([f"{r.empty_share:.0%}"] if empty else []), *([f"{r.refused_share:.0%}"] if refused else []), f"{r.repetition:.0%}", f"{r.distinct_2:.2f}", f"{r.base_nll:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    console.print(table(f"answers: {asked}", columns, cells))
    console.print(
        "[dim]words: median · repeats: 3-grams said before · distinct: different 2-grams · nats: how strange a token is to the base[/]"
    )
    if prompts > 1:
        cells = []
        for one in found:
            rate, controlled, name = Estimate(**one["win_rate"]), Estimate(**one["length_controlled"]), one["against"]
            cells.append(
                [
                    clean(_short(name)),
                    rate.percent() + (" *" if one["significant"] else "  "),
                    "" if by == "shorter" else controlled.percent(),
                    "{value:+.0f}".format(**one["elo"])
                    + (f" ({_points(one['elo']['low'], '−')}..{_points(one['elo']['high'], '+')})" if prompts >= FEWEST else ""),
                ]
            )
        title = f"{TRAINED} wins by {by} (95 % intervals; * significant by itself; ties are halves)"
        console.print(table(title, ["against", "win rate", "at equal length", "Elo above it"], cells))
        if prompts < FEWEST:
            console.print(f"[dim]{prompts} prompts are too few to call anything significant, or for an interval of Elo[/]")
    if result["kinds"]:
        cells = [
            [clean(_short(name)), *(f"{kinds[k][0]} of {kinds[k][1]}" for k in ("refuse", "answer"))]
            for name, kinds in result["kinds"].items()
        ]
        console.print(table("right answers", ["", "refused as they should be", "answered as they should be"], cells))
    if result["safety"]:
        show_safety(console, result["safety"])
    if result["categories"]:
        names = list(result["categories"][0]["scores"])
        cells = [
            [clean(c["category"]), str(c["prompts"]), *(f"{c['scores'][n]:.3f}" for n in names), Estimate(**c["win_rate"]).percent()]
            for c in result["categories"]
        ]
        console.print(table(f"{measure} by category", ["", "prompts", *map(clean, names), f"{TRAINED} beats base"], cells))
        if measure in MEASURES and measure != "shorter":
            console.print(f"[dim]{measure} is read off English words: of other languages it tells little[/]")


def _points(elo: float | None, sign: str) -> str:
    """A bound of an Elo difference; None is that there isn't one."""
    return f"{sign}∞" if elo is None else f"{elo:+.0f}"


def _short(name: str) -> str:
    return name.replace(" turn)", ")")


def _judge(name: str, rubric: str, run_dir: RunDir, console: Console) -> Any:
    """The judge behind a name that isn't a code measure; RunError for one that there isn't."""
    if name == "me":
        if not console.is_terminal:
            raise RunError("--judge me asks in a terminal: run it there, or name another judge.")
        console.print(clean(rubric))
        return Human(console.input, lambda text: console.print(harmless(text), markup=False), Kept(run_dir.path / JUDGEMENTS))
    found = named(name, rubric, run_dir.path / JUDGEMENTS)
    if found is None:
        raise RunError(f"--judge {name!r} isn't one of {', '.join(NAMES)}, me, reward:NAME, URL#MODEL.")
    return found


def _judged(answers: Answers, asked: Prompts, judge: Any, console: Console) -> dict[str, Any]:
    total = (len(answers) - 1) * len(asked) * len(next(iter(answers.values())))
    if isinstance(judge, Human):
        judge.total = total
    else:
        console.print(
            f"[dim]the judge is asked some {2 * total} times: {total} pairs, each in both orders; --count and --seeds make it fewer[/]"
        )
    with counting(console, "judging", quiet=isinstance(judge, Human)) as progress:
        task = progress.add_task("", total=total)
        return wins_by_judge(answers, TRAINED, asked.requests, judge.prefers, lambda done: progress.advance(task, done))


def _rewarded(answers: Answers, asked: Prompts, judge: RewardModel, console: Console) -> Any:
    with counting(console, "judging") as progress:
        task = progress.add_task("", total=len(answers) * len(asked) * len(next(iter(answers.values()))))

        def score(request: Any, text: str) -> float:
            progress.advance(task)
            return judge.score(request, text)

        return scores_on(answers, asked.requests, score)


def _safety(
    session: Session, run_dir: RunDir, who: dict[str, Answerer], items: Sequence[Any], own: Path | None, which: str, console: Console
) -> dict[str, Any]:
    with within_memory(session.recipe, "in that file, and compare again"), counting(console, "safety") as progress:
        task = progress.add_task("before and after", total=len(who) * len(items))
        return check(
            session,
            run_dir,
            who,
            items,
            lambda rows: progress.advance(task, rows),
            adapter=who[TRAINED].of,
            which=which,
            own=own.name if own else "",
        )


def _example(asked: Prompts) -> int:
    """The prompt shown as an example: a short one, the same for every answerer."""
    lengths = np.array([len(request[-1]["content"]) for request in asked.requests])
    return int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
