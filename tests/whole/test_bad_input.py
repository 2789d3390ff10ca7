"""Whatever is wrong with a file or an argument, it is read or refused in one sentence, at once, and nothing is written."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iqlite.errors import IqliteError
from iqlite.model.template import Chat
from iqlite.recipe.prompts import load_prompts
from tests.helpers.strange import KINDS, files, long_line
from tests.helpers.tiny import make_tokenizer

EXAMPLES = {"GGUF conversions": 6, "tokenizers": 20, "templates": 30}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_sentence(kind: str) -> None:
    made_up, read = KINDS[kind]

    @settings(max_examples=EXAMPLES.get(kind, 60), deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(made_up)
    def holds(example: Any) -> None:
        with TemporaryDirectory(prefix="strange-") as name:
            folder = Path(name)
            try:
                read(folder, example)
            except IqliteError as error:
                said = str(error)
                assert said and len(said) < 2000 and "Traceback" not in said
            assert not any(part.startswith(".making") for part in files(folder))

    holds()


@pytest.mark.parametrize("size", [20 * 2**20])
def test_a_line_of_20_mb_is_cut_at_once(size: int, tmp_path: Path) -> None:
    """By characters first: as tokens it was 57 seconds and 2.6 GiB."""
    (tmp_path / "train.jsonl").write_bytes(long_line(size))
    found = load_prompts("train.jsonl", beside=tmp_path, key="prompts.train")
    begin = time.process_time()
    cut = Chat(make_tokenizer()).shorten(found, 1000, "train.jsonl", "prompts.train")
    assert time.process_time() - begin < 2.0
    assert len(Chat(make_tokenizer()).ids(cut.requests[0])) == 1000 and "1 of 2 prompts were cut" in cut.notes[-1]


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 5000), st.integers(60, 200))
def test_cutting_by_characters_first_changes_nothing(length: int, longest: int) -> None:
    """The same tokens are left as where the whole text is tokenised."""
    chat = Chat(make_tokenizer())
    text = "".join(chr(97 + (7 * i) % 26) for i in range(length)) or "x"
    request = ({"role": "user", "content": text},)
    around = len(chat.ids(({"role": "user", "content": ""},)))
    (turn,) = chat.cut(request, longest)
    assert turn["content"] == (text if len(text) + around <= longest else text[-(longest - around) :])  # a letter is a token


def test_nothing_is_left_in_the_cache() -> None:
    assert not list(Path(os.environ["IQLITE_CACHE"]).glob("making-*"))
