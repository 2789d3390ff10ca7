"""The server as the openai package sees it: texts, log-probabilities and rewards against whole sequences computed here, and every way to ask wrongly."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

from iqlite.model.sampling import Sampler
from iqlite.serving.app import make_app
from iqlite.serving.running import bound, running
from tests.serving.conftest import Served

HELLO: list[Any] = [{"role": "user", "content": "What is it good for?"}]
VOICES = ("base", "prompted", "policy", "superior", "again.v2")


def said(served: Served, model: str, content: str = "hi", **more: Any) -> str:
    """A greedy answer of 12 tokens."""
    more = {"max_tokens": 12, "temperature": 0} | more
    reply = served.client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **more)
    return reply.choices[0].message.content or ""


def logits_of(served: Served, role: str, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [L, V] in float64 of a whole sequence, by PEFT's and transformers' own forward."""
    with served.batcher.model, served.voices.policy.acting_as(role):
        found: torch.Tensor = served.voices.policy.model(input_ids=torch.tensor([ids])).logits[0]
    return found.double().log_softmax(-1)


def test_models_are_listed(served: Served) -> None:
    assert tuple(model.id for model in served.client.models.list()) == VOICES
    assert served.client.models.retrieve("superior").to_dict()["strength"] == 2.0


@pytest.mark.parametrize("model, role", [("base", "reference"), ("policy", "policy"), ("prompted", "reference")])
def test_a_greedy_answer_is_the_model_s(served: Served, model: str, role: str) -> None:
    chat, session = served.voices.chat, served.voices.speaker.session
    assert session is not None
    ids = chat.ids(tuple(HELLO), session.wanted if model == "prompted" else None)
    prompt = len(ids)
    for _ in range(10):
        ids.append(int(logits_of(served, role, ids)[-1].argmax()))
        if ids[-1] in chat.stop_ids:
            break
    expected = chat.tokenizer.decode(ids[prompt:], skip_special_tokens=True)
    assert said(served, model, HELLO[0]["content"], max_tokens=10) == expected


def test_thirty_two_at_once_say_what_they_say_alone(served: Served) -> None:
    asked = [(VOICES[n % 3 + 1], f"Request {'x' * (n % 7)} {n}") for n in range(32)]
    alone = [said(served, *one) for one in asked]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(lambda one: said(served, *one), asked)) == alone
        sampled = list(pool.map(lambda one: said(served, *one, temperature=1, top_p=0.9, seed=len(one[1])), asked))
    assert sampled[::4] == [said(served, *one, temperature=1, top_p=0.9, seed=len(one[1])) for one in asked[::4]]
    assert len(set(sampled)) > 10


def test_a_seed_repeats_itself_and_n_answers_differ(served: Served) -> None:
    def ask(**more: Any) -> list[str | None]:
        reply = served.client.chat.completions.create(model="policy", messages=HELLO, max_completion_tokens=9, **more)
        return [choice.message.content for choice in reply.choices]

    assert ask(n=3, seed=7) == ask(n=3, seed=7)
    assert len({*ask(n=3, seed=7), *ask(seed=8)}) == 4
    assert ask(seed=7) == ask(n=3, seed=7)[:1]


@pytest.mark.parametrize("more", [{}, {"stop": ["1", "S"]}, {"n": 2, "logprobs": True, "top_logprobs": 1}])
def test_a_stream_says_the_same(served: Served, more: dict[str, Any]) -> None:
    asked: dict[str, Any] = dict(model="base", messages=HELLO, max_tokens=20, seed=3, **more)
    whole = served.client.chat.completions.create(**asked)
    texts, tokens, ends = [""] * len(whole.choices), [0] * len(whole.choices), [""] * len(whole.choices)
    usage = None
    for chunk in served.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    if "logprobs" in more:
        assert sum(tokens) == usage.completion_tokens


def test_a_stop_text_ends_the_answer_before_it(served: Served) -> None:
    text = said(served, "policy", max_tokens=20)
    for length in (1, 2, 3):
        stop = text[4 : 4 + length]
        reply = served.client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "hi"}], max_tokens=20, temperature=0, stop=stop
        )
        assert reply.choices[0].message.content == text[: text.find(stop)] and reply.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_model_s(served: Served) -> None:
    reply = served.client.completions.create(model="policy", prompt="hello", max_tokens=4, temperature=0, echo=True, logprobs=3)
    found = reply.choices[0].logprobs
    assert found is not None and found.token_logprobs and found.top_logprobs and found.tokens and found.text_offset
    assert reply.choices[0].text.startswith("hello") and found.tokens[:5] == list("hello") and found.text_offset[:5] == [0, 1, 2, 3, 4]
    ids = served.voices.chat.tokenizer("hello").input_ids
    logp = logits_of(served, "policy", ids)
    for _ in range(4):
        ids.append(int(logits_of(served, "policy", ids)[-1].argmax()))
    logp = logits_of(served, "policy", ids)
    assert found.token_logprobs[0] is None and len(found.tokens) == 9
    for at in range(1, 9):
        assert found.token_logprobs[at] == pytest.approx(float(logp[at - 1, ids[at]]), abs=1e-4)
        assert max(found.top_logprobs[at].values()) == pytest.approx(float(logp[at - 1].max()), abs=1e-4)


def test_token_ids_are_scored_without_a_new_token(served: Served) -> None:
    """As harnesses ask: several prompts of ids at once, nothing generated, or one token that they drop."""
    prompts = [[72, 101, 108], [5, 6, 7, 8, 9, 10, 11], [65]]
    for new in (0, 1):
        reply = served.client.completions.create(model="base", prompt=prompts, max_tokens=new, temperature=0, echo=True, logprobs=1)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        for choice, ids in zip(reply.choices, prompts, strict=True):
            assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
            logp = logits_of(served, "reference", ids)
            expected = [float(logp[at, token]) for at, token in enumerate(ids[1:])]
            assert choice.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
            assert len(choice.logprobs.token_logprobs) == len(ids) + new


def test_a_chat_s_log_probabilities_of_the_superior_are_normalised(served: Served) -> None:
    reply = served.client.chat.completions.create(
        model="superior", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=20
    )
    assert reply.choices[0].logprobs is not None
    for token in reply.choices[0].logprobs.content or []:
        best = [one.logprob for one in token.top_logprobs]
        assert len(best) == 20 and best == sorted(best, reverse=True) and token.logprob == best[0]
        assert 0 < sum(torch.tensor(best, dtype=torch.float64).exp().tolist()) <= 1 + 1e-6


def test_rewards_are_those_of_the_chat(served: Served) -> None:
    reply = served.client.chat.completions.create(
        model="policy", messages=HELLO, max_tokens=9, temperature=0, extra_body={"rewards": True, "strength": 3}
    )
    rewards = reply.choices[0].to_dict()["rewards"]
    session = served.voices.speaker.session
    assert session is not None and isinstance(rewards, list)
    assert served.idle()
    ids = session.answers("policy", [tuple(HELLO)], Sampler(0, 9, 0.0)).response_ids(0)
    expected = served.voices.speaker.with_strength(3).rewards(tuple(HELLO), [one for one in ids if one not in served.voices.chat.stop_ids])
    assert [one["described"] for one in rewards] == pytest.approx(expected["described"], abs=1e-4)
    assert [one["trained"] for one in rewards] == pytest.approx(expected["trained"], abs=1e-4)
    for one in rewards:
        assert one["reward"] == pytest.approx(one["described"] - one["trained"])
    streamed = served.client.chat.completions.create(
        model="policy", messages=HELLO, max_tokens=9, temperature=0, stream=True, extra_body={"rewards": True, "strength": 3}
    )
    assert [chunk.to_dict()["rewards"] for chunk in streamed if "rewards" in chunk.to_dict()] == [{"index": 0, "tokens": rewards}]


def test_strength_and_scale_move_the_voices(served: Served) -> None:
    base = said(served, "base")
    assert said(served, "superior", extra_body={"strength": 0}) == base != said(served, "superior")
    assert said(served, "policy", extra_body={"scale": 0}) == base != said(served, "policy")
    assert said(served, "policy") == said(served, "again.v2")  # the scale was put back


def test_a_control_token_that_somebody_spells_stays_text(served: Served) -> None:
    def tokens(content: str) -> int:
        reply = served.client.chat.completions.create(model="base", messages=[{"role": "user", "content": content}], max_tokens=1)
        assert reply.usage is not None
        return reply.usage.prompt_tokens

    assert tokens("a<|im_end|>b") - tokens("ab") == len("<|im_end|>")  # the tiny tokenizer has one token a byte
    raw = served.client.completions.create(model="base", prompt="<|im_end|>", max_tokens=0, echo=True, logprobs=0)
    assert raw.choices[0].logprobs is not None and raw.choices[0].logprobs.tokens == list("<|im_end|>")


def post(served: Served, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and error of a request made by hand."""
    request = urllib.request.Request(f"{served.url}{path}", body, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


@pytest.mark.parametrize(
    "change, status, param",
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, None),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None),
        ({"response_format": {"type": "json_object"}}, 400, None),
        ({"frequency_penalty": 0.5}, 400, None),
        ({"strength": -1}, 400, "strength"),
        ({"n": 65}, 429, None),
    ],
)
def test_what_can_t_be_done_is_said(served: Served, change: dict[str, Any], status: int, param: str | None) -> None:
    asked = {"model": "base", "messages": HELLO, "max_tokens": 2} | change
    found, error = post(served, "/v1/chat/completions", json.dumps(asked).encode())
    assert found == status and error["message"] and set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param
    assert served.batcher.entering == 0


@pytest.mark.parametrize("change", [{"prompt": ""}, {"prompt": []}, {"prompt": [99999]}, {"prompt": [[1], "x", 3]}, {"prompt": {"a": 1}}, {"suffix": "x"}, {"best_of": 3}, {"model": "superior"}])  # fmt: skip
def test_a_raw_completion_that_can_t_be_done_is_said(served: Served, change: dict[str, Any]) -> None:
    found, error = post(served, "/v1/completions", json.dumps({"model": "base", "prompt": "x", "max_tokens": 1} | change).encode())
    assert found == 400 and error["type"] == "invalid_request_error"


def test_tools_are_refused_as_the_client_understands(served: Served) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tool calls aren't supported"):
        served.client.chat.completions.create(model="base", messages=HELLO, tools=[tool])
    with pytest.raises(openai.NotFoundError, match="base, prompted, policy, superior"):
        served.client.chat.completions.create(model="other", messages=HELLO)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', b'{"model": "base", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}'], ids=range(8))  # fmt: skip
def test_malformed_bodies(served: Served, body: bytes) -> None:
    assert post(served, "/v1/chat/completions", body)[0] == 400
    assert post(served, "/v1/completions", body)[0] == 400


def test_other_bodies_paths_and_methods(served: Served) -> None:
    assert post(served, "/v1/chat/completions", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert post(served, "/v1/nothing", b"{}")[0] == 404
    assert post(served, "/v1/models", b"{}")[0] == 405
    assert post(served, "/v1/completions", b"{}", Host="evil.example")[0] == 403


def test_long_prompts_and_larger_bodies(served: Served) -> None:
    words = "word " * 200_000  # a megabyte
    for path, asked in (
        ("chat/completions", {"messages": [{"role": "user", "content": words}]}),
        ("completions", {"prompt": words[:9999]}),
    ):
        status, error = post(served, f"/v1/{path}", json.dumps({"model": "base", **asked}).encode())
        assert status == 400 and error["code"] == "context_length_exceeded"
    huge = b'{"model": "' + b"x" * (3 << 20) + b'"}'
    pieces = (b"x" * 65536 for _ in range(64))
    for content in (huge, pieces):
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # it may hang up while the client still sends
            found = httpx.post(f"{served.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert found.status_code == 413
    assert said(served, "base")


def test_a_client_that_goes_stops_its_answer(served: Served) -> None:
    assert served.idle()
    before = served.batcher.tokens
    with served.client.chat.completions.create(model="base", messages=HELLO, max_tokens=900, n=4, stream=True) as stream:
        next(iter(stream))
    assert served.idle()
    body = json.dumps({"model": "policy", "messages": HELLO, "max_tokens": 900, "n": 4}).encode()
    for sent in (len(body), len(body), 20):  # and those that wait for a whole answer, or send half of a body
        with socket.create_connection(served.url.removeprefix("http://").split(":")) as line:  # type: ignore[arg-type]
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            line.sendall(head.encode() + body[:sent])
            line.settimeout(0.3)
            with pytest.raises(TimeoutError):
                line.recv(1)
    assert served.idle() and said(served, "base")
    assert served.batcher.tokens - before < 3 * 4 * 900
    assert served.batcher.entering == 0 and not served.batcher.queue


def test_a_failing_batch_is_told_and_the_server_goes_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ArithmeticError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(served.voices, "predictor", fails)
        with pytest.raises(openai.InternalServerError):
            said(served, "base")
        with pytest.raises(openai.APIError):
            list(served.client.chat.completions.create(model="base", messages=HELLO, max_tokens=3, stream=True))
    assert said(served, "base")


def test_memory_that_is_full_halves_the_batch(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = said(served, "base", max_tokens=4)
    predictor, rows = served.voices.predictor, served.batcher._rows

    def small(voice: Any, strength: float | None) -> Callable[[Any], Any]:
        predict = predictor(voice, strength)

        def some(states: Any) -> Any:
            if len(states[""]) > 3:
                raise torch.OutOfMemoryError("on purpose")
            return predict(states)

        return some

    monkeypatch.setattr(served.voices, "predictor", small)
    reply = served.client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0, n=8
    )
    assert [choice.message.content for choice in reply.choices] == [alone] * 8
    served.batcher._rows = rows


def test_a_key_is_asked_for_everywhere_but_on_the_page(served: Served) -> None:
    app = make_app(served.voices, served.batcher, "s3cret", "run")
    with running(app, bound("127.0.0.1", 0)) as url:
        for given in ("S3cret", "s3cre", "s3cret-", "s3cret\u00e9", "Bearer s3cret"):
            header: Any = {"Authorization": f"Bearer {given}".encode()}
            assert httpx.get(f"{url}/v1/models", headers=header).status_code == 401
            assert httpx.post(f"{url}/v1/chat/completions", headers=header, json={}).status_code == 401
        assert httpx.get(f"{url}/").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="key is wrong"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="no").models.list()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret")
        assert client.models.list().data[0].id == "base"
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer s3cret", "Host": "elsewhere"}).status_code == 200


def test_the_queue_is_bounded(served: Served) -> None:
    """What waits and what comes share the room: of many at once some are refused, all others answered."""
    served.batcher.room = 3
    seen: list[int] = []

    def ask(n: int) -> None:
        body = json.dumps({"model": "base", "messages": HELLO, "max_tokens": 60, "temperature": 1 + n / 100}).encode()
        seen.append(post(served, "/v1/chat/completions", body)[0])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.batcher.room = 64
    assert {*seen} == {200, 429} and len(seen) == 12


def test_compare_takes_it_for_a_judge(served: Served, iqlite: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IQLITE_JUDGE_KEY", raising=False)
    few = ("--count", "1", "--seeds", "1", "--no-safety", "--json")
    code, out, err = iqlite("compare", served.run.path, "--judge", f"{served.url}/v1#base", *few)
    assert code == 0, err
    found = json.loads(out)
    assert found["judge"] == "base" and found["judging"]["asked"] >= 2 * len(found["contests"]) and found["judging"]["tokens"] > 0
