"""A model converted from a GGUF file is held against the file itself, as the gguf library dequantises it, before the conversion is kept.

Every tensor of the file has its place in the model, with its values. For Llama's family, which most files are, the logits of a few tokens
far apart are computed from the file alone, as llama.cpp does: a scaling, a bias or a head size that got lost shows there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iqlite.errors import BaseError

NEIGHBOURS = {"llama": True, "qwen2": False, "qwen3": False}
"""Architectures whose logits are computed here, and whether their rotation turns neighbouring numbers or the two halves of a head."""
POSITIONS = (0, 1, 2, 9, 70, 520, 1500, 4000)  # far apart, so that a scaling of positions shows; float32 holds their angles
FARTHEST = 1e-3  # nats a token between file and model; sums in another order come to 1e-8 in float32 and 1e-5 in float16
ROWS = 64  # of a matrix that are compared
CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3}  # relative to a tensor's largest number
BESIDE = ("rope_freqs", "rope_factors", "mm.", "v.", "nextn")  # tensors that are no weights of the text model
FOLDED = ("ssm_", "shortconv", "_exps", "_shexp")  # kept in another layout by the model


def prove(model: Any, tensors: Mapping[str, Any], architecture: str, fields: Mapping[str, Any], name: str) -> None:
    """BaseError unless the model is the file's: `tensors` as the gguf library reads them, by name; `fields` is the file's metadata."""
    _same_values(model, tensors, architecture, name)
    if architecture in NEIGHBOURS:
        apart = kl_to_file(model, tensors, architecture, fields)
        if not apart <= FARTHEST:
            raise BaseError(
                f"base {name!r}: the model made of this GGUF says something else than the file ({apart:.2g} nats a token apart): update transformers and gguf, or use the original model's folder."
            )


def kl_to_file(model: Any, tensors: Mapping[str, Any], architecture: str, fields: Mapping[str, Any]) -> float:
    """Mean KL(file‖model) over a few tokens, nats."""
    context = int(fields.get(f"{architecture}.context_length", POSITIONS[-1] + 1))
    positions = [position for position in POSITIONS if position < context]
    ids = [int(i) for i in np.linspace(3, len(tensors["token_embd.weight"].data) - 1, len(positions))]
    with torch.no_grad():
        given, at = torch.tensor([ids]), torch.tensor([positions])
        mask = torch.ones_like(given)  # without one, transformers takes a leap in positions for another text
        found_TV = model.eval()(input_ids=given, position_ids=at, attention_mask=mask, use_cache=False).logits[0].double()
        own_TV = logits_of_file(tensors, architecture, fields, ids, positions).double()
    own_TV, found_TV = own_TV.log_softmax(-1), found_TV[:, : own_TV.shape[1]].log_softmax(-1)
    return float((own_TV.exp() * (own_TV - found_TV)).sum(-1).mean())


def logits_of_file(
    tensors: Mapping[str, Any], architecture: str, fields: Mapping[str, Any], ids: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Logits [T, V] of tokens at these positions, from the file alone, one layer in memory at a time, float32."""
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    heads, hidden = int(own["attention.head_count"]), int(own["embedding_length"])
    kv_heads, eps = int(own.get("attention.head_count_kv", heads)), float(own["attention.layer_norm_rms_epsilon"])
    size = int(own.get("attention.key_length", hidden // heads))
    angles_TP, stretch = _angles(own, tensors, size, positions)
    cos_TP, sin_TP = angles_TP.cos() * stretch, angles_TP.sin() * stretch

    def norm(x: Tensor, key: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * values(tensors[key])

    def linear(x: Tensor, key: str) -> Tensor:
        bias = tensors.get(f"{key}.bias")
        return x @ values(tensors[f"{key}.weight"]).T + (0 if bias is None else values(bias))

    def rotated(x_THD: Tensor) -> Tensor:
        turned, rest = x_THD[..., : 2 * cos_TP.shape[1]], x_THD[..., 2 * cos_TP.shape[1] :]
        a, b = (turned[..., ::2], turned[..., 1::2]) if NEIGHBOURS[architecture] else turned.chunk(2, -1)
        cos, sin = cos_TP[:, None], sin_TP[:, None]
        pair = (a * cos - b * sin, a * sin + b * cos)
        return torch.cat([torch.stack(pair, -1).flatten(-2) if NEIGHBOURS[architecture] else torch.cat(pair, -1), rest], -1)

    x_TD, count = values(tensors["token_embd.weight"], list(ids)), len(ids)
    causal = torch.full((count, count), -math.inf).triu(1)
    for layer in range(int(own["block_count"])):
        at = f"blk.{layer}."
        y = norm(x_TD, f"{at}attn_norm.weight")
        q, k, v = (linear(y, f"{at}attn_{part}").view(count, many, -1) for part, many in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
        if f"{at}attn_q_norm.weight" in tensors:
            q, k = norm(q, f"{at}attn_q_norm.weight"), norm(k, f"{at}attn_k_norm.weight")
        q, k = rotated(q), rotated(k).repeat_interleave(heads // kv_heads, 1)
        weights = (torch.einsum("thd,shd->hts", q, k) / math.sqrt(size) + causal).softmax(-1)
        mixed = torch.einsum("hts,shd->thd", weights, v.repeat_interleave(heads // kv_heads, 1)).flatten(1)
        x_TD = x_TD + linear(mixed, f"{at}attn_output")
        y = norm(x_TD, f"{at}ffn_norm.weight")
        x_TD = x_TD + linear(torch.nn.functional.silu(linear(y, f"{at}ffn_gate")) * linear(y, f"{at}ffn_up"), f"{at}ffn_down")
    head = "output" if "output.weight" in tensors else "token_embd"
    return linear(norm(x_TD, "output_norm.weight"), head)


def values(tensor: Any, rows: list[int] | None = None) -> Tensor:
    """A tensor of the file, or some of its rows, dequantised by the gguf library, float32."""
    import gguf

    packed = tensor.data if rows is None else tensor.data[rows]
    return torch.from_numpy(np.array(gguf.quants.dequantize(packed, tensor.tensor_type), dtype=np.float32))


def _angles(own: Mapping[str, Any], tensors: Mapping[str, Any], size: int, positions: Sequence[int]) -> tuple[Tensor, float]:
    """The angle of each pair at each position [T, P], and what rotated numbers are multiplied by; by llama.cpp's rules."""
    turned = int(own.get("rope.dimension_count", size))
    theta = float(own.get("rope.freq_base", 10000.0))
    pairs = torch.arange(turned // 2, dtype=torch.float64)
    slow = theta ** (-2 * pairs / turned)
    if "rope_freqs.weight" in tensors:
        slow = slow / values(tensors["rope_freqs.weight"]).double()
    factor = float(own.get("rope.scaling.factor") or own.get("rope.scale_linear") or 1.0)
    kind, stretch = own.get("rope.scaling.type", "linear"), 1.0
    if kind == "linear":
        slow = slow / factor
    if kind == "yarn" and factor > 1:
        original = float(own["rope.scaling.original_context_length"])
        fast, last = (float(own.get(f"rope.scaling.yarn_beta_{which}", usual)) for which, usual in (("fast", 32.0), ("slow", 1.0)))
        low, high = (turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, last))
        low, high = max(0, math.floor(low)), min(turned - 1, math.ceil(high))
        kept = 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)
        slow = slow / factor * (1 - kept) + slow * kept
        stretch = 1 + 0.1 * math.log(factor)
    return (torch.tensor(positions, dtype=torch.float64)[:, None] * slow).float(), stretch


def _same_values(model: Any, tensors: Mapping[str, Any], architecture: str, name: str) -> None:
    """BaseError for a tensor of the file that has no place in the model, or other values there."""
    import gguf

    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.get_text_config().num_hidden_layers)
    there = {}
    for key, parameter in model.state_dict().items():
        if found := names.get_name(key, (".weight", ".bias")):
            there[found] = parameter
    lost = [key for key in tensors if key not in there and not key.startswith(BESIDE) and not any(part in key for part in FOLDED)]
    if lost:
        raise BaseError(
            f"base {name!r}: the GGUF holds {len(lost)} tensors that the converted model has no place for, such as {lost[0]}: use the original model's folder."
        )
    for key, tensor in tensors.items():
        parameter = there.get(key)
        if parameter is None or any(part in key for part in FOLDED):
            continue
        count = len(tensor.data)
        rows = sorted({int(row) for row in np.linspace(0, count - 1, min(ROWS, count))})
        expected, largest = values(tensor, rows), float(parameter.abs().max())
        found = parameter.flatten(0, -2)[_rows(key, rows, count, model.config)] if parameter.ndim > 1 else parameter[rows]
        off = CLOSE[parameter.dtype] * max(largest, 1e-6)
        apart = (
            (found.float().reshape(expected.shape) - expected).abs().max() if found.numel() == expected.numel() else torch.tensor(math.inf)
        )
        if key.endswith("norm.weight") and apart > off:  # Gemma's norms are stored with 1 added
            apart = (found.float() + 1 - expected).abs().max()
        if not apart <= off:
            raise BaseError(
                f"base {name!r}: the conversion changed {key} of the GGUF: update transformers and gguf, or use the original model's folder."
            )


def _rows(key: str, rows: Sequence[int], count: int, config: Any) -> list[int]:
    """Where rows of the file's tensor stand in the model's: Llama's q and k have the halves of each head interleaved in a file."""
    if config.model_type not in ("llama", "mistral") or not key.endswith(("attn_q.weight", "attn_k.weight")):
        return list(rows)
    heads = config.num_attention_heads if key.endswith("attn_q.weight") else config.num_key_value_heads
    size = count // heads
    return [row // size * size + row % size % 2 * (size // 2) + row % size // 2 for row in rows]
