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
from typing import Any, Protocol

from iqlite.errors import RunError
from iqlite.records import Messages

PREFIXES = ("http://", "https://")
KEY = "IQLITE_JUDGE_KEY"
TRIES, TIMEOUT_S, TOKENS = 4, 120.0, 8
ASKED = """You compare two answers to the same request. {rubric}

Request:
{request}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with one letter: A, B, or T for a tie."""


class Pairwise(Protocol):
    """Who is better of two."""

    def prefers(self, request: Messages, first: str, second: str) -> float: ...


@dataclass
class ModelJudge:
    """A model behind an OpenAI-compatible server: `url` ends in /v1, `model` is its name there. Asked in both orders; verdicts are kept.

    A server that is busy or silent is asked again, up to four times, with longer and longer pauses (the client's own doing); a verdict that
    isn't one of A, B, T is asked for again and then counts as a tie. `asked`, `malformed` and `tokens` say what it took. The key, where one is needed, comes from
    IQLITE_JUDGE_KEY.
    """

    url: str
    model: str
    rubric: str
    kept: Path
    timeout: float = TIMEOUT_S
    asked: int = 0
    malformed: int = 0
    tokens: int = 0
    _found: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kept.is_file():
            for line in self.kept.read_text("utf-8").split("\n"):
                try:
                    row = json.loads(line) if line else None
                except ValueError:  # the line that a kill cut in two
                    continue
                if row is not None:
                    self._found[row["of"]] = row["verdict"]

    def prefers(self, request: Messages, first: str, second: str) -> float:
        """The mean of both orders: 1, 0.5 or 0 where they agree, a half where they don't."""
        if first == second:
            return 0.5
        return (self._once(request, first, second) + 1 - self._once(request, second, first)) / 2

    def _once(self, request: Messages, first: str, second: str) -> float:
        shown = "\n".join(f"{turn['role']}: {turn['content']}" for turn in request) if len(request) > 1 else request[-1]["content"]
        text = ASKED.format(rubric=self.rubric, request=shown, first=first or "(empty)", second=second or "(empty)")
        of = hashlib.sha256(json.dumps([self.url, self.model, text]).encode()).hexdigest()[:24]
        if of not in self._found:
            verdict = self._verdict(text)
            self._found[of] = verdict
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            with self.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"of": of, "verdict": verdict}) + "\n")
        return self._found[of]

    def _verdict(self, text: str) -> float:
        for _ in range(TRIES):
            letter = re.match(r"\W*(?:answer\s+)?([abt])\b", self._reply(text), re.IGNORECASE)
            if letter:
                return {"a": 1.0, "b": 0.0, "t": 0.5}[letter[1].lower()]
        self.malformed += 1
        return 0.5

    def _reply(self, text: str) -> str:
        try:
            import openai
        except ImportError:
            raise RunError("a judging model needs the openai client: pip install 'iqlite[compare]'.") from None

        client = openai.OpenAI(base_url=self.url, api_key=os.environ.get(KEY, "none"), timeout=self.timeout, max_retries=TRIES)
        self.asked += 1
        try:
            found = client.chat.completions.create(
                messages=[{"role": "user", "content": text}], model=self.model, max_tokens=TOKENS, temperature=0.0, seed=0
            )
        except openai.APIStatusError as error:
            said = " ".join(str(error.message).split())[:200]
            raise RunError(
                f"the judge at {self.url} refuses (HTTP {error.status_code}: {said}): check the model's name and {KEY}; verdicts so far are kept."
            ) from None
        except openai.OpenAIError as error:
            raise RunError(
                f"the judge at {self.url} can't be reached ({type(error).__name__}): start it, and compare again; verdicts so far are kept."
            ) from None
        self.tokens += found.usage.total_tokens if found.usage else 0
        return found.choices[0].message.content or ""


@dataclass
class Human:
    """You, in the terminal: two answers in an order that a hash decides, without names."""

    ask: Callable[[str], str]
    show: Callable[[str], None]

    def prefers(self, request: Messages, first: str, second: str) -> float:
        if first == second:
            return 0.5
        swapped = hashlib.sha256(f"{first}\n{second}".encode()).digest()[0] % 2 == 1
        one, two = (second, first) if swapped else (first, second)
        self.show(f"\n{request[-1]['content']}\n\nA: {one}\n\nB: {two}")
        while True:
            said = self.ask("which is better, a, b, or t for a tie? ").strip().lower()[:1]
            if said in ("a", "b", "t"):
                break
        verdict = {"a": 1.0, "b": 0.0, "t": 0.5}[said]
        return 1 - verdict if swapped else verdict


class RewardModel:
    """A sequence classifier with one output (a reward), or one of its labels (`NAME#LABEL`), on request and answer; the higher wins."""

    def __init__(self, name: str):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.name, _, label = name.partition("#")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
            self.model = AutoModelForSequenceClassification.from_pretrained(self.name, trust_remote_code=False, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise RunError(
                f"the judge {self.name!r} can't be loaded ({str(error).splitlines()[0]}): name a classifier's hub id or folder."
            ) from None
        labels = {str(one).lower(): number for number, one in self.model.config.id2label.items()}
        if label.lower() not in labels if label else len(labels) > 1:
            raise RunError(
                f"the judge {self.name!r} tells {', '.join(labels)} apart: name one of them, such as {self.name}#{next(iter(labels))}."
            )
        self.at = labels[label.lower()] if label else 0
        self.logs = len(labels) > 1

    def score(self, request: Messages, answer: str) -> float:
        """The reward, or the label's log-probability."""
        import torch

        turns = [*request, {"role": "assistant", "content": answer}]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            inputs = self.tokenizer(text, return_tensors="pt", truncation=True, add_special_tokens=False)
        else:
            inputs = self.tokenizer(request[-1]["content"], answer, return_tensors="pt", truncation=True)
        with torch.no_grad():
            logits = self.model(**inputs).logits[0].float()
        return float(logits.log_softmax(-1)[self.at] if self.logs else logits[self.at])


def rubric_of(rubric: str, wanted: Sequence[str]) -> str:
    """What a judging model is told to look for."""
    return rubric or f"Prefer the answer that better fits this description of the assistant: {' '.join(wanted)}"


def named(judge: str, rubric: str, kept: Path) -> Any | None:
    """The judge behind `reward:NAME` or `URL#MODEL`; None for another name."""
    if judge.startswith("reward:"):
        return RewardModel(judge.removeprefix("reward:"))
    if judge.startswith(PREFIXES):
        url, _, model = judge.partition("#")
        if not model:
            raise RunError(f"--judge {judge} names no model: write URL#MODEL, such as http://localhost:11434/v1#qwen2.5:7b.")
        return ModelJudge(url, model, rubric, kept)
    return None
