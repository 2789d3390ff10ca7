"""One row of a prompt file → a request, in whichever of the usual ways the row is written."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from iqlite.records import Messages

COLUMNS = ("prompt", "messages", "conversations", "conversation", "question", "instruction", "text", "chosen")
BESIDE = {"instruction": ("input", "context"), "question": ("context",)}
"""Columns that belong to a prompt: Alpaca's input and Dolly's context stand after the instruction, SQuAD's context before the question."""
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}  # OpenAI's names, ShareGPT's, OpenAssistant's, Gemma's
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")
RENDERED = (
    re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|$)", re.DOTALL),
    re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)(?:<\|eot_id\|>|$)", re.DOTALL),
    re.compile(r"<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>\n?|$)", re.DOTALL),
)
"""Conversations already written in a chat template: ChatML, Llama 3, Gemma."""


def request_of(row: Any, column: str | None) -> Messages | None:
    """The request of a row: of its `column`, or of the first known name, with what belongs to it; None if it is none."""
    if not isinstance(row, Mapping):
        return parse_request(row)
    if column is not None:
        return parse_request(row.get(column))
    name = next((name for name in COLUMNS if row.get(name) is not None), None)
    if name is None:
        return None
    value = row[name]
    beside = [row[one].strip() for one in BESIDE.get(name, ()) if isinstance(row.get(one), str) and row[one].strip()]
    if beside and isinstance(value, str) and value.strip():
        parts = [*beside, value.strip()] if name == "question" else [value.strip(), *beside]
        return ({"role": "user", "content": "\n\n".join(parts)},) if is_text("".join(parts)) else None
    return parse_request(value)


def parse_request(value: Any) -> Messages | None:
    """A plain string, a transcript, or chat messages (as they are, or spelled in a string) → the request, a last assistant turn cut.

    None if it's none of these.
    """
    if isinstance(value, str):
        value = _turns_in(value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in value):
        return None
    turns = [_turn(turn) for turn in value]
    while turns and turns[-1] is not None and turns[-1]["role"] == "assistant":
        turns.pop()
    kept = [turn for turn in turns if turn is not None]
    roles = [turn["role"] for turn in kept]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if len(kept) < len(turns) or not body or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(body)) or body[-1] != "user":
        return None
    return tuple(kept)


def is_text(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no tokenizer can read."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def text_of(content: Any) -> str | None:
    """A turn's text: a string, or a list of parts all of which are texts; None for an image, a call of a tool, nothing."""
    if isinstance(content, str):
        return content.strip() if is_text(content) else None
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in content]
        return text_of("".join(map(str, parts))) if parts and all(isinstance(part, str) for part in parts) else None
    return None


def _turn(turn: Mapping[str, Any]) -> dict[str, str] | None:
    role, content = ROLES.get(str(turn.get("role", turn.get("from"))).lower()), text_of(turn.get("content", turn.get("value")))
    return None if role is None or content is None else {"role": role, "content": content}


def _turns_in(text: str) -> Any:
    """The turns that a string spells: a list as JSON or as Python prints it, a rendered conversation, a transcript; else one user turn."""
    if re.match(r"\s*\[\s*\{", text):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and found and all(isinstance(t, dict) and {"role", "from"} & t.keys() for t in found):
                return found
        if re.match(r"\s*\[\s*\{\s*[\"'](?:role|from)[\"']\s*:", text):
            return None  # turns, but broken ones: no prompt
    for pattern in RENDERED:
        turns = pattern.findall(text)
        if turns and not re.sub(r"<s>|<bos>|<\|begin_of_text\|>", "", pattern.sub("", text)).strip():  # nothing stands beside them
            return [{"role": role, "content": said} for role, said in turns if said.strip()]
    if TRANSCRIPT.match(text if text.startswith("\n\n") else "\n\n" + text):
        return _transcript(text)
    return [{"role": "user", "content": text}]


def _transcript(text: str) -> list[dict[str, str]]:
    pieces = TRANSCRIPT.split(text if text.startswith("\n\n") else "\n\n" + text)[1:]
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said} for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
