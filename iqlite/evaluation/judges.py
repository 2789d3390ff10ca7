"""Judges beyond code: a model behind an OpenAI-compatible server, a reward model or classifier from the hub, and you.

Those that compare look at two answers to one request at a time and say who is better: 1 the first, 0 the second, 0.5 neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import HttpUrl

from iqlite.base.hub import somebody_answers
from iqlite.errors import RunError
from iqlite.integrity import sealed, unsealed
from iqlite.model.rendering import in_time
from iqlite.recipe.schema import Recipe
from iqlite.records import Messages
from iqlite.run.files import explained

REWARD, PREFIXES = "reward:", ("http://", "https://")
KEY = "IQLITE_JUDGE_KEY"
TRIES, TIMEOUT_S = 4, 120.0
TOKENS, THINKING = 8, 2048  # of a reply, and of one that thinks first
THOUGHT = re.compile(  # templates may open it themselves
    r".*(?:</think>|</thinking>|</thought>|</reasoning>|</seed:think>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>)|<think>.*",
    re.DOTALL | re.IGNORECASE,
)
WRAPPED = re.compile(
    r"\\boxed\s*\{\s*(?:\\text\{)?([abt])\b|<(?:answer|verdict)>\s*([abt])\s*</|\"(?:winner|answer|verdict|better|choice)\"\s*:\s*\"([abt])\"",
    re.IGNORECASE,
)
LABEL = r"(?:(?:(?:my|the|final)\s+)*(?:verdict|winner|response|option|choice|answer|answer is|réponse|antwort|respuesta|risposta|resposta|答案|i prefer)\W+)*"
SAID = {"a": 1.0, "b": 0.0, "t": 0.5, "tie": 0.5}
TIE = re.compile(r"\W*(?:it(?:'s| is)\s+)?(?:a\s+)?(?:(?:tie|draw)\b|equal\W*$)", re.IGNORECASE)
VERDICT = re.compile(  # a letter and nothing else on its line, or what can only praise it: "A good question", "A is too short", "A: dull, B: warm" are none
    r"\W*"
    + LABEL
    + r"(?:the\s+)?(?:better\s+)?(?:answer\W+)?(?:is\W+)?(?:answer\W+)?([abt])(?:[^\w\n]*(?:$|\n)|\.\s(?!.*\b[ABT]\b)|\s+wins\b|\s+is\s+(?:the\s+)?better\b|,?\s+(?:because|since)\b)",
    re.IGNORECASE,
)
ASKED = """You compare two answers to the same request. {rubric}

Request:
{request}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with one letter: A, B, or T for a tie."""


class Kept:
    """Verdicts by what was asked, in a JSONL file: no question is put twice."""

    def __init__(self, path: Path):
        self.path = path
        self._found: dict[str, float] = {}
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            try:
                if line:
                    row = unsealed(line)
                    self._found[row["of"]] = float(row["verdict"])
            except (ValueError, KeyError, TypeError):  # the line that a kill cut in two, or one that isn't a verdict
                continue

    def get(self, *of: str) -> float | None:
        """The verdict, if there is one."""
        found: float | None = self._found.get(self._key(of))
        return found

    def put(self, verdict: float, *of: str) -> None:
        """Keeps a verdict, on the disk at once."""
        self._found[self._key(of)] = verdict
        with explained(self.path, "compare again"), self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + sealed({"of": self._key(of), "verdict": verdict}) + "\n")

    @staticmethod
    def _key(of: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:24]


@dataclass
class ModelJudge:
    """A model behind an OpenAI-compatible server: `url` ends in /v1, `model` is its name there. Asked in both orders; verdicts are kept.

    A server that is busy or silent is asked again, up to four times, with longer and longer pauses (the client's own doing); a verdict that
    isn't one of A, B, T is asked for again, with more room where the model thinks first, and then counts as a tie. `asked`, `malformed` and
    `tokens` say what it took, `thinks` that it takes no other limits. The key, where one is needed, comes from IQLITE_JUDGE_KEY.
    RunError at once for an address that can't be one.
    """

    url: str
    model: str
    rubric: str
    kept: Kept
    timeout: float = TIMEOUT_S
    asked: int = 0
    malformed: int = 0
    tokens: int = 0
    thinks: bool = False
    refused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        try:
            import openai
        except ImportError:
            raise RunError("a judging model needs the openai client: pip install 'iqlite[compare]'.") from None
        key = os.environ.get(KEY, "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise RunError(f"{KEY} holds letters that no key has: set it anew.")
        try:
            (HttpUrl(self.url).host or "").encode("idna")
        except ValueError:
            raise RunError(f"--judge {self.shown} is no address: write URL#MODEL, such as http://localhost:11434/v1#qwen2.5:7b.") from None
        try:
            self._client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=TRIES)
        except ImportError:
            raise RunError("the environment names a SOCKS proxy, for which the openai client needs one more package: pip install socksio, or unset ALL_PROXY.") from None  # fmt: skip

    @property
    def shown(self) -> str:
        """The address without a password, for messages."""
        return without_password(self.url)

    def prefers(self, request: Messages, first: str, second: str) -> float:
        """The mean of both orders: 1, 0.5 or 0 where they agree, a half where they don't."""
        if first == second:
            return 0.5
        return (self._once(request, first, second) + 1 - self._once(request, second, first)) / 2

    def _once(self, request: Messages, first: str, second: str) -> float:
        text = ASKED.format(rubric=self.rubric, request=_shown(request), first=first or "(empty)", second=second or "(empty)")
        verdict = self.kept.get(self.url, self.model, text)
        if verdict is None:
            verdict = self._verdict(text)
            if verdict is None:  # not kept: another time it may say something
                self.malformed += 1
                return 0.5
            self.kept.put(verdict, self.url, self.model, text)
        return verdict

    def _verdict(self, text: str) -> float | None:
        room = TOKENS
        for _ in range(TRIES):
            said, cut = self._reply(text, room)
            reply = THOUGHT.sub("", said)
            if TIE.match(reply):
                return 0.5
            if letter := WRAPPED.search(reply):
                return SAID[letter[letter.lastindex or 1].lower()]
            if letter := VERDICT.match(reply):
                return SAID[letter[1].lower()]
            if cut and room == THINKING:
                break  # it would say the same again
            room = THINKING if cut else room
        return None

    def _reply(self, text: str, room: int) -> tuple[str, bool]:
        """(what the model says, whether it was cut off)."""
        import openai

        limits: dict[str, Any] = {"max_completion_tokens": THINKING} if self.thinks else {"max_tokens": room}
        limits |= {name: value for name, value in {"temperature": 0.0, "seed": 0}.items() if name not in self.refused}
        self.asked += 1
        try:
            found = self._client.chat.completions.create(messages=[{"role": "user", "content": text}], model=self.model, **limits)
        except openai.APIStatusError as error:
            told = f"{error.message} {error.body}"
            if error.status_code in (400, 422) and (named := [name for name in limits if name in told and name not in self.refused]):
                self.refused |= {*named}  # some servers forbid what they don't know; hosted models that think take another limit
                self.thinks = self.thinks or "max_tokens" in named
                return self._reply(text, room)
            said = _printable(str(error.body or error.message))[:200]
            raise RunError(
                f"the judge at {self.shown} refuses (HTTP {error.status_code}: {said}): check the model's name and {KEY}; verdicts so far are kept."
            ) from None
        except openai.OpenAIError as error:
            raise RunError(
                f"the judge at {self.shown} can't be reached ({type(error).__name__}): start it, and compare again; verdicts so far are kept."
            ) from None
        except ValueError:  # a body that isn't JSON
            found = None
        try:  # the client builds what it was sent without looking: a web page, other fields, parts of a text
            self.tokens += getattr(found.usage, "total_tokens", None) or 0
            if not found.choices:
                return "", False
            said, cut = found.choices[0].message.content or "", found.choices[0].finish_reason == "length"
            if isinstance(said, str):
                return said, cut
        except (AttributeError, TypeError, IndexError, KeyError):
            pass
        raise RunError(f"the judge at {self.shown} doesn't answer as an OpenAI-compatible server does: its address mostly ends in /v1.")


@dataclass
class Human:
    """You, in the terminal: two answers in an order that a hash decides, without names. `total` pairs are to be judged, where it's known."""

    ask: Callable[[str], str]
    show: Callable[[str], None]
    kept: Kept
    total: int = 0
    at: int = 0

    def prefers(self, request: Messages, first: str, second: str) -> float:
        self.at += 1
        if first == second:
            return 0.5
        swapped = hashlib.sha256(f"{first}\n{second}".encode()).digest()[0] % 2 == 1
        one, two = (second, first) if swapped else (first, second)
        asked = _shown(request)
        before = self.kept.get("me", asked, first, second)
        if before is not None:
            return before
        of = f"{self.at} of {self.total}: " if self.total else ""
        self.show(f"\n{asked}\n\nA: {one}\n\nB: {two}")
        while True:
            try:
                said = self.ask(f"{of}which is better, a, b, or t for a tie? ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                raise RunError("you stopped judging; what you said is kept, and the same command goes on.") from None
            if said in SAID:
                break
        verdict = SAID[said]
        verdict = 1 - verdict if swapped else verdict
        self.kept.put(verdict, "me", asked, first, second)
        return verdict


class RewardModel:
    """A sequence classifier with one output (a reward), or one of its labels, on request and answer; the higher wins.

    `NAME#LABEL` takes a label, `NAME#-LABEL` the less of it, such as toxicity.
    """

    def __init__(self, name: str):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder, _, label = name.partition("#")
        self.name = name
        self.sign, label = (-1, label[1:]) if label.startswith("-") else (1, label)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise RunError(
                f"the judge {self.name!r} can't be loaded ({_printable(str(error))}): name a classifier's hub id or folder."
            ) from None
        if info["missing_keys"]:  # transformers fills them with random numbers
            raise RunError(f"the judge {self.name!r} is no trained classifier: it lacks {min(info['missing_keys'])}.")
        self.model = model.eval()
        labels = {str(one).lower(): number for number, one in self.model.config.id2label.items()}
        if label.lower() not in labels if label else len(labels) > 1:
            raise RunError(
                f"the judge {self.name!r} tells {', '.join(labels)} apart: name one of them, such as {folder}#{next(iter(labels))}."
            )
        self.at = labels[label.lower()] if label else 0
        several = self.model.config.problem_type == "multi_label_classification"
        self.kind = "label" if several else "class" if len(labels) > 1 else "reward"

    def score(self, request: Messages, answer: str) -> float:
        """The reward, or the label's log-probability."""
        import torch

        turns = [*request, {"role": "assistant", "content": answer}]
        if self.tokenizer.chat_template:
            with in_time():
                text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            inputs = self.tokenizer(text, return_tensors="pt", truncation=True, add_special_tokens=False)
        else:
            inputs = self.tokenizer(request[-1]["content"], answer, return_tensors="pt", truncation=True)
        with torch.no_grad():
            logits = self.model(**inputs).logits[0].float()
        if self.kind == "class":
            logits = logits.log_softmax(-1)
        return self.sign * float(torch.nn.functional.logsigmoid(logits)[self.at] if self.kind == "label" else logits[self.at])


def _shown(request: Messages) -> str:
    """A request as judges see it; of several turns, who says what."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in request) if len(request) > 1 else request[-1]["content"]


def _printable(text: str) -> str:
    """What somebody else's program says, on one line and without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def without_password(url: str) -> str:
    """An address as it may be printed and logged."""
    return re.sub(r"//[^/#]*@", "//", url)


def rubric_of(recipe: Recipe) -> str:
    """What a judging model is told to look for: the recipe's own words, or what all its behaviours want."""
    wanted = [text for text in (recipe.behavior.wanted, *(one.wanted for one in recipe.behavior.mixture)) if text]
    return recipe.judge.rubric or f"Prefer the answer that better fits this description of the assistant: {' '.join(wanted)}"


def named(judge: str, rubric: str, kept: Path) -> Any | None:
    """The judge behind `reward:NAME` or `URL#MODEL`; None for another name. RunError at once for a server that isn't there."""
    if judge.startswith(REWARD):
        return RewardModel(judge.removeprefix(REWARD))
    if judge.startswith(PREFIXES):
        url, _, model = judge.partition("#")
        if not model:
            raise RunError(
                f"--judge {without_password(judge)} names no model: write URL#MODEL, such as http://localhost:11434/v1#qwen2.5:7b."
            )
        found = ModelJudge(url, model, rubric, Kept(kept))
        if not somebody_answers(url):  # before anything is generated
            raise RunError(f"the judge at {found.shown} can't be reached: start it, or mend the address.")
        return found
    return None
