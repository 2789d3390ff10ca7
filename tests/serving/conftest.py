"""A real server on a free port, with a tiny random model behind it, and the openai client in front."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import pytest

from iqlite.chat.speaker import Speaker
from iqlite.recipe.reading import parse_recipe
from iqlite.run.rundir import RunDir
from iqlite.serving.app import make_app
from iqlite.serving.batcher import Batcher
from iqlite.serving.running import bound, running
from iqlite.serving.voices import Voices
from iqlite.training.opening import environment, open_session
from tests.helpers.tiny import shake


@dataclass(frozen=True)
class Served:
    """A server that runs: its URL, what is behind it, and a client of it."""

    url: str
    voices: Voices
    batcher: Batcher
    run: RunDir

    @cached_property
    def client(self) -> openai.OpenAI:
        """The real client, which doesn't try again by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def idle(self, seconds: float = 20.0) -> bool:
        """Whether the model's thread comes to rest: nothing waits and no more tokens are drawn."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = self.batcher.tokens
            time.sleep(0.1)
            if not self.batcher.queue and not self.batcher.entering and self.batcher.tokens == before:
                return True
        return False


@pytest.fixture(scope="module")
def tiny_run(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose adapter has random values, made once a module."""
    folder = tmp_path_factory.mktemp("served")
    rows = [{"prompt": f"What is number {number} good for?"} for number in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data: dict[str, Any] = {
        "model": {"base": str(tiny()), "quantization": "none"},
        "adapter": {"rank": 4, "alpha": 8.0},
        "behavior": {"wanted": "You are kind.", "unwanted": "You are mean.", "placement": "system"},
        "prompts": {"train": "train.jsonl"},
        "superior": {"strength": 2.0, "clip": 4.0, "plausibility": 1e-3},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 6},
        "train": {"steps": 3},
    }
    session = open_session(parse_recipe(data, folder / "recipe.toml"))
    shake(session.policy)
    run = RunDir.create(folder / "run", session.recipe, environment(session))
    run.save_folder(run.adapter, session.policy.save_adapter)
    return run


@pytest.fixture(scope="module")
def served(tiny_run: RunDir) -> Iterator[Served]:
    """The run's server; its own adapter once more as a further run, `again`."""
    speaker = Speaker.of_recipe(tiny_run.recipe(), tiny_run.adapter, "system", lambda text: None)
    assert speaker.session is not None
    voices = Voices(speaker, {"again.v2": tiny_run.adapter})
    batcher = Batcher(voices, speaker.session.sizes, room=64)
    with running(make_app(voices, batcher, None, "run <b>&"), bound("127.0.0.1", 0)) as url:
        yield Served(url, voices, batcher, tiny_run)
    batcher.close()
