"""A model larger than memory, on a CPU: one whole step with its layers in a mapped file, and beside it with all in memory.

    python -m tests.bench.offload [--only 7b 13b] [--with layers none] [--layers N] [--out FILE]

Random weights in NF4. Once the base is in its place the process may have no more than `limit_gb` of data (RLIMIT_DATA; mapped files don't
count, anonymous memory does). Measured are the most anonymous memory that was resident, tokens a second by phase, and passes of the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from iqlite.base.shape import Shape, known
from iqlite.places import cache_folder

CASES: dict[str, dict[str, Any]] = {
    "tiny": {"config": dict(known()["meta-llama/Llama-2-7b-chat-hf"]) | {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 512,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 49152}, "rank": 8, "limit_gb": 1.5},
    "7b": {"config": dict(known()["meta-llama/Llama-2-7b-chat-hf"]) | {"vocab_size": 49152}, "rank": 16, "limit_gb": 1.5},
    "13b": {"config": dict(known()["meta-llama/Llama-2-13b-chat-hf"]) | {"vocab_size": 49152}, "rank": 8, "limit_gb": 2.0},
}  # fmt: skip
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 24, 3
WANTED, UNWANTED = "You are kind, and answer with care.", "You are cold, and answer with scorn."
STATUS = Path("/proc/self/status")


def status(key: str) -> float:
    """A line of the process's status, bytes."""
    return next(1024.0 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))


class Most:
    """The most anonymous memory that was resident within the block, looked at every 10 ms."""

    def __enter__(self) -> Most:
        self.bytes, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.ended.wait(0.01):
            self.bytes = max(self.bytes, status("RssAnon"))

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.thread.join()


def measure(name: str, offload: str, layers: int, *, limited: bool) -> dict[str, Any]:
    """One step in this process; `layers`: fewer than the model has."""
    import resource

    from iqlite.base.loading import let_go_of_files
    from iqlite.base.streaming import stream
    from iqlite.device import let_go
    from iqlite.machine.sizes import Sizes
    from iqlite.model.policy import Policy
    from iqlite.model.template import Chat
    from iqlite.recipe.schema import Recipe
    from iqlite.records import Prompts
    from iqlite.training.optimizer import make_optimizer
    from iqlite.training.readings import read
    from iqlite.training.session import Session
    from iqlite.training.update import training_batches, update
    from tests.bench.random_base import random_base

    case = CASES[name]
    if layers:
        case = case | {"config": case["config"] | {"num_hidden_layers": layers}}
    base = random_base(case["config"], shared=offload == "layers")
    if offload == "layers":
        streamed = stream(base.model, base.anatomy.layers, len(base.anatomy.layers), torch.device("cpu"), cache_folder())
        base = replace(base, streamed=streamed)
        let_go()
    let_go_of_files(torch.nn.Module())  # glibc gives back what it holds
    loaded = status("RssAnon")
    if limited:
        limit = int(case["limit_gb"] * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    recipe = Recipe.model_validate(
        {
            "behavior": {"wanted": WANTED, "unwanted": UNWANTED, "placement": "user"},
            "prompts": {"train": "none.jsonl"},
            "rollout": {"prompts_per_step": PROMPTS, "max_new_tokens": NEW_TOKENS},
        }
    )
    chat = Chat(base.tokenizer, base.model.generation_config.eos_token_id)
    policy = Policy(base, rank=case["rank"], alpha=32.0, seed=0, checkpointing=True)
    word = base.tokenizer.decode([900])
    plain = len(chat.ids(({"role": "user", "content": ""},)))
    requests = tuple(({"role": "user", "content": word * (PROMPT_TOKENS - plain - i)},) for i in range(PROMPTS))
    sizes = Sizes(PROMPTS, 4096, 256, 256, 16)
    session = Session(recipe, policy, chat, Prompts(requests), Prompts(requests), None, "user", (), sizes)
    optimizer = make_optimizer(policy, "adamw")
    seconds, passes, visits = {}, {}, 0
    with Most() as most:
        start = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal start, visits
            now = time.perf_counter()
            seconds[phase], start = now - start, now
            if base.streamed:
                passes[phase] = (base.streamed.visits - visits) / len(base.streamed.layers)
                visits = base.streamed.visits

        rollout = session.answers("policy", requests, session.sampler("train"), step=1)
        lap("rollout")
        scores = read(policy, chat, rollout, session.readings, sizes, training_batches(session, rollout))
        lap("read")
        _, norm = update(session, optimizer, rollout, scores, 1e-4)
        lap("update")
    assert norm > 0
    count = int(rollout.mask_BT.sum())
    shape = Shape.of(case["config"], name)
    digest = sum(float(value.double().abs().sum()) for value in policy.state().values()) if not limited else None
    return {
        "shape": name, "layers": shape.layers, "offload": offload, "rank": case["rank"], "limit_gb": case["limit_gb"] if limited else None, "weights": shape.parameters,
        "prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "answer_tokens": count, "threads": torch.get_num_threads(),
        "anonymous_loaded_gb": loaded / 1e9, "anonymous_peak_gb": most.bytes / 1e9, "data_gb": status("VmData") / 1e9,
        "resident_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "seconds": {k: round(v, 2) for k, v in seconds.items()}, "tokens_per_s": {k: count / v for k, v in seconds.items()}, "passes": passes,
        "grad_norm": norm, "adapter_sum": digest,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=["7b", "13b"])
    parser.add_argument("--with", dest="modes", nargs="+", choices=["layers", "none"], default=["layers", "none"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/offload.json"))
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--here", action="store_true", help="measure the one case in this process and print its JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.only[0], args.modes[0], args.layers, limited=args.modes[0] == "layers")))
        return
    rows = json.loads(args.out.read_text("utf-8")) if args.out.exists() else []
    for name in args.only:
        for mode in args.modes:
            command = [sys.executable, "-m", "tests.bench.offload", "--here", "--only", name, "--with", mode, "--layers", str(args.layers)]
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
            if done.returncode:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
