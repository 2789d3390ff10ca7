"""llama.cpp for tests, where it is at hand: its own converter and the program itself. Skips with the reason elsewhere.

`.ci/run` fetches both. IQLITE_LLAMA_CPP names a folder with node_modules/node-llama-cpp (`npm install node-llama-cpp`: prebuilt binaries) and, in converter/,
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
        pytest.skip("IQLITE_LLAMA_CPP isn't set: it names a folder with llama.cpp, see tests/helpers/llama_cpp.py")
    return Path(os.environ["IQLITE_LLAMA_CPP"])


def converter(outtype: str = "f16") -> Callable[[Path, Path], None]:
    """llama.cpp's convert_hf_to_gguf.py: (model folder, GGUF file of that type)."""
    folder = home() / "converter"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"{folder} holds no converter")

    def convert(model: Path, out: Path) -> None:
        # It knows tokenizers by a hash of theirs or by a SentencePiece file, so the tests' own is named here; all else is its own doing.
        code = (
            "import runpy, sys; from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'; "
            "TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2; "
            "from conversion.phi import Phi3MiniModel; Phi3MiniModel.set_vocab = TextModel._set_vocab_gpt2; "
            f"sys.argv[0] = {str(folder / 'convert_hf_to_gguf.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = [sys.executable, "-c", code, str(model.resolve()), "--outfile", str(out.resolve()), "--outtype", outtype]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)}, check=False)
        assert done.returncode == 0, done.stderr

    return convert


def ask(model: Path, requests: list[dict[str, Any]], lora: Path | None = None) -> list[Any]:
    """Runs llama.cpp: {"tokens": ids, "count": n} → greedy ids, or drawn with "temperature", "topP" and "seed";
    {"tokens": ids, "answer": ids} → log-probability of each answer token."""
    modules = home() / "node_modules" / "node-llama-cpp"
    node = shutil.which("node")
    if node is None or not modules.is_dir():
        pytest.skip(f"node or {modules} is missing")
    command = [node, str(SCRIPT), str(modules), str(model), str(lora or "")]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
