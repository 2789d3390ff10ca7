"""iqlite's speed and memory against its nearest peers, as ratios within one run: python -m tests.bench.speed (make bench).

    python -m tests.bench.speed [--only steps rollout loss growth tone] [--tone] [--out runs/bench/speed] [--repetitions 3]

steps    iqlite's step, TRL's SDFT, DistillationTrainer and GRPO, each in a process of its own: response tokens a second, memory growth
rollout  iqlite's sampling and transformers' generate() on the same base and adapter: tokens a second
loss     the loss by chunks and with all logits at once, each in a process of its own: extra memory, seconds
growth   an iqlite step as new tokens, and as prompts, double: exponents of time and memory growth
tone     what is learned in twenty steps, and in how many minutes: iqlite and SDFT (about 20 minutes, only when asked for)

A machine's speed drifts, so competitors take turns (A B A B A B) and a ratio is taken within each repetition. Writes speed.json (every
raw number) and speed.md (one table) into --out after every repetition; parts that aren't run again keep what speed.json has of them.
Smaller sizes (see --help) are for smoke runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch

from iqlite.base.names import locate
from iqlite.device import here
from iqlite.recipe.reading import load_recipe
from tests.bench.speed_table import PEERS, markdown

RECIPE, PROMPTS = Path("recipes/cheerful-135m.toml"), Path("recipes/prompts/everyday.jsonl")
PACKAGES = ("iqlite", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl", "numpy")


class ChildFailed(Exception):
    """A measuring process ended badly."""


class Bench:
    """The command line, the base's folder, and what has been measured so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.model = args, locate(args.model)
        self.machine = machine()
        self.wanted = load_recipe(RECIPE).behavior.wanted or ""
        self.json, self.markdown = args.out / "speed.json", args.out / "speed.md"
        self.record: dict[str, Any] = json.loads(self.json.read_text("utf-8")) if self.json.exists() else {}

    def begin(self, part: str, **settings: Any) -> dict[str, Any]:
        """An empty record of a part; its `runs` are to be filled."""
        self.record[part] = {"machine": self.machine, "settings": settings, "runs": {}}
        runs: dict[str, Any] = self.record[part]["runs"]
        return runs

    def save(self) -> None:
        self.args.out.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(self.record, indent=1) + "\n", "utf-8")
        self.markdown.write_text(markdown(self.record), "utf-8")

    def child(self, module: str, **options: Any) -> dict[str, Any]:
        """Runs a measuring module in a fresh process; returns its last line's JSON, with the whole process's seconds."""
        command = [sys.executable, "-m", f"tests.bench.{module}"]
        for name, value in options.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            command += [f"--{name.replace('_', '-')}"] + [str(one) for one in values if one is not True]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ChildFailed(f"{module} ended with {done.returncode}: {last}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        found["process_seconds"] = round(time.perf_counter() - start, 1)
        return found

    def step(self, side: str, **options: Any) -> dict[str, Any]:
        """One run of iqlite's step or of a peer's."""
        out = {"out": self.args.out / "scratch"} | options
        told = {"wanted": self.wanted} if side == "sdft" else {}
        module = "iqlite_step" if side == "iqlite" else f"trl_{side}"
        return self.child(f"peers.{module}", model=self.model, prompts=PROMPTS, rank=16, **told, **out)


def say(*words: Any) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def steps(bench: Bench) -> None:
    """iqlite and its peers in turn."""
    args = bench.args
    common = {"steps": args.steps, "batch": args.batch, "new_tokens": args.new_tokens, "lr": 3e-4}
    runs = bench.begin("steps", **common, rank=16, alpha=32)
    for quantization in args.quantizations:
        runs[quantization] = []
        for repetition in range(args.repetitions):
            found = {}
            for side in ("iqlite", *PEERS):
                found[side] = bench.step(side, quantization=quantization, **common)
                rate, growth = found[side]["response_tokens_per_second"], found[side]["growth_mib"]
                say(f"steps, {quantization}, {repetition + 1}/{args.repetitions}, {side}: {rate} tokens/s, grows by {growth} MiB")
            runs[quantization].append(found)
            bench.save()


def rollout(bench: Bench) -> None:
    """One process for each quantisation; its sides take turns inside."""
    args = bench.args
    runs = bench.begin("rollout", new_tokens=args.new_tokens)
    for quantization in args.quantizations:
        found = bench.child(
            "speed_rollout", model=bench.model, quantization=quantization, batches=args.rollout_batches,
            new_tokens=args.new_tokens, repetitions=args.repetitions,
        )  # fmt: skip
        runs[quantization] = {str(rows): found[str(rows)] for rows in args.rollout_batches}
        say(f"rollout, {quantization}: done in {found['process_seconds']} s")
        bench.save()


def loss(bench: Bench) -> None:
    """By chunks and plainly, in turn."""
    args = bench.args
    runs = bench.begin("loss", shape=args.loss_shape)
    runs["pairs"] = []
    for repetition in range(args.repetitions):
        found = {}
        for side in ("chunked", "plain"):
            found[side] = bench.child("speed_loss", side=side, shape=args.loss_shape, chunk_tokens=args.chunk_tokens)
            seconds, extra = found[side]["seconds"], found[side]["extra_mib"]
            say(f"loss, {repetition + 1}/{args.repetitions}, {side}: {seconds} s, {extra} MiB more")
        runs["pairs"].append(found)
        bench.save()


def growth(bench: Bench) -> None:
    """iqlite's step over all sizes, then again."""
    args = bench.args
    points = {
        "tokens": [(args.batch, tokens) for tokens in args.growth_tokens],
        "prompts": [(prompts, args.new_tokens) for prompts in args.growth_prompts],
    }
    runs = bench.begin("growth", steps=args.steps, quantization=args.growth_quantization)
    runs.update({name: [] for name in points})
    for repetition in range(args.repetitions):
        found = {}
        for prompts, tokens in sorted({point for line in points.values() for point in line}):
            options = {"batch": prompts, "new_tokens": tokens, "steps": args.steps, "quantization": args.growth_quantization}
            one = found[prompts, tokens] = bench.step("iqlite", **options) | {"prompts": prompts, "new_tokens": tokens}
            where = f"{prompts} prompts × {tokens} tokens"
            say(f"growth, {repetition + 1}/{args.repetitions}, {where}: {one['seconds_per_step']} s, {one['growth_mib']} MiB")
        for name, line in points.items():
            runs[name].append([found[point] for point in line])
        bench.save()


def tone(bench: Bench) -> None:
    """The same number of steps and rate for each; what their answers sound like afterwards."""
    args = bench.args
    common = {"steps": args.tone_steps, "batch": args.batch, "new_tokens": args.new_tokens, "lr": 6e-4, "quantization": "nf4"}
    sides: dict[str, tuple[str, dict[str, Any]]] = {
        "full-kl": ("iqlite", {"objective": "full-kl"}),
        "squared": ("iqlite", {"objective": "squared"}),
        "sdft": ("sdft", {}),
    }
    runs = bench.begin("tone", **common)
    answers = {"model": bench.model} | ({"prompts": args.tone_prompts} if args.tone_prompts else {})
    runs["base"] = bench.child("speed_tone", **answers)
    runs["sides"] = []
    for repetition in range(args.tone_repetitions):
        found = {}
        for name, (side, options) in sides.items():
            folder = args.out / f"tone-{name}"
            found[name] = bench.step(side, **common, **options, save=True, seed=repetition, out=folder)
            found[name] |= bench.child("speed_tone", **answers, adapter=folder) | {"process_seconds": found[name]["process_seconds"]}
            say(
                f"tone, {repetition + 1}/{args.tone_repetitions}, {name}: {found[name]['tone']}, {found[name]['seconds_per_step']} s a step"
            )
        runs["sides"].append(found)
        bench.save()


PARTS = {"steps": steps, "rollout": rollout, "loss": loss, "growth": growth, "tone": tone}


def machine() -> dict[str, Any]:
    """What it was measured on: processor, threads, card, versions."""
    device, dtype = here()
    names = Path("/proc/cpuinfo")
    lines = names.read_text("utf-8").splitlines() if names.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="only these parts")
    parser.add_argument("--tone", action="store_true", help="the tone part too")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/speed"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base of all parts but the loss")
    parser.add_argument("--chunk-tokens", type=int, default=0, help='loss: tokens of a chunk; 0 is what a recipe\'s "auto" comes to')
    parser.add_argument("--tone-repetitions", type=int, default=1, help="tone: training seeds")
    smaller = parser.add_argument_group("sizes")
    smaller.add_argument("--steps", type=int, default=5, help="of a run; the first is its warm-up")
    smaller.add_argument("--batch", type=int, default=8, help="prompts of a step")
    smaller.add_argument("--new-tokens", type=int, default=32)
    smaller.add_argument("--quantizations", nargs="+", choices=["none", "nf4"], default=["none", "nf4"])
    smaller.add_argument("--rollout-batches", nargs="+", type=int, default=[1, 8, 32])
    smaller.add_argument("--loss-shape", nargs=3, type=int, default=[2048, 152064, 3584], metavar=("N", "V", "D"))
    smaller.add_argument("--growth-tokens", nargs="+", type=int, default=[16, 32, 64, 128])
    smaller.add_argument("--growth-prompts", nargs="+", type=int, default=[4, 8, 16, 32])
    smaller.add_argument("--growth-quantization", choices=["none", "nf4"], default="nf4")
    smaller.add_argument("--tone-steps", type=int, default=20)
    smaller.add_argument("--tone-prompts", type=int, default=0, help="held-out prompts answered; 0 is all")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    bench, failed = Bench(args), []
    for part in args.only or [name for name in PARTS if name != "tone" or args.tone]:
        try:
            PARTS[part](bench)
        except ChildFailed as error:
            bench.record[part]["failed"] = str(error)
            failed.append(part)
            say(f"{part}: {error}")
        bench.save()
    print(bench.markdown.read_text("utf-8"))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
