"""Chat: the same tokens as a rollout's, the superior's own distribution, one answer and out, and a talk through a real line editor."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from iqlite.chat import conversation as verb
from iqlite.chat.speaker import Speaker
from iqlite.model.sampling import Sampler
from iqlite.run.rundir import RunDir
from iqlite.training.readings import readings

TURNS = ({"role": "user", "content": "What is it good for?"},)


@pytest.fixture
def speaker(make_run: Callable[..., RunDir]) -> Speaker:
    run = make_run(superior={"strength": 2.0, "clip": 4.0, "plausibility": 1e-3})
    return Speaker.of_recipe(run.recipe(), run.adapter, "system", lambda text: None)


@pytest.mark.parametrize("voice", ["base", "policy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_speaks_as_a_rollout_samples(speaker: Speaker, voice: str, temperature: float) -> None:
    sampler = Sampler(5, 12, temperature, 0.9, "chat")
    assert speaker.session is not None
    role = "reference" if voice == "base" else "policy"
    for attempt in (0, 3):
        rollout = speaker.session.answers(role, [TURNS], sampler, step=attempt)
        ids = rollout.response_ids(0)
        expected = ids[:-1] if ids[-1] in speaker.chat.stop_ids else ids
        assert list(speaker.speak(voice, TURNS, sampler, attempt=attempt)) == list(expected)


def test_the_superior_s_answer_is_drawn_from_equation_3(speaker: Speaker) -> None:
    """Greedy: each token is the likeliest of log_softmax(z_ref + strength · clip(log π⁺ − log π⁻)), computed here from whole sequences."""
    session = speaker.session
    assert session is not None
    answer = list(speaker.speak("superior", TURNS, Sampler(0, 10, 0.0)))
    base = list(speaker.speak("base", TURNS, Sampler(0, 10, 0.0)))
    assert answer and answer != base
    described = {reading.name: reading.description for reading in readings(session.recipe, "system", "base")}
    with speaker.policy.acting_as("reference"):
        logits = {}
        for name, description in described.items():
            prompt = session.chat.ids(TURNS, description)
            ids = torch.tensor([[*prompt, *answer]])
            logits[name] = speaker.policy.model(input_ids=ids).logits[0, len(prompt) - 1 :].double()
    for position, token in enumerate(answer):
        reference, wanted, unwanted = (logits[name][position] for name in ("reference", "wanted", "unwanted"))
        delta = (wanted.log_softmax(0) - unwanted.log_softmax(0)).clamp(-4, 4)
        delta[reference < reference.max() + math.log(1e-3)] = 0
        superior = reference + 2 * delta
        assert superior[token] > superior.max() - 1e-4


def whole_logits(speaker: Speaker, role: str, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits [T, V] in float64 at an answer's positions, from one whole sequence."""
    with speaker.policy.acting_as(role):
        found: torch.Tensor = speaker.policy.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return found.double()


def test_the_two_rewards_are_what_their_names_say(speaker: Speaker) -> None:
    """log π̃/π_ref and log π_θ/π_ref of each token, computed here from whole sequences."""
    session = speaker.session
    assert session is not None
    answer = list(session.answers("policy", [TURNS], Sampler(1, 9, stream="chat")).response_ids(0))
    described = {reading.name: reading.description for reading in readings(session.recipe, "system", "base")}
    logits = {name: whole_logits(speaker, "reference", session.chat.ids(TURNS, one), answer) for name, one in described.items()}
    logits["policy"] = whole_logits(speaker, "policy", session.chat.ids(TURNS), answer)
    logp = {name: one.log_softmax(-1) for name, one in logits.items()}
    delta = (logp["wanted"] - logp["unwanted"]).clamp(-4, 4)
    delta[logp["reference"] < logp["reference"].amax(-1, keepdim=True) + math.log(1e-3)] = 0
    superior = (logp["reference"] + 2 * delta).log_softmax(-1)
    at = (torch.arange(len(answer)), torch.tensor(answer))
    found = speaker.rewards(TURNS, answer)
    assert list(found) == ["described", "trained"]
    assert found["described"] == pytest.approx((superior - logp["reference"])[at].tolist(), abs=1e-4)
    assert found["trained"] == pytest.approx((logp["policy"] - logp["reference"])[at].tolist(), abs=1e-4)
    assert max(map(abs, found["trained"])) > 0.01
    assert list(replace(speaker, adapted=False).rewards(TURNS, answer)) == ["described"]


def test_strength_and_scale_change_who_speaks(speaker: Speaker) -> None:
    sampler = Sampler(0, 10, 0.0)
    weak = speaker.with_strength(0.0)
    assert list(weak.speak("superior", TURNS, sampler)) == list(speaker.speak("base", TURNS, sampler))
    policy = list(speaker.speak("policy", TURNS, sampler))
    speaker.policy.scale_adapter(0.0)
    assert list(speaker.speak("policy", TURNS, sampler)) == list(speaker.speak("base", TURNS, sampler)) != policy
    speaker.policy.scale_adapter(1.0)
    assert list(speaker.speak("policy", TURNS, sampler)) == policy


def test_one_answer_and_out(make_run: Callable[..., RunDir], iqlite: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    options = ["--tokens", 8, "--temperature", 0]
    code, plain, err = iqlite("chat", run.path, "--prompt", "hello", *options)
    assert code == 0 and plain.strip(), err
    found = json.loads(iqlite("chat", run.path, "--prompt", "hello", *options, "--json")[1])
    assert found["by"] == "policy" and found["tokens"] <= 8 and found["first_token_s"] > 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert iqlite("chat", run.path, *options)[1] == plain
    base = json.loads(iqlite("chat", run.recipe().model.base, "--prompt", "hello", *options, "--json")[1])
    assert base["by"] == "base" and base["answer"] != found["answer"]
    with_adapter = iqlite("chat", run.recipe().model.base, "--adapter", run.adapter, "--prompt", "hello", *options, "--json")
    assert json.loads(with_adapter[1])["by"] == "policy"
    superior = json.loads(iqlite("chat", run.path, "--superior", "--prompt", "hello", *options, "--json")[1])
    assert superior["by"] == "superior"


def test_a_recipe_is_heard_before_any_training(data: dict[str, Any], tmp_path: Path, iqlite: Callable[..., Any]) -> None:
    import tomli_w

    (tmp_path / "kind.toml").write_text(tomli_w.dumps(data), "utf-8")
    code, out, err = iqlite("chat", "kind.toml", "--superior", "--prompt", "hello", "--tokens", 4, "--json")
    assert code == 0 and json.loads(out)["by"] == "superior", err
    code, _, err = iqlite("chat", "kind.toml", "--prompt", "hello", "--strength", -1)
    assert code == 2 and "strength" in err


def test_what_can_t_be_talked_to_is_one_sentence(
    tiny: Callable[..., Path], make_run: Callable[..., RunDir], iqlite: Callable[..., Any], tmp_path: Path
) -> None:
    run, other = make_run(), make_run("other", model={"base": str(tiny(hidden_size=32))})
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a model")
    assert iqlite("export", run.path, "--to", "gguf-adapter", "-o", "adapter.gguf")[0] == 0
    ask = ["--prompt", "hello"]
    cases: list[tuple[list[Any], list[str]]] = [
        (["chat", "nothing.toml", *ask], ["nothing.toml"]),
        (["chat", "empty", *ask], ["empty", "isn't a run"]),
        (["chat", run.path, "--adapter", other.adapter, *ask], ["was trained on"]),
        (["chat", run.recipe().model.base, "--superior", *ask], ["superior", "recipe"]),
        (["chat", run.path, "--superior", "--base", *ask], ["--base", "--superior"]),
        (["chat", run.path, "--prompt", ""], ["empty"]),
        (["chat", "./no/such/model", *ask], ["no such file"]),
        (["chat", "adapter.gguf", *ask], ["adapter.gguf", "LoRA adapter", "iqlite chat runs/NAME", "--lora adapter.gguf"]),
        (["chat", "notes.txt", *ask], ["notes.txt", "GGUF"]),
    ]
    for command, words in cases:
        code, _, err = iqlite(*command)
        assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def talk(speaker: Speaker, lines: list[str], width: int = 100) -> str:
    """What a terminal shows of a conversation typed into the real line editor."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width, highlight=False, color_system="truecolor")
    conversation = verb.Conversation(speaker, console, "policy", 0.0, 8, 0)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("".join(f"{line}\r" for line in lines) + "\x04")
        assert conversation.loop("it") == 0
    return shown.getvalue()


def test_a_talk_with_commands(speaker: Speaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IQLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    out = talk(speaker, ["/why", "hello", "/why", "/base", "/retry", "/superior", "/strength 1", "/both", "/scale 0.5", "/retry", "/system Be kind.", "/system", "/temperature 0.5", "/save talk.json", "/nonsense", "/temperature x", "/help"])  # fmt: skip
    assert "there is no answer yet" in out
    assert "what the description rewards" in out and "what training changed" in out and "green: likelier than under the base" in out
    assert "you talk to the base" in out and "you talk to the superior" in out
    assert "/nonsense isn't a command" in out and "isn't a number" in out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    for said in (
        "with strength 1",
        "0.5 times what was trained",
        "before everything: Be kind.",
        "nothing is said before the talk",
        "temperature 0.5",
    ):
        assert plain.count(f"{said}\n") == 1, said  # one line
    assert "48;2;" in out  # background colours of the rewards
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [turn["role"] for turn in saved] == ["user", "assistant"]
    assert all(f"/{name}" in out for name in verb.COMMANDS)
    assert "hello" in (tmp_path / "cache" / verb.HISTORY).read_text()


def conversation_of(speaker: Speaker, width: int = 80, tokens: int = 6, system_text: str | None = None) -> verb.Conversation:
    return verb.Conversation(speaker, Console(file=io.StringIO(), width=width), "policy", 0.0, tokens, 0, system_text)


def test_turns_are_remembered_and_old_ones_leave_the_context(speaker: Speaker) -> None:
    conversation = conversation_of(speaker, system_text="Be brief.")
    for number in range(3):
        conversation._line(f"question {number}")
    assert [turn["role"] for turn in conversation.turns("policy", conversation.exchanges)] == ["system"] + ["user", "assistant"] * 3
    assert [turn["role"] for turn in conversation.read] == ["system"] + ["user", "assistant"] * 2 + ["user"]
    long = tuple({"role": ("user", "assistant")[i % 2], "content": "x" * 200} for i in range(9))
    kept = speaker.shortened(long, 100)
    assert 0 < len(kept) < len(long) and kept[-1]["content"].endswith("x")
    assert len(speaker.chat.ids(kept)) + 100 <= speaker.policy.base.context


def test_side_by_side_each_reads_its_own_answers_only(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, Any]] = []

    def speak(self: Speaker, voice: str, turns: Any, sampler: Sampler, *, attempt: int = 0) -> Any:
        read.append((voice, turns))
        yield from self.chat.tokenizer(f"{voice} {len(turns)}", add_special_tokens=False).input_ids

    monkeypatch.setattr(Speaker, "speak", speak)
    conversation = conversation_of(speaker, tokens=40)
    for line in ("zero", "/both one", "/both two", "/both", "/base", "three"):
        conversation._line(line)
    said = {voice: [[turn["content"] for turn in turns] for by, turns in read if by == voice] for voice in ("base", "policy")}
    assert said["base"][:2] == [["one"], ["one", "base 1", "two"]]
    assert said["policy"][:3] == [["zero"], ["zero", "policy 1", "one"], ["zero", "policy 1", "one", "policy 3", "two"]]
    assert said["base"][2] == said["base"][1]  # /both again: the same question, nothing of the answers to it
    assert said["base"][3] == [
        "zero",
        "policy 1",
        "one",
        "base 1",
        "two",
        "base 3",
        "three",
    ]  # talked to alone, it goes on with what was said


def test_no_word_is_broken_at_the_edge(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Once upon a time, " + "many words were typed at the edge of a narrow terminal. " * 3 + "\n\nThe end " + "x" * 50 + " now"
    ids = speaker.chat.tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(Speaker, "speak", lambda *_, **__: iter(ids))
    conversation = conversation_of(speaker, width=24, tokens=1000)
    conversation._line("tell")
    shown = conversation.console.file.getvalue()  # type: ignore[attr-defined]
    lines = shown.splitlines()
    assert all(len(line) <= 24 for line in lines if "xxx" not in line) and max(map(len, lines[:5])) > 16
    assert shown.split() == ["policy>", *text.split()]


def test_ctrl_c_stops_the_answer_and_not_the_talk(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = replace(conversation_of(speaker, tokens=40), temperature=1.0)
    count = []

    def pressed() -> None:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    conversation._ask("hello")
    _, ended = conversation._answer("policy", lambda piece: None, pressed)
    assert not ended and len(conversation.last) == 2 and "policy" in conversation.exchanges[-1].answers
    assert list(speaker.speak("base", TURNS, Sampler(0, 3, 0.0)))  # the role block was left


def test_a_run_that_isnt_there_isnt_looked_for_on_the_hub(iqlite: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    code, _, err = iqlite("chat", "runs/nothing", "--prompt", "hi")
    assert code == 2 and "runs/nothing: there is no such run" in err and err.count("\n") == 1
