"""The memory model and what is chosen by it: against transformers' own parameter counts, bitsandbytes' own storage, and a card's size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from iqlite.base.names import EMBEDDED, embedded, shape_of
from iqlite.base.shape import Shape, known
from iqlite.commands.bench import _whole
from iqlite.errors import BaseError, RecipeError
from iqlite.machine.fit import LEAST_HARM, advice, choose, given_widths
from iqlite.machine.memory import GIB, NF4_BYTES, PHASES, Widths, Work, estimate
from iqlite.machine.timing import Rates, card_named, cards, seconds_of_step, work_of_step
from iqlite.recipe.reading import load_recipe
from iqlite.recipe.schema import Recipe
from iqlite.training.session import Session
from tests.helpers.tensors import tensors_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
LLAMA_7B, LLAMA_13B, QWEN_32B = "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-13b-chat-hf", "Qwen/Qwen2.5-32B-Instruct"


def work_on_a_card(name: str, tokens: int = 1024, new: int = 256) -> tuple[Shape, Work]:
    """A shipped recipe's work at rank 16 with another base, sequences of `tokens` tokens in all."""
    shape = Shape.of(known()[name], name)
    recipe = load_recipe(RECIPES[0], ["adapter.rank=16"])
    work = Work.of(recipe, shape, "cuda")
    return shape, replace(work, prompt_tokens=tokens - new, new_tokens=new, prompts=32, answers=32)


@pytest.mark.parametrize("name", [name for name, config in known().items() if "counted" not in config])
def test_shapes_count_the_weights_that_transformers_would_make(name: str) -> None:
    config = dict(known()[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config))
    shape = Shape.of(known()[name], name)
    linear = sum(m.weight.numel() for layer in model.model.layers for m in layer.modules() if isinstance(m, nn.Linear))
    small = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert shape.linear_weights == linear
    assert shape.parameters == model.num_parameters() - small
    assert small < 1e-3 * shape.parameters


def test_a_gguf_s_header_is_its_configuration() -> None:
    assert Shape.of_gguf([embedded()], EMBEDDED) == Shape.of(known()[EMBEDDED], EMBEDDED) == shape_of(EMBEDDED)


def test_the_adapter_is_what_peft_makes(make_session: Callable[..., Session]) -> None:
    session = make_session()
    shape = Shape.of(session.policy.base.model.config.to_dict(), "tiny")
    assert shape.adapter_parameters(4) == sum(p.numel() for p in session.policy.parameters.values())


def test_nf4_takes_the_bytes_that_bitsandbytes_stores() -> None:
    weight = Params4bit(torch.randn(2048, 1024), requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    holder = nn.Module()
    holder.register_parameter("weight", weight)
    stored = sum(tensor.nbytes for _, tensor in tensors_of(holder))
    tables = 4 * (16 + 256 + 1)  # the two code books and an offset
    assert stored == pytest.approx(NF4_BYTES * weight.numel() * 2 + tables, abs=64)


@pytest.mark.parametrize(("name", "card_gib"), [(LLAMA_7B, 6), (LLAMA_13B, 10), (QWEN_32B, 24)])
def test_1024_tokens_at_rank_16_fit_the_promised_card(name: str, card_gib: int) -> None:
    shape, work = work_on_a_card(name)
    plan = choose(shape, work, card_gib * GIB)
    assert plan.peak <= card_gib * GIB
    assert plan.widths.rows >= 1
    assert choose(shape, work, card_gib * GIB * 0.6).peak > card_gib * GIB * 0.6  # a check that can fail


@given(free=st.floats(3, 40), more=st.floats(1.0, 2.0), tokens=st.integers(64, 4096))
@settings(max_examples=40, deadline=None)
def test_more_memory_never_narrows_and_what_fits_stays_within(free: float, more: float, tokens: int) -> None:
    shape, work = work_on_a_card(LLAMA_7B, tokens, 32)
    small, large = choose(shape, work, free * GIB), choose(shape, work, free * more * GIB)
    assert small.widths.rows <= large.widths.rows
    assert small.widths.read_tokens <= large.widths.read_tokens
    assert small.widths.chunk_tokens <= large.widths.chunk_tokens
    row = work.longest + work.description_tokens
    narrowest = estimate(shape, work, Widths(1, row, row, 16))
    assert small.peak <= max(free * GIB, narrowest.peak)


def test_every_term_grows_with_what_it_is_made_of() -> None:
    shape, work = work_on_a_card(LLAMA_7B)
    widths = Widths(8, 4096, 2048, 64)
    plan = estimate(shape, work, widths)
    longer = estimate(shape, replace(work, prompt_tokens=2 * work.prompt_tokens), widths)
    assert longer.phases["rollout"]["key/value cache"] > 1.5 * plan.phases["rollout"]["key/value cache"]
    wide = replace(shape, vocabulary=256000)
    chunks = [estimate(wide, work, replace(widths, chunk_tokens=chunk)) for chunk in (256, 512)]
    assert chunks[1].phases["update"]["logits chunk"] == 2 * chunks[0].phases["update"]["logits chunk"]
    assert chunks[1].total("update") - chunks[0].total("update") == pytest.approx(256 * 256000 * 4 * (work.readings + 5.25))
    assert "logits chunk" not in plan.phases["update"]  # a small one and a layer's backward pass don't coincide: the larger counts
    plain = estimate(shape, replace(work, checkpointing=False), widths).total("update")
    assert plain > plan.total("update") + 4 * GIB
    offload = estimate(shape, replace(work, offload=True), widths).total("update")
    inputs = 2048 * 4096 * 2 * 32  # tokens, hidden size, bytes and layers of a Llama 7B; two layers' stay on the card
    assert plan.total("update") - offload == pytest.approx(inputs - inputs / 16)
    assert set(plan.phases) == set(PHASES)
    assert plan.peak == max(plan.total(phase) for phase in PHASES)


def test_advice_comes_in_the_order_of_least_harm_and_makes_it_fit() -> None:
    shape, work = work_on_a_card("allenai/OLMo-2-1124-7B-SFT")
    changes, plan = advice(shape, work, 5.9 * GIB)
    assert changes[0] == 'model.embeddings = "host"'
    assert plan.peak <= 5.9 * GIB
    order = [change for change, _ in LEAST_HARM]
    many, least = advice(shape, replace(work, quantization="none", optimizer="adamw", checkpointing=False, ema=True), GIB)
    assert [order.index(change) for change in many] == sorted(order.index(change) for change in many)
    assert least.peak > GIB
    assert advice(shape, work, 80 * GIB)[0] == []


def test_what_the_recipe_sets_stays(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(rollout={"batch": 3}, train={"chunk_tokens": 32})
    shape, work = work_on_a_card(LLAMA_7B)
    widths = choose(shape, work, 6 * GIB, given_widths(recipe)).widths
    assert (widths.rows, widths.chunk_tokens) == (3, 32)
    assert given_widths(make_recipe()) is None


def test_cards_are_found_by_name_and_near_ones_named() -> None:
    assert card_named("nvidia geforce rtx 4070") == "RTX 4070"
    assert card_named("RTX 3080 12 GB") == "RTX 3080 12GB"
    for name, card in {
        "NVIDIA GeForce RTX 3060 Laptop GPU": "RTX 3060 Laptop", "3060": "RTX 3060", "3060 ti": "RTX 3060 Ti", "4060 Ti 16 GB": "RTX 4060 Ti 16GB",
        "NVIDIA A100-SXM4-80GB": "A100 80GB", "Tesla T4": "T4", "RTX 3060 12GB": "RTX 3060",
    }.items():  # fmt: skip
        assert card_named(name) == card
    assert cards()["RTX 3060 Laptop"]["memory_gb"] == 6
    for name, said in {
        "RTX 407": "did you mean RTX 4070", "A100": "could be A100 40GB or A100 80GB: name one", "rtx": "isn't a card in the list",
        "NVIDIA RTX A4000 Laptop GPU": "--vram", "RTX 3090 Ti": "--vram", "RTX 3060 8GB": "--vram", "GTX 1060": "--vram", "GTX 1080 Ti": "--vram", "Tesla V100": "--vram",
        "M2": "isn't NVIDIA's", "Apple M3 Max": "isn't NVIDIA's", "RX 7900 XTX": "isn't NVIDIA's", "Intel Arc A770": "isn't NVIDIA's",
    }.items():  # fmt: skip
        with pytest.raises(RecipeError, match=said) as caught:
            card_named(name)
        assert str(caught.value).startswith(f"--card {name!r}")
    assert all(card["memory_gb"] > 0 and card["bandwidth_gb_s"] > 0 and card["tflops"] > 0 for card in cards().values())


def test_what_takes_weeks_is_told_so() -> None:
    assert (_whole(None), _whole(7200), _whole(92_566_800)) == ("?", "2 h 00 min", "not on this machine")


def test_rates_give_measured_seconds_back() -> None:
    shape, work = work_on_a_card(LLAMA_7B)
    widths = Widths(8, 4096, 2048, 64)
    prompt = work.longest - work.new_tokens
    needed = work_of_step(shape, work, widths, prompt)
    rates = Rates(needed["decode"] / 3, needed["read"] / 2, needed["update"] / 4, "here")
    assert seconds_of_step(shape, work, widths, rates, prompt) == pytest.approx(9)
    assert seconds_of_step(shape, work, replace(widths, rows=32), rates, prompt) == pytest.approx(3 / 4 + 6)
    assert seconds_of_step(shape, work, widths, rates, prompt // 2) < 9


def test_what_has_no_shape_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', "utf-8")
    with pytest.raises(BaseError, match=r"\(gpt2\) has no linear maps"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}', "utf-8")
    with pytest.raises(BaseError, match="num_attention_heads"):
        shape_of(str(tmp_path))
    broken = tmp_path / "broken.gguf"
    for rest in (b"\x03\x00\x00\x00", b"\xff" * 100):
        broken.write_bytes(b"GGUF" + rest)
        with pytest.raises(BaseError, match=r"broken.gguf can't be read"):
            shape_of(str(broken))


def iqlite(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "iqlite", *words], capture_output=True, text=True, encoding="utf-8", check=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_plan_tells_of_every_shipped_recipe(path: Path) -> None:
    found = iqlite("plan", str(path), "--vram", "24GB", "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["fits"]
    assert told["peak_bytes"] <= told["free_bytes"] == 24 * GIB
    shown = iqlite("plan", str(path), "--vram", "24GB")
    assert all(word in shown.stdout for word in ("embeddings", "optimizer state", *PHASES))
    assert re.match(r"fits: [\d.]+ GiB at its peak, in the \w+, of 24.0 GiB free: a card\n", shown.stdout)


def test_plan_imports_no_torch_and_says_what_to_change(tmp_path: Path) -> None:
    seen = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "iqlite", "plan", str(RECIPES[0]), "--card", "RTX 3060"], capture_output=True, text=True
    )
    assert seen.returncode == 0
    assert not [line for line in seen.stderr.splitlines() if line.rsplit("|", 1)[-1].strip() in ("torch", "transformers")]
    small = iqlite("plan", str(next(p for p in RECIPES if p.stem == "harmless-13b")), "--vram", "9GB")
    assert small.returncode == 1
    assert 'model.embeddings = "host"' in small.stdout
    assert small.stdout.startswith("doesn't fit: ")
    everything = json.loads(iqlite("plan", "--all", "--json").stdout)
    assert len(everything) == 6 * len(RECIPES)
    bad = iqlite("plan", str(RECIPES[0]), "--vram", "lots")
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)


def test_train_refuses_what_doesn_t_fit_before_it_reads_a_weight(data: dict[str, object], tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    config = dict(known()[QWEN_32B]) | {"num_hidden_layers": 400}
    (big / "config.json").write_text(json.dumps(config), "utf-8")
    (big / "model.safetensors").write_bytes(b"")
    (tmp_path / "recipe.toml").write_text(
        f'[model]\nbase = "{big.as_posix()}"\n[behavior]\nwanted = "You are kind."\nunwanted = "You are mean."\n[prompts]\ntrain = "train.jsonl"\n',
        "utf-8",
    )
    refused = iqlite("train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert "no setting makes it fit" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    forced = iqlite("train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"), "--force")
    assert forced.returncode == 2
    assert "fit" not in forced.stderr  # it went on, to the tokenizer and weights that aren't there
