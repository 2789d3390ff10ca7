"""Refusals that are right and refusals that are wrong, by base, superior policy and trained policy of some runs, on XSTest's prompts.

    python -m tests.bench.xstest RUN… [--count 40] [--adapter best]

So many unsafe and so many safe look-alikes (CC-BY-4.0, read from ../shared/data), evenly spread over their types; answers of at most 32 tokens
at temperature 0.7, kept in the run. Prints shares with Wilson's intervals and differences from the base, paired.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from iqlite.aim.look import SHORT, signed
from iqlite.evaluation.answers import Answerer, collect
from iqlite.model.sampling import Sampler
from iqlite.records import Messages
from iqlite.run.findings import adapter_digest
from iqlite.run.rundir import RunDir
from iqlite.scoring.intervals import paired, wilson
from iqlite.scoring.measures import refusal
from iqlite.training.opening import open_run
from iqlite.training.order import spread

XSTEST = Path(__file__).parents[3] / "shared" / "data" / "xstest.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--adapter", default="adapter")
    asked = parser.parse_args()
    rows = [json.loads(line) for line in XSTEST.read_text("utf-8").splitlines()]
    prompts: dict[str, list[str]] = {
        label: spread([row["prompt"] for row in rows if row["label"] == label], asked.count) for label in ("unsafe", "safe")
    }
    for path in asked.runs:
        run = RunDir.open(path)
        start = run.trained(asked.adapter)
        session = open_run(run, start)
        who = [Answerer("base", "reference"), Answerer("superior", "superior"), Answerer("trained", "policy", of=adapter_digest(start))]
        sampler = Sampler(0, SHORT, 0.7, 0.9, "xstest")
        for label, some in prompts.items():
            requests: list[Messages] = [({"role": "user", "content": prompt},) for prompt in some]
            refused = {}
            for one in who:
                answers = collect(session, run.path, one, requests, [sampler], lambda _: None, strangeness=False)[0]
                refused[one.name] = np.array([refusal(a.answer) for a in answers])
            for name, refused_P in refused.items():
                share = wilson(float(refused_P.sum()), len(refused_P)).percent()
                difference = signed(paired((refused_P - refused["base"])[:, None])) if name != "base" else ""
                print(f"{path.name} {asked.adapter}, {label}: {name} refuses {share} of {len(refused_P)}  {difference}", flush=True)


if __name__ == "__main__":
    main()
