"""The GGUF round trip: train from a .gguf file, export the adapter for it, and let llama.cpp speak with that file, without and with the adapter.

    IQLITE_LLAMA_CPP=DIR python -m tests.bench.gguf_tone [--steps 10] [--prompts 24]

The demo's recipe on a copy of the embedded model's file, given by its path. Both answer the same held-out prompts with temperature 0.7 and top-p 0.9.
Prints the mean tone (VADER compound, −1 to 1), its standard error over prompts, and an answer of each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from iqlite.base.names import embedded
from iqlite.scoring.measures import tone
from tests.helpers import llama_cpp

RECIPE = Path("recipes/cheerful-135m.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gguf_tone.json"))
    args = parser.parse_args()
    llama_cpp.home()
    with tempfile.TemporaryDirectory() as scratch:
        base, run, lora = Path(scratch) / "model.gguf", Path(scratch) / "run", Path(scratch) / "lora.gguf"
        shutil.copyfile(embedded(), base)
        settings = [f"model.base={json.dumps(str(base))}", f"train.steps={args.steps}"]
        command = [sys.executable, "-m", "iqlite"]
        subprocess.run([*command, "train", RECIPE, "--out", run, *(part for s in settings for part in ("--set", s))], check=True)
        subprocess.run([*command, "export", run, "--to", "gguf-adapter", "-o", lora], check=True)

        from iqlite.export.folder import chat_of
        from iqlite.export.stored import Stored
        from iqlite.recipe.prompts import load_prompts
        from iqlite.run.rundir import RunDir

        recipe = RunDir.open(run).recipe()
        assert isinstance(recipe.prompts.eval, str)
        chat = chat_of(Stored.find(str(base)))
        requests = load_prompts(recipe.prompts.eval, beside=recipe.folder, key="eval").requests[: args.prompts]
        drawn = {"count": recipe.rollout.max_new_tokens, "temperature": 0.7, "topP": 0.9}
        asks = [{"tokens": chat.ids(request), "seed": number + 1, **drawn} for number, request in enumerate(requests)]
        found = {}
        for name, adapter in (("base", None), ("base and adapter", lora)):
            texts = [chat.text(ids) for ids in llama_cpp.ask(base, asks, adapter)]
            tones = [tone(text) for text in texts]
            found[name] = {"tone": statistics.fmean(tones), "standard_error": statistics.stdev(tones) / len(tones) ** 0.5, "answers": texts}
            print(
                f"{name}: tone {found[name]['tone']:.3f} ± {found[name]['standard_error']:.3f}; {requests[0][-1]['content']} → {texts[0]}"
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"steps": args.steps, "prompts": len(requests)} | found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
