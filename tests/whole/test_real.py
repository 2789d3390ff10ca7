"""The demo's recipe on the real small model, NF4, through the command line, with few steps: it learns, and what it leaves is usable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from iqlite.base.names import EMBEDDED, locate
from iqlite.run.rundir import RunDir
from iqlite.training.opening import open_session

RECIPE = Path(__file__).parents[2] / "recipes" / "cheerful-135m.toml"
STEPS = 4


def iqlite(*arguments: object) -> str:
    done = subprocess.run([sys.executable, "-m", "iqlite", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def kl_on_fixed_answers(run: RunDir, start: Path | None) -> float:
    """KL(policy‖superior) on the base's own answers, the same before and after: what the policy samples itself changes as it learns."""
    session = open_session(run.recipe(), start=start, placement=run.environment()["placement"])
    fixed = session.answers("reference", session.eval.requests[:8], session.sampler("fixed"))
    return session.score(fixed).means()["kl/policy_superior"]


@pytest.mark.real
def test_a_real_model_learns_the_described_tone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"train.steps={STEPS}", f"train.eval_every={STEPS}", "prompts.eval_count=8", "rollout.max_new_tokens=16", "train.warmup=0"]
    out = iqlite("train", RECIPE, "--out", run, *(part for setting in settings for part in ("--set", setting)))
    assert "nf4" in out and f"step {STEPS}/{STEPS}" in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert abs(rows[1]["kl/policy_reference"]) < 1e-6
    assert [row["step"] for row in rows if "eval/kl_policy_superior" in row] == [0, STEPS]
    before, after = (kl_on_fixed_answers(RunDir.open(run), start) for start in (None, run / "adapter"))
    assert after < 0.8 * before
    result = json.loads(iqlite("compare", run, "--seeds", 1, "--count", 4, "--no-safety", "--json"))
    assert {m["name"] for m in result["measures"]} == {"base", "prompted (system turn)", "prompted (user turn)", "trained"}
    assert all(m["answers"] == 4 and m["empty_share"] == 0 and m["example"] for m in result["measures"])

    # without iqlite: the unquantised base and PEFT load the adapter, and it changes what the model says
    folder = locate(EMBEDDED)
    tokenizer, base = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How was your day?"}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        before = base(prompt["input_ids"]).logits[0, -1].log_softmax(-1)
        after = PeftModel.from_pretrained(base, str(run / "adapter"))(prompt["input_ids"]).logits[0, -1].log_softmax(-1)
    assert float((after.exp() * (after - before)).sum()) > 1e-3


@pytest.mark.real
def test_the_demo_with_its_descriptions_swapped_is_refused(tmp_path: Path) -> None:
    """A target that points the wrong way on a real model: one sentence with the figures, exit code 2, and nothing written."""
    swapped = ["behavior.wanted='You always answer in a cold, gloomy and discouraging tone.'", "behavior.unwanted='You always answer in a warm, cheerful and encouraging tone.'"]  # fmt: skip
    arguments = ["train", RECIPE, "--out", tmp_path / "run", *(part for one in swapped for part in ("--set", one))]
    done = subprocess.run([sys.executable, "-m", "iqlite", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 2 and "aims the wrong way: by tone, base 0." in done.stderr and "--improve" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists() and "step 1" not in done.stdout
