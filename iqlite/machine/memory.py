"""The memory model: bytes by term and phase from a model's shape and a recipe alone. No torch; `plan`, `train` and batch sizing (`fit`) share it.

What stays (weights, adapter, optimizer) plus the largest phase (rollout, reading, update) is the peak. A phase's largest moments don't coincide:
of a layer's MLP and its attention, of a chunk's logits and a layer's backward pass, the larger one counts. Coefficients that no closed form
gives were counted on this project's own code and are named below: for a card on a played one (tests/bench/plan_play.py), for a CPU by
runs (tests/bench/plan_error.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from iqlite.base.shape import Shape
from iqlite.recipe.schema import Behavior, Principle, Recipe, readings_of

GIB, MIB = 2**30, 2**20
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; a byte a block of 64; a float32 for 256 of those (double quantisation)
CONTEXT = {"cuda": 480 * MIB, "cpu": 395 * MIB}  # CUDA context and kernels; a process after its imports. Measured on the CPU
WORKSPACES = 2 * 8519680  # bytes that cuBLAS keeps for each of two streams, ours and the one that graphs are recorded on
PAGES = 3 * 20 * MIB  # what a card's allocator holds in pages that aren't full; it gives whole ones back. By play
FRAGMENTATION = {
    "cpu": 1.30,
    "cuda": 1.15,
}  # of what comes and goes, what an allocator holds with it: a CPU's (measured), a card's where layers are streamed (by play)
CHUNK_BESIDE = 5.25  # [chunk, V] float32 tensors alive at once in the chunked loss, beside one of each reading
CHUNK_COPIES = {"more": 9, "cpu": 14}  # all of them, at least: with contrary prompts or capped logits, and on a CPU (measured)
LOGIT_COPIES = 5  # [rows, V] float32 tensors alive at once while a token is chosen
FLOAT_ROTARY = ("olmo", "olmo2", "olmo3", "flex_olmo")  # rotate queries and keys in float32
QUERY_NORMED = ("olmo2", "olmo3", "qwen3", "gemma3_text", "gemma4_text", "exaone4", "qwen3_moe")  # norms over queries and keys too
POST_NORMED = ("olmo2", "olmo3", "gemma2", "gemma3_text", "gemma4_text", "exaone4")  # norms behind the MLP: their gradients are float32
EAGER = ("gemma2",)  # attention by transformers' own mathematics, since a soft cap is in it
EAGER_SCORES, EAGER_SAVED = 10, 8  # bytes a score at once without a gradient, and kept for it (some are float32)
ALLOCATOR = "allocator's pages"
PHASES = ("rollout", "reading", "update")
SLOTS = 2  # of streamed layers on a card: base.streaming's


@dataclass(frozen=True)
class Widths:
    """How much each phase does at once: answers decoded, tokens read, tokens with a gradient, tokens through the head."""

    rows: int
    read_tokens: int
    update_tokens: int
    chunk_tokens: int
    fold: bool = False


@dataclass(frozen=True)
class Work:
    """What a recipe asks of a machine: one step's sizes, and what is kept how. Token counts are the longest there may be."""

    device: str  # cpu | cuda, which stands for every card
    quantization: str
    on_card: bool  # the embedding table
    rank: int
    ema: bool  # a slow average beside the trained adapter
    adapters: int  # others that the estimator reads
    prompts: int
    answers: int  # at most at once: of a step or of an evaluation
    prompt_tokens: int
    description_tokens: int
    new_tokens: int
    readings: int
    optimizer: str
    checkpointing: bool
    contrary: bool = False  # prompts on which nothing is to change
    offload: bool = False  # the layers' inputs wait in the computer's memory
    streamed: int = 0  # layers whose weights come by when they are read

    @classmethod
    def of(cls, recipe: Recipe, shape: Shape, device: str) -> Work:
        """A recipe's work on a device of that type (torch's name), the recipe's "auto"s resolved."""
        train, rollout, superior = recipe.train, recipe.rollout, recipe.superior
        streamed = shape.layers if recipe.model.offload == "layers" else 0
        texts, readings = _descriptions(recipe)
        longest = max((_tokens(text) for text in texts), default=0)
        room = shape.context - rollout.max_new_tokens - longest
        return cls(
            device="cpu" if device == "cpu" else "cuda",
            quantization=recipe.model.quantization,
            on_card=device == "cpu" or shape.tied or recipe.model.embeddings == "card",
            rank=recipe.adapter.rank,
            ema=superior.weights == "ema",
            adapters=(superior.adapter is not None) + (superior.unwanted_adapter is not None),
            prompts=rollout.prompts_per_step + recipe.contrary_per_step,
            answers=max(rollout.prompts_per_step + recipe.contrary_per_step, recipe.prompts.eval_count),
            prompt_tokens=max(1, min(recipe.prompts.max_tokens, room, _longest_prompt(recipe))),
            description_tokens=longest,
            new_tokens=rollout.max_new_tokens,
            readings=readings,
            optimizer=usual_optimizer(device) if train.optimizer == "auto" else train.optimizer,
            checkpointing=device != "cpu" if train.checkpointing == "auto" else train.checkpointing != "off",
            contrary=recipe.contrary_per_step > 0,
            offload=train.checkpointing == "offload" and device != "cpu",
        ).streaming(streamed)

    def streaming(self, layers: int) -> Work:
        """The same with so many layers streamed: they are recomputed, and their inputs wait in the computer's memory."""
        return self if layers == 0 else replace(self, streamed=layers, checkpointing=True, offload=self.device == "cuda")

    def of_one_among(self, processes: int) -> Work:
        """The work of that one of several processes which has the most: prompts are shared out, lengths stay."""
        return replace(self, prompts=-(-self.prompts // processes), answers=-(-self.answers // processes))

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


def usual_optimizer(device: str) -> str:
    """The optimizer that "auto" means: of 8 bits and paged where bitsandbytes has pages (CUDA, ROCm and XPU)."""
    return "paged-adamw-8bit" if device in ("cuda", "xpu") else "adamw"


def estimate(shape: Shape, work: Work, widths: Widths) -> Plan:
    """The plan of one step at given widths."""
    terms = {"rollout": _rollout, "reading": _reading, "update": _update}
    phases = {}
    for name in PHASES:
        found = {term: size for term, size in terms[name](shape, work, widths).items() if size}
        if work.device == "cpu" or work.streamed:
            found["fragmentation"] = sum(found.values()) * (FRAGMENTATION[work.device] - 1)
        phases[name] = found
    return Plan(widths, _stays(shape, work), phases)


def _stays(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes that are there in every phase. A CPU keeps the gradients' and the optimizer's memory once it has them."""
    matrix = shape.vocabulary * shape.hidden * work.bytes
    trained = shape.adapter_parameters(work.rank)
    norms = shape.hidden * shape.layers * 2 * work.bytes
    weights: dict[str, float]
    mapped = work.device == "cpu" and work.streamed > 0  # in a file, of which the system keeps in memory what it has room for
    here = 1 - work.streamed / shape.layers
    if work.quantization == "nf4":
        linear = shape.linear_weights * here + shape.unread * (not mapped)
        weights = {"4-bit weights": linear / 2, "their quantisation state": linear * (NF4_BYTES - 0.5)}
    else:
        weights = {"weights": float((shape.linear_weights * here + shape.unread * (not mapped)) * work.bytes)}
    if work.streamed and not mapped:
        weights["slots of streamed layers"] = min(SLOTS, work.streamed) * layer_bytes(shape, work)
    if shape.other and not mapped:
        weights["experts and other weights, unquantised"] = float(shape.other * work.bytes)
    return weights | {
        "embeddings": 0.0 if mapped else matrix * work.on_card + norms,
        "head": 0.0 if shape.tied or mapped else float(matrix),
        "adapter": 4.0 * trained * (1 + work.ema + work.adapters),
        "shared prefixes": _kv_bytes(shape, work) * work.readings * work.description_tokens,  # of the frozen roles: kept for the run
        "optimizer state": trained * (2.05 if work.optimizer == "paged-adamw-8bit" else 8.0),
        {"cuda": "CUDA context", "cpu": "process after imports"}[work.device]: float(CONTEXT[work.device]),
        **({"cuBLAS workspaces": float(WORKSPACES), ALLOCATOR: float(PAGES)} if work.device == "cuda" else {}),
    }


def _rollout(shape: Shape, work: Work, widths: Widths) -> dict[str, float]:
    rows = min(widths.rows, work.answers)
    kept = _kv_bytes(shape, work) * (rows * work.longest + work.description_tokens)
    begun = _passing(shape, work, rows * work.prompt_tokens, work.longest, fills=kept / shape.layers)
    drawn = 4.0 * LOGIT_COPIES * rows * shape.vocabulary + rows * (work.longest * work.bytes + 16 * work.new_tokens)
    return {
        "key/value cache": kept,
        "activations": begun,
        "logits and what decoding holds": max(0.0, drawn + _attending(shape, work, rows, work.longest) - begun),
        "adapter in 16 bits": 2.0 * shape.adapter_parameters(work.rank) if work.device == "cuda" else 0.0,
        "matrices for decoding": 4.0 * shape.linear_weights if widths.fold else 0.0,
    }


def _reading(shape: Shape, work: Work, widths: Widths) -> dict[str, float]:
    row = work.longest + work.description_tokens
    tokens = min(max(widths.read_tokens, row), work.readings * work.answers * row)  # of one role at a time
    most = max(work.readings * work.prompts, (work.readings + 1) * work.answers)  # an evaluation reads by the policy too
    return {"activations": _passing(shape, work, tokens, row), "states between layers": between_layers(shape, work, most * row, tokens)}


def _update(shape: Shape, work: Work, widths: Widths) -> dict[str, float]:
    tokens = min(max(widths.update_tokens, work.longest), work.prompts * work.longest)
    answers, hidden = tokens * work.new_tokens / work.longest, shape.hidden * work.bytes
    all_at_once = work.prompts * work.longest if work.streamed else tokens  # a streamed layer does all batches before the next comes
    kept = (
        offloaded(shape, work, tokens) / shape.layers * 2 if work.offload else offloaded(shape, work, all_at_once)
    )  # one in use, one on its way
    if not work.checkpointing:
        kept = _saved(shape, work, tokens) * (shape.layers - 1)
    more = work.contrary or shape.model_type in EAGER  # these have a soft cap behind the head too
    copies = max(work.readings + CHUNK_BESIDE, CHUNK_COPIES.get(work.device, 0), CHUNK_COPIES["more"] * more)
    chunk = 4.0 * copies * min(widths.chunk_tokens, work.answers * work.new_tokens) * shape.vocabulary
    states = tokens * (4.0 * shape.hidden + 2 * hidden) + 2 * answers * hidden
    wide, matrix = tokens * shape.intermediate * work.bytes, _dequantised(shape, work)
    norms = 8.0 * shape.hidden if shape.model_type in POST_NORMED else 0.0
    back = _saved(shape, work, tokens) + max(2 * wide, wide + matrix) + tokens * (2 * hidden + norms)
    if work.device == "cuda":  # the one's memory is used for the other
        states, chunk, back = (states, chunk, 0.0) if states + chunk > back else (0.0, 0.0, back)
    return {
        "layers' inputs" if work.checkpointing else "activations of the layers before": kept,
        "last states and their gradient": states,
        "logits chunk": chunk,
        "states between layers": between_layers(shape, work, (work.readings + 1) * work.prompts * work.longest, tokens),
        "a layer's activations and gradients": back,
        "gradients": 4.0 * shape.adapter_parameters(work.rank),
    }


def layer_bytes(shape: Shape, work: Work) -> float:
    """Bytes of one layer's weights as they are kept."""
    return shape.linear_weights / shape.layers * (NF4_BYTES if work.quantization == "nf4" else work.bytes)


def between_layers(shape: Shape, work: Work, tokens: int, at_once: int) -> float:
    """Bytes of the states of a step's tokens, which wait while a streamed layer does one batch after the other; of a card's all but two batches
    are in the computer's memory."""
    waiting = 2 * at_once if work.offload else tokens
    return float(waiting * shape.hidden * work.bytes) if work.streamed else 0.0


def waiting_outside(shape: Shape, work: Work) -> float:
    """Bytes of the computer's memory that a card's streamed layers take: their weights, and for a whole step the inputs of all layers and the
    states of the readings."""
    tokens = work.prompts * (work.longest * (1 + work.readings) + work.description_tokens * work.readings)
    inputs = offloaded(shape, work, work.prompts * work.longest)
    return work.streamed * layer_bytes(shape, work) + inputs + float(tokens * shape.hidden * work.bytes)


def offloaded(shape: Shape, work: Work, tokens: int) -> float:
    """Bytes of the layers' inputs of so many tokens, which recomputing starts from."""
    return float(tokens * shape.hidden * work.bytes * shape.layers)


def _passing(shape: Shape, work: Work, tokens: int, row: int, fills: float = 0.0) -> float:
    """Bytes of `tokens` tokens in rows of so many at a layer's largest moment without a gradient. `fills`: what it keeps of them from its attention on."""
    hidden, queries, keys = shape.hidden * work.bytes, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide, matrix = tokens * shape.intermediate * work.bytes, _dequantised(shape, work)
    mlp = 2 * tokens * hidden + max(3 * wide, 2 * wide + matrix)
    if shape.model_type in EAGER:  # transformers holds a layer's attention until the layer ends
        mlp += tokens * row * shape.heads * work.bytes
    moments = [mlp, tokens * (hidden + work.bytes * (2 * queries + 4 * keys)) + _attending(shape, work, tokens / row, row)]
    if shape.model_type in FLOAT_ROTARY:
        moments.append(tokens * (work.bytes * (queries + 2 * keys) + max(12 * queries, 4 * queries + 12 * keys)) - fills)
    return 2 * tokens * hidden + tokens * row + max(moments)


def _attending(shape: Shape, work: Work, rows: float, row: int) -> float:
    """Bytes of keys and values repeated for each query's head, where there are fewer of them, and of scores where they are ever there."""
    repeated = 2 * shape.heads * shape.head_dim if shape.kv_heads < shape.heads else 0
    scores = EAGER_SCORES * shape.heads * row if shape.model_type in EAGER else 0
    return rows * row * (repeated * work.bytes + scores)


def _saved(shape: Shape, work: Work, tokens: int) -> float:
    """Bytes of the activations of one layer until its backward pass: the MLP's four, the norms' inputs (float32) and outputs,
    and attention's query, result and repeated keys and values. Counted on the graph that autograd keeps."""
    inner = 4 * shape.intermediate + 2 * shape.hidden + 4 * shape.heads * shape.head_dim
    norms = 2 * shape.hidden + ((shape.heads + shape.kv_heads) * shape.head_dim if shape.model_type in QUERY_NORMED else 0)
    scores = EAGER_SAVED * shape.heads if shape.model_type in EAGER else 0
    return tokens * (work.bytes * inner + 4.0 * norms + work.longest * (work.bytes + scores))


def _kv_bytes(shape: Shape, work: Work) -> float:
    """Bytes of a token's keys and values in all layers."""
    return float(2 * shape.attending * shape.kv_heads * shape.head_dim * work.bytes)


def _dequantised(shape: Shape, work: Work) -> float:
    """The largest linear map in the compute dtype, while it is used."""
    return float(max(i * o for i, o, _ in shape.maps) * work.bytes) if work.quantization == "nf4" else 0.0


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


def _longest_prompt(recipe: Recipe) -> int:
    """No fewer tokens than the longest local prompt has (two bytes a token); what isn't a local text file may be of any length."""
    longest = 0
    for source in (recipe.prompts.train, recipe.prompts.eval, recipe.prompts.outside, recipe.prompts.contrary):
        for one in source if isinstance(source, tuple) else (source,) if source is not None else ():
            path = recipe.folder / one if isinstance(one, str) else None
            if path is None or path.suffix not in (".jsonl", ".txt") or not path.is_file():
                return recipe.prompts.max_tokens
            longest = max(longest, *(len(line) for line in path.read_bytes().splitlines() or [b""]))
    return longest // 2 + 24


def _tokens(text: str) -> int:
    """About how many tokens a text is, its turn's marks included."""
    return len(text) // 4 + 12
