"""llama.cpp's own converter, for the architectures whose GGUF tensors iqlite doesn't write itself: a merged folder → a GGUF file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from iqlite.errors import RunError
from iqlite.export.gguf_keys import ARCHITECTURE

SCRIPT, PROGRAM = "convert_hf_to_gguf.py", "convert-hf-to-gguf"
WRITES = ("f32", "f16", "bf16", "q8_0")  # the others go through f16 and llama-quantize
FAR = 20  # lines of what it said that are looked through for its error


def needed(model_type: str) -> list[str] | None:
    """The command of llama.cpp's converter where iqlite doesn't write a model's GGUF itself, else None; RunError with how to get it."""
    if model_type in ARCHITECTURE:
        return None
    home = os.environ.get("LLAMA_CPP")
    script = Path(home) / SCRIPT if home else None
    if script is not None and script.is_file():
        return [sys.executable, str(script)]
    for name in (PROGRAM, SCRIPT):
        if found := shutil.which(name):
            return [found]
    raise RunError(
        f"a GGUF of a {model_type} model is written by llama.cpp's converter, which isn't here: set LLAMA_CPP to a checkout of llama.cpp "
        f"(git clone https://github.com/ggml-org/llama.cpp), or put its {SCRIPT} on PATH; or merge with --to hf."
    )


def convert(command: Sequence[str], folder: Path, path: Path, quant: str) -> None:
    """Writes `path` from a merged folder; RunError with the converter's own words."""
    asked = [*command, str(folder), "--outfile", str(path), "--outtype", quant]
    done = subprocess.run(asked, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode or not path.is_file():
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()][-FAR:]
        errors = [line for line in lines if "Error" in line or "ERROR" in line]
        said = (errors or lines or ["it said nothing"])[-1]
        raise RunError(f"llama.cpp's converter failed ({said}): update llama.cpp, or merge with --to hf and convert the folder yourself.")
