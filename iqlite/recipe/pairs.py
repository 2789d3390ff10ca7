"""Preference pairs from a file: what `probe --pairs` ranks and `compare --with dpo --pairs` learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iqlite.errors import PromptsError
from iqlite.model.template import Chat
from iqlite.recipe.requests import COLUMNS, ROLES, TRANSCRIPT, parse_request, request_of, text_of
from iqlite.recipe.rows import rows_of
from iqlite.records import Messages


@dataclass(frozen=True)
class Pair:
    """A request with the answer people chose and the one they rejected."""

    request: Messages
    chosen: str
    rejected: str


def load_pairs(path: Path, say: Callable[[str], None] = lambda _: None) -> list[Pair]:
    """Rows with `prompt` (or `messages`), `chosen` and `rejected`: texts, lists of turns, or whole transcripts that begin alike.

    Rows with a null side are counted to `say`; PromptsError with the line of any other that isn't a pair.
    """
    found, without = [], 0
    for number, row in rows_of(str(path), Path(), "--pairs"):
        sides = [row.get(side, "") for side in ("chosen", "rejected")] if isinstance(row, Mapping) else [0]
        if None in sides:
            without += 1
            continue
        pair = _pair(row) if isinstance(row, Mapping) else None
        if pair is None:
            raise PromptsError(f'--pairs {path}: line {number} must look like {{"prompt": …, "chosen": …, "rejected": …}}.')
        found.append(pair)
    if without:
        say(f"{path}: {without} row{'s' * (without > 1)} without a chosen or a rejected answer left out.")
    if not found:
        raise PromptsError(f"--pairs {path} holds no pair.")
    return found


def _pair(row: Mapping[str, Any]) -> Pair | None:
    asked = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    given = request_of(asked, None)
    conversation = row.get("chosen") if given is None and not any(asked.get(key) for key in COLUMNS) else None
    request = given if conversation is None else parse_request(conversation)
    if request is not None and request[0]["role"] != "system" and (system := text_of(row.get("system"))):
        request = ({"role": "system", "content": system}, *request)
    chosen, rejected = (_answer(row.get(side)) for side in ("chosen", "rejected"))
    if request is None or not chosen or not rejected:
        return None
    if conversation is not None and (parse_request(row.get("rejected")) != request or chosen == row.get("chosen")):
        return None  # without a prompt, both must be conversations that begin alike
    return Pair(request, chosen, rejected)


def _answer(side: Any) -> str | None:
    """An answer's text: of a string, of a transcript's or a list of turns' last turn, the assistant's."""
    if isinstance(side, str):
        last = TRANSCRIPT.split(side)
        transcript = len(last) > 2 and side.lstrip().startswith("Human:")
        return text_of(last[-1]) if transcript and last[-2] == "Assistant" else None if transcript else text_of(side)
    if isinstance(side, (list, tuple)) and side and isinstance(side[-1], Mapping):
        turn = side[-1]
        if ROLES.get(str(turn.get("role", turn.get("from"))).lower()) == "assistant":
            return text_of(turn.get("content", turn.get("value")))
    return None


def answer_ids(chat: Chat, text: str) -> list[int]:
    """The ids of an answer with the end of its turn; one that is cut loses that first, since it hasn't ended."""
    return [*chat.answer_ids(text), chat.turn_end]
