"""A conversation in a terminal: what was said, who speaks now, and the commands that begin with a slash."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from iqlite.chat.speaker import Speaker
from iqlite.errors import IqliteError, RecipeError, RunError
from iqlite.model.sampling import SPOKEN_TOP_P, Sampler
from iqlite.places import cache_folder, exists, path_of
from iqlite.records import Messages
from iqlite.terminal import WordWrap, clean, harmless, painted

HISTORY = "chat-history"
WHY_NOT = {"policy": "give a run, or --adapter DIR.", "superior": "give a recipe or a run.", "base": ""}
WHY = {
    "described": "what the description rewards, log π̃/π_ref",
    "trained": "what training changed, log π_θ/π_ref",
}
LEGEND = "green: likelier than under the base, red: less; in nats (0.7: twice as likely)"


@dataclass
class Exchange:
    """A question and what each voice answered to it, the latest answer last."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)


@dataclass
class Conversation:
    """What was said, who speaks now, and how. `read` and `last` are what the last answerer read, and the ids of its answer."""

    speaker: Speaker
    console: Console
    voice: str
    temperature: float
    tokens: int
    seed: int
    system_text: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    attempt: int = 0
    last: list[int] = field(default_factory=list)
    read: Messages = ()

    def turns(self, voice: str, exchanges: Sequence[Exchange], *, own: bool = False) -> Messages:
        """Exchanges as a voice reads them: with its own answers, and, unless `own`, with another's where it gave none."""
        found: list[dict[str, str]] = [{"role": "system", "content": self.system_text}] if self.system_text else []
        for exchange in exchanges:
            answer = exchange.answers.get(voice, None if own else next(reversed(exchange.answers.values()), None))
            if answer is not None:
                found += [{"role": "user", "content": exchange.question}, {"role": "assistant", "content": answer}]
        return tuple(found)

    def once(self, question: str, *, as_json: bool) -> int:
        """One answer on standard output."""
        self._ask(question)
        began = time.perf_counter()
        times: list[float] = []

        def show(piece: str) -> None:
            if not as_json:
                sys.stdout.write(harmless(piece))
                sys.stdout.flush()

        text, ended = self._answer(self.voice, show, lambda: times.append(time.perf_counter()))
        if as_json:
            rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
            first = times[0] - began if times else None
            print(json.dumps({"prompt": question, "answer": text, "by": self.voice, "tokens": len(times), "ended": ended, "first_token_s": first, "tokens_per_s": rate}))  # fmt: skip
        else:
            print()
        return 0

    def loop(self, name: str) -> int:
        """Reads lines until the user leaves; Ctrl-C stops the answer and not the program."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory

        cache_folder().mkdir(parents=True, exist_ok=True)
        completer = WordCompleter([f"/{command}" for command in COMMANDS], sentence=True)
        session: PromptSession[str] = PromptSession(
            history=FileHistory(str(cache_folder() / HISTORY)), completer=completer, complete_while_typing=False
        )
        self.console.print(f"{name}: you talk to the {self.voice}. /help lists the commands, Ctrl-D leaves.", markup=False)
        while True:
            try:
                line = session.prompt("you> ").strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return 0
            if line in ("/quit", "/exit"):
                return 0
            try:
                self._line(line)
            except IqliteError as error:
                self.console.print(Text(harmless(str(error)), "red"))

    def _line(self, line: str) -> None:
        if not line.startswith("/"):
            if line:
                self._ask(line)
                self._stream()
            return
        word, _, rest = line[1:].partition(" ")
        if word not in COMMANDS:
            raise RunError(f"/{word} isn't a command: /help lists them.")
        COMMANDS[word](self, rest.strip())

    def _ask(self, text: str) -> None:
        self.exchanges.append(Exchange(text))
        self.attempt = 0

    def _answer(
        self, voice: str, show: Callable[[str], None], token: Callable[[], None] = lambda: None, *, own: bool = False
    ) -> tuple[str, bool]:
        """Streams one answer to the last question and keeps it; (text, whether it ended by itself). `own`: it reads its own answers only."""
        sampler = Sampler(self.seed, self.tokens, self.temperature, SPOKEN_TOP_P, "chat")
        *before, asked = self.exchanges
        turns: Messages = (*self.turns(voice, before, own=own), {"role": "user", "content": asked.question})
        turns = self.speaker.shortened(turns, self.tokens)
        ids: list[int] = []
        shown, ended = "", False
        answer = self.speaker.speak(voice, turns, sampler, attempt=self.attempt)
        try:
            for token_id in answer:
                token()
                ids.append(token_id)
                text = self.speaker.chat.tokenizer.decode(ids, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # half a character waits for its other half
                    show(text[len(shown) :])
                    shown = text
            ended = len(ids) < self.tokens
        except KeyboardInterrupt:
            answer.close()
        self.last, self.read = ids, turns
        text = self.speaker.chat.text(ids)
        asked.answers.pop(voice, None)
        asked.answers[voice] = text  # the last of them
        return text, ended

    def _stream(self) -> None:
        self.console.print(f"[bold]{self.voice}[/]> ", end="")
        lines = WordWrap(self.console.width, len(self.voice) + 2)

        def show(text: str) -> None:
            self.console.print(Text(text), end="", soft_wrap=True)

        _, ended = self._answer(self.voice, lambda piece: show(lines.add(harmless(piece))))
        show(lines.end())
        self.console.print("" if ended else "[dim] …[/]")

    def _confirm(self, text: str) -> None:
        self.console.print(f"[dim]{clean(text)}[/]")

    def base(self, _: str) -> None:
        """talk to the bare base"""
        self._become("base")

    def policy(self, _: str) -> None:
        """talk to the policy: what was trained, the base with its adapter"""
        self._become("policy")

    def superior(self, _: str) -> None:
        """talk to the superior policy: the base pushed, word by word, towards the wanted description; training makes the policy like it"""
        self._become("superior")

    def strength(self, rest: str) -> None:
        """/strength 2: how far the superior policy is pushed from the base"""
        strength = self._number(rest, "/strength 2")
        self.speaker = self.speaker.with_strength(strength)
        self._confirm(f"the superior policy is pushed with strength {strength:g}")

    def scale(self, rest: str) -> None:
        """/scale 0.5: how much of the adapter is added to the base"""
        factor = self._number(rest, "/scale 0.5")
        if "policy" not in self.speaker.voices or not abs(factor) <= 100:
            raise RunError("/scale needs an adapter, and a factor up to 100.")
        self.speaker.policy.scale_adapter(factor)
        self._confirm(f"the policy is the base and {factor:g} times what was trained")

    def temperature_(self, rest: str) -> None:
        """/temperature 0.7: how freely words are drawn; 0 always takes the likeliest"""
        value = self._number(rest, "/temperature 0.7")
        if not 0 <= value <= 10:
            raise RunError("/temperature takes a number from 0 to 10.")
        self.temperature = value
        self._confirm(f"temperature {value:g}" + ("" if value else ": always the likeliest word"))

    def system(self, rest: str) -> None:
        """/system TEXT: say it before everything; without TEXT, nothing"""
        self.system_text = rest or None
        self._confirm(f"before everything: {rest}" if rest else "nothing is said before the talk")

    def both(self, rest: str) -> None:
        """/both [TEXT]: base and policy side by side, from the same seed; each reads its own answers only"""
        if "policy" not in self.speaker.voices:
            raise RunError("/both needs an adapter: chat with a run, or give --adapter DIR.")
        self._again(rest)
        texts = {"base": "", "policy": ""}
        with Live(console=self.console, refresh_per_second=8, transient=False) as live:
            for voice in texts:

                def show(piece: str, voice: str = voice) -> None:
                    texts[voice] += harmless(piece)
                    live.update(_columns(texts))

                self._answer(voice, show, own=True)

    def why(self, _: str) -> None:
        """colour the words of the last answer: what the description rewards, and what training changed"""
        if "superior" not in self.speaker.voices:
            raise RunError("/why needs descriptions: chat with a recipe or a run.")
        if not self.last:
            raise RunError("there is no answer yet to explain.")
        pieces = self.speaker.chat.pieces(self.last)
        for name, rewards in self.speaker.rewards(self.read, self.last).items():
            figures = f"mean {sum(rewards) / len(rewards):+.3f}, from {min(rewards):+.2f} to {max(rewards):+.2f}"
            self.console.print(f"[bold]{WHY[name]}[/] [dim]({figures})[/]")
            self.console.print(painted(pieces, rewards, self.console.color_system), soft_wrap=False)
        self._confirm(LEGEND)

    def retry(self, _: str) -> None:
        """another answer to the same question"""
        if not self.exchanges:
            raise RunError("there is no question yet to answer again.")
        self.attempt += 1
        self._stream()

    def save(self, rest: str) -> None:
        """/save FILE: the conversation as JSON"""
        path = path_of(rest or "chat.json")
        if exists(path):
            raise RunError(f"{path} exists already: name another file.")
        try:
            path.write_text(json.dumps({"messages": self.turns(self.voice, self.exchanges)}, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise RunError(f"{path} can't be written ({error.strerror}).") from None
        self.console.print(f"saved to {path}", markup=False)

    def clear(self, _: str) -> None:
        """forget what was said"""
        self.exchanges, self.last = [], []
        self._confirm("forgotten")

    def help(self, _: str) -> None:
        """this list"""
        shown = Table.grid(padding=(0, 2))
        for name, command in COMMANDS.items():
            shown.add_row(f"/{name}", Text(command.__doc__ or ""))
        self.console.print(shown)
        self.console.print(f"now: the {self.voice}, temperature {self.temperature:g}, at most {self.tokens} tokens an answer", markup=False)

    def _become(self, voice: str) -> None:
        if voice not in self.speaker.voices:
            raise RunError(f"there is no {voice} here: {WHY_NOT[voice]}")
        self.voice = voice
        self.console.print(f"[dim]you talk to the {voice}[/]")

    def _again(self, rest: str) -> None:
        if rest:
            self._ask(rest)
        elif not self.exchanges:
            raise RunError("there is no question yet: /both TEXT asks one.")

    def _number(self, rest: str, example: str) -> float:
        try:
            return float(rest)
        except ValueError:
            raise RecipeError(f"{rest!r} isn't a number: type {example}.") from None


def _columns(texts: dict[str, str]) -> Table:
    shown = Table(expand=True, show_lines=False)
    for voice in texts:
        shown.add_column(voice, ratio=1, overflow="fold")
    shown.add_row(*(Text(text) for text in texts.values()))
    return shown


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "base": Conversation.base,
    "policy": Conversation.policy,
    "superior": Conversation.superior,
    "strength": Conversation.strength,
    "both": Conversation.both,
    "why": Conversation.why,
    "retry": Conversation.retry,
    "system": Conversation.system,
    "temperature": Conversation.temperature_,
    "scale": Conversation.scale,
    "save": Conversation.save,
    "clear": Conversation.clear,
    "help": Conversation.help,
}
