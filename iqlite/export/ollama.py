"""Ollama's Modelfile: where the weights are, the chat template in Go's template language, and a stop line for every end token.

The template isn't looked up by the model's name but read off what the model's own Jinja template makes of a few conversations.
"""

from __future__ import annotations

from dataclasses import dataclass

from iqlite.errors import RunError
from iqlite.model.template import Chat
from iqlite.records import Messages

_SYSTEM, _USERS, _ANSWERS = "iq-system", ("iq-first", "iq-second"), ("iq-answer-one", "iq-answer-two")


@dataclass(frozen=True)
class Template:
    """The text around each part of a conversation. `first`: before the first user turn; `system`: around a system text there.

    `opening` is what stands only before the answer that is to come, such as a thought that begins or is left empty.
    """

    first: str
    system: tuple[str, str]
    later: str
    answers: str
    before_history: str
    end: str
    opening: str

    @classmethod
    def of(cls, chat: Chat) -> Template:
        """Read off the chat's renderings."""
        turns = conversation(None, answered=True)
        first, one, between, two, last = _around(chat, turns, answer=False, marks=(_USERS[0], _ANSWERS[0], _USERS[1], _ANSWERS[1]))
        del two
        asks = _around(chat, turns[:1], answer=True, marks=(_USERS[0],))[1]
        answers = _common(asks, one)
        end = last if between.startswith(last) else _common(between, last)
        told = _around(chat, conversation(_SYSTEM, answered=False)[:2], answer=True, marks=(_SYSTEM, _USERS[0]))
        bos = chat.tokenizer.bos_token if chat.adds_bos else ""  # the runner puts it there itself
        return cls(
            first.removeprefix(bos),
            (told[0].removeprefix(bos), told[1]),
            between[len(end) :],
            answers,
            one[len(answers) :],
            end,
            asks[len(answers) :],
        )

    def render(self, turns: Messages) -> str:
        """What the Go template makes of a conversation that ends with a user turn."""
        system = next((turn["content"] for turn in turns if turn["role"] == "system"), "")
        text, first = "", True
        for turn in turns:
            if turn["role"] == "user":
                start = (self.system[0] + system + self.system[1] if system else self.first) if first else self.later
                text, first = text + start + turn["content"] + self.answers, False
            elif turn["role"] == "assistant":
                text += self.before_history + turn["content"] + self.end
        return text + self.opening

    def is_exact(self, chat: Chat) -> bool:
        """True if conversations of several turns come out as the model's own template writes them."""
        bos = chat.tokenizer.bos_token if chat.adds_bos else ""
        asked = [conversation(system, answered=True)[:-1] for system in (None, _SYSTEM)]
        return all(self.render(turns) == chat.render(chat.describe(turns, None), answer=True).removeprefix(bos) for turns in asked)

    def go(self) -> str:
        """In Go's template language, as Ollama runs it. No trim markers: every space and line end is the model's.

        RunError for a template whose own text would be read as Go's, or would end the Modelfile's: it could add lines there.
        """
        for text in (self.first, *self.system, self.later, self.answers, self.before_history, self.end, self.opening):
            if strange := next((mark for mark in ('"""', "{{", "}}", "\0") if mark in text), None):
                raise RunError(
                    f"the model's chat template writes {strange!r}, which a Modelfile would take for its own: export with --to gguf, which keeps the template as it is."
                )
        start = f"{{{{ if $first }}}}{{{{ if $.System }}}}{self.system[0]}{{{{ $.System }}}}{self.system[1]}{{{{ else }}}}{self.first}{{{{ end }}}}"
        user = f"{start}{{{{ $first = false }}}}{{{{ else }}}}{self.later}{{{{ end }}}}{{{{ .Content }}}}{self.answers}"
        answer = f"{self.before_history}{{{{ .Content }}}}{self.end}"
        turn = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
        return f"{{{{ $first := true }}}}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{self.opening}"


def modelfile(chat: Chat, source: str, adapter: str | None) -> str:
    """The Modelfile of a model in `source` (a file, or a model that Ollama has), with a LoRA beside it or without.

    RunError for names and tokens that would add lines to it.
    """
    if not source.isprintable():
        raise RunError(f"{source!r} can't be named in a Modelfile: give the base's file a plain name.")
    lines = [f"FROM {source}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f'TEMPLATE """{Template.of(chat).go()}"""')
    for stop in dict.fromkeys(str(chat.tokenizer.convert_ids_to_tokens(token)) for token in chat.stop_ids):
        if '"' in stop or not stop.isprintable():
            raise RunError(f"the token {stop!r} that ends the model's answers can't be written into a Modelfile: export with --to gguf.")
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"


def conversation(system: str | None, *, answered: bool) -> Messages:
    """Two user turns and their answers, behind a system turn if there is a text for it."""
    turns = [{"role": "system", "content": system}] if system else []
    for user, answer in zip(_USERS, _ANSWERS, strict=True):
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return tuple(turns if answered else turns[:-1])


def _around(chat: Chat, turns: Messages, *, answer: bool, marks: tuple[str, ...]) -> list[str]:
    """The rendered text before, between and behind the marks."""
    rest, parts = chat.render(chat.describe(turns, None), answer=answer), []
    for mark in marks:
        before, _, rest = rest.partition(mark)
        parts.append(before)
    return [*parts, rest]


def _common(a: str, b: str) -> str:
    """What two texts begin with alike."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
