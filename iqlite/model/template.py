"""Requests → the ids that the base reads: its chat template, descriptions, what prompts share."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from iqlite.errors import BaseError, PromptsError
from iqlite.model.rendering import Template, Thinking
from iqlite.records import Messages, Prompts

CHARACTERS = 64  # of a token at most, as far as a text that is to be cut is tokenised; our choice, far above what tokens hold
CONTROL = re.compile(
    r"<[^\s<>]+>|\[/?[A-Z_]+\]|◁[^\s◁▷]+▷"
)  # how tokens look that steer a model though its tokenizer doesn't call them special
FEW_SHARED = 8  # tokens that all requests begin with before sharing what they come to is worth it; our choice


@dataclass(frozen=True)
class Description:
    """A behaviour in words, with optional demonstrations (user turn, answer), and where the text stands: "system" or "user"."""

    text: str
    demonstrations: tuple[tuple[str, str], ...] = ()
    placement: str = "system"


class Chat:
    """A tokenizer's way to write requests as ids. Never changes the tokenizer."""

    def __init__(self, tokenizer: Any, generation_eos: int | Sequence[int] | None = None, thinking: Thinking = "auto"):
        self.tokenizer = tokenizer
        self.rendering = Template(tokenizer, thinking)
        self.stop_ids, self.turn_end = self._stop_ids(generation_eos)
        self._bos = tokenizer.bos_token_id if tokenizer.bos_token_id in tokenizer("a").input_ids[:1] else None

    @property
    def template(self) -> str:
        """The template in Jinja's language."""
        return self.rendering.text

    @property
    def default_template(self) -> bool:
        """True if the tokenizer brings none, so that requests are written as User: … Assistant: … turns."""
        return self.rendering.default

    @property
    def system_turn(self) -> bool:
        """True if the template takes a system turn."""
        return self.rendering.system_turn

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
        ids = self._ids_of(self.describe(request, description))
        if self._bos is not None:
            at = next((i for i, token in enumerate(ids) if token != self._bos), len(ids))
            ids = [self._bos, *ids[at:]]
        return ids

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer's text; control tokens that it spells stay text, but for the marks of thinking."""
        hidden: list[str] = []
        return self._tokenised(self._hide("assistant", text, hidden), hidden) if self._spells("assistant", text) else self._tokenised(text)

    def _ids_of(self, turns: Messages) -> list[int]:
        """Ids of rendered turns. A control token that somebody spells in a text stays text: it ends no turn and begins none."""
        if not any(self._spells(turn["role"], turn["content"]) for turn in turns):
            return self._tokenised(self.render(turns, answer=True))
        hidden: list[str] = []
        turns = tuple({**turn, "content": self._hide(turn["role"], turn["content"], hidden)} for turn in turns)
        return self._tokenised(self.render(turns, answer=True), hidden)

    def _spells(self, role: str, text: str) -> bool:
        pattern = self._control[role == "assistant"]
        return pattern is not None and pattern.search(text) is not None

    def _hide(self, role: str, text: str, hidden: list[str]) -> str:
        """The text with a number between two private signs in the place of each control token."""
        pattern = self._control[role == "assistant"]

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"\ue000{len(hidden) - 1}\ue001"

        text = re.sub("[\ue000\ue001]", "", text)
        return text if pattern is None else pattern.sub(hide, text)

    def _tokenised(self, text: str, hidden: Sequence[str] = ()) -> list[int]:
        """Ids of a text; what `hidden` holds is put back as text."""
        ids: list[int] = []
        for place, piece in enumerate(re.split("\ue000(\\d+)\ue001", text) if hidden else [text]):
            if place % 2:
                ids += self._as_text(hidden[int(piece)])
            else:
                ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return ids

    def _as_text(self, token: str) -> list[int]:
        """Ids of what a control token is spelled with."""
        ids: list[int] = self.tokenizer(token, add_special_tokens=False, split_special_tokens=True).input_ids
        if set(ids).isdisjoint(self.tokenizer.all_special_ids) and set(ids).isdisjoint(self._added):
            return ids
        return [i for character in token for i in self.tokenizer(character, add_special_tokens=False).input_ids]

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        return dict(getattr(self.tokenizer, "added_tokens_decoder", {}))

    @functools.cached_property
    def _control(self) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        """Control tokens in what a user or a system turn says, and in what an assistant said, whose thinking is the template's to leave out."""
        special = {*self.tokenizer.all_special_tokens, *(token.content for token in self._added.values() if token.special)} - {""}
        looks = {token.content for token in self._added.values() if CONTROL.fullmatch(token.content)}
        found = [special | looks, special - {*(self.rendering.marks or ())}]
        patterns = [re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None for names in found]
        return patterns[0], patterns[1]

    @functools.cache  # noqa: B019 - a chat lives as long as its session
    def shared(self, description: Description | None = None) -> tuple[int, ...]:
        """Ids that requests under a description begin with, whatever the user asks; empty if they are too few to be worth sharing."""
        asked: list[Messages] = [({"role": "user", "content": text},) for text in ("a", "Zoë?", "7 b")]
        ids = [self.ids(request, description) for request in asked]
        alike = next((n for n, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), 0)  # zip stops at the shortest
        return tuple(ids[0][:alike]) if alike >= FEW_SHARED else ()

    def render(self, turns: Messages, *, answer: bool) -> str:
        """The template's text of the turns; with `answer`, up to where the model's answer begins."""
        return self.rendering.render(turns, answer=answer)

    def text(self, ids: Sequence[int]) -> str:
        """Sampled ids as text without special tokens, and without what the model thought before it answered."""
        if self.rendering.still_thinking(ids):
            return ""
        text: str = self.tokenizer.decode(list(ids)[self.rendering.thought_end(ids) or 0 :], skip_special_tokens=True)
        return text.strip()

    def thought(self, ids: Sequence[int]) -> str:
        """What the model thought before it answered; "" if it didn't."""
        end = len(ids) if self.rendering.still_thinking(ids) else self.rendering.thought_end(ids) or 0
        text: str = self.tokenizer.decode(list(ids)[:end], skip_special_tokens=True)
        for mark in self.rendering.marks or ():
            text = text.replace(mark, "")
        return text.strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it: decoded alone, many tokens lose their space or half a character."""
        found, before = [], ""
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode(list(ids[:end]))
            if text.endswith("\ufffd") and end < len(ids):  # half a character waits for its other half
                found.append("")
                continue
            found.append(text[len(before) :])
            before = text
        return found

    def shorten(self, prompts: Prompts, longest: int, source: str, key: str) -> Prompts:
        """Cuts over-long requests from the left (earlier turns first, then the last turn's beginning) to `longest` tokens.

        PromptsError if every request is too long: the limit is then wrong, not a row.
        """
        requests, cut = [], 0
        for request in prompts.requests:
            # A token holds at least one byte, so that short texts needn't be tokenised to know that they fit.
            size = sum(len(turn["content"].encode()) + 32 for turn in request) + 128
            if size > longest and (size > CHARACTERS * longest or len(self.ids(request)) > longest):
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
        while len(turns) > first + 2 and sum(len(turn["content"]) for turn in turns) > CHARACTERS * longest:
            del turns[first : first + 2]
        turns = [{**turn, "content": turn["content"][-CHARACTERS * longest :]} for turn in turns]
        while len(turns) > first + 2 and len(self.ids(tuple(turns))) > longest:
            del turns[first : first + 2]  # a user turn and its answer
        excess = len(self.ids(tuple(turns))) - longest
        last = self.tokenizer(turns[-1]["content"], add_special_tokens=False).input_ids
        while excess > 0 and len(last) > 1:
            last = last[min(excess, len(last) - 1) :]
            turns[-1] = {**turns[-1], "content": self.tokenizer.decode(last).lstrip("\ufffd")}
            excess = len(self.ids(tuple(turns))) - longest
        return tuple(turns)

    def _stop_ids(self, generation_eos: int | Sequence[int] | None) -> tuple[tuple[int, ...], int]:
        """(the tokenizer's EOS, the generation config's, and the special token that ends the template's assistant turn; that last one)."""
        more = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or [])
        stops = dict.fromkeys([self.tokenizer.eos_token_id, *more])
        after = self.tokenizer(self.rendering.ending(), add_special_tokens=False).input_ids
        special = set(self.tokenizer.all_special_ids) | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        ends = [token for token in after[:2] if token in special][:1]
        if self.rendering.thinks and ends and (self.rendering.marks or ("",))[0].startswith("<|channel|>"):
            ends = []  # it ends the thinking as well
        stops.update(dict.fromkeys(ends))
        found = tuple(token for token in stops if token is not None)
        if not found:
            raise BaseError(
                "the base has no token that ends an answer, in its tokenizer, generation config or chat template: set eos_token in its tokenizer_config.json, or choose another base."
            )
        return found, (ends or found)[0]
