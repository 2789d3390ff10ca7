"""`plan` beside the played card: no phase takes more than it says, nor much less. All shipped recipes: tests/bench/plan_play.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.card.shapes import play

RECIPES = Path(__file__).parents[2] / "recipes"
MOST = 0.08  # what two layers are off by, as a share; of all layers' memory it is less


@pytest.mark.parametrize(("name", "gb", "base"), [("concise-8b", 6, ""), ("harmless-7b", 8, ""), ("concise-7b", 8, "google/gemma-2-9b-it")])
def test_a_phase_takes_what_is_planned_and_memory_is_never_full(name: str, gb: float, base: str) -> None:
    """Two layers at all layers' widths, on a card with as much memory as `plan` says that these take."""
    played = play(RECIPES / f"{name}.toml", gb, base=base, layers=2)
    for peak in played.peaks:
        assert 0 <= peak.error < MOST, peak
    assert (played.full, played.said) == (0, ())
