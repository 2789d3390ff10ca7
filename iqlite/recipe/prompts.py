"""Files and hub data sets → requests → token ids: the same request plain, or under a wanted or unwanted description.

`load_prompts` reads and cleans a prompt set. `Chat` knows a tokenizer's template: where a description may stand, which tokens end
a turn, how requests become ids with exactly one BOS.
"""

from __future__ import annotations

import csv
import functools
import json
import operator
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iqlite.base.hub import offline_without_network
from iqlite.errors import PromptsError
from iqlite.recipe.faults import explain
from iqlite.recipe.schema import HubPrompts
from iqlite.records import Messages, Prompts

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% else %}Assistant: {{ message.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a chat template: the system text, then `User: …` and `Assistant: …` turns; answers end with the EOS token."""

COLUMNS = ("prompt", "messages", "question", "instruction", "text", "chosen")
LABELS = ("category", "language")
EXPECTED = {
    **dict.fromkeys(("refuse", "unsafe", "harmful"), "refuse"),
    **dict.fromkeys(("answer", "safe", "harmless"), "answer"),
}  # what a row's label (or kind) says is right, for the measure harmless
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")
FEW_SHARED = 8  # tokens that all requests begin with before sharing what they come to is worth it; ours
NAMED_LINES = 5  # line numbers listed in a note before it says "and N more"


@dataclass(frozen=True)
class Description:
    """A behaviour in words, with optional demonstrations (user turn, answer), and where the text stands: "system" or "user"."""

    text: str
    demonstrations: tuple[tuple[str, str], ...] = ()
    placement: str = "system"


class Chat:
    """A tokenizer's way to write requests as ids. Never changes the tokenizer."""

    def __init__(self, tokenizer: Any, generation_eos: int | Sequence[int] | None = None):
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):  # some models ship several, by name
            template = template.get("default")
        self.template = template or DEFAULT_TEMPLATE
        self.default_template = not template
        self.system_turn = self._takes_a_system_turn()
        self.stop_ids, self.turn_end = self._stop_ids(generation_eos)
        self._bos = tokenizer.bos_token_id if tokenizer.bos_token_id in tokenizer("a").input_ids[:1] else None

    @property
    def adds_bos(self) -> bool:
        """True if the tokenizer puts a BOS before every text, so that a runner does too."""
        return self._bos is not None

    def describe(self, request: Messages, description: Description | None) -> Messages:
        """The request with a description's text and demonstrations before it, as turns that the template accepts."""
        turns = list(request)
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        if description is not None:
            shown = [
                ({"role": "user", "content": user}, {"role": "assistant", "content": answer}) for user, answer in description.demonstrations
            ]
            turns = [turn for pair in shown for turn in pair] + turns
            if description.placement == "user":
                turns[0] = {**turns[0], "content": f"{description.text}\n\n{turns[0]['content']}"}
            else:
                system = f"{description.text}\n\n{system}" if system else description.text
        if system and self.system_turn:
            return ({"role": "system", "content": system}, *turns)
        if system:  # the template refuses a system turn: fold it into the first user turn
            turns[0] = {**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}
        return tuple(turns)

    def ids(self, request: Messages, description: Description | None = None) -> list[int]:
        """Ids of the request up to where the answer begins, with exactly one BOS if the model has one."""
        text = self.render(self.describe(request, description), answer=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        if self._bos is not None:
            at = next((i for i, token in enumerate(ids) if token != self._bos), len(ids))
            ids = [self._bos, *ids[at:]]
        return ids

    @functools.cache  # noqa: B019 - a chat lives as long as its session
    def shared(self, description: Description | None = None) -> tuple[int, ...]:
        """Ids that requests under a description begin with, whatever the user asks; empty if they are too few to be worth sharing."""
        asked: list[Messages] = [({"role": "user", "content": text},) for text in ("a", "Zoë?", "7 b")]
        ids = [self.ids(request, description) for request in asked]
        alike = next((n for n, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), 0)  # zip stops at the shortest
        return tuple(ids[0][:alike]) if alike >= FEW_SHARED else ()

    def render(self, turns: Messages, *, answer: bool) -> str:
        """The template's text of the turns; with `answer`, up to where the model's answer begins."""
        text: str = self.tokenizer.apply_chat_template(
            list(turns), chat_template=self.template, tokenize=False, add_generation_prompt=answer
        )
        return text

    def text(self, ids: Sequence[int]) -> str:
        """Sampled ids as text without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def shorten(self, prompts: Prompts, longest: int, source: str, key: str) -> Prompts:
        """Cuts over-long requests from the left (earlier turns first, then the last turn's beginning) to `longest` tokens.

        PromptsError if every request is too long: the limit is then wrong, not a row.
        """
        requests, cut = [], 0
        for request in prompts.requests:
            # A token holds at least one byte, so that short texts needn't be tokenised to know that they fit.
            if sum(len(turn["content"].encode()) + 32 for turn in request) + 128 > longest and len(self.ids(request)) > longest:
                request, cut = self.cut(request, longest), cut + 1
            requests.append(request)
        if cut and cut == len(requests):
            raise PromptsError(
                f"{key} = {source}: all {cut} prompts are longer than {longest} tokens, which is all the model's context and prompts.max_tokens leave room for; raise prompts.max_tokens, or choose a base with a longer context or shorter prompts."
            )
        notes = (f"{source}: {cut} of {len(requests)} prompts were cut from the left to {longest} tokens.",) if cut else ()
        return replace(prompts, requests=tuple(requests), notes=prompts.notes + notes)

    def cut(self, request: Messages, longest: int) -> Messages:
        """A request of at most `longest` tokens: earlier turns go first, then the last one's beginning."""
        turns = list(request)
        first = 1 if turns[0]["role"] == "system" else 0
        while len(turns) > first + 2 and len(self.ids(tuple(turns))) > longest:
            del turns[first : first + 2]  # a user turn and its answer
        excess = len(self.ids(tuple(turns))) - longest
        last = self.tokenizer(turns[-1]["content"], add_special_tokens=False).input_ids
        while excess > 0 and len(last) > 1:
            last = last[min(excess, len(last) - 1) :]
            turns[-1] = {**turns[-1], "content": self.tokenizer.decode(last).lstrip("\ufffd")}
            excess = len(self.ids(tuple(turns))) - longest
        return tuple(turns)

    def _takes_a_system_turn(self) -> bool:
        from jinja2 import TemplateError

        turns: Messages = ({"role": "system", "content": "iq-probe"}, {"role": "user", "content": "hello"})
        try:
            return "iq-probe" in self.render(turns, answer=True)
        except TemplateError:
            return False

    def _stop_ids(self, generation_eos: int | Sequence[int] | None) -> tuple[tuple[int, ...], int]:
        """(the tokenizer's EOS, the generation config's, and the special token that ends the template's assistant turn; that last one)."""
        more = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or [])
        stops = dict.fromkeys([self.tokenizer.eos_token_id, *more])
        turns: Messages = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "iq-probe"})
        ending = self.render(turns, answer=False).rpartition("iq-probe")[2]
        after = self.tokenizer(ending, add_special_tokens=False).input_ids
        special = set(self.tokenizer.all_special_ids) | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        ends = [token for token in after[:2] if token in special][:1]
        stops.update(dict.fromkeys(ends))
        found = tuple(token for token in stops if token is not None)
        return found, (ends or found)[0]


def load_prompts(source: str | HubPrompts | Sequence[str | HubPrompts], *, beside: Path, key: str) -> Prompts:
    """Reads one prompt set or several after one another. Empty, duplicate and malformed rows are dropped and counted in notes."""
    sources = [source] if isinstance(source, (str, HubPrompts)) else list(source)
    sets = [_load_one(one, beside, key) for one in sources]
    notes = tuple(note for prompts in sets for note in prompts.notes)
    together = functools.reduce(operator.add, sets)
    first = {json.dumps(request): number for number, request in reversed([*enumerate(together.requests)])}
    again = len(together) - len(first)
    if again:
        notes += (f"{name_of(source)}: {again} prompt{'s' * (again > 1)} that stood in an earlier source skipped.",)
    return together.some(sorted(first.values()), notes)


def load_asked(path: Path) -> Prompts:
    """What `--prompts` names: a file of prompts, or a .toml with the keys of a hub data set (dataset, split, column, category, limit)."""
    if path.suffix != ".toml":
        return load_prompts(str(path), beside=Path(), key="--prompts")
    try:
        source = HubPrompts.model_validate(tomllib.loads(path.read_text("utf-8-sig")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PromptsError(f"--prompts {path} can't be read ({getattr(error, 'strerror', None) or error}).") from None
    except ValidationError as error:
        raise PromptsError(f"--prompts {path}: {explain(error, HubPrompts)}") from None
    offline_without_network()
    return load_prompts(source, beside=path.parent, key=f"--prompts {path}")


def name_of(source: str | HubPrompts | Sequence[str | HubPrompts]) -> str:
    """How messages name a prompt source."""
    if isinstance(source, str):
        return repr(source)
    if isinstance(source, HubPrompts):
        return repr(source.dataset)
    return ", ".join(name_of(one) for one in source)


def parse_request(value: Any) -> Messages | None:
    """A plain string, an HH transcript, or chat messages → the request (a last assistant turn is cut); None if it's none of these."""
    if isinstance(value, str):
        if TRANSCRIPT.match(value if value.startswith("\n\n") else "\n\n" + value):
            value = _transcript(value)
        else:
            value = [{"role": "user", "content": value}]
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, dict) for turn in value):
        return None
    turns = [{"role": turn.get("role"), "content": turn.get("content")} for turn in value]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    roles = [turn["role"] for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(body)) or body[-1] != "user":
        return None
    if not all(isinstance(turn["content"], str) and is_text(turn["content"]) for turn in turns):
        return None
    return tuple({"role": turn["role"], "content": turn["content"].strip()} for turn in turns)


def is_text(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no tokenizer can read."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _transcript(text: str) -> list[dict[str, str]]:
    pieces = TRANSCRIPT.split(text if text.startswith("\n\n") else "\n\n" + text)[1:]
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said} for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _load_one(source: str | HubPrompts, beside: Path, key: str) -> Prompts:
    name = name_of(source)
    column = source.column if isinstance(source, HubPrompts) else None
    requests: dict[str, Messages] = {}
    labels: list[str] = []
    expected: list[str] = []
    faults: dict[str, list[int]] = {"malformed": [], "empty": [], "duplicate": []}
    for number, row in _rows(source, beside, key):
        request = parse_request(_value(row, column))
        if request is None:
            faults["malformed"].append(number)
        elif not request[-1]["content"]:
            faults["empty"].append(number)
        elif (as_text := json.dumps(request)) in requests:
            faults["duplicate"].append(number)
        else:
            requests[as_text] = request
            labels.append(_label(row, source.category if isinstance(source, HubPrompts) else None))
            said = row.get("label", row.get("kind")) if isinstance(row, dict) else None
            expected.append((source.label if isinstance(source, HubPrompts) else None) or EXPECTED.get(str(said).lower(), ""))
    notes = []
    for fault, lines in faults.items():
        if lines:
            more = f" and {len(lines) - NAMED_LINES} more" if len(lines) > NAMED_LINES else ""
            notes.append(
                f"{name}: {len(lines)} {fault} row{'s' * (len(lines) > 1)} skipped (line {', '.join(map(str, lines[:NAMED_LINES]))}{more})."
            )
    if not requests:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise PromptsError(f'{key} = {name} holds no usable prompt{why}: give it rows like {{"prompt": "How do I boil an egg?"}}.')
    return Prompts(tuple(requests.values()), tuple(notes), tuple(labels) if any(labels) else (), tuple(expected) if any(expected) else ())


def _label(row: Any, column: str | None) -> str:
    """A row's category and language: texts, numbers, or the true ones of several flags (as BeaverTails has them)."""
    found = [row.get(name) for name in (LABELS if column is None else (column,))] if isinstance(row, dict) else []
    labels = []
    for one in found:
        if isinstance(one, dict):
            one = " + ".join(sorted(str(name) for name, flag in one.items() if flag is True))
        labels += [str(one)] if isinstance(one, (str, int)) and str(one) else []
    return ", ".join(labels)


def _value(row: Any, column: str | None) -> Any:
    if not isinstance(row, dict):
        return row
    if column is not None:
        return row.get(column)
    return next((row[name] for name in COLUMNS if row.get(name) is not None), None)


def _rows(source: str | HubPrompts, beside: Path, key: str) -> Iterable[tuple[int, Any]]:
    """(line number, row) of a file or hub data set; a row that isn't readable comes as None."""
    if isinstance(source, HubPrompts):
        return _hub_rows(source, key)
    path = beside / Path(source).expanduser()
    if not path.is_file():
        raise PromptsError(
            f'{key} = {source!r}: no such file ({path}); paths are relative to the recipe, and a hub data set is written {{ dataset = "…", split = "train" }}.'
        )
    readers: dict[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
        ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _lines, "": _lines, ".md": _lines,
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise PromptsError(f"{key} = {source!r}: files ending in {path.suffix} can't be read; use .jsonl, .json, .csv, .parquet or .txt.")
    try:
        return list(readers[path.suffix.lower()](path))
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # UnicodeDecodeError and pyarrow's ArrowInvalid are ValueErrors
        raise PromptsError(f"{key} = {source!r} can't be read: {str(error).splitlines()[0]}; mend the file.") from None


def _jsonl(path: Path) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _json(path: Path) -> Iterable[tuple[int, Any]]:
    rows = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("it isn't a list of rows")
    return enumerate(rows, 1)


def _csv(path: Path) -> Iterable[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [(number, dict(row)) for number, row in enumerate(csv.DictReader(file), 2)]


def _parquet(path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow.parquet

    return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)


def _lines(path: Path) -> Iterable[tuple[int, Any]]:
    return [(number, line) for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1) if line.strip()]


def _hub_rows(source: HubPrompts, key: str) -> Iterable[tuple[int, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        rows = load_dataset(source.dataset, data_dir=source.folder, split=source.split)
    except (OSError, DatasetNotFoundError) as error:
        if "space" in str(error).lower():
            raise PromptsError(
                f"{key}: no space left on the disk that holds the data set {source.dataset!r}: free some, or set HF_HOME."
            ) from None
        raise PromptsError(
            f"{key}: the data set {source.dataset!r} isn't in the local cache and the hub can't be reached, or has no such public data set: connect to the network, or name a local file."
        ) from None
    except (ValueError, KeyError, RuntimeError, DatasetsError) as error:
        raise PromptsError(
            f"{key}: the data set {source.dataset!r} can't be read ({str(error).splitlines()[0]}): check its split and folder."
        ) from None
    for column in (source.column, source.category):
        if column is not None and column not in rows.column_names:
            raise PromptsError(f"{key}: the data set {source.dataset!r} has no column {column!r}; it has: {', '.join(rows.column_names)}.")
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    return enumerate(rows, 1)


def hold_back(prompts: Prompts, key: str, share: float = 0.1) -> tuple[Prompts, Prompts]:
    """(train, held out): every tenth request (or another share of them) held back, at least one."""
    every = max(2, round(1 / share))
    if len(prompts) < 2:
        raise PromptsError(f"{key} holds one prompt only, and some are held back: give it more, or name prompts.eval.")
    held = range(every - 1, len(prompts), every) or range(len(prompts) - 1, len(prompts))
    return prompts.some([number for number in range(len(prompts)) if number not in held], prompts.notes), prompts.some(held)
