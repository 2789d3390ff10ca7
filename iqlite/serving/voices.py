"""Who answers: what a model's name on the server means, and requests as the ids that it reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from iqlite.chat.speaker import Speaker
from iqlite.errors import first_line
from iqlite.model.template import Description
from iqlite.records import Messages
from iqlite.serving.faults import ApiError
from iqlite.training.readings import readings

BASE, PROMPTED, POLICY, SUPERIOR = "base", "prompted", "policy", "superior"
WHAT = {
    BASE: "the bare base",
    PROMPTED: "the base, told the wanted description",
    POLICY: "what was trained: the base with its adapter",
    SUPERIOR: "the base pushed, token by token, towards the wanted description; what training aims at",
}


@dataclass(frozen=True)
class Voice:
    """One model of the server: the weights that read (`role`), and under which descriptions (None: plain)."""

    name: str
    role: str
    readings: Mapping[str, Description | None]
    what: str
    shared: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """True if it reads a request as it is, so that it can go on with a raw text too."""
        return all(description is None for description in self.readings.values())


class Voices:
    """All models of one server, which share one base in memory. Thread-safe, except for `predict`, which is the model's own thread's.

    `others` are further adapters of the same base, by name.
    """

    def __init__(self, speaker: Speaker, others: Mapping[str, Path] | None = None):
        self.speaker, self.chat, self.policy = speaker, speaker.chat, speaker.policy
        self.context: int = speaker.policy.base.context
        self.tokenizing = threading.Lock()  # a tokenizer's settings change for a text that spells control tokens
        session = speaker.session
        plain: dict[str, Description | None] = {"": None}
        found = [Voice(BASE, "reference", plain, WHAT[BASE])]
        if session is not None and session.wanted is not None:
            found.append(Voice(PROMPTED, "reference", {"": session.wanted}, WHAT[PROMPTED]))
        if POLICY in speaker.voices:
            found.append(Voice(POLICY, "policy", plain, WHAT[POLICY]))
        if SUPERIOR in speaker.voices:
            assert session is not None
            described = {reading.name: reading.description for reading in readings(session.recipe, session.placement, "base")}
            found.append(Voice(SUPERIOR, "reference", described, WHAT[SUPERIOR]))
        for number, (name, folder) in enumerate((others or {}).items()):
            role = f"run{number}"  # a name of PEFT's own has no dots
            self.policy.add_frozen(role, folder)
            found.append(Voice(name, role, plain, f"the adapter of {name}"))
        self.by_name = {
            voice.name: Voice(
                voice.name, voice.role, voice.readings, voice.what, {n: self.chat.shared(d) for n, d in voice.readings.items()}
            )
            for voice in found
        }

    def get(self, name: str) -> Voice:
        """A model by its name; ApiError 404 with those that there are."""
        if name not in self.by_name:
            there = ", ".join(self.by_name)
            raise ApiError(404, f"there is no model {name[:100]!r} here: name one of {there}.", param="model", code="model_not_found")
        return self.by_name[name]

    def chat_ids(self, voice: Voice, turns: Messages) -> dict[str, list[int]]:
        """The ids of a conversation under each of a voice's readings; ApiError 400 if the template won't have it or it is too long."""
        try:
            with self.tokenizing:
                found = {name: self.chat.ids(turns, description) for name, description in voice.readings.items()}
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            said = f"messages: the model's chat template refuses them ({first_line(error)})."
            raise ApiError(400, said, param="messages") from None
        self._check_length(found, "messages")
        return found

    def raw_ids(self, voice: Voice, prompt: str | Sequence[int]) -> dict[str, list[int]]:
        """The ids of a raw prompt; ApiError 400 for a voice that reads descriptions, or a prompt that is too long or holds an id that isn't one."""
        if not voice.plain:
            raise ApiError(400, f"{voice.name} reads a description before a conversation: ask /v1/chat/completions.", param="model")
        if isinstance(prompt, str):
            with self.tokenizing:  # a control token that is spelled stays text; who means the token gives ids
                ids: list[int] = self.chat.tokenizer(prompt, split_special_tokens=True).input_ids
        else:
            ids, vocabulary = list(prompt), self.policy.base.model.get_input_embeddings().num_embeddings
            if any(not 0 <= token < vocabulary for token in ids):
                raise ApiError(400, f"prompt: token ids are 0 to {vocabulary - 1}.", param="prompt")
        self._check_length({"": ids}, "prompt")
        return {"": ids}

    def predictor(self, voice: Voice, strength: float | None) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """What makes logits [b, V] of the readings' last hidden states [b, D]."""
        head = self.policy.head
        if voice.name != SUPERIOR:
            return lambda states: head(states[""])
        session = self.heard(strength).session
        assert session is not None
        scoring = session.scoring
        return lambda states: scoring(head, states)[0]

    def heard(self, strength: float | None) -> Speaker:
        """The speaker at a strength of the superior's contrast."""
        return self.speaker if strength is None or self.speaker.session is None else self.speaker.with_strength(strength)

    def strength(self) -> float | None:
        """The recipe's own strength; None where there is no superior."""
        session = self.speaker.session
        return None if session is None or SUPERIOR not in self.by_name else float(session.recipe.superior.settings()["strength"])

    def listed(self, created: int) -> list[dict[str, Any]]:
        """The models in OpenAI's form, with what each is in a sentence."""
        more: dict[str, dict[str, Any]] = {SUPERIOR: {"strength": self.strength()}, POLICY: {"scale": 1.0}}
        return [
            {"id": name, "object": "model", "created": created, "owned_by": "iqlite", "description": voice.what, **more.get(name, {})}
            for name, voice in self.by_name.items()
        ]

    def _check_length(self, found: Mapping[str, Sequence[int]], field: str) -> None:
        longest = max(map(len, found.values()))
        if longest >= self.context:
            said = f"{field}: {longest} tokens don't fit the model's context of {self.context}: shorten them."
            raise ApiError(400, said, param=field, code="context_length_exceeded")
