"""A card's figures: memory by recipe and size beside `plan` and the played card, tokens a second beside generate() and SDFT.

    python -m tests.gpu.measure fit speed table --out FOLDER [--seconds 180]

Needs no network and no tokenizer: weights are random, of the real shapes. Each case is a process of its own, the worthiest first, and none begins
after so many seconds of its part. Writes FOLDER/card.json, and with `table` FOLDER/card.md. tests/gpu/run.sh calls it. With PLAYED_CARD
set, `fit` plays two layers, which shows that the script works and no more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from iqlite.base.shape import Shape, known
from iqlite.machine.fit import choose, given_widths
from iqlite.machine.memory import CONTEXT, GIB, PHASES, Work, estimate
from iqlite.model.sampling import Sampler
from iqlite.recipe.reading import load_recipe
from iqlite.training.optimizer import make_optimizer
from iqlite.training.readings import read
from iqlite.training.rollout import sample
from iqlite.training.update import update
from tests.bench.random_base import random_base
from tests.card import shapes
from tests.card.played import Counts

RECIPES = Path(__file__).parents[2] / "recipes"
PLAYED = Path(__file__).parents[1] / "bench" / "results" / "plan_play.json"
FITS = [("harmless-7b", 8), ("kind-4b", 6), ("harmless-13b", 12), ("concise-8b", 6), ("harmless-7b", 12), ("concise-7b", 8), ("harmless-12b", 12),
        ("harmless-7b", 24), ("harmless-13b", 24), ("concise-8b", 8), ("concise-7b", 12), ("harmless-12b", 24), ("helpful-harmless-7b", 8)]  # fmt: skip
SPEED_BASE, ROWS, NEW, PROMPT = "meta-llama/Llama-2-7b-chat-hf", (1, 8, 32), 64, 64


class Driver:
    """The real card, asked as `shapes` asks a played one."""

    paged = 0  # the allocator doesn't count pages

    def __init__(self) -> None:
        self.memory, self.counts = self, Counts()

    def reset_peaks(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    @property
    def peak_allocated(self) -> int:
        return torch.cuda.max_memory_allocated()

    @property
    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved()


def fit(name: str, gb: float) -> dict[str, Any]:
    """A step of a recipe on a card with so much memory: GiB by phase, without the driver's context."""
    path = RECIPES / f"{name}.toml"
    if "PLAYED_CARD" in os.environ:
        played = shapes.play(path, gb, layers=2, card=os.environ["PLAYED_CARD"])
        peaks, said = played.peaks, list(played.said)
    else:
        recipe = load_recipe(path, [])
        config, free = shapes.config_of(recipe.model.base), shapes.FREE * gb * GIB
        work, plan = shapes.planned_for(recipe, recipe.model.base, gb)
        plan = estimate(Shape.of(config, recipe.model.base), work, plan.widths)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (free - CONTEXT["cuda"]) / torch.cuda.get_device_properties(0).total_memory))
        said = []
        with shapes.answers_of(shapes.DECODED):
            session, full_length = shapes.session_of(random_base(config, tokenizer=False), recipe, work, plan.widths, said.append)
            peaks = tuple(shapes.steps_of(Driver(), session, full_length, plan, work, False))
    phases = {p.phase: {"plan": p.planned / GIB, "allocated": p.allocated / GIB, "reserved": p.reserved / GIB} for p in peaks}
    return {"recipe": name, "gb": gb, "phases": phases, "full": said}


def speed(way: str) -> dict[str, Any]:
    """Tokens a second with a 7B shape and rank 16: "iqlite", every phase; "generate" with PEFT, dynamic and static cache."""
    base = random_base(known()[SPEED_BASE], tokenizer=False)
    ids = [[10 + row] * PROMPT for row in range(max(ROWS))]
    found: dict[str, Any] = {"way": way}
    if way == "iqlite":
        recipe = load_recipe(RECIPES / "harmless-7b.toml", [f"model.base={SPEED_BASE}", "prompts.max_tokens=64", "adapter.rank=16"])
        shape = Shape.of(known()[SPEED_BASE], SPEED_BASE)
        work, free = Work.of(recipe, shape, "cuda"), torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        plan = choose(shape, work, free, given_widths(recipe))
        session, full_length = shapes.session_of(base, recipe, work, plan.widths, print)
        policy, sizes = session.policy, session.sizes

        def drawn(rows: int, step: int, new: int = NEW) -> int:
            requests = list(session.train.requests[:rows])
            made = sample(policy, "policy", requests, ids[:rows], range(rows), [0], Sampler(0, new), step=step, sizes=sizes)
            return int(made.mask_BT.sum())

        found["rollout"] = {rows: timed(lambda rows=rows: drawn(rows, 1), lambda rows=rows: drawn(rows, 0)) for rows in ROWS}
        rollout, optimizer = full_length(list(session.train.requests[:16])), make_optimizer(policy, work.optimizer)
        tokens = int(rollout.mask_BT.sum())

        def reading() -> int:
            found["scores"] = read(policy, session.chat, rollout, session.readings, sizes)
            return tokens

        def updated() -> int:
            update(session, optimizer, rollout, found["scores"], 1e-4)
            return tokens

        found |= {"reading": timed(reading, reading), "update": timed(updated, updated)}
        del found["scores"]
        return found
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(base.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for cache in ("dynamic", "static"):

        def generated(rows: int, new: int = NEW, cache: str = cache) -> int:
            given = torch.tensor(ids[:rows], device=base.device)
            options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
            with torch.no_grad():
                model.generate(
                    input_ids=given, attention_mask=torch.ones_like(given), do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new,
                    pad_token_id=0, disable_compile=True, **options,
                )  # fmt: skip
            return rows * new

        found[cache] = {rows: timed(lambda rows=rows: generated(rows), lambda rows=rows: generated(rows, 4)) for rows in ROWS}
    return found


def timed(work: Any, warm_up: Any) -> float:
    """Tokens a second."""
    warm_up()
    torch.cuda.synchronize()
    start = time.perf_counter()
    tokens: int = work()
    torch.cuda.synchronize()
    return tokens / (time.perf_counter() - start)


def sdft(folder: Path) -> list[list[str]]:
    """Commands: a small base with random weights, then iqlite's step beside TRL's SDFT on it. None where TRL isn't there."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
        return []
    size = "hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=4"
    make = f"from pathlib import Path; from tests.helpers.tiny import save_tiny; save_tiny(Path({str(folder / 'base')!r}), {size})"
    options = ["--only", "steps", "--repetitions", "1", "--steps", "3", "--quantizations", "nf4", "--model", str(folder / "base")]
    return [[sys.executable, "-c", make], [sys.executable, "-m", "tests.bench.speed", *options, "--out", str(folder / "speed")]]


def markdown(record: dict[str, Any]) -> str:
    """The tables of what there is."""
    lines = [f"{record['card']}, torch {torch.__version__}", ""]
    played = {(one["recipe"], one["gb"]): one for one in json.loads(PLAYED.read_text("utf-8"))} if PLAYED.exists() else {}
    if fits := record.get("fit"):
        lines += ["| recipe | GB | phase | plan, GiB | allocated | plan's error, % | played | reserved | memory full |", "|" + " --- |" * 9]
    for one in fits or []:
        for phase, row in one.get("phases", {}).items():
            play = played.get((one["recipe"], one["gb"]), {}).get("phases", {}).get(phase, {}).get("played")
            error = 100 * (row["plan"] / row["allocated"] - 1)
            shown = f"{row['plan']:.2f} | {row['allocated']:.2f} | {error:+.1f} | {'' if play is None else f'{play:.2f}'} | {row['reserved']:.2f}"
            lines.append(f"| {one['recipe']} | {one['gb']:g} | {phase} | {shown} | {len(one['full'])} |")
        if "failed" in one:
            lines.append(f"| {one['recipe']} | {one['gb']:g} | failed: {one['failed'].splitlines()[-1][:80]} | | | | | | |")
    if found := {one.get("way"): one for one in record.get("speed", [])}:
        lines += ["", "| tokens a second, 7B shape | " + " | ".join(map(str, ROWS)) + " rows |", "|" + " --- |" * (1 + len(ROWS))]
        for name, rates in (
            ("iqlite, rollout", found.get("iqlite", {}).get("rollout")),
            ("generate, PEFT, dynamic cache", found.get("generate", {}).get("dynamic")),
            ("generate, PEFT, static cache", found.get("generate", {}).get("static")),
        ):
            lines += [f"| {name} | " + " | ".join(f"{rate:,.0f}" for rate in rates.values()) + " |"] if rates else []
        lines += [
            "",
            *(f"{phase}: {found['iqlite'][phase]:,.0f} answer tokens a second" for phase in PHASES[1:] if phase in found.get("iqlite", {})),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["fit", "speed", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180, help="after which no case of a part begins")
    parser.add_argument("--one", nargs="+", help="a case, in this process")
    args = parser.parse_args()
    if args.one:
        found = fit(args.one[0], float(args.one[1])) if args.parts == ["fit"] else speed(args.one[0])
        print(json.dumps(found))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "card.json"
    record: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    record["card"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"played {os.environ.get('PLAYED_CARD', '')}"
    size = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 24
    cases = {"fit": [[name, str(gb)] for name, gb in FITS if gb <= size + 1], "speed": [["iqlite"], ["generate"]]}
    for part in args.parts:
        if part == "table":
            (args.out / "card.md").write_text(markdown(record), "utf-8")
            print(markdown(record))
            continue
        record[part], end = [], time.monotonic() + args.seconds
        for given in cases[part]:
            if (left := end - time.monotonic()) <= 0:
                break
            command = [sys.executable, "-m", "tests.gpu.measure", part, "--out", str(args.out), "--one", *given]
            record[part].append(
                _run(command, left + 30) | ({"recipe": given[0], "gb": float(given[1])} if part == "fit" else {"way": given[0]})
            )
            file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        if part == "speed":
            for more in sdft(args.out):
                if (left := end - time.monotonic()) > 0:
                    subprocess.run(more, timeout=left + 30, check=False)


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": "no time left"}
    if done.returncode:
        return {"failed": done.stderr[-2000:] or "?"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
