"""Sample responses from a role with the KV cache, and make the response mask: the one place where eligibility is decided.

The sampling noise is a function of (seed, stream, step, prompt index, position) alone, so the ids don't depend on how the batch was split
(ties within rounding apart). Prompts are padded on the left here, with position ids that follow the attention mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iqlite.keyvalues import Decoding
from iqlite.policy import Policy
from iqlite.records import Messages, Rollout
from iqlite.sizes import Sizes

FOLD_FROM = 4  # tokens to decode from which one matrix a layer pays for being made
LEAVE_AT = 0.75  # rows that have ended leave when no more than this share of the batch is left: each time copies the cache
CDF_BLOCK = 256  # tokens of a block in inverse-CDF sampling
NUCLEUS_FIRST = 1024  # tokens looked at before the whole vocabulary is sorted


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn. `temperature` 0 is greedy; `top_p` 1 truncates nothing. `stream` keeps uses of one seed apart."""

    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stream: str = "train"


def sample(
    policy: Policy,
    role: str,
    requests: Sequence[Messages],
    prompt_ids: Sequence[Sequence[int]],
    index: Sequence[int],
    stop_ids: Sequence[int],
    sampler: Sampler,
    *,
    step: int = 0,
    sizes: Sizes,
    shared: Sequence[int] = (),
    progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Answers to B prompts by `role`, as many at a time as `sizes` allows. `index` are the prompts' numbers; they and `step` key the noise.

    `shared` are ids that prompts may begin with; where all of a batch do, they are read once.
    """
    tokens_BT = torch.zeros(len(prompt_ids), sampler.max_new_tokens, dtype=torch.long)
    # Prompts of like length decode together, longest first: the least padding, and the largest batch comes before the others.
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))
    with policy.acting_as(role, folded=sizes.fold and sampler.max_new_tokens >= FOLD_FROM):
        at = 0
        while at < len(order):
            longest = len(prompt_ids[order[at]]) + sampler.max_new_tokens
            part = order[at : at + sizes.together(longest)]
            with sizes.fitting("rollout_tokens", len(part), longest) as again:
                tokens_BT[part] = _decode(policy, [prompt_ids[i] for i in part], [index[i] for i in part], stop_ids, sampler, step, shared)
            if again:
                continue
            at += len(part)
            if progress is not None:
                progress(len(part))
    mask_BT, ended_B = response_mask(tokens_BT, stop_ids)
    width = int(mask_BT.sum(-1).max())
    return Rollout(
        index=tuple(index),
        requests=tuple(requests),
        prompt_ids=tuple(map(tuple, prompt_ids)),
        tokens_BT=tokens_BT[:, :width],
        mask_BT=mask_BT[:, :width],
        ended_B=ended_B,
    )


def response_mask(tokens_BT: Tensor, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(mask [B, T], ended [B]): true up to and including the first end-of-turn token, also where it doubles as padding."""
    stops_BT = torch.isin(tokens_BT, torch.tensor(list(stop_ids)))
    before_BT = stops_BT.long().cumsum(-1) - stops_BT.long()
    return before_BT == 0, stops_BT.any(-1)


def noise(seed: int, stream: str, step: int, index: Sequence[int] | np.ndarray, position: int) -> Tensor:
    """One uniform number in [0, 1) for each prompt index, float64 [B]: a hash (splitmix64) of its arguments, no state."""
    key = np.uint64(int.from_bytes(stream.encode()[:8], "little"))
    state = np.full(len(index), key, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in (seed, step, np.asarray(index, dtype=np.uint64), position):
            state = _splitmix64(state ^ (np.asarray(part, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) / 2.0**53)


def choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token whose stretch of the cumulative distribution holds the uniform number: int64 [B] (inverse-CDF sampling)."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = (logits_BV.float() if temperature == 1 else logits_BV.float() / temperature).softmax(-1)
    if top_p < 1:
        probs_BV = probs_BV * (probs_BV >= _smallest_in_nucleus(probs_BV, top_p))
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


def _smallest_in_nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """[B, 1]: the last probability that the nucleus needs to reach `top_p`; ties with it belong to the nucleus too."""
    for k in (min(NUCLEUS_FIRST, probs_BV.shape[-1]), probs_BV.shape[-1]):  # a full sort only where few tokens don't suffice
        top_Bk = probs_BV.topk(k).values
        needed_Bk = top_Bk.cumsum(-1) - top_Bk < top_p
        if k == probs_BV.shape[-1] or not bool(needed_Bk[:, -1].any()):
            break
    return top_Bk.gather(-1, needed_Bk.sum(-1, keepdim=True) - 1)


def _decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    index: Sequence[int],
    stop_ids: Sequence[int],
    sampler: Sampler,
    step: int,
    shared: Sequence[int] = (),
) -> Tensor:
    """Ids [b, max_new_tokens] of one batch, filled with a stop id behind the end of a row. Inside a role block.

    What all prompts begin with (`shared`) is read once for all rows; rows that have ended leave the batch.
    """
    device, new = policy.device, sampler.max_new_tokens
    prefix = policy.begun(prompts, [shared] * len(prompts), longest=max(map(len, prompts)) + new)
    start = prefix[0] if None not in prefix else None
    done = 0 if start is None else len(start)
    rest = [prompt[done:] for prompt in prompts]
    longest = max(map(len, rest))
    ids_BL, real_BL, position_BL = padded(rest, new, stop_ids[0], device, done)
    cache = Decoding(len(policy.decoder.layers), len(rest), done + longest + new, start)
    stop = torch.tensor(list(stop_ids), device=device)
    out_BT = torch.full((len(rest), new), stop_ids[0], device=device)
    rows = torch.arange(len(rest), device=device)  # which rows are still being decoded
    numbers = np.asarray(index, dtype=np.uint64)
    for position in range(new):
        hidden_BLD = policy.decoder(
            input_ids=ids_BL,
            attention_mask=real_BL[:, : done + longest + position],
            position_ids=position_BL,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        uniform_B = noise(sampler.seed, sampler.stream, step, numbers, position)
        token_B = choose(policy.head(hidden_BLD[:, -1]), uniform_B, sampler.temperature, sampler.top_p)
        ended_B = torch.isin(out_BT[rows, position - 1], stop) if position else torch.zeros(len(rows), dtype=torch.bool, device=device)
        token_B = torch.where(ended_B, stop[0], token_B)
        out_BT[rows, position] = token_B
        ids_BL, position_BL = token_B[:, None], position_BL[:, -1:] + 1
        alive = ~torch.isin(token_B, stop)
        left = int(alive.sum())
        if left == 0:
            break
        if left <= LEAVE_AT * len(rows):
            cache.keep(alive)
            rows, real_BL, ids_BL, position_BL = rows[alive], real_BL[alive], ids_BL[alive], position_BL[alive]
            numbers = numbers[alive.cpu().numpy()]
    return out_BT.cpu()


def padded(prompts: Sequence[Sequence[int]], new: int, fill: int, device: torch.device, done: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, L], which tokens are real [B, done + L + new], positions [B, L]) of prompts padded on the left behind a prefix of `done` tokens.

    Laid out as: prefix, padding, the prompt, what is to be sampled. Positions count real tokens only.
    """
    longest = max(map(len, prompts))
    real_BL = torch.tensor([[1] * done + [0] * (longest - len(p)) + [1] * (len(p) + new) for p in prompts], device=device)
    ids_BL = torch.tensor([[fill] * (longest - len(p)) + list(p) for p in prompts], device=device)
    return ids_BL, real_BL, (real_BL.cumsum(-1) - 1).clamp(min=0)[:, done : done + longest]


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
