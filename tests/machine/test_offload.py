"""What streamed layers take and move by the plan: terms, the fewest bytes that fit, time by the bus, advice, and peaks of a played card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from iqlite.base.shape import Shape, known
from iqlite.machine.fit import STREAM, advice, choose, least_streaming
from iqlite.machine.memory import GIB, NF4_BYTES, Work
from iqlite.machine.timing import Rates, seconds_of_step
from iqlite.recipe.reading import load_recipe
from tests.card.shapes import play

RECIPE = Path(__file__).parents[2] / "recipes" / "harmless-7b.toml"
BASES = (("meta-llama/Llama-3.1-8B-Instruct", 4), ("meta-llama/Llama-2-13b-chat-hf", 6), ("Qwen/Qwen2.5-32B-Instruct", 12))


def work_of(base: str, *settings: str) -> tuple[Shape, Work]:
    shape = Shape.of(known()[base], base)
    return shape, Work.of(load_recipe(RECIPE, list(settings)), shape, "cuda")


@pytest.mark.parametrize(("base", "card_gb"), BASES)
def test_models_larger_than_the_card_fit_it(base: str, card_gb: int) -> None:
    """What isn't streamed is there whole, what is takes two slots; and no number of layers that fits moves less."""
    shape, work = work_of(base, "model.embeddings=host")
    free = 0.95 * card_gb * GIB
    assert choose(shape, work, free).peak > free
    found = least_streaming(shape, work, free)
    plan = choose(shape, found, free)
    assert plan.peak <= free
    layer = shape.linear_weights * NF4_BYTES / shape.layers
    there = sum(size for term, size in plan.stays.items() if "4-bit" in term or "quantisation" in term or "slots" in term)
    assert there == pytest.approx((shape.layers - found.streamed + 2) * layer)
    moved = found.streamed * -(-work.prompts // plan.widths.rows)
    for layers in range(1, shape.layers + 1):
        other = choose(shape, work.streaming(layers), free)
        assert other.peak > free or layers * -(-work.prompts // other.widths.rows) >= moved


def test_what_comes_and_goes_leaves_room_for_fragments_where_layers_are_streamed() -> None:
    """A played card ran full without: `tests.bench.plan_play --larger`."""
    shape, work = work_of(BASES[0][0])
    for streamed, share in ((0, 0.0), (shape.layers, 0.15)):
        plan = choose(shape, replace(work, streamed=streamed), 24 * GIB)
        for found in plan.phases.values():
            beside = sum(size for term, size in found.items() if term != "fragmentation")
            assert found.get("fragmentation", 0.0) == pytest.approx(share * beside)


def test_auto_streams_nothing_where_all_fits() -> None:
    shape, work = work_of(BASES[0][0])
    assert least_streaming(shape, work, 24 * GIB) == work


def test_a_slow_bus_sets_the_time_and_a_fast_one_does_not() -> None:
    """By hand: every decoded position of every batch of answers moves all streamed bytes, a step's readings and update twice."""
    shape, work = work_of(BASES[1][0])
    work = replace(work, prompts=4, new_tokens=100).streaming(shape.layers)
    plan = choose(shape, work, 8 * GIB)
    slow = replace(Rates(1e15, 1e20, 1e20, "the moon"), bus=1e9)
    a_pass = shape.linear_weights * NF4_BYTES / 1e9
    inputs = 2 * 4 * (50 + 100) * shape.hidden * 2 * shape.layers / 1e9
    assert seconds_of_step(shape, work, plan.widths, slow, 50) == pytest.approx((100 + 2) * a_pass + inputs, rel=1e-3)
    computing = Rates(1e9, 1e12, 1e12, "the sun", bus=1e18)
    there = replace(work, streamed=0)
    assert seconds_of_step(shape, work, plan.widths, computing, 50) == pytest.approx(
        seconds_of_step(shape, there, plan.widths, computing, 50), rel=1e-3
    )


def test_advice_streams_before_it_changes_what_is_trained() -> None:
    shape, work = work_of(BASES[0][0])
    changes, plan = advice(shape, work, 0.95 * 4 * GIB)
    assert plan.peak <= 0.95 * 4 * GIB
    assert STREAM in changes
    assert not [change for change in changes if "prompts" in change or "rank" in change]


def test_plan_says_what_comes_by_and_how_long_it_takes(iqlite: Callable[..., tuple[int, str, str]]) -> None:
    asked = ["plan", RECIPE, "--card", "RTX 3060", "--vram", "5GB", "--set", "model.offload=layers", "--json"]
    told = [json.loads(iqlite(*asked, "--bus", bus)[1]) for bus in ("2", "4")]
    assert told[0]["streamed_layers"] == 32
    assert told[0]["rates"]["bus"] == 2e9
    assert told[1]["step_seconds"] < told[0]["step_seconds"]
    assert told[0]["host_bytes"] > told[0]["pass_bytes"]
    assert "32 of 32 layers come by" in iqlite(*asked[:-1])[1]
    code, _, error = iqlite("plan", "--all", "--bus", "2")
    assert code == 2
    assert "--bus" in error


def test_a_played_card_takes_what_is_planned() -> None:
    """Two layers of a 7B, both streamed: allocated within the plan, and not far below. (The plan's activations are for the worst.)"""
    played = play(
        RECIPE, 1.6, "model.offload=layers", "model.embeddings=host", "rollout.prompts_per_step=2", base="meta-llama/Llama-2-7b-chat-hf", layers=2
    )  # fmt: skip
    assert played.full == 0
    assert [peak.phase for peak in played.peaks] == ["rollout", "reading", "update"]
    for peak in played.peaks:
        assert -0.02 < peak.error < 0.3
