"""What comes after training on a CUDA card: a chat, a comparison, a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch

from iqlite.chat.speaker import Speaker
from iqlite.model.sampling import Sampler
from iqlite.run.rundir import RunDir
from iqlite.serving.app import make_app
from iqlite.serving.batcher import Batcher
from iqlite.serving.running import bound, running
from iqlite.serving.voices import Voices

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]
TURNS = ({"role": "user", "content": "What is it good for?"},)


@pytest.fixture
def run(make_run: Callable[..., RunDir]) -> RunDir:
    return make_run(model={"quantization": "nf4"}, superior={"strength": 2.0})


@pytest.fixture
def speaker(run: RunDir) -> Speaker:
    return Speaker.of_recipe(run.recipe(), run.adapter, "system", lambda text: None)


def test_a_chat_s_voices_differ_and_each_says_the_same_again(speaker: Speaker) -> None:
    assert speaker.policy.device.type == "cuda"
    said = {voice: list(speaker.speak(voice, TURNS, Sampler(0, 12, 0.0))) for voice in ("base", "policy", "superior")}
    assert len(set(map(tuple, said.values()))) == 3
    assert all(list(speaker.speak(voice, TURNS, Sampler(0, 12, 0.0))) == ids for voice, ids in said.items())


def test_a_run_is_compared(run: RunDir, iqlite: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = iqlite("compare", run.path, "--with", "superior", "--seeds", "1", "--no-safety", "--judge", "shorter", "--json")
    assert code == 0, err
    assert json.loads(out)


def test_a_server_says_what_the_chat_says(speaker: Speaker) -> None:
    expected = speaker.chat.tokenizer.decode(list(speaker.speak("policy", TURNS, Sampler(0, 12, 0.0))), skip_special_tokens=True)
    assert speaker.session is not None
    voices = Voices(speaker, {})
    batcher = Batcher(voices, speaker.session.sizes, room=16)
    try:
        with running(make_app(voices, batcher, None, "run"), bound("127.0.0.1", 0)) as url:
            client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
            reply = client.chat.completions.create(model="policy", messages=list(TURNS), max_tokens=12, temperature=0)
    finally:
        batcher.close()
    assert reply.choices[0].message.content == expected
