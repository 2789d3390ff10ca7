"""OpenAI's objects: answers, streamed or whole, of chats and of raw completions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from iqlite.serving.answer import Done, Piece, Token


@dataclass
class Form:
    """The form of one response. `prompt_tokens` are its requests' in all; `told` whether log-probabilities are."""

    id: str
    created: int
    model: str
    prompt_tokens: int
    told: bool

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """How many tokens went in and came out."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


@dataclass
class ChatForm(Form):
    """chat.completion and chat.completion.chunk."""

    def chunks(self, event: Piece | Done) -> Iterator[dict[str, Any]]:
        """The chunks that tell of a piece: an answer that ended says so in one of its own."""
        if isinstance(event, Done):
            if event.rewards is not None:
                yield self._object("chat.completion.chunk", []) | {"rewards": {"index": event.choice, "tokens": event.rewards}}
            return
        if event.text or event.tokens:
            yield self._chunk(event.choice, {"content": event.text}, self._logprobs(event.tokens), None)
        if event.finish:
            yield self._chunk(event.choice, {}, None, event.finish)

    def first(self, choices: int) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        for choice in range(choices):
            yield self._chunk(choice, {"role": "assistant", "content": ""}, None, None)

    def last(self, completion_tokens: int) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._object("chat.completion.chunk", []) | {"usage": self.usage(completion_tokens)}

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {
                "index": choice,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one.tokens),
                "finish_reason": one.finish,
                **({} if one.rewards is None else {"rewards": one.rewards}),
            }
            for choice, one in enumerate(answers)
        ]
        return self._object("chat.completion", choices) | {"usage": self.usage(sum(one.completion_tokens for one in answers))}

    def _chunk(self, choice: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        def entry(text: str, logprob: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        if not self.told:
            return None
        return {"content": [entry(t.text, t.logprob) | {"top_logprobs": [entry(*one) for one in t.top]} for t in tokens], "refusal": None}


@dataclass
class TextForm(Form):
    """text_completion. `offsets` are the characters of each choice's text so far."""

    offsets: dict[int, int] = field(default_factory=dict)

    def first(self, choices: int) -> Iterator[dict[str, Any]]:
        """Nothing comes before the text."""
        yield from ()

    def chunks(self, event: Piece | Done) -> Iterator[dict[str, Any]]:
        """The chunk that tells of a piece."""
        if isinstance(event, Piece):
            yield self._object("text_completion", [self._choice(event.choice, event.text, event.tokens, event.finish)])

    def last(self, completion_tokens: int) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._object("text_completion", []) | {"usage": self.usage(completion_tokens)}

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        """All answers at once."""
        choices = [self._choice(choice, one.text, one.tokens, one.finish) for choice, one in enumerate(answers)]
        return self._object("text_completion", choices) | {"usage": self.usage(sum(one.completion_tokens for one in answers))}

    def _choice(self, choice: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        return {"index": choice, "text": text, "logprobs": self._logprobs(choice, tokens), "finish_reason": finish}

    def _logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.told:
            return None
        offset, offsets = self.offsets.get(choice, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        self.offsets[choice] = offset
        tops = [None if token.logprob is None else dict(reversed(self._best(token))) for token in tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _best(self, token: Token) -> list[tuple[str, float]]:
        """The likeliest, and the token itself; reversed into a dict, the likeliest of several that read alike stays."""
        assert token.logprob is not None
        return sorted([*token.top, (token.text, token.logprob)], key=lambda one: -one[1])


@dataclass
class Whole:
    """An answer that is being gathered."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    completion_tokens: int = 0
    rewards: list[dict[str, Any]] | None = None

    def add(self, event: Piece | Done) -> None:
        """Takes in what comes of it."""
        if isinstance(event, Done):
            self.completion_tokens, self.rewards = event.completion_tokens, event.rewards
            return
        self.text += event.text
        self.tokens += event.tokens
        self.finish = event.finish or self.finish


def sse(data: dict[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
