"""One answer while it is drawn: its tokens as text, the texts that end it, and what is told of each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iqlite.records import Messages
from iqlite.serving.faults import ApiError


@dataclass(frozen=True)
class Settings:
    """What answers must share to be decoded as one batch."""

    voice: str
    temperature: float
    top_p: float
    strength: float | None
    scale: float


@dataclass(frozen=True)
class Token:
    """A token as text, its log-probability in nats (None for a prompt's first), and the likeliest tokens in its place, best first."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What a client is told next of one answer: text, the tokens it comes from, and why the answer ended, where it has."""

    choice: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Done:
    """Nothing more comes of an answer; `rewards` of its tokens where they were asked for."""

    choice: int
    completion_tokens: int
    rewards: list[dict[str, Any]] | None = None


Event = Piece | Done | ApiError


@dataclass
class Answer:
    """One answer that is asked for. `ids` are its request under each reading, `number` keys its noise, `top` counts alternatives (None: none told).

    `emit` is called from the model's thread; `gone` says that nobody waits any more. `echo` begins with the prompt itself.
    """

    settings: Settings
    ids: Mapping[str, Sequence[int]]
    choice: int
    number: int
    longest: int
    stops: tuple[str, ...]
    top: int | None
    emit: Callable[[Event], None]
    gone: Callable[[], bool]
    decode: Callable[[Sequence[int]], str]
    turns: Messages | None = None
    rewards: bool = False
    echo: bool = False
    drawn: list[int] = field(default_factory=list)
    ended: bool = False
    _said: str = ""  # all text so far, what is held back included
    _sent: int = 0  # characters of it that went out
    _from: int = 0  # ids before this one have their text in `_said`
    _context: int = 0  # where decoding begins, so that a token has the space that stands before it
    _waiting: list[Token] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the longest reading with its answer."""
        return max(map(len, self.ids.values())) + self.longest

    def begin(self, text: str, tokens: Sequence[Token]) -> None:
        """The echoed prompt."""
        self.emit(Piece(self.choice, text, tuple(tokens)))
        if self.longest == 0:
            self.end("length")

    def add(self, token: int, stops: bool, told: Token | None) -> None:
        """Another token was drawn; `stops` if it is one that ends a turn."""
        if stops:
            self._say(self._rest())
            if not self.ended:
                self.end("stop")
            return
        self.drawn.append(token)
        if told is not None:
            self._waiting.append(told)
        text = self._rest()
        last = len(self.drawn) == self.longest
        if not text.endswith("\ufffd") or last:  # half a character waits for its other half
            self._context, self._from = self._from, len(self.drawn)
            self._say(text)
        if not self.ended and last:
            self.end("length")

    def end(self, why: str) -> None:
        """The last piece; what follows, if anything, are rewards."""
        text, self._sent = self._said[self._sent :], len(self._said)
        self.emit(Piece(self.choice, text, tuple(self._waiting), why))
        self._waiting, self.ended = [], True
        if not self.rewards:
            self.emit(Done(self.choice, len(self.drawn)))

    def fail(self, fault: ApiError) -> None:
        """It can't be given."""
        self.ended = True
        self.emit(fault)

    def _rest(self) -> str:
        """The text of the ids that have none yet."""
        before = self.decode(self.drawn[self._context : self._from])
        return self.decode(self.drawn[self._context :])[len(before) :]

    def _say(self, text: str) -> None:
        searched = max(0, len(self._said) - max(map(len, self.stops), default=0))
        self._said += text
        found = [at for at in (self._said.find(stop, searched) for stop in self.stops) if at >= 0]
        if found:
            self._said = self._said[: min(found)]
            self.end("stop")
            return
        held = max((n for stop in self.stops for n in range(1, len(stop)) if self._said.endswith(stop[:n])), default=0)
        upto = len(self._said) - held
        if upto > self._sent or (self._waiting and not held):
            piece, self._sent = self._said[self._sent : upto], max(upto, self._sent)
            self.emit(Piece(self.choice, piece, tuple(self._waiting)))
            self._waiting = []
