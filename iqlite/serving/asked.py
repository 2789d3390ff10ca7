"""What clients may ask: the fields of OpenAI's requests that mean something here. Others are ignored, or refused where ignoring would mislead."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from iqlite.records import Messages
from iqlite.serving.faults import ApiError

NEW_TOKENS = 512  # of an answer where nobody says; our choice
MOST_CHOICES, MOST_STOPS, MOST_TOP = 128, 16, 20
TOOLS = ("tools", "functions", "tool_choice", "function_call")
OFF: tuple[Any, ...] = (None, 0, 0.0, [], {}, "none", "auto", False)
"""What a field that isn't supported may be all the same."""


class Text(BaseModel):
    """A part of a turn's content."""

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Text] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, given: Any) -> Any:
        if isinstance(given, dict) and (given.get("role") in ("tool", "function") or given.get("tool_calls") or given.get("function_call")):
            raise ValueError("tool calls aren't supported: leave such turns out")
        return given

    def said(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


class Asked(BaseModel):
    """What both kinds of requests share. `strength` and `scale` are ours: of the superior's contrast, and of the policy's adapter."""

    model: str
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = 1.0
    strength: Annotated[float, Field(ge=0, lt=1000, allow_inf_nan=False)] | None = None
    scale: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MOST_STOPS:
            raise ValueError(f"at most {MOST_STOPS} texts can end an answer")
        return stop

    @model_validator(mode="after")
    def _supported(self) -> Asked:
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name) not in OFF:
                raise ValueError(f"{name} isn't supported: leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return bool((self.stream_options or {}).get("include_usage"))


class ChatAsked(Asked):
    """POST /v1/chat/completions. `rewards` is ours: what each token of the answer is worth."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    rewards: bool = False

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name in TOOLS:
                if given.get(name) not in OFF:
                    raise ValueError(f"{name}: tool calls aren't supported; leave the field out")
            if (given.get("response_format") or {"type": "text"}) != {"type": "text"}:
                raise ValueError("response_format: answers are plain text; leave the field out")
            if "audio" in (given.get("modalities") or ()):
                raise ValueError("modalities: answers are plain text; leave the field out")
        return given

    @field_validator("messages")
    @classmethod
    def _somebody_asks(cls, messages: list[Turn]) -> list[Turn]:
        if not any(turn.role == "user" for turn in messages):
            raise ValueError('no turn is of role "user": add one')
        return messages

    def turns(self) -> Messages:
        """The messages as chat turns."""
        return tuple({"role": "system" if turn.role == "developer" else turn.role, "content": turn.said()} for turn in self.messages)

    @property
    def longest(self) -> int:
        """Tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens or NEW_TOKENS

    @property
    def top(self) -> int | None:
        """How many alternatives of each token; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionAsked(Asked):
    """POST /v1/completions. A prompt is text or token ids; a list holds several."""

    prompt: Any
    max_tokens: Annotated[int, Field(ge=0)] | None = 16  # OpenAI's default here
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _no_more(self) -> CompletionAsked:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of isn't supported: leave it out")
        if self.suffix:
            raise ValueError("suffix isn't supported: leave it out")
        return self

    @field_validator("prompt")
    @classmethod
    def _texts_or_ids(cls, given: Any) -> list[str | list[int]]:
        several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]

        def fine(one: Any) -> bool:
            ids = isinstance(one, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in one)
            return bool(one) and (isinstance(one, str) or ids)

        if len(several) > MOST_CHOICES or not all(map(fine, several)):
            raise ValueError(f"a prompt is a text that isn't empty, a list of token ids, or a list of at most {MOST_CHOICES} of either")
        return several

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts."""
        found: list[str | list[int]] = self.prompt
        return found

    @property
    def longest(self) -> int:
        """Tokens of an answer."""
        return 16 if self.max_tokens is None else self.max_tokens


Kind = TypeVar("Kind", bound=Asked)


def parsed(kind: type[Kind], body: bytes) -> Kind:
    """A request's body; ApiError 400 that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or None
        said = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {said}" if where else said, param=where) from None
