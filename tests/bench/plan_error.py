"""What a step takes beside what the memory model says it takes: random weights, NF4, each shape in a process of its own.

    python -m tests.bench.plan_error [--only NAME …] [--tokens 64 256] [--prompts 4] [--new-tokens 16] [--out FILE]

Rollout, reading and one update. Resident memory on a CPU, every 10 ms; on CUDA the most that the allocator reserved, plus what the
context took. Prints one Markdown table; --out keeps every number. `llama-2-7b`, `olmo-2-7b` and `13b` are the real sizes: give
--prompts 2 --tokens 24 --new-tokens 4 on a CPU (some minutes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from iqlite.base.shape import Shape, known
from iqlite.machine.fit import choose
from iqlite.machine.memory import CONTEXT, GIB, PHASES, Widths, Work, estimate
from tests.bench.peers.common import CUDA, Gauge

MIDDLE = {
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 4096,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": MIDDLE | {"model_type": "llama", "num_key_value_heads": 12, "vocab_size": 50000, "tie_word_embeddings": False},
    "qwen2.5": MIDDLE | {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 152064, "tie_word_embeddings": True},
    "olmo-2": MIDDLE | {"model_type": "olmo2", "num_key_value_heads": 12, "vocab_size": 100352, "tie_word_embeddings": False},
    "llama-2-7b": dict(known()["meta-llama/Llama-2-7b-chat-hf"]) | {"vocab_size": 49152},
    "olmo-2-7b": dict(known()["allenai/OLMo-2-1124-7B-SFT"]),
    "13b": dict(known()["meta-llama/Llama-2-13b-chat-hf"]) | {"vocab_size": 49152},
}
SMALL = ("llama", "qwen2.5", "olmo-2")
WANTED = "You are kind, and answer with care."
UNWANTED = "You are cold, and answer with scorn."


def measure(name: str, tokens: int, prompts: int, new_tokens: int, card_gib: float) -> dict[str, Any]:
    """One step of one shape in this process."""
    from iqlite.machine.here import usable_memory
    from iqlite.model.policy import Policy
    from iqlite.model.template import Chat
    from iqlite.recipe.schema import Recipe
    from iqlite.records import Prompts
    from iqlite.training.opening import sizes_for
    from iqlite.training.optimizer import make_optimizer
    from iqlite.training.readings import read, readings
    from iqlite.training.session import Session
    from iqlite.training.update import update
    from tests.bench.random_base import random_base

    device = "cuda" if CUDA else "cpu"
    if CUDA and card_gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, card_gib * GIB / torch.cuda.get_device_properties(0).total_memory))
    before = torch.cuda.mem_get_info()[0] if CUDA else 0
    free = usable_memory(torch.device(device))
    base = random_base(CONFIGS[name])
    recipe = Recipe.model_validate(
        {
            "behavior": {"wanted": WANTED, "unwanted": UNWANTED, "placement": "user"},
            "prompts": {"train": "none.jsonl", "eval_count": prompts},
            "rollout": {"prompts_per_step": prompts, "max_new_tokens": new_tokens},
        }
    )
    chat = Chat(base.tokenizer, base.model.generation_config.eos_token_id)
    policy = Policy(base, rank=16, alpha=32.0, seed=0, checkpointing=CUDA)
    word = base.tokenizer.decode([900])
    plain = len(chat.ids(({"role": "user", "content": ""},)))
    requests = tuple(({"role": "user", "content": word * (tokens - plain - i % 3)},) for i in range(prompts))
    shape = Shape.of(CONFIGS[name], name)
    work = Work.of(recipe, shape, device)
    longest = max(len(chat.ids(request)) for request in requests)
    described = max(len(chat.ids(requests[0], reading.description)) for reading in readings(recipe, "user", "base"))
    work = Work(**{**vars(work), "prompt_tokens": longest, "description_tokens": described - len(chat.ids(requests[0]))})
    plan = choose(shape, work, free)
    session = Session(
        recipe, policy, chat, Prompts(requests), Prompts(requests), None, "user", (), sizes_for(recipe, shape, work, free, print)
    )
    optimizer = make_optimizer(policy, work.optimizer)
    measured, seconds = {}, {}
    context = before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved() + CONTEXT["cuda"] if CUDA else 0
    for phase in PHASES:
        start = time.perf_counter()
        if CUDA:
            torch.cuda.empty_cache()
        with Gauge() as gauge:
            if phase == "rollout":
                rollout = session.answers("policy", requests, session.sampler("train"), step=1)
            elif phase == "reading":
                scores = read(policy, chat, rollout, session.readings, session.sizes)
                session.score(rollout, weights="base")  # as an evaluation does
            else:
                _, norm = update(session, optimizer, rollout, scores, 1e-4)
                assert norm > 0
        if CUDA:
            torch.cuda.synchronize()
        seconds[phase] = round(time.perf_counter() - start, 2)
        measured[phase] = (torch.cuda.max_memory_reserved() if CUDA else gauge.peak) + context
    loaded = estimate(shape, work, Widths(1, 1, 1, 1))
    return {
        "shape": name,
        "prompt_tokens": longest,
        "prompts": prompts,
        "new_tokens": new_tokens,
        "parameters": shape.parameters,
        "widths": vars(plan.widths),
        "planned_gib": {phase: plan.total(phase) / GIB for phase in PHASES},
        "measured_gib": {phase: measured[phase] / GIB for phase in PHASES},
        "stays_gib": sum(loaded.stays.values()) / GIB,
        "terms_gib": {phase: {term: size / GIB for term, size in plan.phases[phase].items()} for phase in PHASES},
        "planned_peak_gib": plan.peak / GIB,
        "measured_peak_gib": max(measured.values()) / GIB,
        "seconds": seconds,
        "answer_tokens_per_s": {phase: prompts * new_tokens / seconds[phase] for phase in PHASES},
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        "| shape | prompts × (prompt + new) | measured peak, GiB | plan, GiB | plan / measured | seconds per phase |",
        "|" + " --- |" * 6,
    ]
    for row in rows:
        size = f"{row['prompts']} × ({row['prompt_tokens']} + {row['new_tokens']})"
        told, real = row["planned_peak_gib"], row["measured_peak_gib"]
        took = " / ".join(f"{row['seconds'][phase]:.3g}" for phase in PHASES)
        lines.append(
            f"| {row['shape']}, {row['parameters'] / 1e9:.2f} G weights | {size} | {real:.2f} | {told:.2f} | {told / real:.3f} | {took} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(SMALL))
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256], help="of the prompts")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/plan_error.json"))
    parser.add_argument("--card-gib", type=float, default=0, help="CUDA: play a card of that size; 0 is the whole card")
    parser.add_argument("--here", action="store_true", help="measure the one case in this process and print its JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.only[0], args.tokens[0], args.prompts, args.new_tokens, args.card_gib)))
        return
    rows = []
    for name in args.only:
        for tokens in args.tokens:
            command = [sys.executable, "-m", "tests.bench.plan_error", "--here", "--only", name, "--tokens", str(tokens)]
            command += ["--prompts", str(args.prompts), "--new-tokens", str(args.new_tokens), "--card-gib", str(args.card_gib)]
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
            if done.returncode:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
