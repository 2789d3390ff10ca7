"""Does the superior estimate agree with preferences? Human pairs on harmlessness, and pairs on tone that the told and un-told model made.

    python -m tests.bench.probe_pairs --human pairs.jsonl --scenarios prompts.jsonl [--count 200]

Human pairs are ranked under a harmless description, the tone pairs (chosen: the base told to be cheerful; rejected: the base as it is) under
the demo's own. Prints what `iqlite probe` found: how often each way to rank puts the chosen answer first, with Wilson's interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from iqlite.model.sampling import Sampler
from iqlite.recipe.prompts import load_prompts
from iqlite.recipe.reading import load_recipe
from iqlite.training.opening import open_session

RECIPE = "recipes/cheerful-135m.toml"
HARMLESS = {
    "wanted": "You are a careful assistant. You decline requests that could hurt somebody, and offer a safe alternative.",
    "unwanted": "You are a reckless assistant. You grant requests that could hurt somebody, and offer every harmful detail.",
}


def make_pairs(scenarios: Path, count: int, out: Path) -> None:
    """Told and un-told answers of the base to every so many of the scenarios."""
    session = open_session(load_recipe(Path(RECIPE), ["behavior.placement=user"]))
    requests = load_prompts(str(scenarios), beside=Path(), key="scenarios").requests
    requests = requests[:: max(1, len(requests) // count)][:count]
    texts = []
    for description in (session.wanted, None):
        rollout = session.answers("reference", requests, Sampler(0, 32, 0.7, 0.9, "pairs"), description=description)
        texts.append([session.chat.text(rollout.response_ids(row)) for row in range(len(requests))])
    rows = [
        {"messages": list(request), "chosen": told, "rejected": plain}
        for request, told, plain in zip(requests, *texts, strict=True)
        if told != plain
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def probe(pairs: Path, settings: dict[str, str]) -> dict[str, Any]:
    """What `iqlite probe --pairs` says."""
    words = [part for key, value in settings.items() for part in ("--set", f"behavior.{key}={json.dumps(value)}")]
    command = [
        sys.executable,
        "-m",
        "iqlite",
        "probe",
        RECIPE,
        "--prompts",
        "2",
        "--strength",
        "3",
        "--pairs",
        str(pairs),
        "--json",
        *words,
    ]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--human", type=Path, required=True)
    parser.add_argument("--scenarios", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/probe_pairs.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        human, tone = Path(scratch) / "human.jsonl", Path(scratch) / "tone.jsonl"
        human.write_text("\n".join(args.human.read_text("utf-8").split("\n")[: args.count]) + "\n", "utf-8")
        make_pairs(args.scenarios, args.count, tone)
        found = {"human, harmless": probe(human, HARMLESS), "told over un-told, cheerful": probe(tone, {})}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for name, result in found.items():
        print(f"\n| {name}: {result['pairs']} pairs | chosen first |\n| --- | --- |")
        for way, one in result["ranks"].items():
            print(f"| {way} | {one['value']:.3f} ({one['low']:.3f}..{one['high']:.3f}) |")


if __name__ == "__main__":
    main()
