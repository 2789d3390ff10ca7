"""TOML → a validated, frozen recipe. Each field's one-sentence description is its help; unknown keys are errors with the nearest name.

The estimator's and the objective's settings (`strength`, `clip`, `gamma`, …) stand in `[superior]` and `[objective]`; which there
are, and their defaults, is read off the functions' signatures.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from iqlite.method.estimators import ESTIMATORS
from iqlite.method.objectives import OBJECTIVES
from iqlite.recipe.faults import nearest

Placement = Literal["auto", "system", "user"]
Text = Annotated[str, Field(min_length=1, max_length=100_000)]
Most = 2**31 - 1  # of any count
Count = Annotated[int, Field(ge=1, le=Most)]
Auto = Literal["auto"]


class Table(BaseModel):
    """A table of the recipe: frozen, no unknown keys, no coercion from strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Table):
    """`[model]`: the base that is trained from."""

    base: Text = Field(
        "smollm2-135m-instruct", description="Hub id, model folder, .gguf file, ollama:NAME:TAG, lmstudio:NAME, or the embedded model."
    )
    revision: str | None = Field(None, description="Revision of a hub model: a branch, tag or commit.")
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="nf4 keeps the base in 4 bits (double quantisation); none keeps it as it is."
    )
    thinking: Literal["auto"] | bool = Field(
        "auto", description="Whether the model thinks before it answers; auto: not, where its chat template leaves the choice."
    )
    embeddings: Literal["card", "host"] = Field("card", description="Where the embedding table is; host spares the card an untied one.")
    offload: Literal["none", "layers", "auto"] = Field(
        "none",
        description="Where the base's layers are: none, all of them on the card; layers, in the computer's memory (on a CPU in a mapped file), from "
        "where each comes by when it is read; auto, as many on the card as fit. Changes no result.",
    )
    backend: Literal["auto", "plain", "unsloth"] = Field(
        "auto",
        description="Whose code trains: transformers and PEFT with iqlite's own layers (plain), or unsloth's, which has to be installed; auto is "
        "unsloth where it is installed, on a card, for a model that it has a fast path for; only train asks, all else is plain.",
    )


class Adapter(Table):
    """`[adapter]`: the LoRA that learns."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the LoRA matrices on every linear layer.")
    alpha: float = Field(32.0, gt=0, description="LoRA scale; the adapter's output is multiplied by alpha/rank.")
    start: Text | None = Field(None, description="Folder of an existing adapter to go on from; the reference stays the bare base.")


class Demonstration(Table):
    """`[[behavior.demonstrations]]`: an earlier turn that shows the behaviour."""

    user: Text = Field(description="What the user says in the shown turn.")
    wanted: Text = Field(description="The wanted answer to it.")
    unwanted: Text = Field(description="The unwanted answer to it, in the same form.")


class Principle(Table):
    """`[[behavior.mixture]]`: one of several weighted behaviours."""

    name: Text = Field(description="A short name for the behaviour.")
    weight: float = Field(1.0, gt=0, description="Weight of the behaviour's contrast in the sum.")
    wanted: Text = Field(description="The wanted behaviour, in a sentence or two.")
    unwanted: Text = Field(description="The unwanted behaviour, alike in form and length and opposite in meaning.")
    demonstrations: tuple[Demonstration, ...] = Field((), description="Earlier turns shown with the descriptions.")


class Behavior(Table):
    """`[behavior]`: what to train, in words."""

    wanted: Text | None = Field(None, description="The wanted behaviour, in a sentence or two.")
    unwanted: Text | None = Field(None, description="The unwanted behaviour, alike in form and length and opposite in meaning.")
    placement: Placement = Field(
        "auto", description="Where the description stands: system turn, head of the first user turn, or whichever moves the base more."
    )
    where: Literal["answer", "thinking", "both"] = Field(
        "both", description="Which part of what a thinking model writes is trained: with model.thinking = true."
    )
    demonstrations: tuple[Demonstration, ...] = Field((), description="Earlier turns shown with the descriptions.")
    mixture: tuple[Principle, ...] = Field((), description="Several weighted behaviours instead of one, for the mixture estimator.")


class HubPrompts(Table):
    """`{ dataset = …, split = …, column = … }`: prompts from a data set on the hub."""

    dataset: Text = Field(description="The data set's id on the hub.")
    config: str | None = Field(None, description="The configuration of a data set that has several.")
    split: Text = Field("train", description="The split to read.")
    column: str | None = Field(None, description="The column that holds the prompt; by default the first known name.")
    folder: str | None = Field(None, description="A folder inside the data set, such as harmless-base.")
    category: str | None = Field(None, description="The column that a comparison keeps apart; by default category and language.")
    label: Literal["refuse", "answer"] | None = Field(
        None, description="What is right for all its rows, for the measure harmless; by default what the column label says."
    )
    limit: int | None = Field(None, ge=1, le=Most, description="Read at most this many rows.")


Source = Text | HubPrompts | tuple[Text | HubPrompts, ...]


class PromptSets(Table):
    """`[prompts]`: what the policy is asked, plain, in training and in evaluation."""

    train: Source = Field(description="Prompt file beside the recipe, a hub data set, or a list of these.")
    eval: Source | None = Field(None, description="Held-out prompts; without it a tenth of the training prompts is held back.")
    outside: Source | None = Field(None, description="Prompts from outside the domain, watched for damage.")
    contrary: Source | None = Field(
        None,
        description="Prompts on which the behaviour is not wanted: trained beside the others to stay as the base is; a quarter is held out.",
    )
    eval_count: int = Field(16, ge=1, le=Most, description="How many held-out prompts each evaluation during training answers.")
    max_tokens: int = Field(1024, ge=16, le=Most, description="Longer prompts are cut from the left to this many tokens.")


class Superior(Table):
    """`[superior]`: how the superior policy is estimated; the estimator's own settings stand here too."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    estimator: str = Field("contrastive", description="Name of the estimator.")
    weights: Literal["base", "policy", "ema"] = Field("base", description="Which weights read the descriptions.")
    ema_rate: float = Field(
        0.05, gt=0, le=1, description="How far the slow average moves to the policy at each update, with weights = ema."
    )
    adapter: Text | None = Field(None, description="Folder of the adapter that stands for the wanted behaviour (estimator = adapter).")
    unwanted_adapter: Text | None = Field(None, description="Folder of the adapter for the unwanted behaviour; the bare base without it.")

    def settings(self) -> dict[str, float]:
        """The estimator's settings, defaults included."""
        return settings_of(ESTIMATORS[self.estimator]) | dict(self.model_extra or {})

    def with_settings(self, changed: Mapping[str, float], *, only: bool = False) -> Superior:
        """The same table with some settings changed; `only` forgets the others that were given."""
        new = self.model_copy()
        new.__pydantic_extra__ = ({} if only else dict(self.model_extra or {})) | dict(changed)
        return new


class Objective(Table):
    """`[objective]`: what the update minimises; the objective's own settings stand here too."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    name: str = Field("full-kl", description="Name of the objective.")

    def settings(self) -> dict[str, float | bool]:
        """The objective's settings, defaults included."""
        return settings_of(OBJECTIVES[self.name]) | dict(self.model_extra or {})


class Rollouts(Table):
    """`[rollout]`: how the policy's own answers are sampled."""

    prompts_per_step: int = Field(8, ge=1, le=Most, description="Prompts answered in each step.")
    contrary_per_step: Count | Auto = Field(
        "auto", description="Contrary prompts answered beside them in each step, where there are some; auto is half as many."
    )
    max_new_tokens: int = Field(64, ge=1, le=Most, description="Longest answer, tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; 1 is what the method's gradients assume.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus truncation; 1 truncates nothing.")
    batch: Count | Auto = Field("auto", description="Answers decoded at once; auto is as many as memory has room for. Changes no result.")


class Train(Table):
    """`[train]`: the loop and the optimizer."""

    steps: int | None = Field(None, ge=1, le=Most, description="Steps to train; 20 if neither steps nor epochs is given.")
    epochs: float | None = Field(None, gt=0, le=10_000, description="Passes over the training prompts, instead of steps.")
    learning_rate: float = Field(3e-4, gt=0, le=1.0, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up: a cosine down to a tenth, or constant."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the learning rate rises.")
    max_grad_norm: float = Field(1.0, gt=0, description="The gradient is scaled down to this norm.")
    optimizer: Literal["auto", "adamw", "paged-adamw-8bit"] = Field(
        "auto", description="auto is float32 AdamW on a CPU and paged 8-bit AdamW on CUDA."
    )
    updates_per_rollout: int = Field(1, ge=1, le=Most, description="Updates made from each rollout.")
    batch_tokens: Count | Auto = Field(
        "auto", description="Tokens in one forward or backward pass; auto is as many as memory has room for. Changes no result."
    )
    chunk_tokens: Count | Auto = Field("auto", description="Response tokens that pass the LM head at once. Changes no result.")
    checkpointing: Literal["auto", "on", "off", "offload"] = Field(
        "auto",
        description="Recompute activations in the backward pass; auto is on under CUDA; offload also keeps the layers' inputs in the "
        "computer's memory meanwhile.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the adapter, the data order and the sampling.")
    eval_every: int = Field(5, ge=1, le=Most, description="Steps between evaluations on the held-out prompts.")
    checkpoint_every: int = Field(10, ge=1, le=Most, description="Steps between checkpoints to resume from.")
    until_converged: bool = Field(
        False,
        description="Stop when the held-out KL of policy and superior no longer falls and the measure no longer rises, beyond their noise.",
    )
    max_kl_reference: float = Field(5.0, gt=0, description="Stop when the mean KL(policy‖reference), nats a token, exceeds this.")


class Judge(Table):
    """`[judge]`: what the look before training, evaluations and comparisons go by; no gradient ever sees it."""

    measure: Literal["described", "tone", "shorter", "refusal", "compliance", "harmless"] = Field(
        "described",
        description="What answers are scored by: tone (cheerful words), shorter (fewer words), refusal, compliance, harmless (refuses where "
        "it should, answers where it should), described (what the base's own readings say; for any behaviour).",
    )
    aim: bool = Field(True, description="Look before the first update whether the target points the right way.")
    rubric: str = Field("", description="What a judging model is told to look for; without it, the wanted behaviour.")


class Log(Table):
    """`[log]`: where the metrics go beside the run's own files; changes nothing of the run."""

    to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        (),
        description="Trackers that the metrics are also sent to, where installed: tensorboard, trackio, wandb; without this nothing is sent anywhere.",
    )


class Recipe(Table):
    """A whole recipe. `path` is the file it came from; relative paths in it are relative to `path`'s folder."""

    model: Model = Field(default_factory=Model)
    adapter: Adapter = Field(default_factory=Adapter)
    behavior: Behavior = Field(default_factory=Behavior)
    prompts: PromptSets
    superior: Superior = Field(default_factory=Superior)
    objective: Objective = Field(default_factory=Objective)
    rollout: Rollouts = Field(default_factory=Rollouts)
    train: Train = Field(default_factory=Train)
    judge: Judge = Field(default_factory=Judge)
    log: Log = Field(default_factory=Log)

    _path: Path = Path("recipe.toml")

    @property
    def path(self) -> Path:
        """The recipe's file."""
        return self._path

    @property
    def folder(self) -> Path:
        """Where the recipe's relative paths start."""
        return self._path.parent

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        _check_settings("superior.estimator", self.superior.estimator, ESTIMATORS, self.superior.model_extra)
        _check_settings("objective.name", self.objective.name, OBJECTIVES, self.objective.model_extra)
        if self.train.steps is not None and self.train.epochs is not None:
            raise ValueError("train.steps and train.epochs are both given; keep one of them")
        behavior, estimator = self.behavior, self.superior.estimator
        asks_for = readings_of(estimator)
        if self.model.offload != "none" and self.model.backend == "unsloth":
            raise ValueError('model.offload needs iqlite\'s own layers; set model.backend = "plain", or model.offload = "none"')
        if "wanted" in asks_for and behavior.wanted is None:
            raise ValueError(
                f'behavior.wanted is missing; the estimator "{estimator}" needs a sentence that describes the wanted behaviour'
            )
        if "unwanted" in asks_for and behavior.unwanted is None:
            raise ValueError(
                'behavior.unwanted is missing; describe the opposite behaviour, or set superior.estimator = "prompted", which needs none'
            )
        if "behaviors" in asks_for and not behavior.mixture:
            raise ValueError(
                'behavior.mixture is empty; the estimator "mixture" needs [[behavior.mixture]] tables with name, wanted and unwanted'
            )
        if behavior.mixture and "behaviors" not in asks_for:
            raise ValueError(f'behavior.mixture is given but superior.estimator is "{estimator}"; set superior.estimator = "mixture"')
        if "adapter" in asks_for and self.superior.adapter is None:
            raise ValueError('superior.adapter is missing; the estimator "adapter" needs the folder of an existing adapter')
        pairs = [("behavior", behavior.wanted, behavior.unwanted)] + [
            (f"behavior.mixture {p.name!r}", p.wanted, p.unwanted) for p in behavior.mixture
        ]
        for where, wanted, unwanted in pairs:
            if wanted is not None and unwanted is not None and wanted.split() == unwanted.split():
                raise ValueError(
                    f"{where}: wanted and unwanted say the same ({wanted!r}), so there is no contrast to train; make unwanted the opposite"
                )
        names = [p.name for p in behavior.mixture]
        if len(set(names)) < len(names):
            raise ValueError("behavior.mixture: two behaviours share a name; give each its own")
        return self

    @property
    def contrary_per_step(self) -> int:
        """Contrary prompts in each step: half as many as the others unless the recipe says how many, 0 if there are none."""
        if self.prompts.contrary is None:
            return 0
        asked = self.rollout.contrary_per_step
        return max(1, self.rollout.prompts_per_step // 2) if asked == "auto" else asked

    def total_steps(self, prompts: int) -> int:
        """Steps of the whole run over that many training prompts."""
        if self.train.epochs is not None:
            return max(1, math.ceil(self.train.epochs * prompts / self.rollout.prompts_per_step))
        return 20 if self.train.steps is None else self.train.steps


def settings_of(function: Callable[..., Any]) -> dict[str, Any]:
    """An estimator's or objective's settings and their defaults: its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def readings_of(estimator: str) -> tuple[str, ...]:
    """The readings an estimator asks for beside the reference: its other positional parameters, without their shape suffix."""
    parameters = list(inspect.signature(ESTIMATORS[estimator]).parameters.values())
    return tuple(p.name.removesuffix("_nV") for p in parameters[1:] if p.kind is not p.KEYWORD_ONLY)


LIMITS: dict[str, tuple[float, float]] = {
    "strength": (0.0, 1000.0), "clip": (0.0, math.inf), "plausibility": (0.0, 1.0), "gamma": (0.0, 1.0),
}  # fmt: skip
"""Inclusive ranges of settings by their name; a new setting without a line here may be any number."""


def _check_settings(key: str, name: str, known: Mapping[str, Callable[..., Any]], given: Mapping[str, Any] | None) -> None:
    table = key.split(".")[0]
    if name not in known:
        raise ValueError(f"{key} = {name!r} isn't known; choose one of: {', '.join(known)}")
    settings = settings_of(known[name])
    fields = (Superior if table == "superior" else Objective).model_fields
    for setting, value in (given or {}).items():
        if setting not in settings:
            raise ValueError(f"{table}.{setting} isn't a setting of {name!r}{nearest(setting, [*settings, *fields])}")
        kinds = (bool,) if isinstance(settings[setting], bool) else (int, float)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{table}.{setting} = {value!r} must be {'true or false' if bool in kinds else 'a number'}")
        low, high = LIMITS.get(setting, (-math.inf, math.inf))
        if not low <= value <= high:  # also refuses nan
            raise ValueError(
                f"{table}.{setting} = {value!r} must be {f'between {low:g} and {high:g}' if high < math.inf else f'at least {low:g}'}"
            )
