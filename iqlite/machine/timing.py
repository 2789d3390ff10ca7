"""How long a step takes on a machine: its rates (measured by `iqlite bench`, or a card's data sheet) and the work of each phase.

Decoding is bound by what each token reads of memory, reading and updating by arithmetic: three rates say it all. No torch.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from iqlite.base.shape import Shape
from iqlite.errors import RecipeError
from iqlite.machine.memory import Widths, Work, layer_bytes, offloaded
from iqlite.places import cache_folder
from iqlite.recipe.schema import Recipe

BENCH_FILE = "bench.json"
REACHED = {"decode": 0.5, "read": 0.4, "update": 0.35}  # shares of a data sheet's figures that libraries reach; our choice, not measured
TO_HOST = 12e9  # bytes a second between a card and the computer's memory: PCIe 4.0 at half its lanes' rate; our choice, not measured
FUSED = 0.5 + 1 / 64 + 1 / 64  # bytes a weight and pass: 4 bits and their scales, multiplied as they are
DEQUANTISED = FUSED + 2 * 2  # 16 bits are written and read again
MOST = 2 / 3  # share of a layer's weights that `Fused.most` is about
NARROW_FOR = 2.0  # times less traffic that narrower batches must promise, for they take more launches; our choice
KINDS = frozenset(
    ["ti", "super", "laptop", "mobile", "max", "q", "d"]
)  # cards of one number that differ in these differ in speed and memory
OTHER_MAKERS = re.compile(r"\b(?:apple|m[1-9]|amd|radeon|rx|instinct|mi\d+x?|intel|arc|a[357][1-9]0|b5[78]0)\b", re.IGNORECASE)
TYPICAL_PROMPT = 128  # tokens, where the prompts aren't at hand to be looked at; our choice


@dataclass(frozen=True)
class Rates:
    """Bytes a second while decoding; floating-point operations a second of readings and of updates. `source`: where from, `bus` apart; `card`: whose."""

    decode: float
    read: float
    update: float
    source: str
    machine: str = ""
    card: str = ""
    bus: float = TO_HOST  # bytes a second from where streamed layers wait: the computer's memory, or on a CPU a disk

    @classmethod
    def of_card(cls, name: str) -> Rates:
        """From the data sheet."""
        card = cards()[name]
        tflops = 1e12 * card["tflops"]
        return cls(
            REACHED["decode"] * 1e9 * card["bandwidth_gb_s"],
            REACHED["read"] * tflops,
            REACHED["update"] * tflops,
            "the data sheet",
            card=name,
        )

    @classmethod
    def measured(cls, machine: str) -> Rates | None:
        """What `iqlite bench` measured on a machine of that name ("cpu", or the card's); None before it ran there."""
        try:
            found = cls(**json.loads((cache_folder() / BENCH_FILE).read_text("utf-8"))["rates"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.machine == machine else None

    @classmethod
    def here(cls, card: str) -> Rates | None:
        """A card's: measured or by the data sheet, whichever is quicker (small models are bound by launching kernels)."""
        try:
            sheet = cls.of_card(card_named(card))
        except RecipeError:
            return cls.measured(card)
        measured = cls.measured(card)
        if measured is None:
            return sheet
        quicker = {name: max(getattr(sheet, name), getattr(measured, name)) for name in ("decode", "read", "update")}
        return replace(measured, **quicker)

    def record(self) -> dict[str, Any]:
        """For bench.json."""
        return asdict(self)


@cache
def cards() -> Mapping[str, Mapping[str, Any]]:
    """Cards by name: memory_gb, bandwidth_gb_s, tflops (16-bit, dense), bf16."""
    found: dict[str, dict[str, Any]] = json.loads(files("iqlite").joinpath("data/cards.json").read_text("utf-8"))["cards"]
    return found


@cache
def _fused_rows() -> Mapping[str, Sequence[int]]:
    found: dict[str, list[int]] = json.loads(files("iqlite").joinpath("data/fused.json").read_text("utf-8"))["rows"]
    return found


def card_named(name: str) -> str:
    """The card that a name means, whatever its case and maker's prefix, or a part of it such as 3060; RecipeError names what it could be.

    A name that says Ti, Super, Laptop or a size means no card of another kind or size: these differ in memory and speed.
    """
    import difflib

    asked, kind, size = _words_of(name)
    if OTHER_MAKERS.search(name):
        raise RecipeError(
            f"--card {name!r} isn't NVIDIA's, and rates of other makers' cards aren't known: leave it out, and give --vram 16GB."
        )
    found = []
    for key, card in cards().items():
        words, its_kind, _ = _words_of(key)
        part = asked <= words and any(word[-1].isdigit() for word in asked)
        if (words <= asked or part) and kind == its_kind and size in (None, card["memory_gb"]):
            found.append(key)
    plain = [key for key in found if _words_of(key)[2] is None]  # RTX 3080 is the one that isn't called 12GB
    if len(found) == 1 or len(plain) == 1:
        return (plain or found)[0]
    if found:
        raise RecipeError(f"--card {name!r} could be {' or '.join(found)}: name one of them.")
    by_name = {key.lower(): key for key in cards()}
    near = [by_name[key] for key in difflib.get_close_matches(re.sub(r"nvidia|geforce", "", name.lower()).strip(), by_name, 3, 0.6)]
    hint = f"did you mean {', '.join(near)}? Or give" if near else "give"
    raise RecipeError(f"--card {name!r} isn't a card in the list; {hint} --vram 8GB.")


def _words_of(name: str) -> tuple[set[str], set[str], int | None]:
    """(words that name a card, words of its kind, its gigabytes if it says them)."""
    plain = re.sub(r"(\d+)\s*(?:gb|gib)\b", r"\1gb", name.lower())
    words = set(re.split(r"[\s\-_/()]+", plain)) - {"", "nvidia", "geforce", "tesla", "gpu"}
    sizes = {word for word in words if re.fullmatch(r"\d+gb", word)}
    return words - KINDS - sizes, words & KINDS, int(next(iter(sizes)).removesuffix("gb")) if sizes else None


@dataclass(frozen=True)
class Fused:
    """Rows up to which bitsandbytes multiplies by 4-bit weights as they are, and doesn't dequantise them for each product: by all weights, and by
    two thirds of them at least. Its own choice by card and shape, for 7B's shapes in data/fused.json; one row where the card isn't there."""

    all: int = 1
    most: int = 1

    @classmethod
    def of_card(cls, name: str) -> Fused:
        """By a card's name, as the driver or a person spells it."""
        try:
            found = _fused_rows().get(card_named(name)) if name else None
        except RecipeError:
            found = None
        return cls(*found) if found else cls()

    def bytes_a_weight(self, rows: int) -> float:
        """Of memory traffic in one product with so many rows."""
        if rows <= self.all:
            return FUSED
        return MOST * FUSED + (1 - MOST) * DEQUANTISED if rows <= self.most else DEQUANTISED

    def together(self, rows: int, fit: int) -> int:
        """How many of `rows` rows are best decoded at once where `fit` have room: fewer if weights are then read in less than half the traffic."""

        def traffic(width: int) -> float:
            return -(-rows // width) * self.bytes_a_weight(min(rows, width))

        fewer = [width for width in (self.most, self.all) if 1 < width < fit and traffic(width) * NARROW_FOR < traffic(fit)]
        return min(fewer, key=traffic) if fewer else fit


ONE_ROW = Fused()


def work_of_step(shape: Shape, work: Work, widths: Widths, prompt_tokens: int, fused: Fused = ONE_ROW) -> dict[str, float]:
    """Bytes to decode, and operations to prefill and read, and to update, in one step with prompts of that many tokens."""
    weights, head = shape.linear_weights, shape.vocabulary * shape.hidden
    answers = work.prompts * work.new_tokens
    tokens = work.prompts * (prompt_tokens + work.new_tokens)
    rows, passes = _decoded_at_once(work, widths, fused), decoding_passes(work, widths, fused)
    if work.device == "cpu":
        per_weight = 4.0 if widths.fold or work.quantization == "none" else 0.5 + 2 * 4
    elif work.quantization == "none":
        per_weight = 2.0
    else:
        per_weight = fused.bytes_a_weight(min(rows, work.prompts))
    return {
        "decode": passes * (per_weight * weights + work.bytes * head),
        "read": 2.0 * weights * (work.prompts * prompt_tokens + work.readings * tokens),
        "update": 2.0 * weights * tokens * (3 if work.checkpointing else 2) + 2.0 * head * answers * (work.readings + 2),
    }


def seconds_of_step(shape: Shape, work: Work, widths: Widths, rates: Rates, prompt_tokens: int) -> float:
    """Seconds of one step: rollout, readings and update. Rows are reckoned for the longest prompts: shorter ones decode wider."""
    rows = max(widths.rows, widths.rows * work.longest // (prompt_tokens + work.new_tokens))
    widths, fused = replace(widths, rows=rows), Fused.of_card(rates.card or rates.machine)
    needed = work_of_step(shape, work, widths, prompt_tokens, fused)
    tokens = work.prompts * (prompt_tokens + work.new_tokens)
    moved = 2 * offloaded(shape, work, tokens) / rates.bus if work.offload else 0.0  # there and back
    a_pass = streamed_bytes(shape, work) / rates.bus  # while one layer computes, the next is on its way: what takes longer counts
    decode = max(needed["decode"] / rates.decode, a_pass * decoding_passes(work, widths, fused))
    return decode + max(needed["read"] / rates.read + needed["update"] / rates.update, 2 * a_pass) + moved


def streamed_bytes(shape: Shape, work: Work) -> float:
    """Bytes that one pass of the weights moves."""
    return work.streamed * layer_bytes(shape, work)


def decoding_passes(work: Work, widths: Widths, fused: Fused) -> int:
    """Passes of the weights in one rollout: one for each position of each batch of answers, whatever its width."""
    return work.new_tokens * -(-work.prompts // _decoded_at_once(work, widths, fused))


def _decoded_at_once(work: Work, widths: Widths, fused: Fused) -> int:
    return fused.together(work.prompts, widths.rows) if work.device != "cpu" and work.quantization != "none" else widths.rows


def typical_prompt(recipe: Recipe, longest: int) -> int:
    """Tokens of a usual training prompt: looked up in a local file's first lines, else a guess."""
    source = recipe.prompts.train
    path = recipe.folder / source if isinstance(source, str) else None
    if path is None or not path.is_file():
        return min(TYPICAL_PROMPT, longest)
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = [len(line) for _, line in zip(range(200), file, strict=False)]
    return min(longest, max(8, sum(lines) // max(1, len(lines)) // 4 + 8))


def prompts_of(recipe: Recipe) -> int | None:
    """How many training prompts there are, where that can be told without loading them."""
    source = recipe.prompts.train
    counts: list[int | None] = []
    for one in source if isinstance(source, tuple) else (source,):
        path = recipe.folder / one if isinstance(one, str) else None
        if path is not None and path.is_file() and path.suffix in (".jsonl", ".txt"):
            counts.append(sum(1 for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()))
        else:
            counts.append(getattr(one, "limit", None))
    return None if None in counts else sum(count or 0 for count in counts)


def steps_of(recipe: Recipe) -> int | None:
    """Steps of the whole run, where that can be told."""
    if recipe.train.epochs is None:
        return recipe.total_steps(1)
    prompts = prompts_of(recipe)
    return None if prompts is None else recipe.total_steps(prompts)


def card_here() -> tuple[str, float] | None:
    """(name, free bytes) of the first card, asked of the driver's own tool: importing torch would take seconds."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5
        )
        name, free = asked.stdout.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(free) * 2**20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
