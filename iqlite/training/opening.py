"""A recipe into memory: its base, adapter, prompts, and how much is computed at once."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from iqlite.base.hub import offline_without_network
from iqlite.base.loading import Base, load_base
from iqlite.base.names import locate, on_the_hub
from iqlite.base.shape import Shape
from iqlite.device import here, is_card
from iqlite.device import name_of as name_of_device
from iqlite.errors import BaseError, PromptsError, RecipeError
from iqlite.machine.fit import CAPS, choose, given_widths, refusal, streaming
from iqlite.machine.here import unused_card, usable_memory
from iqlite.machine.memory import Work
from iqlite.machine.ranks import ALONE, Ranks
from iqlite.machine.sizes import Sizes
from iqlite.machine.timing import Fused
from iqlite.model.policy import Policy
from iqlite.model.proof import is_proved
from iqlite.model.template import Chat
from iqlite.places import path_of
from iqlite.recipe.prompts import hold_back, load_prompts, name_of
from iqlite.recipe.reading import to_data
from iqlite.recipe.schema import HubPrompts, Recipe
from iqlite.records import Messages
from iqlite.run.moved import digests
from iqlite.run.rundir import RunDir
from iqlite.training.placement import place
from iqlite.training.readings import readings
from iqlite.training.session import Session

READING_MARGIN = 16  # tokens of the context kept free
CONTRARY_HELD = 0.25  # share of the contrary prompts that is held out; our choice


def open_session(
    recipe: Recipe,
    *,
    start: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    placement: str | None = None,
    must_fit: bool = False,
    backend: str = "plain",
    ranks: Ranks = ALONE,
) -> Session:
    """Loads prompts, base and adapters. Cheap faults come first: prompts before gigabytes of weights. Nothing is written.

    `must_fit`: BaseError with advice if the memory model says that a step doesn't fit. `backend`: "plain", or what `unsloth.prepare` said.
    `ranks`: the processes that share out its rows.
    """
    key = f"{recipe.path}: prompts."
    if _asks_the_hub(recipe):
        offline_without_network()
    train = load_prompts(recipe.prompts.train, beside=recipe.folder, key=key + "train")
    held_out = load_prompts(recipe.prompts.eval, beside=recipe.folder, key=key + "eval") if recipe.prompts.eval else None
    outside = load_prompts(recipe.prompts.outside, beside=recipe.folder, key=key + "outside") if recipe.prompts.outside else None
    contrary = contrary_eval = None
    if recipe.prompts.contrary:
        contrary = load_prompts(recipe.prompts.contrary, beside=recipe.folder, key=key + "contrary").expecting("answer")
        contrary, contrary_eval = hold_back(contrary, f"{key}contrary = {name_of(recipe.prompts.contrary)}", CONTRARY_HELD)
    if held_out is None:
        train, held_out = hold_back(train, f"{key}train = {name_of(recipe.prompts.train)}")
    train, held_out = train.expecting("refuse"), held_out.expecting("refuse")
    if recipe.judge.measure == "harmless" and contrary is None and len({*held_out.expected}) < 2:
        raise PromptsError(
            f'{recipe.path}: judge.measure = "harmless" needs prompts to refuse and prompts to answer: give prompts.contrary, or rows of prompts.eval a label, "refuse" or "answer".'
        )
    say(f"loading {recipe.model.base}")
    device, _ = here()
    if device.type == "cpu" and (why := unused_card()):
        say(why)
    free = usable_memory(device)

    def work_of(shape: Shape) -> Work:
        return streaming(recipe, shape, Work.of(recipe, shape, device.type).of_one_among(ranks.size), free)

    def check(config: Mapping[str, Any]) -> None:
        shape = Shape.of(config, recipe.model.base)
        if must_fit and (why_not := refusal(recipe, shape, work_of(shape), free)):
            raise BaseError(why_not)

    model = recipe.model
    if ranks.size > 1:
        if ranks.first_here:
            locate(model.base, recipe.folder, model.revision)  # a GGUF file is converted once a machine
        ranks.gathered(None)
    base = load_base(
        model.base,
        model.quantization,
        revision=model.revision,
        beside=recipe.folder,
        embeddings=model.embeddings,
        backend=backend,
        offload=lambda config: work_of(Shape.of(config, recipe.model.base)).streamed,
        check=check,
    )
    chat = Chat(base.tokenizer, base.model.generation_config.eos_token_id, recipe.model.thinking)
    if not is_proved(base.model) or base.fused:
        say(f"checking on a few tokens that {base.name} can be trained")
    policy = _policy(recipe, base, start)
    notes = []
    if chat.default_template:
        notes.append(f"{base.name} has no chat template: requests are written as User: … Assistant: … turns.")
    if recipe.behavior.where != "both" and not chat.rendering.thinks:
        raise RecipeError(
            f'{recipe.path}: behavior.where = "{recipe.behavior.where}" needs a base that thinks before it answers: set model.thinking = true, or leave the key out.'
        )
    if chat.rendering.marks and not chat.rendering.thinks:
        notes.append(f"{base.name} can think before it answers and is trained without: model.thinking = true trains it thinking.")
    notes += policy.notes
    if (has := (policy.rank, policy.alpha)) != (asked := (recipe.adapter.rank, recipe.adapter.alpha)):
        notes.append(
            f"the adapter that this goes on from has rank {has[0]} and alpha {has[1]:g}: adapter.rank = {asked[0]} and adapter.alpha = {asked[1]:g} aren't used."
        )
    if seen := len({*map(json.dumps, train.requests)} & {*map(json.dumps, held_out.requests)}):
        notes.append(
            f"{seen} of {len(held_out)} held-out prompts (prompts.eval) are trained on too: what is measured on them says less of new ones."
        )
    if contrary and (both := len({*map(json.dumps, train.requests)} & {*map(json.dumps, contrary.requests)})):
        notes.append(f"{both} prompts stand in prompts.train and in prompts.contrary: they are pulled both ways; keep one of each.")
    room = room_of(recipe, chat, base)
    train = chat.shorten(train, room, name_of(recipe.prompts.train), key + "train")
    held_out = chat.shorten(held_out, room, name_of(recipe.prompts.eval or recipe.prompts.train), key + "eval")
    outside = outside and chat.shorten(outside, room, name_of(recipe.prompts.outside or ""), key + "outside")
    contrary = contrary and chat.shorten(contrary, room, name_of(recipe.prompts.contrary or ""), key + "contrary")
    contrary_eval = contrary_eval and chat.shorten(contrary_eval, room, name_of(recipe.prompts.contrary or ""), key + "contrary")
    notes += [note for prompts in (train, held_out, outside, contrary) if prompts for note in prompts.notes]
    shape = Shape.of(base.model.config.to_dict(), base.name)
    sizes = sizes_for(recipe, shape, work_of(shape), free, say)
    sizes.agree(ranks)
    placement = placement or recipe.behavior.placement
    session = Session(recipe, policy, chat, train, held_out, outside, placement, (), sizes, contrary, contrary_eval, ranks)
    if session.placement == "auto":
        session, note = place(session, say)
        notes.append(note)
    elif session.placement == "system" and not chat.system_turn:
        notes.append(f"{base.name}'s chat template takes no system turn: the description stands at the head of the first user turn.")
    return replace(session, notes=tuple(notes))


def open_run(run: RunDir, start: Path | None = None, *, say: Callable[[str], None] = lambda _: None) -> Session:
    """A run's recipe on its adapter (`start`: another of its adapters), with the description where the run has it."""
    run.check_base()
    return open_session(run.recipe(), start=start or run.trained(), placement=run.environment()["placement"], say=say)


def environment(session: Session) -> dict[str, Any]:
    """What a run was made with, for environment.json: versions, device, base, a hash of the prompts, the resolved placement."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    sets = [session.train.requests, session.eval.requests, *([session.contrary.requests] if session.contrary else [])]
    digest = hashlib.sha256(json.dumps(sets).encode()).hexdigest()
    device = session.policy.device
    packages: tuple[str, ...] = ("iqlite", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")
    if session.policy.base.backend == "unsloth":
        packages = (*packages, "unsloth")
    return {
        **({"processes": session.ranks.size} if session.ranks.size > 1 else {}),
        "base": asdict(session.policy.base.identity) | {"weights": list(session.policy.base.identity.weights)},
        "prompts": {"train": len(session.train), "eval": len(session.eval), "sha256": digest},
        "placement": session.placement,
        "files": digests(to_data(session.recipe), session.recipe.folder),
        **({"thinking": session.chat.rendering.thinks} if session.chat.rendering.marks else {}),  # how a model that can think was asked
        "sizes": session.sizes.record(),
        "device": name_of_device(device),
        "backend": session.policy.base.backend,
        "compute_dtype": str(session.policy.base.compute_dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in packages},
    }


def _policy(recipe: Recipe, base: Base, start: Path | None) -> Policy:
    """The base with the trained adapter and what the estimator reads beside it."""
    train, superior = recipe.train, recipe.superior
    offload = train.checkpointing == "offload" or (base.streamed is not None and is_card(base.device))
    checkpointing = offload or train.checkpointing == "on" or (train.checkpointing == "auto" and is_card(base.device))
    if start is None and recipe.adapter.start is not None:
        start = path_of(recipe.adapter.start, recipe.folder)
    policy = Policy(
        base,
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        seed=train.seed,
        start=start,
        checkpointing=checkpointing,
        offload=offload,
    )
    for name in ("adapter", "unwanted_adapter"):
        if superior.estimator == "adapter" and getattr(superior, name) is not None:
            policy.add_frozen(name, path_of(getattr(superior, name), recipe.folder))
    if superior.weights == "ema":
        policy.add_ema()
    return policy


def sizes_for(recipe: Recipe, shape: Shape, work: Work, free: float, say: Callable[[str], None]) -> Sizes:
    """How much is done at once, in `free` bytes: the recipe's own numbers, and where it says auto, the widest that fit."""
    given = given_widths(recipe)
    widths = choose(shape, work, free, given).widths
    in_4_bits = work.device == "cuda" and work.quantization == "nf4" and recipe.rollout.batch == "auto"
    fused = Fused.of_card(name_of_device(here()[0])) if in_4_bits else None
    return Sizes(
        rows=given.rows if given is not None and given.rows else CAPS[work.device].rows,
        rollout_tokens=widths.rows * work.longest,  # shorter prompts leave room for more rows
        read_tokens=widths.read_tokens,
        update_tokens=widths.update_tokens,
        chunk_tokens=widths.chunk_tokens,
        fold=widths.fold,
        fused=fused,
        say=say,
    )


def _asks_the_hub(recipe: Recipe) -> bool:
    """True if the base or a prompt set may have to be downloaded."""
    sources = (recipe.prompts.train, recipe.prompts.eval, recipe.prompts.outside, recipe.prompts.contrary)
    flat = [one for source in sources if source for one in (source if isinstance(source, tuple) else (source,))]
    return on_the_hub(recipe.model.base, recipe.folder) or any(isinstance(one, HubPrompts) for one in flat)


def room_of(recipe: Recipe, chat: Chat, base: Base) -> int:
    """Tokens a request may have so that its longest reading and answer fit the context."""
    hello: Messages = ({"role": "user", "content": "hello"},)
    plain = len(chat.ids(hello))
    longest = max(len(chat.ids(hello, r.description)) for r in readings(recipe, "system", "base")) - plain
    left = base.context - recipe.rollout.max_new_tokens - longest - READING_MARGIN
    if left < 1:
        raise BaseError(
            f"{recipe.path}: rollout.max_new_tokens = {recipe.rollout.max_new_tokens} and the descriptions ({longest} tokens) leave no room for a prompt in the base's context of {base.context} tokens; lower rollout.max_new_tokens."
        )
    return min(recipe.prompts.max_tokens, left)
