"""Real sizes with random weights on cards of 6 to 24 GB, played by a memory limit: what fits, and how far the plan is off.

python -m pytest tests/gpu/test_fit.py -m gpu -s        prints one line of JSON a case
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

PLAYED = torch.cuda.is_available() and torch.cuda.get_device_name().startswith("played")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
    pytest.mark.skipif(PLAYED, reason="a process of its own has no played card; tests/bench/plan_play.py plays real sizes"),
]
CASES = [("llama-2-7b", 6), ("llama-2-7b", 8), ("olmo-2-7b", 8), ("13b", 10), ("13b", 12), ("13b", 24)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("shape", "card_gib"), CASES)
def test_a_step_of_1024_tokens_stays_within_the_card_and_near_the_plan(shape: str, card_gib: int) -> None:
    """Each in a process of its own: a limit and a peak are a process's."""
    words = ["--here", "--only", shape, "--tokens", "896", "--new-tokens", "128", "--prompts", "8", "--card-gib", str(card_gib)]
    done = subprocess.run([sys.executable, "-m", "tests.bench.plan_error", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(told))
    assert told["measured_peak_gib"] <= card_gib
    assert told["planned_peak_gib"] == pytest.approx(told["measured_peak_gib"], rel=0.1)
