"""iqlite's rollout against generate() of transformers on a plain PEFT model, same base and adapter, interleaved in one process.

    python -m tests.bench.speed_rollout --model DIR --quantization nf4

iqlite's Policy replaces the forwards of PEFT's layers, so generate() gets a second copy of the base, with the adapter loaded by PEFT. The
adapter's B is small random numbers. Every answer has exactly --new-tokens tokens. The last line is one JSON object: for every batch size
and repetition, seconds and tokens of both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel

from iqlite.base.loading import let_go_of_files, load_base
from iqlite.model.sampling import Sampler
from iqlite.recipe.reading import load_recipe
from iqlite.training.opening import open_session
from iqlite.training.rollout import sample
from iqlite.training.session import Session

RECIPE = Path("recipes/cheerful-135m.toml")
WARM_UP_TOKENS = 4


def open_policy(args: argparse.Namespace) -> Session:
    """The demo's session on the model, with an adapter that does something."""
    settings = [f"model.base={json.dumps(args.model)}", f"model.quantization={args.quantization}", "behavior.placement=user"]
    session = open_session(load_recipe(RECIPE, settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in session.policy.parameters.items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    return session


def plain_model(session: Session, args: argparse.Namespace) -> Any:
    """A base of its own with the same adapter, as PEFT loads it; no end of turn stops its generate()."""
    base = load_base(args.model, args.quantization)
    let_go_of_files(base.model)
    with tempfile.TemporaryDirectory() as folder:
        session.policy.save_adapter(Path(folder))
        model = PeftModel.from_pretrained(base.model, folder)
    base.model.generation_config.eos_token_id = None
    return model.eval()


def never_sampled(session: Session) -> int:
    """A special token that chat doesn't use: its probability is next to nothing."""
    tokenizer, chat = session.policy.base.tokenizer, session.chat
    names = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    return max(int(i) for i, name in names.items() if i not in chat.stop_ids and name not in str(chat.template))


def ours(session: Session, rows: int, new: int, step: int) -> int:
    """Tokens that iqlite sampled."""
    requests = session.train.requests[:rows]
    rollout = sample(
        session.policy,
        "policy",
        requests,
        [session.chat.ids(request) for request in requests],
        range(rows),
        [never_sampled(session)],
        Sampler(0, new),
        step=step,
        sizes=session.sizes,
        shared=session.chat.shared(None),
    )
    return int(rollout.mask_BT.sum())


def theirs(model: Any, session: Session, rows: int, new: int) -> int:
    """Tokens that generate() sampled: prompts padded on the left, the whole distribution, as iqlite samples."""
    prompts = [session.chat.ids(request) for request in session.train.requests[:rows]]
    longest, pad = max(map(len, prompts)), never_sampled(session)
    with torch.no_grad():
        ids_BL = model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device),
            attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=pad,
        )
    return int(ids_BL.shape[1] - longest) * rows


def timed(call: Any, *args: Any) -> dict[str, float]:
    start = time.perf_counter()
    tokens = call(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base model, Hugging Face format")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    session = open_policy(args)
    let_go_of_files(session.policy.model)
    model = plain_model(session, args)
    found: dict[str, list[dict[str, Any]]] = {str(rows): [] for rows in args.batches}
    for rows in args.batches:
        ours(session, rows, WARM_UP_TOKENS, 0)
        theirs(model, session, rows, WARM_UP_TOKENS)
        for repetition in range(args.repetitions):
            mine = timed(ours, session, rows, args.new_tokens, repetition + 1)
            found[str(rows)].append({"iqlite": mine, "generate": timed(theirs, model, session, rows, args.new_tokens)})
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
