"""What the played card found wrong, each held by a small test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from iqlite import device as devices
from iqlite.base.attention import NAME
from iqlite.base.loading import load_base
from iqlite.machine.timing import Fused, cards
from iqlite.model.head import Head
from iqlite.model.keyvalues import Prefix, before_rows
from iqlite.training.optimizer import load_state_of, make_optimizer, state_of
from tests.card.driver import fused_4bit, played
from tests.card.played import MODELS, PlayedCard, known

LLAMA_7B = ((4096, 4096), (11008, 4096), (4096, 11008))  # (out, in) of its layers' linear maps


@pytest.fixture
def card() -> Iterator[PlayedCard]:
    with played("RTX 4070", 12) as there:
        yield there


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_rows_of_several_prefixes_copy_them_for_a_layer_at_a_time(card: PlayedCard) -> None:
    layers, rows, heads, size = 8, 16, 4, 64
    prefixes = []
    for tokens in (96, 128):
        parts = [tuple(random(1, heads, tokens, size).to(card.device) for _ in range(layers)) for _ in range(2)]
        prefixes.append(Prefix(tuple(range(tokens)), *parts))
    told = [random(rows, heads, 8, size).to(card.device) for _ in range(2)]
    card.memory.reset_peaks()
    before = card.memory.allocated
    cache: Any = before_rows([prefixes[row % 2] for row in range(rows)], layers)
    assert card.memory.allocated == before
    for layer in range(layers):
        keys, _ = cache.update(*told, layer)
    assert known(keys)[:, :, 128:].equal(known(told[0]))  # type: ignore[arg-type]
    assert not known(keys)[0, :, :32].any()
    assert known(keys)[0, :, 32:128].equal(known(prefixes[0].keys[-1])[0])  # type: ignore[arg-type]
    of_a_layer = 2 * rows * heads * 128 * size * 4  # keys and values, float32
    assert of_a_layer < card.memory.peak_allocated - before < 4 * of_a_layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_summed_and_kept_in_float32(dtype: torch.dtype, card: PlayedCard) -> None:
    states, weight = random(5, 64, dtype=dtype), random(300, 64, dtype=dtype, seed=1)
    linear = nn.Linear(64, 300, bias=False)
    linear.weight = nn.Parameter(weight.to(card.device), requires_grad=False)
    given = states.to(card.device).requires_grad_()
    logits: Any = Head(linear)(given)
    exact = states.double() @ weight.double().T
    assert logits.dtype == torch.float32
    assert (known(logits) - exact).abs().max() < 1e-5 < 20 * (exact.to(dtype) - exact).abs().max()
    (gradient,) = torch.autograd.grad(logits.sum(), given)
    assert torch.allclose(known(gradient).float(), weight.float().sum(0).expand(5, -1), rtol=2e-2, atol=2e-2)  # type: ignore[arg-type]


def test_an_8_bit_optimizer_s_moments_lie_in_pages_after_a_resume_too(card: PlayedCard) -> None:
    large, small = (nn.Parameter(random(100, size).to(card.device)) for size in (1024, 64))
    policy: Any = SimpleNamespace(parameters={"large": large, "small": small}, device=card.device)
    optimizer: Any = make_optimizer(policy, "paged-adamw-8bit")
    for parameter in (large, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    again: Any = make_optimizer(policy, "paged-adamw-8bit")
    load_state_of(again, *state_of(optimizer))
    for one in (optimizer, again):
        assert [getattr(one.state[p]["state1"], "is_paged", False) for p in (large, small)] == [True, False]
    assert again.state[large]["state1"].equal(optimizer.state[large]["state1"])
    assert isinstance(again, bnb.optim.PagedAdamW8bit)


def test_before_ampere_grouped_attention_stays_fused(tiny: Callable[..., Path]) -> None:
    """transformers leaves fewer keys than queries to torch where there is no mask; older cards' kernels take none such."""
    with played("RTX 2070", 8) as older, torch.no_grad():
        base = load_base(str(tiny()), "nf4")
        ids: Any = torch.arange(30).reshape(2, 15).to(older.device)
        assert base.compute_dtype == torch.float16 and base.model.config._attn_implementation == NAME
        found, kinds = [], []
        for name in (NAME, "sdpa"):
            base.model.set_attn_implementation(name)
            before = older.counts.copy()
            whole: Any = base.model(input_ids=ids).logits
            begun: Any = base.model(input_ids=ids[:, :14], use_cache=True).past_key_values
            last: Any = base.model(input_ids=ids[:, 14:], past_key_values=begun).logits
            found.append(torch.cat([known(whole), known(last)], 1))
            kinds.append({kind.split(",")[0] for kind in older.counts.since(before).attention})
    assert kinds == [{"efficient"}, {"math"}]
    assert torch.allclose(*found, atol=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_rows_multiplied_in_4_bits_are_bitsandbytes_own_choice(name: str) -> None:
    """On Llama-2-7B's layers: rows up to which every product is fused, and beyond which two thirds of the weights aren't."""
    model, fused = MODELS[name], Fused.of_card(name)
    dtype = torch.bfloat16 if model.capability >= (8, 0) else torch.float16

    def weights(rows: int) -> float:
        """Share of the weights that are multiplied as they are; gate and up are two."""
        sizes = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
        total = sum(out * inside * count for (out, inside), count in sizes.items())
        return (
            sum(o * i * c for (o, i), c in sizes.items() if fused_4bit(model.capability, model.multiprocessors, dtype, rows, o, i)) / total
        )

    assert all(weights(rows) == 1 for rows in range(4, fused.all + 1))
    assert weights(fused.all + 1) < 1
    assert all(weights(rows) >= 2 / 3 - 1e-9 for rows in range(4, fused.most + 1))
    assert weights(fused.most + 1) < 2 / 3


def test_no_card_is_named_that_torch_has_dropped() -> None:
    assert not [name for name in cards() if name.startswith(("GTX 9", "GTX 10", "V100", "Titan V", "P100"))]
    assert {"RTX 2060", "T4"} <= set(cards())  # Turing, the oldest that CUDA 12.8 and 13 builds know


@pytest.mark.parametrize("set_by_user", ["", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_memory_that_grows_in_place_is_asked_for_unless_the_user_has_chosen(set_by_user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in devices.ALLOCATOR.values():
        monkeypatch.delenv(name, raising=False)
    if set_by_user:
        monkeypatch.setenv(set_by_user, "max_split_size_mb:64")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    devices.ask_for_expandable_segments()
    asked = {name: os.environ[name] for name in devices.ALLOCATOR.values() if name in os.environ}
    name = devices.ALLOCATOR[tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)]
    assert asked == ({set_by_user: "max_split_size_mb:64"} if set_by_user else {name: "expandable_segments:True"})
    for name in asked:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("streamed", [0, 2])
def test_an_embedding_that_stays_on_the_host_needs_no_room_on_its_way_there(streamed: int, tiny: Callable[..., Path]) -> None:
    """A recipe that fits with it there mustn't run out while the base is loaded."""
    with played("RTX 4070", 12) as card:
        before = card.memory.allocated
        card.memory.reset_peaks()
        base = load_base(str(tiny("llama", tie_word_embeddings=False)), "nf4", embeddings="host", offload=lambda _: streamed)
        table = base.model.get_input_embeddings().weight
        assert table.device.type == "cpu" and base.anatomy.head.weight.device.type == "cuda"
        stays = card.memory.allocated - before
        assert stays > 0 and card.memory.peak_allocated - before - stays < table.nbytes // 2
