"""Whole steps of a recipe at its model's real size on a played card, without numbers: peaks by phase beside the plan."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto import CONFIG_MAPPING

import iqlite.base.streaming as streaming_module
from iqlite.base.identity import Identity
from iqlite.base.loading import Base, embed_on_host, train_on_any_cpu
from iqlite.base.shape import Shape, known
from iqlite.base.streaming import evenly, stream
from iqlite.machine.fit import choose, given_widths, streaming
from iqlite.machine.memory import ALLOCATOR, GIB, PHASES, Plan, Widths, Work, estimate
from iqlite.machine.sizes import Sizes
from iqlite.model import decoding, steady
from iqlite.model.policy import Policy
from iqlite.recipe.reading import load_recipe
from iqlite.recipe.schema import Recipe
from iqlite.records import Messages, Prompts, Rollout, SuperiorScores
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
    """A phase's peak in bytes, without the driver's context: as planned, allocated, and reserved."""

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
    """What a recipe's steps took. `said` are the notes of a memory that was full, `full` how often it was, `paged` bytes in bitsandbytes' pages."""

    plan: Plan
    peaks: tuple[Peak, ...]
    said: tuple[str, ...]
    full: int
    retries: int
    paged: int


def of_context(plan: Plan) -> dict[str, float]:
    """A plan's bytes in tensors by phase: without the driver's context and the allocator's pages."""
    return {phase: plan.total(phase) - plan.stays["CUDA context"] - plan.stays[ALLOCATOR] for phase in PHASES}


def config_of(name: str) -> dict[str, Any]:
    """A base's configuration as transformers builds it; of what was counted on a larger model, the decoder's alone."""
    config = dict(known()[name])
    if (counted := config.get("counted")) is None:
        return config
    names = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
             "intermediate": "intermediate_size", "vocabulary": "vocab_size", "tied": "tie_word_embeddings", "context": "max_position_embeddings"}  # fmt: skip
    return {"model_type": counted["model_type"]} | {theirs: counted[ours] for ours, theirs in names.items()}


def planned_for(recipe: Recipe, name: str, gb: float) -> tuple[Work, Plan]:
    """What `iqlite plan` says of a recipe on a card of that size."""
    shape, free = Shape.of(known()[name], name), FREE * gb * GIB
    work = streaming(recipe, shape, Work.of(recipe, shape, "cuda"), free)
    return work, choose(shape, work, free, given_widths(recipe))


def play(recipe_path: Path, gb: float, *settings: str, base: str = "", layers: int = 0, card: str = "RTX 4070", expandable: bool = True,
         roomy: bool = False, evaluates: bool = False) -> Played:  # fmt: skip
    """A step at the widths that `plan` chooses for a card of that size, every prompt and answer as long as it may be.

    `layers`: fewer than the base has, at the widths of all; what the card has free is then what `plan` says that these need. `roomy`: it has no end.
    One whole batch of each phase is played (two of the update's); before it a step of one prompt, which leaves the optimizer its state.
    """
    recipe = load_recipe(recipe_path, list(settings))
    name = base or recipe.model.base
    work, plan = planned_for(recipe, name, gb)
    config = config_of(name)
    free = FREE * gb * GIB
    if layers:
        config |= {"num_hidden_layers": layers} | ({"layer_types": config["layer_types"][:layers]} if config.get("layer_types") else {})
        work = work.streaming(min(work.streamed, layers))
    plan = estimate(Shape.of(config, name), work, plan.widths)
    if layers:
        free = plan.peak
    said: list[str] = []
    with played(card, 400 if roomy else free / GIB, numbers=False, expandable=expandable) as there, answers_of(DECODED):
        capacity, there.memory.capacity = there.memory.capacity, float("inf")  # how a base gets there isn't played
        base = base_of(there, config, torch.bfloat16 if there.model.capability >= (8, 0) else torch.float16, streamed=work.streamed)
        session, full_length = session_of(base, recipe, work, plan.widths, said.append)
        gc.collect()
        there.memory.empty_cache()
        there.memory.capacity = capacity
        peaks = list(steps_of(there, session, full_length, plan, work, evaluates))
        return Played(plan, tuple(peaks), tuple(said), there.memory.full, there.memory.retries, there.paged)


def steps_of(card: Any, session: Session, full_length: Callable[[list[Messages]], Rollout], plan: Plan, work: Work, evaluates: bool) -> Iterator[Peak]:  # fmt: skip
    planned, sizes = of_context(plan), session.sizes
    optimizer = make_optimizer(session.policy, work.optimizer)
    row = work.longest - HEAD  # what all requests begin with is read once
    whole = {
        "rollout": sizes.together(work.longest),
        "reading": sizes.read_tokens // (row * len(session.readings)),
        "update": 2 * max(1, sizes.update_tokens // row),
    }
    rows = {phase: max(1, min(count, work.prompts if phase == "update" else work.answers)) for phase, count in whole.items()}
    requests = list(session.train.requests[: max(rows.values())])
    rollout = full_length(requests)
    scores = read(session.policy, session.chat, _first(rollout, 1), session.readings, sizes)
    update(session, optimizer, _first(rollout, 1), scores, 1e-4)  # gives the optimizer its state
    answer = partial(session.answers, "policy", requests[: rows["rollout"]], session.sampler("train"))
    yield _measured(card, "rollout", planned, answer)
    part = _first(rollout, rows["reading"])
    ahead = training_batches(session, part) if work.streamed else ()
    yield _measured(card, "reading", planned, partial(read, session.policy, session.chat, part, session.readings, sizes, ahead))
    hidden = {name: states_BTD.expand(rows["update"], -1, -1) for name, states_BTD in scores.hidden.items()}
    part, given = _first(rollout, rows["update"]), SuperiorScores(hidden)
    yield _measured(card, "update", planned, partial(update, session, optimizer, part, given, 1e-4))
    if evaluates:
        answers = full_length(list(session.eval.requests[: session.recipe.prompts.eval_count]))
        yield _measured(card, "reading", planned, partial(session.score, answers, weights="base"))


def _first(rollout: Rollout, rows: int) -> Rollout:
    short = {name: getattr(rollout, name)[:rows] for name in ("index", "requests", "prompt_ids", "tokens_BT", "mask_BT", "ended_B")}
    return replace(rollout, **short)


def _measured(card: Any, phase: str, planned: dict[str, float], block: Callable[[], Any]) -> Peak:
    gc.collect()
    card.memory.reset_peaks()
    before = card.counts.copy()
    block()
    of_allocator = planned[phase] - card.paged  # pages lie where the driver puts them
    return Peak(phase, of_allocator, card.memory.peak_allocated, card.memory.peak_reserved, card.counts.since(before))


@contextmanager
def answers_of(tokens: int) -> Iterator[None]:
    """Without numbers nothing tells when an answer ends: it does after so many tokens."""
    real, drawn = decoding.choose, [0]

    def choose_token(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, **given: bool) -> Tensor:
        real(logits_BV, uniform_B, temperature, top_p, **given)
        drawn[0] += 1
        return torch.full((len(logits_BV),), TOKEN if drawn[0] % tokens else STOP, device=logits_BV.device)

    def run(step: Callable[[], None], _: torch.device) -> Callable[[], None]:
        """A recording keeps all that it has seen, where a card's pool has room for one step."""
        step()
        return step

    with mock.patch.object(decoding, "choose", choose_token), mock.patch.multiple(steady, choose=choose_token, repeated=run):
        yield


def session_of(
    base: Base, recipe: Recipe, work: Work, widths: Widths, say: Callable[[str], None]
) -> tuple[Session, Callable[[list[Messages]], Rollout]]:
    """A recipe on a base without a tokenizer, and what makes answers of full length."""
    if recipe.model.embeddings == "host":
        embed_on_host(base.model)
    with mock.patch("iqlite.model.policy.is_proved", return_value=True):  # a proof needs a tokenizer
        policy = Policy(
            base, rank=recipe.adapter.rank, alpha=recipe.adapter.alpha, seed=0, checkpointing=work.checkpointing, offload=work.offload
        )
    if recipe.superior.weights == "ema":
        policy.add_ema()
    requests: tuple[Messages, ...] = tuple(({"role": "user", "content": str(i)},) for i in range(work.answers))
    chat: Any = Words(work.prompt_tokens, work.description_tokens)
    rest = {name: getattr(widths, name) for name in ("read_tokens", "update_tokens", "chunk_tokens")}
    sizes = Sizes(widths.rows, rollout_tokens=widths.rows * work.longest, say=say, **rest)
    session = Session(recipe, policy, chat, Prompts(requests), Prompts(requests), None, "user", (), sizes)

    def full_length(asked: list[Messages]) -> Rollout:
        """Their answers, each as long as it may be."""
        tokens_BT = torch.full((len(asked), recipe.rollout.max_new_tokens), TOKEN)
        mask_BT, ended_B = torch.ones_like(tokens_BT, dtype=torch.bool), torch.zeros(len(asked), dtype=torch.bool)
        ids = tuple(tuple(chat.ids(request)) for request in asked)
        return Rollout(
            index=tuple(range(len(asked))), requests=tuple(asked), prompt_ids=ids, tokens_BT=tokens_BT, mask_BT=mask_BT, ended_B=ended_B
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
