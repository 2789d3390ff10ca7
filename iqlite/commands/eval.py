"""`iqlite eval`: what harnesses that people trust say of a run, the base beside the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from iqlite.commands.options import Base, Json, Which
from iqlite.errors import RunError
from iqlite.terminal import Watch, clean, table
from iqlite.terminal import console as terminal

EXAMPLES = (
    "iqlite eval runs/cheerful-135m --tasks inspect_evals/ifeval,gsm8k --limit 50",
    "iqlite eval runs/mine --tasks mine.py,mine.yaml",
)


def eval(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/cheerful-135m.")],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Tasks, with commas: Inspect's with a slash (inspect_evals/ifeval) or a .py file, lm-eval's without (gsm8k) or a .yaml file.",
        ),
    ] = "inspect_evals/ifeval,gsm8k,truthfulqa_mc1",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many samples of each task.")] = None,
    which: Which = "adapter",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Hand a run to Inspect and lm-eval, base beside trained.

    Their own programs ask a server that runs as long as they do. What they say goes into the run, its report and its model card.
    """
    from iqlite.run.rundir import RunDir, check_adapter_of
    from iqlite.serving.running import check_installed

    run = RunDir.open(path, base)
    check_adapter_of(run, run.trained(which))
    check_installed()

    from iqlite.evaluation.harnesses import evaluate, keep, program, task_named
    from iqlite.run.findings import with_error

    named = [task_named(name.strip()) for name in tasks.split(",")]
    for harness in {task.harness for task in named}:
        program(harness)
    console = terminal(stderr=as_json)
    scores = evaluate(run, which, named, limit, Watch(console))
    if not scores:
        raise RunError("the harnesses gave no figure: look at what they wrote into the run's harnesses folder.")
    kept = keep(run, which, scores)
    if as_json:
        print(json.dumps({"adapter": which, "scores": kept}))
        return

    rows = [
        [
            clean(f"{one['task']}, {one['metric']}"),
            f"{one['harness']} {clean(one['harness_version'])}",
            str(one["samples"]),
            with_error(one, "base"),
            with_error(one, "trained"),
        ]
        for one in kept
    ]
    console.print(table("harnesses (± is a standard error)", ["task", "by", "samples", "base", "trained"], rows))
    console.print(f"kept in {run.path}; iqlite report and the model card show it.", markup=False)
