"""The memory model: bytes by term and phase from a model's shape and a recipe alone. No torch; `plan`, `train` and batch sizing share it.

What stays (weights, adapter, optimizer) plus the largest phase (rollout, reading, update) is the peak. Coefficients that no closed
form gives were measured on this project's own code and are named below; tests/bench/plan_error.py holds them against runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from iqlite.architectures import Shape, known
from iqlite.errors import BaseError
from iqlite.gguf_files import find_gguf
from iqlite.hub import offline_without_network
from iqlite.recipe import Behavior, Principle, Recipe, readings_of

GIB, MIB = 2**30, 2**20
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; a byte a block of 64; a float32 for 256 of those (double quantisation)
CONTEXT = {
    "cuda": 480 * MIB,
    "cpu": 395 * MIB,
}  # CUDA context, cuBLAS workspace and kernels; a process after its imports. Measured on the CPU
FRAGMENTATION = {"cuda": 1.08, "cpu": 1.30}  # of what comes and goes, what the allocator holds beyond it. Measured on the CPU
CHUNK_COPIES = 14  # [chunk, V] float32 tensors alive at once in the chunked loss
LOGIT_COPIES = 4  # [rows, V] float32 tensors alive at once while a token is chosen
LEAST_CHUNK = 16
CHUNK_TENSOR = 30 * MIB  # glibc maps larger blocks anew each time, which costs a CPU what a wider chunk would gain
CPU_SHARE = 0.25  # of the free memory, what the float32 matrices for decoding may take
PHASES = ("rollout", "reading", "update")


@dataclass(frozen=True)
class Widths:
    """How much each phase does at once: answers decoded, tokens read, tokens with a gradient, tokens through the head."""

    rows: int
    read_tokens: int
    update_tokens: int
    chunk_tokens: int
    fold: bool = False


CAPS = {"cuda": Widths(256, 16384, 8192, 256), "cpu": Widths(64, 4096, 256, 48)}
"""Beyond these, width gains nothing (on a CPU it costs: few rows stay in its caches)."""


@dataclass(frozen=True)
class Work:
    """What a recipe asks of a machine: one step's sizes, and what is kept how. Token counts are the longest there may be."""

    device: str  # cuda | cpu
    quantization: str
    rank: int
    adapters: int  # beside the trained one: an average, or what the estimator reads
    prompts: int
    answers: int  # at most at once: of a step or of an evaluation
    prompt_tokens: int
    description_tokens: int
    new_tokens: int
    readings: int
    optimizer: str
    checkpointing: bool

    @classmethod
    def of(cls, recipe: Recipe, shape: Shape, device: str) -> Work:
        """A recipe's work on a device, the recipe's "auto"s resolved."""
        train, rollout, superior = recipe.train, recipe.rollout, recipe.superior
        texts, readings = _descriptions(recipe)
        longest = max((_tokens(text) for text in texts), default=0)
        room = shape.context - rollout.max_new_tokens - longest
        extra = [superior.weights == "ema", superior.adapter, superior.unwanted_adapter]
        return cls(
            device=device,
            quantization=recipe.model.quantization,
            rank=recipe.adapter.rank,
            adapters=sum(map(bool, extra)),
            prompts=rollout.prompts_per_step,
            answers=max(rollout.prompts_per_step, recipe.prompts.eval_count),
            prompt_tokens=max(1, min(recipe.prompts.max_tokens, room)),
            description_tokens=longest,
            new_tokens=rollout.max_new_tokens,
            readings=readings,
            optimizer={"cuda": "paged-adamw-8bit", "cpu": "adamw"}[device] if train.optimizer == "auto" else train.optimizer,
            checkpointing=device == "cuda" if train.checkpointing == "auto" else train.checkpointing == "on",
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest plain prompt with its answer."""
        return self.prompt_tokens + self.new_tokens

    @property
    def bytes(self) -> int:
        """Of one number in the compute dtype."""
        return 2 if self.device == "cuda" else 4


@dataclass(frozen=True)
class Plan:
    """Bytes by term: what stays, and what each phase adds to it."""

    widths: Widths
    stays: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    def total(self, phase: str) -> float:
        """Peak of a phase, bytes."""
        return sum(self.stays.values()) + sum(self.phases[phase].values())

    @property
    def sets_the_peak(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        """Bytes at the highest."""
        return self.total(self.sets_the_peak)


def estimate(shape: Shape, work: Work, widths: Widths) -> Plan:
    """The plan of one step at given widths."""
    terms = {"rollout": _rollout, "reading": _reading, "update": _update}
    phases = {}
    for name in PHASES:
        found = {term: size for term, size in terms[name](shape, work, widths).items() if size}
        found["fragmentation"] = sum(found.values()) * (FRAGMENTATION[work.device] - 1)
        phases[name] = found
    return Plan(widths, _stays(shape, work), phases)


def choose(shape: Shape, work: Work, free: float, given: Widths | None = None) -> Plan:
    """The widest step whose peak stays within `free` bytes; where not even the narrowest does, that one. `given` wins where not 0."""
    cap, longest = CAPS[work.device], work.longest + work.description_tokens
    chunk = cap.chunk_tokens
    if work.device == "cpu":
        chunk = max(LEAST_CHUNK, min(chunk, int(CHUNK_TENSOR / (4 * shape.vocabulary)) // 8 * 8))
    fold = work.device == "cpu" and 4 * shape.linear_weights <= CPU_SHARE * free
    start = Widths(cap.rows, cap.read_tokens, cap.update_tokens, chunk, fold)
    if given is not None:
        start = Widths(*(g or s for g, s in zip(vars(given).values(), vars(start).values(), strict=True)))
    narrowing: dict[str, tuple[tuple[str, int], ...]] = {
        "rollout": (("rows", 1),),
        "reading": (("read_tokens", longest),),
        "update": (("chunk_tokens", 4 * LEAST_CHUNK), ("update_tokens", longest), ("chunk_tokens", LEAST_CHUNK)),
    }
    widths, full = start, replace(work, answers=cap.rows)  # a comparison may have more answers than a step
    for phase, steps in narrowing.items():
        for name, least in steps:
            while estimate(shape, full, widths).total(phase) > free and getattr(widths, name) > least:
                if given is not None and getattr(given, name):
                    break
                widths = replace(widths, **{name: max(least, getattr(widths, name) // 2)})
    return estimate(shape, work, widths)


Change = tuple[str, Callable[[Work], Work]]
LEAST_HARM: tuple[Change, ...] = (
    ('train.checkpointing = "on"', lambda work: replace(work, checkpointing=True)),
    ('train.optimizer = "paged-adamw-8bit"', lambda work: replace(work, optimizer="paged-adamw-8bit")),
    ('superior.weights = "base"', lambda work: replace(work, adapters=0)),
    ('model.quantization = "nf4"', lambda work: replace(work, quantization="nf4")),
    ("prompts.max_tokens = 256", lambda work: replace(work, prompt_tokens=min(256, work.prompt_tokens))),
    ("rollout.max_new_tokens = 128", lambda work: replace(work, new_tokens=min(128, work.new_tokens))),
    ("adapter.rank = 8", lambda work: replace(work, rank=min(8, work.rank))),
)
"""What makes a recipe smaller, in the order of least harm: time, then what the averaged weights gain, then what is trained."""


def given_widths(recipe: Recipe) -> Widths | None:
    """What a recipe sets itself, 0 where it leaves the choice to us; None if it sets nothing."""
    rows, tokens, chunk = (0 if n == "auto" else n for n in (recipe.rollout.batch, recipe.train.batch_tokens, recipe.train.chunk_tokens))
    return Widths(rows, tokens, tokens, chunk) if rows or tokens or chunk else None


def advice(shape: Shape, work: Work, free: float, given: Widths | None = None) -> tuple[list[str], Plan]:
    """(settings, plan): which changes make it fit, least harm first; all that help if even those don't suffice."""
    chosen: list[str] = []
    plan = choose(shape, work, free, given)
    for change, apply in ((("the widths at auto", lambda work: work),) if given else ()) + LEAST_HARM:
        if plan.peak <= free:
            break
        if "8bit" in change and work.device == "cpu":
            continue
        tried = choose(shape, apply(work), free)
        if tried.peak < plan.peak:
            chosen.append(change)
            work, plan = apply(work), tried
    return chosen, plan


def shape_of(name: str, beside: Path = Path(), revision: str | None = None) -> Shape:
    """The shape of a base by its recipe name: a GGUF file's header, a folder's config.json, the package's list, or the hub's config.json."""
    gguf = find_gguf(name, beside)
    if gguf is not None:
        return Shape.of_gguf(gguf, name)
    for folder in (beside / Path(name).expanduser(), Path(name).expanduser()):
        if (folder / "config.json").is_file():
            try:
                return Shape.of(json.loads((folder / "config.json").read_text("utf-8")), name)
            except (ValueError, OSError) as error:
                raise BaseError(f"base {name!r}: {folder / 'config.json'} can't be read ({error}); download it again.") from None
    if name in known():
        return Shape.of(known()[name], name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BaseError(f"base {name!r}: no such file or folder; paths are relative to the recipe.")
    offline_without_network()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(name, "config.json", revision=revision)
        return Shape.of(json.loads(Path(file).read_text("utf-8")), name)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BaseError(
            f"base {name!r}: its config.json can't be had ({said}); connect to the network, log in if it's gated, or name a local folder."
        ) from None


def _stays(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes that are there in every phase. A CPU keeps the gradients' and the optimizer's memory once it has them."""
    matrix = shape.vocabulary * shape.hidden * work.bytes
    trained = shape.adapter_parameters(work.rank)
    norms = shape.hidden * shape.layers * 2 * work.bytes
    weights: dict[str, float]
    if work.quantization == "nf4":
        weights = {"4-bit weights": shape.linear_weights / 2, "their quantisation state": shape.linear_weights * (NF4_BYTES - 0.5)}
    else:
        weights = {"weights": float(shape.linear_weights * work.bytes)}
    return weights | {
        "embeddings": matrix + norms,
        "head": 0.0 if shape.tied else float(matrix),
        "adapter": 4.0 * trained * (1 + work.adapters),
        "optimizer state": trained * (2.05 if work.optimizer == "paged-adamw-8bit" else 8.0),
        {"cuda": "CUDA context", "cpu": "process after imports"}[work.device]: float(CONTEXT[work.device]),
    }


def _rollout(shape: Shape, work: Work, widths: Widths) -> dict[str, float]:
    rows = min(widths.rows, work.answers)
    return {
        "key/value cache": _kv_bytes(shape, work) * (rows * work.longest + work.description_tokens),
        "activations": float(rows * work.prompt_tokens * _passing(shape, work)),
        "logits": 4.0 * LOGIT_COPIES * rows * shape.vocabulary,
        "dequantised weights": 4.0 * shape.linear_weights if widths.fold else _dequantised(shape, work),
    }


def _reading(shape: Shape, work: Work, widths: Widths) -> dict[str, float]:
    row = work.longest + work.description_tokens
    tokens = min(max(widths.read_tokens, row), work.readings * work.prompts * row)
    return {
        "shared prefixes": _kv_bytes(shape, work) * work.readings * work.description_tokens,
        "activations": float(tokens * (_passing(shape, work) + shape.hidden * work.bytes)),
        "dequantised weights": _dequantised(shape, work),
    }


def _update(shape: Shape, work: Work, widths: Widths) -> dict[str, float]:
    tokens = min(max(widths.update_tokens, work.longest), work.prompts * work.longest)
    saved = _saved(shape, work)
    layer_inputs = tokens * shape.hidden * work.bytes * shape.layers
    return {
        "activations": float(layer_inputs + tokens * saved) if work.checkpointing else float(tokens * saved * shape.layers),
        "logits chunk": 4.0 * CHUNK_COPIES * min(widths.chunk_tokens, work.prompts * work.new_tokens) * shape.vocabulary,
        "gradients": 4.0 * shape.adapter_parameters(work.rank),
        "dequantised weights": _dequantised(shape, work),
    }


def _passing(shape: Shape, work: Work) -> float:
    """Bytes a token needs within a layer without a gradient: three of the MLP's, and what attention holds."""
    attention = 3 * shape.hidden + (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return work.bytes * max(3 * shape.intermediate + 2 * shape.hidden, float(attention))


def _saved(shape: Shape, work: Work) -> float:
    """Bytes a token's activations take in one layer until its backward pass: the MLP's four, the norms' inputs (float32) and outputs,
    and attention's query, result and repeated keys and values. Counted on the graph that autograd keeps."""
    inner = 4 * shape.intermediate + 2 * shape.hidden + 4 * shape.heads * shape.head_dim
    norms = 2 * shape.hidden + ((shape.heads + shape.kv_heads) * shape.head_dim if shape.model_type == "olmo2" else 0)
    return work.bytes * inner + 4.0 * norms


def _kv_bytes(shape: Shape, work: Work) -> float:
    """Bytes of a token's keys and values in all layers."""
    return float(2 * shape.layers * shape.kv_heads * shape.head_dim * work.bytes)


def _dequantised(shape: Shape, work: Work) -> float:
    """The largest linear map in the compute dtype, while it is used."""
    return float(max(i * o for i, o in shape.linears.values()) * work.bytes) if work.quantization == "nf4" else 0.0


def _descriptions(recipe: Recipe) -> tuple[list[str], int]:
    """(texts put before the prompts, number of readings)."""
    behavior, asks_for = recipe.behavior, readings_of(recipe.superior.estimator)
    sides = ("wanted", "unwanted")
    pairs: list[Behavior | Principle] = [behavior, *behavior.mixture]
    texts = []
    for pair in pairs:
        shown = " ".join(f"{turn.user} {max(turn.wanted, turn.unwanted, key=len)}" for turn in pair.demonstrations)
        texts += [f"{text} {shown}" for side in sides if (text := getattr(pair, side)) or shown]
    readings = 2 * len(behavior.mixture) if "behaviors" in asks_for else len(asks_for)
    return texts, 1 + readings


def refusal(recipe: Recipe, shape: Shape, work: Work, free: float) -> str | None:
    """One sentence for a recipe that doesn't fit, with what to change, least harm first; None if it fits."""
    plan = choose(shape, work, free, given_widths(recipe))
    if plan.peak <= free:
        return None
    changes, smaller = advice(shape, work, free, given_widths(recipe))
    where = "card" if work.device == "cuda" else "memory"
    said = f"{recipe.path} needs {plan.peak / GIB:.1f} GiB and {free / GIB:.1f} GiB of this machine's {where} are free"
    if smaller.peak <= free:
        return f"{said}; {' and '.join(changes)} would make it {smaller.peak / GIB:.1f} GiB (see iqlite plan), or go on with --force."
    return f"{said}; no setting makes it fit (the least is {smaller.peak / GIB:.1f} GiB): choose a smaller base, or go on with --force."


def _tokens(text: str) -> int:
    """About how many tokens a text is, its turn's marks included."""
    return len(text) // 4 + 12
