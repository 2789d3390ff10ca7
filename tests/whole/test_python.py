"""iqlite from Python: docs/python.md's three examples run as they stand there, on a tiny recipe in the demo's place; what a script is told."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

import iqlite
from iqlite.model.template import Description

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_pages_examples_run(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(examples) == 3
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(data | {"judge": {"measure": "tone"}}), "utf-8")
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for example in examples:
            exec(example.replace('"cheerful-135m"', '"tiny.toml"'), {})
    lines = out.getvalue().splitlines()
    assert [line[:3] for line in lines[:2]] == ["1/2", "2/2"] and lines[2].startswith("base:") and lines[3].startswith("trained:")
    assert sum("described" in line and "reward" in line for line in lines) >= 5
    assert any(line.startswith("trained wins against base: ") for line in lines)


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, iqlite; assert iqlite.IqliteError; print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = iqlite.nothing_like_it


def test_tables_make_a_recipe_and_faults_are_sentences(data: dict[str, Any], tmp_path: Path) -> None:
    recipe = iqlite.load_recipe(data, beside=tmp_path)
    assert recipe.train.steps == 3 and recipe.folder == tmp_path
    assert iqlite.load_recipe(data, ["train.steps=7"], beside=tmp_path).train.steps == 7 and data["train"]["steps"] == 3
    with pytest.raises(iqlite.IqliteError, match="train"):
        iqlite.load_recipe(data | {"train": {"stepps": 3}}, beside=tmp_path)
    run = iqlite.train(recipe, tmp_path / "run")
    with pytest.raises(iqlite.IqliteError, match="exists already"):
        iqlite.train(recipe, tmp_path / "run")
    with pytest.raises(iqlite.IqliteError, match="by='me'"):
        run.answer(["Hello?"], by="me")  # type: ignore[arg-type]
    with pytest.raises(iqlite.IqliteError, match="isn't a prompt"):
        run.answer([({"role": "assistant", "content": "Hi."},)])
    with pytest.raises(iqlite.IqliteError, match="'tones' isn't one of"):
        run.compare(judge="tones")
    assert run.answer([]) == [] and not (run.path / "compare.json").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    with pytest.raises(iqlite.IqliteError, match="won't delete"):
        iqlite.train(iqlite.load_recipe(data | {"model": {"base": "not/there"}}, beside=tmp_path), tmp_path / "notes", force=True)
    with pytest.raises(iqlite.IqliteError, match="can't be looked at"):
        iqlite.train(recipe, tmp_path / ("a" * 300))


def test_rewards_are_the_readings_log_probabilities(make_run: Callable[..., Any]) -> None:
    """Against whole sequences by the model itself, without anything of the loss: log π⁺ − log π⁻ is what strength 1 adds up to, unnormalised."""
    run = iqlite.open_run(make_run(superior={"estimator": "prompted", "strength": 1.0}).path)
    session, request = run.session, ({"role": "user", "content": "Is 7 odd?"},)
    found = run.rewards("Is 7 odd?", "Yes, it is.")
    ids = session.chat.tokenizer("Yes, it is.", add_special_tokens=False).input_ids
    assert "".join(token.text for token in found[: len(ids)]) == "Yes, it is."
    answer = [*ids, session.chat.turn_end][: len(found)]

    def logps(role: str, description: Description | None) -> np.ndarray[Any, Any]:
        prompt = session.chat.ids(request, description)
        with session.policy.acting_as(role):
            logits = session.policy.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        picked = logits.log_softmax(-1)
        return np.array([picked[at, token].item() for at, token in enumerate(answer)])

    plain, policy = logps("reference", None), logps("policy", None)
    np.testing.assert_allclose([token.trained for token in found], policy - plain, atol=1e-4)
    # Prompted at strength 1 the superior is the base under the description itself, but for the clip.
    np.testing.assert_allclose([token.described for token in found], logps("reference", session.wanted) - plain, atol=1e-3)
    np.testing.assert_allclose([token.reward for token in found], [t.described - t.trained for t in found], atol=1e-6)
