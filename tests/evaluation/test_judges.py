"""Judges beyond code: a judging model against transformers' own OpenAI-compatible server with faults put in front of it, a reward model, a person."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from iqlite.base.names import EMBEDDED, locate
from iqlite.errors import RunError
from iqlite.evaluation.judges import Human, Kept, ModelJudge, RewardModel, named, rubric_of
from iqlite.recipe.schema import Recipe
from iqlite.run.rundir import RunDir

REQUEST = ({"role": "user", "content": "How was your day?"},)


class Front:
    """A server that passes requests on to `behind`, but first commits the faults it was given, one a request."""

    def __init__(self, behind: str | None):
        self.faults: list[str] = []
        self.seen: list[dict[str, Any]] = []
        front = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                front.seen.append(json.loads(body))
                fault = front.faults.pop(0) if front.faults else ""
                if fault == "silence":
                    time.sleep(1.5)
                    return
                if fault == "page":
                    self._answer(200, b"<html></html>", "text/html")
                elif fault.startswith("RAW"):
                    self._answer(200, fault.removeprefix("RAW").encode())
                elif fault == "nothing":
                    self._answer(200, b'{"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []}')
                elif fault == "picky" and "max_tokens" in front.seen[-1]:
                    self._answer(400, b'{"error": {"message": "max_tokens is not supported, use max_completion_tokens"}}')
                elif fault.isdigit():
                    self._answer(int(fault), b'{"error": {"message": "fault"}}')
                elif fault:
                    reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
                    message = {"role": "assistant", "content": fault.removeprefix("CUT")}
                    finish = "length" if fault.startswith("CUT") else "stop"
                    reply["choices"] = [{"index": 0, "finish_reason": finish, "message": message}]
                    reply["usage"] = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
                    self._answer(200, json.dumps(reply).encode())
                else:
                    passed = urllib.request.Request(f"{behind}{self.path}", body, {"Content-Type": "application/json"})
                    with urllib.request.urlopen(passed, timeout=300) as reply:
                        self._answer(200, reply.read())

            def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front(None)
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """transformers serve on the embedded model; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(locate(EMBEDDED))
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
                time.sleep(0.5)
        yield address
    finally:
        process.kill()


@pytest.mark.real
def test_a_real_server_with_faults_in_front_of_it(served: str, tmp_path: Path) -> None:
    front = Front(served)
    front.faults = ["429", "500", "I like bananas."]
    judge = ModelJudge(front.url, str(locate(EMBEDDED)), "Prefer the friendlier answer.", Kept(tmp_path / "kept.jsonl"))
    verdict = judge.prefers(REQUEST, "It was lovely, thank you!", "Bad.")
    assert verdict in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert len(front.seen) >= 5 and not front.faults and judge.tokens > 0
    shown = front.seen[-1]["messages"][0]["content"]
    assert "Prefer the friendlier answer." in shown and "It was lovely" in shown
    asked = judge.asked
    assert judge.prefers(REQUEST, "It was lovely, thank you!", "Bad.") == verdict and judge.asked == asked  # kept
    again = ModelJudge(front.url, str(locate(EMBEDDED)), "Prefer the friendlier answer.", Kept(tmp_path / "kept.jsonl"))
    assert again.prefers(REQUEST, "It was lovely, thank you!", "Bad.") == verdict and again.asked == 0
    front.server.shutdown()


def test_both_orders_are_asked_and_cancel_a_position_bias(front: Front, tmp_path: Path) -> None:
    judge = ModelJudge(front.url, "m", "", Kept(tmp_path / "kept.jsonl"))
    front.faults = ["A", "A"]
    assert judge.prefers(REQUEST, "one", "two") == 0.5  # always the first: no preference
    front.faults = ["A", "B."]
    assert judge.prefers(REQUEST, "three", "four") == 1.0
    front.faults = ["Answer: B", "The better answer is A."]
    assert judge.prefers(REQUEST, "five", "six") == 0.0
    front.faults = ["T", "b"]
    assert judge.prefers(REQUEST, "seven", "eight") == 0.75
    assert judge.prefers(REQUEST, "same", "same") == 0.5
    assert judge.asked == 8 and judge.tokens == 48 and judge.malformed == 0
    front.faults = ["A tie.", "It's a draw"]
    assert judge.prefers(REQUEST, "nine", "ten") == 0.5
    front.faults = ["CUT<think>A or B? B", "<think>A is warm. B isn't.</think>\n\nA", "CUTOkay, A", "Okay, A or B?</think>B"]
    assert judge.prefers(REQUEST, "eleven", "twelve") == 1.0 and judge.malformed == 0
    assert [seen["max_tokens"] for seen in front.seen[-4:]] == [8, 2048, 8, 2048]
    front.faults = ["picky", "B", "A"]
    hosted = ModelJudge(front.url, "m", "", Kept(tmp_path / "hosted.jsonl"))
    assert hosted.prefers(REQUEST, "one", "two") == 0.0 and hosted.asked == 3  # refused once, and not asked that way again
    assert ["max_completion_tokens" in seen for seen in front.seen[-3:]] == [False, True, True]
    front.faults = ["CUTBoth", "CUTBoth are"] * 2
    assert judge.prefers(REQUEST, "thirteen", "fourteen") == 0.5 and judge.malformed == 2 and not front.faults
    texts = [seen["messages"][0]["content"] for seen in front.seen[:2]]
    assert "Answer A:\none\n" in texts[0] and "Answer A:\ntwo\n" in texts[1]


def test_faults_are_waited_out_and_nonsense_is_a_tie(front: Front, tmp_path: Path) -> None:
    judge = ModelJudge(front.url, "m", "", Kept(tmp_path / "kept.jsonl"), timeout=0.5)
    front.faults = ["429", "503", "silence", "A", "B"]
    assert judge.prefers(REQUEST, "one", "two") == 1.0
    front.faults = ["I like bananas."] * 4 + ["A"]
    assert judge.prefers(REQUEST, "three", "four") == 0.25 and judge.malformed == 1
    front.faults = ["page"]
    with pytest.raises(RunError, match="ends in /v1"):
        judge.prefers(REQUEST, "five", "six")
    front.faults = ["nothing"] * 4 + ["B"]
    assert judge.prefers(REQUEST, "seven", "eight") == 0.75 and judge.malformed == 2
    for odd in (
        '{"choices": [{"text": "A"}]}',
        '{"choices": ["A"]}',
        '{"choices": [{"message": {"content": [{"text": "A"}]}}]}',
        '{"choices"',
        "[]",
        "null",
    ):
        front.faults = [f"RAW{odd}"]
        with pytest.raises(RunError, match="ends in /v1"):
            judge.prefers(REQUEST, "five", "six")
    front.faults = ['RAW{"choices": [{"message": {"content": "A"}}], "usage": {}}', "A good question, but B is better.", "B wins"]
    assert judge.prefers(REQUEST, "eleven", "twelve") == 1.0 and judge.malformed == 2  # an article is no verdict: asked again
    front.faults = ["401"]
    with pytest.raises(RunError, match="HTTP 401"):
        judge.prefers(REQUEST, "five", "six")
    (tmp_path / "kept.jsonl").open("a").write('{"of": "cut')
    again = ModelJudge(front.url, "m", "", Kept(tmp_path / "kept.jsonl"))
    assert again.prefers(REQUEST, "one", "two") == 1.0 and again.asked == 0


def test_names_and_dead_judges_are_refused_before_torch_is_imported(
    iqlite: Callable[..., Any], make_run: Callable[..., RunDir], front: Front
) -> None:
    run, heavy = make_run(), ("torch", "transformers", "peft", "datasets")
    for options, said in (
        (["--with", "superior,foo"], "--with 'foo' isn't one of"),
        (["--judge", "nicer"], "--judge 'nicer' isn't one of described, tone"),
        (["--judge", "http://127.0.0.1:9/v1#m"], "http://127.0.0.1:9/v1 can't be reached: start it"),
    ):
        code = (
            f"import sys; sys.argv = ['iqlite', 'compare', {str(run.path)!r}, *{options!r}]\nfrom iqlite.cli import main\ntry: main()\n"
            f"except SystemExit as e: print(e.code, sorted(set({heavy!r}) & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout == "2 []\n" and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    named(f"{front.url}#m", "", run.path / "kept.jsonl")
    assert not front.seen  # one that is there is asked nothing yet


def test_a_server_that_isnt_there_is_one_sentence(
    iqlite: Callable[..., Any], make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    options = ["--seeds", "1", "--count", "2", "--no-safety"]
    code, _, err = iqlite("compare", run.path, *options, "--judge", "http://127.0.0.1:9/v1#m")
    assert code == 2 and "can't be reached" in err and err.strip().count("\n") == err.strip().count("answering")
    code, _, err = iqlite("compare", run.path, *options, "--judge", "http://127.0.0.1:9/v1")
    assert code == 2 and "names no model" in err
    for address in (
        "http://127.0.0.1:91x/v1",
        "http://[::1",
        "http://",
        "http://192.168.1.300/v1",
        "http://[::1]x/v1",
        "http://me:secret@a..b/v1",
    ):
        code, out, err = iqlite("compare", run.path, *options, "--judge", f"{address}#m")
        assert code == 2 and "is no address" in err and err.count("\n") == 1 and "secret" not in err, err
        assert "answering" not in out + err
    code, _, err = iqlite("compare", run.path, *options, "--judge", "http://me:se@cret@127.0.0.1:9/v1#m")
    assert code == 2 and "http://127.0.0.1:9/v1 can't be reached" in err and "cret" not in err
    for key in ("ключ", "a\nb"):
        monkeypatch.setenv("IQLITE_JUDGE_KEY", key)
        code, _, err = iqlite("compare", run.path, *options, "--judge", "http://127.0.0.1:9/v1#m")
        assert code == 2 and "IQLITE_JUDGE_KEY" in err and err.count("\n") == 1, err
    monkeypatch.setenv("IQLITE_JUDGE_KEY", " abc\n")
    ModelJudge("http://127.0.0.1:9/v1", "m", "", Kept(run.path / "none.jsonl"))
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    code, _, err = iqlite("compare", run.path, *options, "--judge", "http://127.0.0.1:9/v1#m")
    assert code == 2 and "SOCKS" in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        *((reply, 1.0) for reply in ("A", " a.", "**A**", "(A)", "Answer: A", "The better answer is A.", "Answer A is better.", "A is the better one", "A. It is warmer.", "A\n\nB is dull.", "A, because B is cold", "A wins")),
        *((reply, 1.0) for reply in ("\\boxed{A}", "$\\boxed{A}$", "<answer>A</answer>", "Verdict: A", "Winner: A", "My choice: A", "Final answer: A", "I prefer A", '{"winner": "A"}', "答案：A", "Réponse : A")),
        *((reply, 1.0) for reply in ("[THINK]B is short.[/THINK]A", "<thinking>hm, B</thinking>A", "<|channel|>analysis<|message|>B?<|end|><|start|>assistant<|channel|>final<|message|>A", "◁think▷B◁/think▷A")),
        *((reply, 0.5) for reply in ("T", "Tie", "It's a tie.", "A draw", "Equal")),
        *((reply, None) for reply in ("A is worse than B.", "A is not better", "Answer A is too short", "A's tone is colder", "A, B, or T?", "A/B", "A: dull. B: warm. B", "A. dull. B. warm.", "A good question", "Both", "")),
    ],
)  # fmt: skip
def test_only_a_verdict_is_one(reply: str, verdict: float | None, front: Front, tmp_path: Path) -> None:
    judge = ModelJudge(front.url, "m", "", Kept(tmp_path / "kept.jsonl"))
    front.faults = [reply or "nothing"] * 4 + ["T"]
    found = judge.prefers(REQUEST, "one", "two")
    if verdict is None:
        assert judge.malformed == 1 and found == 0.5
    else:
        assert judge.malformed == 0 and found == 0.5 and len(front.seen) == 2
        assert judge.kept.get(front.url, "m", front.seen[0]["messages"][0]["content"]) == verdict


def test_compare_by_a_judging_model(iqlite: Callable[..., Any], make_run: Callable[..., RunDir], front: Front) -> None:
    run = make_run()
    front.faults = ["A", "B"] * 12  # the trained model's answer is always better
    code, out, err = iqlite("compare", run.path, "--seeds", "1", "--no-safety", "--judge", f"{front.url}#m", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert all(contest["win_rate"]["value"] == 1.0 for contest in found["contests"] if contest["against"] != "trained")
    assert found["elo"]["trained"]["value"] == max(one["value"] for one in found["elo"].values())
    assert found["judging"]["asked"] == 24 and found["judge"] == "m"


def test_a_reward_model_and_a_classifier(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    for labels in (1, 2):
        torch.manual_seed(labels)
        model = AutoModelForSequenceClassification.from_pretrained(tiny(), num_labels=labels)
        model.config.pad_token_id = 0
        model.save_pretrained(tmp_path / f"labels{labels}")
        tokenizer.save_pretrained(tmp_path / f"labels{labels}")
        text = tokenizer.apply_chat_template([*REQUEST, {"role": "assistant", "content": "Fine."}], tokenize=False)
        with torch.no_grad():
            logits = model.eval()(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0]
        name = f"{tmp_path / f'labels{labels}'}" + ("#LABEL_1" if labels == 2 else "")
        expected = logits[0] if labels == 1 else logits.log_softmax(-1)[1]
        assert RewardModel(name).score(REQUEST, "Fine.") == pytest.approx(float(expected), abs=1e-5)
    less = RewardModel(f"{tmp_path / 'labels2'}#-label_1")
    assert less.score(REQUEST, "Fine.") == pytest.approx(-float(expected), abs=1e-5)
    with pytest.raises(RunError, match="label_0, label_1"):
        RewardModel(str(tmp_path / "labels2"))
    with pytest.raises(RunError, match="no trained classifier"):
        RewardModel(f"{tiny()}#LABEL_1")
    with pytest.raises(RunError, match="can't be loaded"):
        RewardModel(str(tmp_path / "nothing"))


def test_a_person_is_asked_blind_and_once(tmp_path: Path) -> None:
    shown: list[str] = []
    answers = iter(["x", "both", "a b", "a", "t"])
    person = Human(lambda text: next(answers), shown.append, Kept(tmp_path / "kept.jsonl"))
    verdict = person.prefers(REQUEST, "first answer", "second answer")
    assert verdict == (1.0 if shown[0].index("first answer") < shown[0].index("second answer") else 0.0)
    assert person.prefers(REQUEST, "p", "q") == 0.5 and person.prefers(REQUEST, "same", "same") == 0.5
    assert person.prefers(REQUEST, "first answer", "second answer") == verdict  # next(answers) would raise: it was kept
    orders = set()
    for number in range(20):
        shown.clear()
        Human(lambda text: "a", shown.append, Kept(tmp_path / f"{number}.jsonl")).prefers(REQUEST, f"mine {number}", f"other {number}")
        orders.add(shown[0].index("mine") < shown[0].index("other"))
    assert orders == {True, False}


def test_names_and_rubrics_of_judges(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    assert named("taste", "", tmp_path) is None
    assert rubric_of(make_recipe(judge={"rubric": "Be fair."})) == "Be fair." and "You are kind." in rubric_of(make_recipe())
    two = [{"name": "a", "wanted": "You rhyme.", "unwanted": "You don't."}, {"name": "b", "wanted": "You sing.", "unwanted": "You mumble."}]
    mixed = make_recipe(superior={"estimator": "mixture"}, behavior={"wanted": None, "unwanted": None, "mixture": two})
    assert "You rhyme. You sing." in rubric_of(mixed)


def test_kept_verdicts_survive_lines_that_are_none(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept.jsonl")
    kept.put(1.0, "a")
    with kept.path.open("ab") as file:
        file.write(b'\n3\n{"of": "x"}\n\xff\xfe\n{"of": "y", "verd')
    assert Kept(kept.path).get("a") == 1.0 and Kept(kept.path).get("b") is None
