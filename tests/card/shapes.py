"""Whole steps of a recipe at its model's real size on a played card, without numbers: peaks by phase beside the plan."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto import CONFIG_MAPPING

import iqlite.base.streaming as streaming_module
import iqlite.model.decoding as decoding
from iqlite.base.identity import Identity
from iqlite.base.loading import Base, embed_on_host, train_on_any_cpu
from iqlite.base.shape import Shape, known
from iqlite.base.streaming import evenly, stream
from iqlite.machine.fit import choose, given_widths, streaming
from iqlite.machine.memory import GIB, PHASES, Plan, Work
from iqlite.model.policy import Policy
from iqlite.recipe.reading import load_recipe
from iqlite.recipe.schema import Recipe
from iqlite.records import Messages, Prompts, Rollout
from iqlite.training.opening import sizes_for
from iqlite.training.optimizer import make_optimizer
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import training_batches, update
from tests.card.driver import played
from tests.card.played import Card, Counts, PlayedCard, blank, playing

FREE = 0.95  # of a card's size, as `iqlite plan` takes it
STOP, TOKEN = 2, 7
DECODED = 3  # tokens, then all answers stop: what a longer one takes is there from the first on
HEAD = 5  # tokens of the template before every request


@dataclass(frozen=True)
class Peak:
    """A phase's peak in bytes, without the driver's context: as planned (without the allocator's term), allocated, and reserved."""

    phase: str
    planned: float
    allocated: int
    reserved: int
    counts: Counts

    @property
    def error(self) -> float:
        """The plan's, as a share of what was allocated."""
        return self.planned / self.allocated - 1


@dataclass(frozen=True)
class Played:
    """What a recipe's steps took. `said` are the notes of a memory that was full, `full` how often it was."""

    plan: Plan
    peaks: tuple[Peak, ...]
    said: tuple[str, ...]
    full: int
    retries: int


def of_context(plan: Plan) -> dict[str, float]:
    """A plan's bytes in the allocator's tensors by phase: without the driver's context and what the allocator holds beyond."""
    beside = plan.stays["CUDA context"]
    return {phase: plan.total(phase) - beside - plan.phases[phase].get("allocator", 0.0) for phase in PHASES}


def play(recipe_path: Path, gb: float, *settings: str, base: str = "", layers: int = 0, card: str = "RTX 4070", steps: int = 2, expandable: bool = True,
         roomy: bool = False, evaluates: bool = False) -> Played:  # fmt: skip
    """Steps at the widths that `plan` chooses for a card of that size, every prompt and answer as long as it may be. `layers`: fewer than it has.

    One batch of each phase is played, and a smaller one after it. `roomy`: on a card without end.
    """
    recipe = load_recipe(recipe_path, list(settings))
    name = base or recipe.model.base
    config = dict(known()[name])
    if layers:
        config |= {"num_hidden_layers": layers} | ({"layer_types": config["layer_types"][:layers]} if config.get("layer_types") else {})
    shape = Shape.of(config, name)
    free = FREE * gb * GIB
    work = streaming(recipe, shape, Work.of(recipe, shape, "cuda"), free)
    plan = choose(shape, work, free, given_widths(recipe))
    said: list[str] = []
    with played(card, 400 if roomy else free / GIB, numbers=False, expandable=expandable) as there, _answers_of(DECODED):
        session, full_length = _session(there, recipe, shape, work, config, free, said.append)
        peaks = list(_steps(there, session, full_length, plan, work, steps, evaluates))
        return Played(plan, tuple(peaks), tuple(said), there.memory.full, there.memory.retries)


def _steps(card: PlayedCard, session: Session, full_length: Callable[[Rollout], Rollout], plan: Plan, work: Work, steps: int, evaluates: bool) -> Iterator[Peak]:  # fmt: skip
    planned, sizes = of_context(plan), session.sizes
    optimizer = make_optimizer(session.policy, work.optimizer)
    row = work.longest
    rows_read = -(-sizes.read_tokens // (row * len(session.readings)))
    most = max(min(sizes.together(row), work.answers), rows_read, sizes.update_tokens // row) + 1
    requests = list(session.train.requests[: min(most, work.prompts)])
    for step in range(1, steps + 1):
        made: list[Any] = []
        answer = partial(session.answers, "policy", requests, session.sampler("train"), step=step)
        yield _measured(card, "rollout", planned, lambda answer=answer, made=made: made.append(answer()))
        rollout: Rollout = full_length(made[0])
        reading = partial(read, session.policy, session.chat, rollout, session.readings, sizes, training_batches(session, rollout))
        yield _measured(card, "reading", planned, lambda reading=reading, made=made: made.append(reading()))
        yield _measured(card, "update", planned, lambda: update(session, optimizer, rollout, made[1], 1e-4))  # noqa: B023
    if evaluates:
        asked = list(session.eval.requests[: session.recipe.prompts.eval_count])
        answers = full_length(session.answers("policy", asked, session.sampler("eval")))
        yield _measured(card, "reading", planned, lambda: session.score(answers, weights="base"))


def _measured(card: PlayedCard, phase: str, planned: dict[str, float], block: Callable[[], Any]) -> Peak:
    gc.collect()
    card.memory.reset_peaks()
    before = card.counts.copy()
    block()
    return Peak(phase, planned[phase], card.memory.peak_allocated, card.memory.peak_reserved, card.counts.since(before))


@contextmanager
def _answers_of(tokens: int) -> Iterator[None]:
    """Without numbers nothing tells when an answer ends: it does after so many tokens."""
    real, drawn = decoding.choose, [0]

    def choose_token(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
        real(logits_BV, uniform_B, temperature, top_p)
        drawn[0] += 1
        return torch.full((len(logits_BV),), TOKEN if drawn[0] % tokens else STOP, device=logits_BV.device)

    decoding.choose = choose_token
    try:
        yield
    finally:
        decoding.choose = real


def _session(
    card: PlayedCard, recipe: Recipe, shape: Shape, work: Work, config: dict[str, Any], free: float, say: Callable[[str], None]
) -> tuple[Session, Callable[[Rollout], Rollout]]:
    base = base_of(card, config, torch.bfloat16 if card.model.capability >= (8, 0) else torch.float16, streamed=work.streamed)
    if recipe.model.embeddings == "host":
        embed_on_host(base.model)
    policy = Policy(
        base, rank=recipe.adapter.rank, alpha=recipe.adapter.alpha, seed=0, checkpointing=work.checkpointing, offload=work.offload
    )
    if recipe.superior.weights == "ema":
        policy.add_ema()
    requests: tuple[Messages, ...] = tuple(({"role": "user", "content": str(i)},) for i in range(work.answers))
    chat: Any = Words(work.prompt_tokens, work.description_tokens)
    session = Session(
        recipe, policy, chat, Prompts(requests), Prompts(requests), None, "user", (), sizes_for(recipe, shape, work, free, say)
    )

    def full_length(rollout: Rollout) -> Rollout:
        rows, new = len(rollout.index), recipe.rollout.max_new_tokens
        tokens_BT = torch.full((rows, new), TOKEN)
        return replace(
            rollout, tokens_BT=tokens_BT, mask_BT=torch.ones_like(tokens_BT, dtype=torch.bool), ended_B=torch.zeros(rows, dtype=torch.bool)
        )

    return session, full_length


class Words:
    """In place of `template.Chat`, which needs a tokenizer: ids of given lengths, a request's own after what its description puts before all."""

    stop_ids = (STOP,)
    rendering = SimpleNamespace(thinks=False, marks=())

    def __init__(self, prompt_tokens: int, description_tokens: int):
        self.prompt_tokens, self.description_tokens = prompt_tokens, description_tokens

    def shared(self, description: Any = None) -> tuple[int, ...]:
        if description is None:
            return tuple(range(100, 100 + HEAD))
        return (100 + sum(map(ord, str(description))) % 50,) * (HEAD + self.description_tokens)

    def ids(self, request: Messages, description: Any = None) -> list[int]:
        return [*self.shared(description), *[10 + int(request[-1]["content"]) % 7] * (self.prompt_tokens - HEAD)]


def base_of(card: PlayedCard, config: dict[str, Any], dtype: torch.dtype, *, streamed: int = 0) -> Base:
    """A base of a configuration on the card, in 4 bits, shapes only; `streamed` of its layers wait in the computer's memory, in one buffer for all."""
    options = dict(config)
    settings = CONFIG_MAPPING[options.pop("model_type")](**{k: v for k, v in options.items() if k != "counted"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    decoder = model.get_decoder()
    outside = evenly(decoder.layers, streamed)
    for layer in decoder.layers:
        empty = _untouched if any(layer is one for one in outside) else partial(_empty, card)
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, _quantised(empty, child, dtype))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                setattr(module, name, nn.Parameter(_empty(card, *parameter.shape, dtype=dtype), requires_grad=False))
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(card.device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type == "meta" and not isinstance(buffer, Card):
                module.register_buffer(name, _empty(card, *buffer.shape, dtype=buffer.dtype), persistent=False)
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=STOP)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = model.is_quantized = True
    train_on_any_cpu(model)
    base = Base("played", model, None, dtype, "nf4", Identity("played", settings.model_type, 0, 0, 0, ()))
    if not streamed:
        return base
    buffers: dict[int, Tensor] = {}
    real, streaming_module.pinned = streaming_module.pinned, lambda size, _: buffers.setdefault(size, torch.empty(size, dtype=torch.uint8))
    try:
        return replace(base, streamed=stream(model, decoder.layers, streamed, card.device, Path()))
    finally:
        streaming_module.pinned = real


def _untouched(*shape: int, dtype: torch.dtype) -> Tensor:
    """Of the computer's memory, but nothing is ever written there."""
    return torch.empty(shape, dtype=dtype)


def _empty(card: PlayedCard, *shape: int, dtype: torch.dtype) -> Card:
    return card.own(blank(shape, dtype))


def _quantised(empty: Callable[..., Tensor], linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    out, inside = linear.out_features, linear.in_features
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            inside, out, bias=linear.bias is not None, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
        )
    blocks = out * inside // 64
    state = QuantState(
        absmax=empty(blocks, dtype=torch.uint8), shape=torch.Size((out, inside)), code=empty(16, dtype=torch.float32), blocksize=64,
        quant_type="nf4", dtype=dtype, offset=playing().own(torch.zeros(())),
        state2=QuantState(
            absmax=empty(-(-blocks // 256), dtype=torch.float32), code=empty(256, dtype=torch.float32), blocksize=256, dtype=torch.float32
        ),
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        empty(out * inside // 2, 1, dtype=torch.uint8), quant_type="nf4", compress_statistics=True, blocksize=64, quant_state=state,
        bnb_quantized=True, module=layer,
    )  # fmt: skip
    layer.quant_state = state
    if layer.bias is not None:
        layer.bias = nn.Parameter(empty(out, dtype=dtype), requires_grad=False)
    made: nn.Module = layer
    return made


def record(played: Played) -> list[dict[str, Any]]:
    """The largest of each phase, in GiB, for a table."""
    rows = []
    for phase in PHASES:
        found = [peak for peak in played.peaks if peak.phase == phase]
        most = max(found, key=lambda peak: peak.allocated)
        rows.append(
            {
                "phase": phase,
                "planned_gib": round(most.planned / GIB, 3),
                "allocated_gib": round(most.allocated / GIB, 3),
                "reserved_gib": round(max(peak.reserved for peak in found) / GIB, 3),
                "widths": asdict(played.plan.widths),
            }
        )
    return rows
