"""llama.cpp for tests, where it is at hand: its own converter and the program itself. Skips with the reason elsewhere.

IQLITE_LLAMA_CPP names a folder with node_modules/node-llama-cpp (`npm install node-llama-cpp`: prebuilt binaries) and, in converter/,
llama.cpp's convert_hf_to_gguf.py with its conversion and gguf packages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "llama_cpp.mjs"


def home() -> Path:
    """The folder; skips without it."""
    if "IQLITE_LLAMA_CPP" not in os.environ:
        pytest.skip("IQLITE_LLAMA_CPP isn't set: it names a folder with llama.cpp, see tests/llama_cpp.py")
    return Path(os.environ["IQLITE_LLAMA_CPP"])


def converter() -> Callable[[Path, Path], None]:
    """llama.cpp's convert_hf_to_gguf.py: (model folder, f16 GGUF file)."""
    folder = home() / "converter"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"{folder} holds no converter")

    def convert(model: Path, out: Path) -> None:
        command = [
            sys.executable,
            str(folder / "convert_hf_to_gguf.py"),
            str(model.resolve()),
            "--outfile",
            str(out.resolve()),
            "--outtype",
            "f16",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)}, check=False)
        if "BPE pre-tokenizer was not recognized" in done.stderr:
            pytest.skip("the converter knows tokenizers by hash, and not the tests' own")
        assert done.returncode == 0, done.stderr

    return convert


def ask(model: Path, requests: list[dict[str, Any]], lora: Path | None = None) -> list[Any]:
    """Runs llama.cpp: {"tokens": ids, "count": n} → greedy ids; {"tokens": ids, "answer": ids} → log-probability of each answer token."""
    modules = home() / "node_modules" / "node-llama-cpp"
    node = shutil.which("node")
    if node is None or not modules.is_dir():
        pytest.skip(f"node or {modules} is missing")
    command = [node, str(SCRIPT), str(modules), str(model), str(lora or "")]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
