"""Preference pairs from a file: what `probe --pairs` ranks and `compare --with dpo --pairs` learns from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from iqlite.errors import PromptsError
from iqlite.model.template import Chat
from iqlite.recipe.prompts import is_text, parse_request
from iqlite.records import Messages


@dataclass(frozen=True)
class Pair:
    """A request with the answer people chose and the one they rejected."""

    request: Messages
    chosen: str
    rejected: str


def load_pairs(path: Path) -> list[Pair]:
    """JSON lines with `prompt` (or `messages`), `chosen` and `rejected` texts; PromptsError with the line that isn't so."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"--pairs {path} can't be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}).") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            request = parse_request(row.get("prompt") or row.get("messages"))
            chosen, rejected = row["chosen"], row["rejected"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            request, chosen, rejected = None, None, None
        if request is None or not all(isinstance(text, str) and is_text(text) for text in (chosen, rejected)):
            raise PromptsError(f'--pairs {path}: line {number} must look like {{"prompt": …, "chosen": …, "rejected": …}}.')
        found.append(Pair(request, chosen.strip(), rejected.strip()))
    if not found:
        raise PromptsError(f"--pairs {path} holds no pair.")
    return found


def answer_ids(chat: Chat, text: str) -> list[int]:
    """The ids of an answer with the end of its turn; one that is cut loses that first, since it hasn't ended."""
    return [*chat.tokenizer(text, add_special_tokens=False).input_ids, chat.turn_end]
