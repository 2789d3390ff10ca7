"""What a recipe comes to once it is in memory: base, policy, chat, prompts, the readings, and how π̃ is made from them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from iqlite.base.architectures import Shape
from iqlite.base.gguf_files import EMBEDDED
from iqlite.base.hub import offline_without_network
from iqlite.base.loading import Base, device_and_dtype, load_base
from iqlite.errors import BaseError, PromptsError, RecipeError
from iqlite.machine.fit import CAPS, choose, given_widths, refusal
from iqlite.machine.memory import CONTEXT, Work
from iqlite.machine.sizes import Sizes
from iqlite.machine.timing import card_here
from iqlite.method.estimators import ESTIMATORS
from iqlite.method.loss import Scoring, TokenStatistics, chunked_statistics, spans
from iqlite.method.objectives import OBJECTIVES, kl
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.recipe.prompts import Chat, Description, hold_back, load_prompts, name_of
from iqlite.recipe.schema import Demonstration, HubPrompts, Recipe, readings_of
from iqlite.records import Messages, Prompts, Rollout
from iqlite.training.readings import Reading, read
from iqlite.training.rollout import sample

PLACEMENT_PROMPTS, PLACEMENT_TOKENS = 8, 16  # how much `placement = "auto"` reads both ways; ours
READING_MARGIN = 16  # tokens of the context kept free
CONTRARY_HELD = 0.25  # share of the contrary prompts that is held out; ours


@dataclass(frozen=True)
class Session:
    """A recipe ready to run. `placement` is resolved; `notes` are sentences for the user."""

    recipe: Recipe
    policy: Policy
    chat: Chat
    train: Prompts
    eval: Prompts
    outside: Prompts | None
    placement: str
    notes: tuple[str, ...]
    sizes: Sizes
    contrary: Prompts | None = None
    contrary_eval: Prompts | None = None

    @property
    def asked(self) -> Prompts:
        """The held-out prompts that the recipe's measure is of: harmless needs those with both kinds of right answer."""
        both = self.recipe.judge.measure == "harmless" and self.contrary_eval is not None
        return self.eval + self.contrary_eval if both and self.contrary_eval else self.eval

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The reference, always by the bare base, and what the estimator asks for, by the weights that the recipe names."""
        return readings(self.recipe, self.placement, self.recipe.superior.weights)

    @property
    def scoring(self) -> Scoring:
        """The estimator with its settings."""
        superior = self.recipe.superior
        estimator = functools.partial(ESTIMATORS[superior.estimator], **superior.settings())
        mixture = tuple((p.name, p.weight) for p in self.recipe.behavior.mixture)
        return Scoring(estimator, readings_of(superior.estimator), mixture)

    @property
    def objective(self) -> Callable[..., Any]:
        """The objective with its settings."""
        return functools.partial(OBJECTIVES[self.recipe.objective.name], **self.recipe.objective.settings())

    @property
    def wanted(self) -> Description | None:
        """The wanted description as it is read, what the base is told in a comparison; all of them in a mixture."""
        found = [r.description for r in self.readings if r.name.startswith("wanted") and r.description]
        if not found:
            return None
        shown = tuple(turn for description in found for turn in description.demonstrations)
        return Description(" ".join(description.text for description in found), shown, self.placement)

    def with_strength(self, strength: float) -> Session:
        """The same with another strength of the contrast in π̃; RecipeError for a number it can't be."""
        if not 0 <= strength < 1000:
            now = self.recipe.superior.settings()["strength"]
            raise RecipeError(f"the strength {strength:g} can't be used: give one from 0 to 1000, such as {now:g}.")
        superior = self.recipe.superior.model_copy()
        superior.__pydantic_extra__ = {**(self.recipe.superior.model_extra or {}), "strength": strength}
        return replace(self, recipe=self.recipe.model_copy(update={"superior": superior}))

    def sampler(self, stream: str) -> Sampler:
        """How rollouts are drawn."""
        rollout = self.recipe.rollout
        return Sampler(self.recipe.train.seed, rollout.max_new_tokens, rollout.temperature, rollout.top_p, stream)

    def answers(
        self, role: str, requests: Sequence[Messages], sampler: Sampler, *, description: Description | None = None, step: int = 0,
        index: Sequence[int] | None = None, progress: Callable[[int], None] | None = None,
    ) -> Rollout:  # fmt: skip
        """Samples answers to requests by a role, plain or told a description."""
        ids = [self.chat.ids(request, description) for request in requests]
        numbers = range(len(requests)) if index is None else index
        return sample(
            self.policy,
            role,
            requests,
            ids,
            numbers,
            self.chat.stop_ids,
            sampler,
            step=step,
            sizes=self.sizes,
            shared=self.chat.shared(description),
            progress=progress,
        )

    def score(self, rollout: Rollout, *, weights: str | None = None) -> TokenStatistics:
        """Rewards, KLs and entropy of the policy on a rollout's tokens, without a gradient."""
        which = self.readings if weights is None else readings(self.recipe, self.placement, weights)
        mask_BT = rollout.mask_BT
        scores = read(self.policy, self.chat, rollout, [*which, Reading("policy", "policy")], self.sizes)
        hidden = {name: hidden_BTD[mask_BT] for name, hidden_BTD in scores.hidden.items()}
        return chunked_statistics(
            self.policy.head, hidden.pop("policy"), rollout.tokens_BT[mask_BT], hidden, self.scoring, chunk_tokens=self.sizes.chunk_tokens
        )


def readings(recipe: Recipe, placement: str, weights: str) -> tuple[Reading, ...]:
    """What an estimator has to read, by name. The reference is always the bare base."""
    role = "reference" if weights == "base" else weights
    behavior = recipe.behavior
    found = [Reading("reference", "reference")]

    def described(name: str, text: str | None, demonstrations: Sequence[Demonstration], side: str) -> Reading:
        shown = tuple((turn.user, getattr(turn, side)) for turn in demonstrations)
        return Reading(name, role, Description(text or "", shown, placement))

    for name in readings_of(recipe.superior.estimator):
        if name in ("wanted", "unwanted"):
            found.append(described(name, getattr(behavior, name), behavior.demonstrations, name))
        elif name == "behaviors":
            found += [
                described(f"{side}:{p.name}", getattr(p, side), p.demonstrations, side)
                for p in behavior.mixture
                for side in ("wanted", "unwanted")
            ]
        elif getattr(recipe.superior, name) is not None:
            found.append(Reading(name, name))  # an adapter of its own, with the plain prompt
    return tuple(found)


def unused_card() -> str:
    """Why a card of this computer isn't used, and what to do; empty if there is none, or if it was hidden on purpose."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or not (card := card_here()):
        return ""
    if torch.version.cuda is None:
        cause = f"this torch ({torch.__version__}) was built for CPUs only: install the CUDA build that PyTorch's own page names for your system"
    else:
        cause = f"torch {torch.__version__} can't reach it: update its driver, which must know CUDA {torch.version.cuda}"
    return f"{card[0]} isn't used, since {cause}. Going on without it."


def open_session(
    recipe: Recipe,
    *,
    start: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    placement: str | None = None,
    must_fit: bool = False,
) -> Session:
    """Loads prompts, base and adapters. Cheap faults come first: prompts before gigabytes of weights. Nothing is written.

    `must_fit`: BaseError with advice if the memory model says that a step doesn't fit.
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
    device, _ = device_and_dtype()
    if device.type == "cpu" and (why := unused_card()):
        say(why)
    free = free_memory(device)

    def check(config: Mapping[str, Any]) -> None:
        shape = Shape.of(config, recipe.model.base)
        why_not = refusal(recipe, shape, Work.of(recipe, shape, device.type), free)
        if must_fit and why_not is not None:
            raise BaseError(why_not)

    model = recipe.model
    base = load_base(
        model.base, model.quantization, revision=model.revision, beside=recipe.folder, embeddings=model.embeddings, check=check
    )
    chat = Chat(base.tokenizer, base.model.generation_config.eos_token_id)
    policy = _policy(recipe, base, start)
    notes = []
    if chat.default_template:
        notes.append(f"{base.name} has no chat template: requests are written as User: … Assistant: … turns.")
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
    sizes = sizes_for(recipe, shape, Work.of(recipe, shape, device.type), free, say)
    session = Session(
        recipe, policy, chat, train, held_out, outside, placement or recipe.behavior.placement, (), sizes, contrary, contrary_eval
    )
    if session.placement == "auto":
        session, note = _place(session, say)
        notes.append(note)
    elif session.placement == "system" and not chat.system_turn:
        notes.append(f"{base.name}'s chat template takes no system turn: the description stands at the head of the first user turn.")
    return replace(session, notes=tuple(notes))


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
    packages = ("iqlite", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")
    return {
        "base": asdict(session.policy.base.identity) | {"weights": list(session.policy.base.identity.weights)},
        "prompts": {"train": len(session.train), "eval": len(session.eval), "sha256": digest},
        "placement": session.placement,
        "sizes": session.sizes.record(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "compute_dtype": str(session.policy.base.compute_dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in packages},
    }


def _policy(recipe: Recipe, base: Base, start: Path | None) -> Policy:
    """The base with the trained adapter and what the estimator reads beside it."""
    train, superior = recipe.train, recipe.superior
    checkpointing = train.checkpointing == "on" or (train.checkpointing == "auto" and base.device.type == "cuda")
    if start is None and recipe.adapter.start is not None:
        start = recipe.folder / Path(recipe.adapter.start).expanduser()
    policy = Policy(base, rank=recipe.adapter.rank, alpha=recipe.adapter.alpha, seed=train.seed, start=start, checkpointing=checkpointing)
    for name in ("adapter", "unwanted_adapter"):
        if superior.estimator == "adapter" and getattr(superior, name) is not None:
            policy.add_frozen(name, recipe.folder / Path(getattr(superior, name)).expanduser())
    if superior.weights == "ema":
        policy.add_ema()
    return policy


def sizes_for(recipe: Recipe, shape: Shape, work: Work, free: float, say: Callable[[str], None]) -> Sizes:
    """How much is done at once, in `free` bytes: the recipe's own numbers, and where it says auto, the widest that fit."""
    given = given_widths(recipe)
    widths = choose(shape, work, free, given).widths
    return Sizes(
        rows=given.rows if given is not None and given.rows else CAPS[work.device].rows,
        rollout_tokens=widths.rows * work.longest,  # shorter prompts leave room for more rows
        read_tokens=widths.read_tokens,
        update_tokens=widths.update_tokens,
        chunk_tokens=widths.chunk_tokens,
        fold=widths.fold,
        say=say,
    )


def free_memory(device: torch.device) -> float:
    """Bytes that this process may come to use, what it uses now included: of the card as the driver reports it, or of the host.

    On Windows the driver spills to host memory instead of failing, at a tenth of the speed: there the allocator is told to stop
    at what is free.
    """
    if device.type == "cpu":
        import psutil

        free = float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
        limit = Path("/sys/fs/cgroup/memory.max")  # a container's
        text = limit.read_text("utf-8").strip() if limit.exists() else "max"
        return min(free, float(text)) if text.isdigit() else free
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_reserved(device)
    if os.name == "nt":
        torch.cuda.set_per_process_memory_fraction(min(torch.cuda.get_per_process_memory_fraction(device), (free + used) / total), device)
    return min(free + used, torch.cuda.get_per_process_memory_fraction(device) * total) + CONTEXT["cuda"]


def _asks_the_hub(recipe: Recipe) -> bool:
    """True if the base or a prompt set may have to be downloaded."""
    sources = (recipe.prompts.train, recipe.prompts.eval, recipe.prompts.outside, recipe.prompts.contrary)
    flat = [one for source in sources if source for one in (source if isinstance(source, tuple) else (source,))]
    base = recipe.model.base
    local = base == EMBEDDED or ":" in base or any(path.exists() for path in (recipe.folder / Path(base).expanduser(), Path(base)))
    return not local or any(isinstance(one, HubPrompts) for one in flat)


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


def _place(session: Session, say: Callable[[str], None]) -> tuple[Session, str]:
    """METHOD's `auto`: a handful of prompts read both ways; the placement with the larger KL from the base is taken."""
    if not any(r.description for r in readings(session.recipe, "system", "base")):
        return replace(session, placement="system"), "no description is read, so its placement doesn't matter."
    if not session.chat.system_turn:
        return replace(
            session, placement="user"
        ), "the chat template takes no system turn: the description stands at the head of the first user turn."
    say("reading the description in both placements")
    requests = session.train.requests[:PLACEMENT_PROMPTS]
    sampler = replace(session.sampler("place"), max_new_tokens=min(PLACEMENT_TOKENS, session.recipe.rollout.max_new_tokens))
    rollout = session.answers("reference", requests, sampler)
    measured = {placement: moved(session, rollout, placement) for placement in ("system", "user")}
    chosen = max(measured, key=lambda placement: measured[placement])
    figures = ", ".join(f"{placement} turn {nats:.3f}" for placement, nats in measured.items())
    return replace(
        session, placement=chosen
    ), f"the description stands in the {chosen} turn, where it moves the base more (KL from the base, nats a token: {figures})."


def moved(session: Session, rollout: Rollout, placement: str, *, other: str = "reference") -> float:
    """Mean KL(π⁺‖π_ref) over the rollout's tokens, nats, or KL(π⁺‖π⁻) with `other` "unwanted"; over all behaviours of a mixture. The base reads.

    nan where there are no two such readings.
    """
    which = [r for r in readings(session.recipe, placement, "base") if r.name.startswith(("wanted", other))]
    scores = read(session.policy, session.chat, rollout, which, session.sizes)
    head, total, count = session.policy.head, 0.0, 0
    with torch.no_grad():
        for name in scores.hidden:
            against = other if other == "reference" else name.replace("wanted", other, 1)
            if not name.startswith("wanted") or against not in scores.hidden:
                continue
            told_ND, plain_ND = (scores.hidden[n][rollout.mask_BT] for n in (name, against))
            for at in spans(len(told_ND), session.sizes.chunk_tokens):
                total += float(kl(head(told_ND[at]).log_softmax(-1), head(plain_ND[at]).log_softmax(-1)).sum())
            count += len(told_ND)
    return total / count if count else math.nan
