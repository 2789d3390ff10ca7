"""Kernels, waits and bytes of a decoded token on the played card, before and after, beside transformers' own decoding; and what they come to in time.

    python -m tests.bench.decode_play [--rows 1 8 32] [--layers 1 2] [--out tests/bench/results]

A model of Llama-2-7B's width in 4 bits, shapes only, with an adapter of rank 16, 300 tokens of prompt; what a layer takes is the difference of
models of two sizes. `loop` is the plain loop with PEFT-like casts for each token, `steps` are `model.steady` with `model.joined`; a captured
graph is one launch of the steps' kernels. Writes decode.json and decode.md.

The time of a token is what takes longer, host or card: the host 24 µs for each kernel it launches itself (measured with this code on a CPU,
61 ms for 2,490) and 3 waits of 20 µs; for a graph 50 µs, and two steps' launches for each recording, one in 64 tokens. The card: bytes at 75 % of
its data sheet, and 1.5 µs for each kernel to begin and end. A model, not a measurement.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from iqlite.base.shape import known
from iqlite.machine.sizes import Sizes
from iqlite.model import decoding, steady
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.training.rollout import sample
from tests.card.driver import played
from tests.card.played import MODELS, Counts, PlayedCard
from tests.card.shapes import base_of

BASE, PROMPT, NEW, FROM = "meta-llama/Llama-2-7b-chat-hf", 300, 21, 6
HOST, WAIT, REPLAY, RECORDED, EACH, REACHED, BEGIN = 24e-6, 20e-6, 50e-6, 2, 64, 0.75, 1.5e-6
WAYS = ("loop", "steps", "generate, PEFT, dynamic", "generate, PEFT, static", "generate, base, static")
CARDS = ("RTX 3060", "RTX 4070", "RTX 4090")


@contextmanager
def marked(card: PlayedCard) -> Iterator[list[Counts]]:
    """The counts after each choice of a token; the token itself is made up, for there are no numbers."""
    marks: list[Counts] = []
    was = {module: module.choose for module in (decoding, steady)}
    modules: Any = steady
    repeated = modules.repeated

    def tap(module: Any) -> None:
        def choose(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            was[module](logits, *args, **kwargs)
            marks.append(card.counts.copy())
            return torch.full((len(logits),), 7, device=card.device)

        module.choose = choose

    def run(step: Any, _: Any) -> Any:  # each step is run, so that its kernels are counted
        step()
        return step

    tap(decoding)
    tap(steady)
    modules.repeated = run
    try:
        yield marks
    finally:
        for module, choose in was.items():
            module.choose = choose  # type: ignore[attr-defined]
        modules.repeated = repeated


def token(name: str, way: str, rows: int, layers: int) -> Counts:
    """What one token of `rows` rows takes on a model of so many layers."""
    config = dict(known()[BASE]) | {"num_hidden_layers": layers}
    with played(name, 200.0, numbers=False) as card:
        base = base_of(card, config, torch.bfloat16)
        if way.startswith("generate"):
            return _of_transformers(card, base.model, way, rows)
        policy = Policy(base, rank=16, alpha=32.0, seed=0, checkpointing=True)
        policy.forward.steady = way == "steps"
        sizes = Sizes(rows=1024, rollout_tokens=10**9, read_tokens=10**9, update_tokens=10**9, chunk_tokens=256)
        prompts = [[10] * (PROMPT - row % 5) for row in range(rows)]
        requests = [({"role": "user", "content": "why?"},)] * rows
        with marked(card) as marks:
            sample(policy, "policy", requests, prompts, range(rows), (2,), Sampler(0, NEW), sizes=sizes)
    return marks[FROM + 1].since(marks[FROM])


def _of_transformers(card: PlayedCard, model: Any, way: str, rows: int) -> Counts:
    """A token of the forward that generate() calls, without its sampling."""
    if "PEFT" in way:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.eval()
    config = model.get_decoder().config if hasattr(model, "get_decoder") else model.base_model.model.config
    cache = StaticCache(config=config, max_cache_len=PROMPT + NEW) if "static" in way else DynamicCache(config=config)
    ids, marks = torch.full((rows, PROMPT), 10, device=card.device), []
    with torch.no_grad():
        for _ in range(4):
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = torch.full((rows, 1), 10, device=card.device)
            marks.append(card.counts.copy())
    return marks[3].since(marks[2])


def whole(name: str, way: str, rows: int, sizes: tuple[int, int]) -> dict[str, Any]:
    """A token on all layers, from models of two sizes."""
    few, many = (token(name, way, rows, layers) for layers in sizes)
    layers, more = known()[BASE]["num_hidden_layers"], sizes[1] - sizes[0]

    def grown(small: float, large: float) -> tuple[float, float]:
        layer = (large - small) / more
        return layer, small - sizes[0] * layer

    kernels, outside = grown(sum(few.kernels.values()), sum(many.kernels.values()))
    waits, waits_outside = grown(sum(few.waits.values()), sum(many.waits.values()))
    moved, moved_outside = grown(few.bytes, many.bytes)
    by_name = {
        key: (many.kernels[key] - few.kernels[key]) / more for key in many.kernels | few.kernels if many.kernels[key] != few.kernels[key]
    }
    return {
        "card": name, "way": way, "rows": rows, "kernels_a_layer": kernels, "kernels_outside": outside, "kernels": kernels * layers + outside,
        "waits": waits * layers + waits_outside, "gb": (moved * layers + moved_outside) / 1e9,
        "products": dict(many.products), "attention": dict(many.attention), "layer": dict(Counter(by_name).most_common()),
    }  # fmt: skip


def seconds(found: dict[str, Any], *, graph: bool) -> float:
    """Of a token, by the model above."""
    card: float = found["gb"] * 1e9 / (REACHED * 1e9 * MODELS[found["card"]].bandwidth) + BEGIN * found["kernels"]
    launched: float = HOST * found["kernels"] + WAIT * found["waits"]
    return max(card, launched) if not graph else max(card, REPLAY) + RECORDED * launched / EACH


def markdown(record: list[dict[str, Any]]) -> str:
    """Two tables."""
    lines = ["| a decoded token, Llama-2-7B, rank 16 | rows | kernels a layer | outside | whole token | waits of the host | launches |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for one in [one for one in record if one["card"] == "RTX 4070"]:
        launches = 1 if one["way"] == "steps" else one["kernels"]
        lines.append(
            f"| {one['way']} | {one['rows']} | {one['kernels_a_layer']:.0f} | {one['kernels_outside']:.0f} | {one['kernels']:,.0f} | {one['waits']:.0f} | {launches:,.0f} |"
        )
    lines += [
        "",
        "| tokens a second, estimated | rows | loop | steps, launched one by one | steps, as a graph |",
        "| --- | --- | --- | --- | --- |",
    ]
    by = {(one["card"], one["way"], one["rows"]): one for one in record}
    for card, way, rows in by:
        if way == "steps" and (loop := by.get((card, "loop", rows))):
            steps = by[card, way, rows]
            rates = [rows / seconds(loop, graph=False), rows / seconds(steps, graph=False), rows / seconds(steps, graph=True)]
            lines.append(f"| {card} | {rows} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--layers", nargs=2, type=int, default=[1, 2])
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", type=Path, default=Path("tests/bench/results"))
    args = parser.parse_args()
    file = args.out / "decode.json"
    record: list[dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.exists() else []
    for card in args.cards:
        for way in args.ways:
            for rows in args.rows:
                if way.startswith("generate") and card != "RTX 4070":
                    continue  # kernels, of which there are as many on each card
                found = whole(card, way, rows, tuple(args.layers))
                record = [one for one in record if (one["card"], one["way"], one["rows"]) != (card, way, rows)] + [found]
                print(json.dumps(found), flush=True)
                file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    (args.out / "decode.md").write_text(markdown(record), "utf-8")
    print(markdown(record))


if __name__ == "__main__":
    main()
