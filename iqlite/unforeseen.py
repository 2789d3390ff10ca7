"""Errors that nobody foresaw: a sentence for the person, and everything else in a file that can be sent to us."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from iqlite import __version__
from iqlite.errors import first_line
from iqlite.places import cache_folder

DEBUG = "IQLITE_DEBUG"
ISSUES = "https://github.com/iqlite/iqlite/issues"
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
LOOKS_SECRET = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[\w-]{8,}|(?<=://)[^/\s@]+(?=@)")
SHORTEST = 6  # characters of a secret's value that is taken out; a shorter one would take half the words along
LONGEST = 300  # characters of a library's message in the sentence
HERE = Path(__file__).parent


def explain(error: BaseException, command: Sequence[str]) -> str:
    """The sentence for an error that isn't foreseen: a library's own, or a bug of ours; the rest goes into a file that it names."""
    where, ours = _origin(error)
    said = f"{type(error).__name__} in {where}: {without_secrets(first_line(error))[:LONGEST]}"
    path = _written(error, command)
    details = f"the details are in {path}" if path else f"set {DEBUG}=1 for the details"
    if ours:
        return f"this is a bug in iqlite ({said}); {details}: please report it with them at {ISSUES}"
    if isinstance(error, MemoryError):
        return f"memory is full ({said}); {details}. Close other programs, or take something smaller."
    return f"something failed that nobody foresaw ({said}); {details}. If it comes again, report it with them at {ISSUES}"


def without_secrets(text: str) -> str:
    """A text without the values of the environment's keys and passwords, without what looks like one, and without those in addresses."""
    values = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return LOOKS_SECRET.sub("***", text)


def _origin(error: BaseException) -> tuple[str, bool]:
    """(where it was raised, whether that is our own code)."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "iqlite", True
    last = frames[-1]
    path = Path(last.filename)
    ours = path.is_relative_to(HERE)
    if ours:
        return f"{path.relative_to(HERE.parent).as_posix()}:{last.lineno}", True
    parts = path.parts
    package = parts[parts.index("site-packages") + 1] if "site-packages" in parts else path.name
    return package, False


def _written(error: BaseException, command: Sequence[str]) -> Path | None:
    """The file with everything that helps to find the cause; None where none can be written."""
    lines = [
        f"iqlite {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"command: {' '.join(command)}",
        f"modules: {', '.join(_versions())}",
        "",
        *traceback.format_exception(error),
    ]
    text = without_secrets("\n".join(lines))
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (cache_folder() / "errors", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / (name if folder.name == "errors" else f"iqlite-{name}")
            with path.open("x", encoding="utf-8", errors="replace") as file:
                file.write(text)
            return path
        except OSError:
            continue
    return None


def _versions() -> list[str]:
    """Versions of the libraries that are loaded."""
    found = []
    for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "tokenizers", "safetensors", "gguf", "trl", "openai"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version:
            found.append(f"{name} {version}")
    return found
