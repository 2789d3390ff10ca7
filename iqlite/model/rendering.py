"""A chat template at work: turns → the text that the model reads, with its thinking on or off; templates that can't be used are said.

What is thought is not what is judged: `thought_end` tells where an answer's thinking ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

from iqlite.errors import BaseError, first_line
from iqlite.records import Messages

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% else %}Assistant: {{ message.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models without a chat template: the system text, then `User: …` and `Assistant: …` turns; answers end with the EOS token."""
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""What thinking stands between in the templates of Qwen and DeepSeek, Mistral, EXAONE, Seed, Gemma 4 and gpt-oss."""
HELLO: Messages = ({"role": "user", "content": "hello"},)
PROBE = "iq-probe"
SECONDS = 5.0  # for one conversation, which takes a thousandth; our choice
Thinking = Literal["auto", True, False]


@contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Ends a template of Jinja that runs in this thread for longer, or takes all memory, with a BaseError; it may be a stranger's."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        if time.monotonic() > end:
            raise BaseError(f"the base's chat template runs for more than {seconds:g} seconds: choose another base.")
        return watch if frame.f_code.co_filename == "<template>" else None

    sys.settrace(watch)
    try:
        yield
    except (MemoryError, RecursionError) as error:
        raise BaseError(f"the base's chat template never comes to an end ({type(error).__name__}): choose another base.") from None
    finally:
        sys.settrace(before)


class Template:
    """A tokenizer's chat template. `thinking`: "auto" is off wherever a model can think, since a rollout's few tokens are for the answer."""

    def __init__(self, tokenizer: Any, thinking: Thinking = "auto"):
        self.tokenizer = tokenizer
        text = getattr(tokenizer, "chat_template", None)
        if isinstance(text, dict):  # some models ship several, by name
            text = text.get("default")
        self.text: str = text or DEFAULT_TEMPLATE
        self.default = not text
        self._more: dict[str, Any] = {}
        self._parts = False
        self._check()
        self.marks = next((marks for marks in MARKS if marks[1] in self.text), None)
        self._switches = self.marks is not None and self._with(enable_thinking=True) != self._with(enable_thinking=False)
        self.thinks = self.marks is not None and thinking is True
        if self._switches:
            self._more["enable_thinking"] = self.thinks
        if thinking is True and self.marks is None:
            raise BaseError("model.thinking = true, but the base's chat template knows no thinking: leave the key out.")
        self.system_turn = self._takes_a_system_turn()

    def render(self, turns: Messages, *, answer: bool) -> str:
        """The text of the turns; with `answer`, up to where the model's answer begins, behind an empty thought where it isn't to think.

        BaseError for a conversation that the template refuses.
        """
        try:
            text = self._rendered(turns, answer)
        except self._faults() as error:
            raise BaseError(f"the base's chat template refuses a conversation ({first_line(error)}): mend chat_template.jinja.") from None
        if not answer or self.marks is None or self.thinks:
            return text
        opens, closes = self.marks
        if text.rstrip().endswith(closes):
            return text
        if opens.startswith("<|channel|>"):
            return text + closes
        if text.rstrip().endswith(opens):
            return f"{text.rstrip()}\n\n{closes}\n\n"
        return text if self._switches or opens not in self.text else f"{text}{opens}\n\n{closes}\n\n"

    def thought_end(self, ids: Sequence[int]) -> int | None:
        """How many of an answer's ids are its thinking, the closing mark included; None if no thinking ends in it."""
        if self.marks is None:
            return None
        ids, closing = list(ids), self.tokenizer(self.marks[1], add_special_tokens=False).input_ids
        for end in range(len(ids), len(closing) - 1, -1):
            if ids[end - len(closing) : end] == closing:
                return end
        if self.marks[1] not in self.tokenizer.decode(ids):
            return None
        return next(end for end in range(1, len(ids) + 1) if self.marks[1] in self.tokenizer.decode(ids[:end]))

    def still_thinking(self, ids: Sequence[int]) -> bool:
        """True if an answer is all thinking so far."""
        if self.marks is None or self.thought_end(ids) is not None:
            return False
        return self.thinks or self.tokenizer.decode(list(ids)).lstrip().startswith(self.marks[0])

    def _check(self) -> None:
        """Finds how the template wants to be called; BaseError if it can't be used at all, or renders no user text."""
        fault = ""
        ways: tuple[dict[str, Any], ...] = ({}, {"tools": []})
        for more in ways:
            for parts in (False, True):  # some want a turn's content as a list of parts
                self._more, self._parts = more, parts
                try:
                    if "hello" in self._rendered(HELLO, True):
                        return
                    fault = fault or "it leaves out what the user says"
                except self._faults() as error:
                    fault = fault or first_line(error)
        raise BaseError(
            f"the base's chat template can't be used ({fault}): mend chat_template.jinja in its folder, or choose another base."
        )

    def _takes_a_system_turn(self) -> bool:
        try:
            return PROBE in self._rendered(({"role": "system", "content": PROBE}, *HELLO), True)
        except self._faults():
            return False

    def ending(self) -> str:
        """What stands behind an assistant's turn; "" where a template wants no conversation to end with one."""
        try:
            return self._rendered((*HELLO, {"role": "assistant", "content": PROBE}), False).rpartition(PROBE)[2]
        except self._faults():
            return ""

    def _with(self, **more: Any) -> str:
        return self._rendered(HELLO, True, **more)

    def _rendered(self, turns: Messages, answer: bool, **more: Any) -> str:
        given: list[Any] = list(turns)
        if self._parts:
            given = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        with in_time():
            text: str = self.tokenizer.apply_chat_template(
                given, chat_template=self.text, tokenize=False, add_generation_prompt=answer, **{**self._more, **more}
            )
        return text

    @staticmethod
    def _faults() -> tuple[type[Exception], ...]:
        from jinja2 import TemplateError

        return (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, SyntaxError)
