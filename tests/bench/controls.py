"""Controls: what must not work, trained like the demo. If one does as well as the method, that is the finding.

    python -m tests.bench.controls [--steps 6] [--seeds 0 1 2] [--only NAME …]

swapped           the demo's two descriptions, the other way round: the tone must fall
unrelated         two descriptions that say nothing about the tone: it must stay
same twice        the wanted description in both places, once without its full stop (the very same is refused): nothing of the tone may be learned
sharpened base    no descriptions: the base at temperature 1/2 as target, by full KL. What comes of unlikely tokens pushed down, whatever they say
unlikely punished no descriptions: −1 for each sampled token that the policy gave less than 0.1, else 0, by policy gradient (arXiv 2608.31046)
policy gradient   the method with that objective, to stand beside it

Rows like ablations': tone of 24 held-out answers at temperature 1 before and after, means over the training seeds with (min..max); then each seed's
gain. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from iqlite.evaluation.curves import of_run
from iqlite.recipe.reading import load_recipe
from iqlite.run.rundir import RunDir
from iqlite.scoring.measures import tone
from tests.bench.methods_table import spread

OUT, RECIPE = Path("runs/bench/controls"), Path("recipes/cheerful-135m.toml")
UNRELATED = ("You always answer in the present tense.", "You always answer in the past tense.")
UNLIKELY = 0.1  # a sampled token that the policy gave less is one
CONTROLS = ("method", "swapped", "unrelated", "same twice", "sharpened base", "policy gradient", "unlikely punished")


def settings_of(name: str) -> dict[str, object]:
    """What is changed in the demo's recipe."""
    behavior = load_recipe(RECIPE).behavior
    texts = {
        "swapped": (behavior.unwanted, behavior.wanted),
        "unrelated": UNRELATED,
        "same twice": (behavior.wanted, (behavior.wanted or "").removesuffix(".")),
    }.get(name, (behavior.wanted, behavior.unwanted))
    objective = "policy-gradient" if name in ("policy gradient", "unlikely punished") else "full-kl"
    return {"behavior.wanted": texts[0], "behavior.unwanted": texts[1], "behavior.placement": "user", "objective.name": objective}


def put_in_place(name: str) -> None:
    """A control without descriptions takes the place of the estimate, or of the advantages, in this process."""
    import torch

    from iqlite.method import estimators
    from iqlite.training import update

    if name == "sharpened base":

        @functools.wraps(estimators.contrastive)  # whose settings the recipe has
        def sharpened(reference_nV: torch.Tensor, wanted_nV: torch.Tensor, unwanted_nV: torch.Tensor, **_: float) -> estimators.Estimate:
            return (2 * reference_nV).log_softmax(-1), {}

        estimators.ESTIMATORS["contrastive"] = sharpened
    if name == "unlikely punished":
        theirs = update.rollout_advantages

        def punished(*given: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            logp_BT, _ = theirs(*given)
            assert logp_BT is not None
            return logp_BT, -((logp_BT.exp() < UNLIKELY) & given[1].learned_BT.to(logp_BT.device)).float()

        update.rollout_advantages = punished  # type: ignore[assignment]


def train(name: str, seed: int, steps: int) -> RunDir:
    """The control's run, done now unless it is there, in a process of its own."""
    path = OUT / f"{name.replace(' ', '-')}-{seed}"
    if not (path / "result.json").exists():
        kept = settings_of(name) | {"train.seed": seed, "train.steps": steps, "train.eval_every": steps, "prompts.eval_count": 24, "judge.aim": False}  # fmt: skip
        words = [part for key, value in kept.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        resume = ["--resume"] if path.exists() else []
        command = ["train", str(RECIPE), "--out", str(path), "--no-safety", *words, *resume]
        subprocess.run([sys.executable, "-m", "tests.bench.controls", "--worker", name, *command], check=True)
    return RunDir.open(path)


def table(found: dict[str, list[list[float]]]) -> str:
    """Markdown of [tone before, after, held-out KL to its own target, words after] of each control's seeds."""
    lines = ["| control | seeds | tone before | tone after | each seed's gain | KL(policy‖target), nats | words |", "|" + " --- |" * 7]
    for name, runs in found.items():
        before, after, kl, words = zip(*runs, strict=True)
        gains = ", ".join(f"{b - a:+.2f}" for a, b in zip(before, after, strict=True))
        cells = [spread(before, "{:.3f}"), spread(after, "{:.3f}"), gains, spread(kl, "{:.3f}"), spread(words, "{:.0f}")]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        from iqlite.cli import main as program

        put_in_place(sys.argv[2])
        sys.argv = ["iqlite", *sys.argv[3:]]
        program()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTROLS, default=CONTROLS)
    args = parser.parse_args()
    found: dict[str, list[list[float]]] = {}
    for seed in args.seeds:
        for name in args.only:
            run = train(name, seed, args.steps)
            first, *_, last = of_run(run, tone)
            found.setdefault(name, []).append([first.score, last.score, run.metrics()[-1]["eval/kl_policy_superior"], last.words])
            (OUT / "controls.md").write_text(table(found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
