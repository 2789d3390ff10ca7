"""Requests → the ids that the base reads: its chat template, descriptions, what prompts share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from iqlite.errors import PromptsError
from iqlite.records import Messages, Prompts

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% else %}Assistant: {{ message.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a chat template: the system text, then `User: …` and `Assistant: …` turns; answers end with the EOS token."""


FEW_SHARED = 8  # tokens that all requests begin with before sharing what they come to is worth it; our choice


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
