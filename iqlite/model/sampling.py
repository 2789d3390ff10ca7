"""Which token is drawn: noise that is a function of its arguments alone, and the token it picks from a distribution. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CDF_BLOCK = 256  # tokens of a block in inverse-CDF sampling
NUCLEUS_FIRST = 1024  # tokens looked at before the whole vocabulary is sorted
SPOKEN_TEMPERATURE, SPOKEN_TOP_P = 0.7, 0.9  # as people chat with a model; our choice


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn. `temperature` 0 is greedy; `top_p` 1 truncates nothing. `stream` keeps uses of one seed apart."""

    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stream: str = "train"


def noise(seed: int, stream: str, step: int, index: Sequence[int] | np.ndarray, position: int) -> Tensor:
    """One uniform number in [0, 1) for each prompt index, float64 [B]: a hash (splitmix64) of its arguments, no state."""
    key = np.uint64(int.from_bytes(stream.encode()[:8], "little"))
    state = np.full(len(index), key, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in (seed, step, np.asarray(index, dtype=np.uint64), position):
            state = _splitmix64(state ^ (np.asarray(part, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) / 2.0**53)


def choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, *, waits: bool = True) -> Tensor:
    """The token whose stretch of the cumulative distribution holds the uniform number: int64 [B] (inverse-CDF sampling).

    `waits` False never looks at a number to decide what to compute, so that the host needn't wait for a card.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = (logits_BV.float() if temperature == 1 else logits_BV.float() / temperature).softmax(-1)
    if top_p < 1:
        probs_BV = probs_BV * (probs_BV >= _smallest_in_nucleus(probs_BV, top_p, waits))
    return _where_cumulative_exceeds(probs_BV, uniform_B.to(logits_BV.device))


def _where_cumulative_exceeds(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """First token whose cumulative probability exceeds the uniform number's share of the whole; never one of probability 0.

    Two levels, blocks and tokens of the one block, so that only those need float64.
    """
    rows = torch.arange(len(probs_BV), device=probs_BV.device)
    blocks_BKb = torch.nn.functional.pad(probs_BV, (0, -probs_BV.shape[-1] % CDF_BLOCK)).view(len(probs_BV), -1, CDF_BLOCK)
    cumulative_BK = blocks_BKb.sum(-1).double().cumsum(-1)
    at_B1 = uniform_B[:, None] * cumulative_BK[:, -1:]
    block_B = torch.searchsorted(cumulative_BK, at_B1, right=True)[:, 0].clamp(max=cumulative_BK.shape[-1] - 1)
    before_B = torch.nn.functional.pad(cumulative_BK, (1, 0))[rows, block_B]
    inside_Bb = blocks_BKb[rows, block_B].double().cumsum(-1)
    short_B1 = torch.minimum(at_B1 - before_B[:, None], inside_Bb[:, -1:] * (1 - 1e-12))
    inside_B = torch.searchsorted(inside_Bb, short_B1.clamp(min=0), right=True)[:, 0].clamp(max=CDF_BLOCK - 1)
    return block_B * CDF_BLOCK + inside_B


def _smallest_in_nucleus(probs_BV: Tensor, top_p: float, waits: bool) -> Tensor:
    """[B, 1]: the last probability that the nucleus needs to reach `top_p`; ties with it belong to the nucleus too."""
    first = NUCLEUS_FIRST if waits else probs_BV.shape[-1]
    for k in (min(first, probs_BV.shape[-1]), probs_BV.shape[-1]):  # a full sort only where few tokens don't suffice
        top_Bk = probs_BV.topk(k).values
        needed_Bk = top_Bk.cumsum(-1) - top_Bk < top_p
        if k == probs_BV.shape[-1] or not bool(needed_Bk[:, -1].any()):
            break
    return top_Bk.gather(-1, needed_Bk.sum(-1, keepdim=True) - 1)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
