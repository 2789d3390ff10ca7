"""The first word of an answer after the program starts, and words after it: iqlite chat, transformers' TextStreamer, llama.cpp.

    IQLITE_LLAMA_CPP=DIR python -m tests.bench.chat_speed --run runs/demo [--tokens 64] [--repetitions 3]

The run's policy on its 4-bit base, by iqlite and by transformers with PEFT; the merged model without 4 bits, by iqlite, by transformers and, as an f16
GGUF, by llama.cpp (left out where it isn't at hand). Greedy, one question, two threads, interleaved, each in a process of its own whose
standard output is read as it comes. Seconds run from the process's start. The tokens of an answer are counted with the run's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from iqlite.export.folder import chat_of
from iqlite.export.stored import Stored
from iqlite.model.template import Chat
from iqlite.run.rundir import RunDir
from tests.helpers import llama_cpp

QUESTION = "Tell me about the house where you grew up, and about the people who lived in it."
PEER = Path(__file__).parent / "peers" / "stream_transformers.py"


def stream(command: list[str], stdin: str | None, chat: Chat) -> dict[str, float | str]:
    """Runs a command and notes when its words come."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write((stdin or "").encode())
    process.stdin.close()
    pieces: list[tuple[float, bytes]] = []
    while piece := os.read(process.stdout.fileno(), 65536):
        pieces.append((time.perf_counter() - start, piece))
    assert process.wait() == 0, command
    at = [(t, piece) for t, piece in pieces if piece.strip() and not piece.lstrip().startswith(b"[[")]
    text = b"".join(piece for _, piece in pieces).decode().split("\n[[")[0].strip()
    last = b"".join(piece for _, piece in at[1:]).decode(errors="ignore")
    tokens = len(chat.tokenizer(last, add_special_tokens=False)["input_ids"])
    return {"first_s": at[0][0], "tokens_per_s": tokens / (at[-1][0] - at[0][0]), "answer": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/chat_speed.json"))
    args = parser.parse_args()
    recipe = RunDir.open(args.run).recipe()
    stored = Stored.find(recipe.model.base, recipe.folder, recipe.model.revision)
    chat = chat_of(stored)
    with tempfile.TemporaryDirectory() as scratch:
        merged, file = str(Path(scratch) / "merged"), str(Path(scratch) / "merged.gguf")
        iqlite = [sys.executable, "-m", "iqlite"]
        subprocess.run([*iqlite, "merge", str(args.run), "-o", merged, "--no-check"], check=True)
        asked = ["--prompt", QUESTION, "--tokens", str(args.tokens), "--temperature", "0"]
        peer = [sys.executable, str(PEER)]
        commands: dict[str, tuple[list[str], str | None]] = {
            "iqlite chat RUN (NF4 and adapter)": ([*iqlite, "chat", str(args.run), *asked], None),
            "TextStreamer (NF4 and PEFT)": ([*peer, str(stored.folder), QUESTION, str(args.tokens), "--nf4", "--adapter", str(args.run / "adapter")], None),
            "iqlite chat MERGED (as stored)": ([*iqlite, "chat", merged, *asked], None),
            "TextStreamer (merged, float32)": ([*peer, merged, QUESTION, str(args.tokens)], None),
        }  # fmt: skip
        if "IQLITE_LLAMA_CPP" in os.environ and shutil.which("node"):
            subprocess.run([*iqlite, "export", str(args.run), "--to", "gguf", "-o", file], check=True)
            ids = list(chat.ids(({"role": "user", "content": QUESTION},)))
            request = json.dumps([{"tokens": ids, "count": args.tokens, "stream": True}])
            modules = str(llama_cpp.home() / "node_modules" / "node-llama-cpp")
            commands["llama.cpp (merged, f16 GGUF)"] = ([shutil.which("node") or "", str(llama_cpp.SCRIPT), modules, file], request)
        rows: dict[str, list[dict[str, float | str]]] = {name: [] for name in commands}
        for repetition in range(args.repetitions + 1):  # the first fills the disk's cache and isn't counted
            for name, (command, stdin) in commands.items():
                found = stream(command, stdin, chat)
                if repetition:
                    rows[name].append(found)
                print(f"{repetition}/{args.repetitions} {name}: {found['first_s']:.2f} s, {found['tokens_per_s']:.1f} tokens/s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print("| who | first word after start, s | tokens/s |\n| --- | --- | --- |")
    for name, times in rows.items():
        figures = [[float(one[key]) for one in times] for key in ("first_s", "tokens_per_s")]
        print(f"| {name} | " + " | ".join(f"{statistics.median(f):.3g} ({min(f):.3g}..{max(f):.3g})" for f in figures) + " |")
    for name, times in rows.items():
        print(f"{name}: {str(times[0]['answer'])[:120]}")


if __name__ == "__main__":
    main()
