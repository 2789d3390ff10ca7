"""What a GGUF file says of its model and transformers' converter leaves out: position scaling, head sizes, caps, windows.

A field that changes what the model computes is either carried over here or the file is refused; none is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from iqlite.errors import BaseError

LLAMA3_BANDS = (1.0, 4.0)  # low and high frequency factors of every model that has them; the file holds only what they come to
CARRIED = {
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
    "logit_scale": "logit_scale",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Fields, and what transformers calls them, where a model's configuration has such a number."""
LARGE_LAYERS = {
    "gemma2": 46,
    "gemma3": 62,
}  # of the 27B models, whose attention is scaled by their width (llama.cpp knows them by their layers)


def loses_sizes(architecture: str, fields: Mapping[str, Any]) -> bool:
    """True where transformers' own reading of the header gets a tensor's size wrong, so that it needs to be corrected before the weights."""
    return architecture == "qwen3moe" or (architecture == "qwen3" and fields.get("qwen3.attention.key_length", 128) != 128)


def correct(config: Any, architecture: str, fields: Mapping[str, Any], factors: Mapping[str, Sequence[float]], name: str) -> None:
    """Sets in a converted model's configuration what the file says; `factors` are its tensors of rotation factors, by their names.

    BaseError for a position scaling that can't be carried over.
    """
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items() if key.startswith(f"{architecture}.")}
    for key, there in CARRIED.items():
        number = own.get(key)
        if number is not None and getattr(config, there, None) is not None and not isinstance(number, tuple):
            setattr(config, there, number)
    if architecture in LARGE_LAYERS:  # llama.cpp reckons the attention's scale so
        large = LARGE_LAYERS[architecture] == own.get("block_count")
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if architecture == "qwen3moe":  # llama.cpp's only way
        config.norm_topk_prob = True
    scaled = _scaling(config, own, factors, name)
    if scaled is None:
        return
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:  # layers that look back a window keep their own rotation
        rope["full_attention"] = rope["full_attention"] | scaled
    else:
        rope |= scaled
    config.rope_parameters = rope


def _scaling(config: Any, own: Mapping[str, Any], factors: Mapping[str, Sequence[float]], name: str) -> dict[str, Any] | None:
    """What transformers' rotation needs beyond its base; None where positions aren't scaled."""
    factor = own.get("rope.scaling.factor") or own.get("rope.scale_linear")  # the older name
    kind = own.get("rope.scaling.type", "linear")  # as llama.cpp takes a factor without a type
    original = own.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in factors:
        return _llama3(config, factors["rope_freqs.weight"], name)
    if "rope_factors_long.weight" in factors:
        long, short = (list(map(float, factors[f"rope_factors_{which}.weight"])) for which in ("long", "short"))
        original = original or config.max_position_embeddings
        config.original_max_position_embeddings = original
        return {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "factor": config.max_position_embeddings / original,
            "original_max_position_embeddings": original,
        }
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor and original:
        betas = {
            to: own[key]
            for key, to in (("rope.scaling.yarn_beta_fast", "beta_fast"), ("rope.scaling.yarn_beta_slow", "beta_slow"))
            if key in own
        }
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original), **betas}
    raise BaseError(
        f"base {name!r}: a GGUF whose positions are scaled by {kind!r}, which can't be carried over: use the original model's folder."
    )


def _llama3(config: Any, found: Sequence[float], name: str) -> dict[str, Any]:
    """Llama 3's scaling from the factors it comes to: the largest is the whole factor; one in between tells the original context."""
    low, high = LLAMA3_BANDS
    theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
    factor, size = max(found), 2 * len(found)
    turns_in_one = [1 / (2 * math.pi * theta ** (2 * pair / size)) for pair in range(len(found))]  # of the original context
    between = [pair for pair, value in enumerate(found) if 1 + 1e-3 < value < factor * (1 - 1e-3)]
    guesses = []
    for pair in between:
        smooth = (1 / found[pair] - 1 / factor) / (1 - 1 / factor)
        guesses.append((low + smooth * (high - low)) / turns_in_one[pair])
    if not between:  # all turn fully or not at all: any context between the last that does and the first that doesn't
        last = max((pair for pair, value in enumerate(found) if value < 1 + 1e-3), default=0)
        guesses = [high / turns_in_one[last]]
    original = round(sorted(guesses)[len(guesses) // 2])
    made = [_stretch(original * turns, factor, low, high) for turns in turns_in_one]
    if any(abs(a - b) > 1e-2 * b for a, b in zip(made, found, strict=True)):
        raise BaseError(f"base {name!r}: a GGUF whose rotation factors are no known scaling: use the original model's folder.")
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _stretch(turns: float, factor: float, low: float, high: float) -> float:
    smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
    return 1.0 / ((1.0 - smooth) / factor + smooth)
