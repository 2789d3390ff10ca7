"""The one decoding loop: the next tokens of many answers at once, each predicted from one reading of its request or from several.

A reading is what the model is given before an answer: the plain request, or the request under a description. All readings of all
requests are rows of one batch; what a reading's requests begin with is read once (`Forward.begun`) and stands before its rows.
Knows nothing of rollouts, sessions and recipes. Prompts are padded on the left here, with position ids that follow the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from iqlite.model.forward import Forward
from iqlite.model.keyvalues import Decoding, Prefix, longest_of
from iqlite.model.sampling import Sampler, choose, noise
from iqlite.model.steady import CHECK_EVERY, Steps, steadily

LEAVE_AT = 0.75  # rows that have ended leave when no more than this share of the batch is left: each time copies the cache


def draw(
    forward: Forward,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    shared: Mapping[str, Sequence[int]],
    predict: Callable[[Mapping[str, Tensor]], Tensor],
    stop_ids: Sequence[int],
    sampler: Sampler,
    step: int,
    index: Sequence[int],
    *,
    every: int = CHECK_EVERY,
    record: bool = True,
) -> Generator[tuple[Tensor, Tensor], Tensor | None, None]:
    """Position by position (which of the B answers go on [b], their next ids [b]), on the host, until all have ended.

    `prompts` are the ids of B requests under each reading, `shared` the ids that a reading's requests may begin with; `predict` makes
    logits [b, V] of the readings' last hidden states [b, D]. `index` (the requests' numbers) and `step` key the noise. An answer that
    has ended repeats a stop id until it leaves the batch. Who draws may send back which of them end here [b] (bool, on the host), beside
    those that drew a stop id. Inside a role block, which must last as long as the answers are drawn.

    Where `forward.steadies` the rows, the tokens after the first are drawn by `model.steady`, which gives the same ids and lets the host see them
    only after `every` of them; `record` False keeps it from recording `predict`, for one that is to run each time.
    """
    new, device = sampler.max_new_tokens, forward.device
    rows = [ids for requests in prompts.values() for ids in requests]
    begun = _begun(forward, rows, [shared.get(name, ()) for name, requests in prompts.items() for _ in requests], new)
    before = longest_of(begun)
    rests = [ids[0 if start is None else len(start) :] for ids, start in zip(rows, begun, strict=True)]
    longest = max(map(len, rests))
    ids_RL, real_RL, position_RL = padded(rests, new, stop_ids[0], device, [0 if start is None else len(start) for start in begun])
    cache = forward.room(before + longest + new, begun)
    stop = torch.tensor(list(stop_ids))
    which_b = torch.arange(len(index))
    numbers = np.asarray(index, dtype=np.uint64)
    ended_b = torch.zeros(len(index), dtype=torch.bool)
    for position in range(new):
        if position and isinstance(cache, Decoding) and forward.steadies(cache.room):
            filled = before + longest
            steps = Steps(
                forward, cache, predict, list(prompts), stop_ids, sampler, step, numbers, ids_RL, position_RL, real_RL[:, :filled], ended_b
            )  # fmt: skip
            yield from steadily(steps, which_b, filled, new - 1, every, record=record)
            return
        state_RD = forward.decoder(
            input_ids=ids_RL,
            attention_mask=real_RL[:, : before + longest + position],
            position_ids=position_RL,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits_bV = predict(dict(zip(prompts, state_RD.split(len(which_b)), strict=True)))
        uniform_b = noise(sampler.seed, sampler.stream, step, numbers, position)
        token_b = choose(logits_bV, uniform_b, sampler.temperature, sampler.top_p).cpu()
        token_b = torch.where(ended_b, stop[0], token_b)
        enough_b = yield which_b, token_b
        ended_b = torch.isin(token_b, stop) | ended_b if enough_b is None else torch.isin(token_b, stop) | ended_b | enough_b
        if bool(ended_b.all()):
            return
        ids_RL, position_RL = token_b.repeat(len(prompts))[:, None].to(device), position_RL[:, -1:] + 1
        if int((~ended_b).sum()) <= LEAVE_AT * len(which_b):
            stays_b, stays_R = ~ended_b, (~ended_b).repeat(len(prompts)).to(device)
            cache.keep(stays_R)
            ids_RL, real_RL, position_RL = ids_RL[stays_R], real_RL[stays_R], position_RL[stays_R]
            which_b, numbers, ended_b = which_b[stays_b], numbers[stays_b.numpy()], ended_b[stays_b]


def _begun(forward: Forward, rows: Sequence[Sequence[int]], starts: Sequence[Sequence[int]], new: int) -> list[Prefix | None]:
    """What each row starts with. None for all where a row that can't share is the longest: there is then as much to read as without."""
    # Padding between a prefix and what follows makes a row reach no further than this, which a sliding window would notice.
    furthest = max(map(len, starts)) + max(map(len, rows)) + new
    begun = forward.begun(rows, starts, longest=furthest)
    longest = max(map(len, rows))
    unshared = max((len(ids) for ids, start in zip(rows, begun, strict=True) if start is None), default=0)
    return [None] * len(rows) if unshared == longest else begun


def padded(
    prompts: Sequence[Sequence[int]], new: int, fill: int, device: torch.device, done: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [R, L], which tokens are real [R, P + L + new], positions [R, L]) of prompts padded on the left, row r behind `done[r]` ≤ P tokens.

    Laid out as: padding, the prefix, padding, the prompt, what is to be sampled. Positions count real tokens only.
    """
    before, longest = max(done), max(map(len, prompts))
    lengths = [(before - prefix, prefix, longest - len(prompt), len(prompt) + new) for prefix, prompt in zip(done, prompts, strict=True)]
    real_RL = torch.tensor([[0] * gap + [1] * prefix + [0] * padding + [1] * rest for gap, prefix, padding, rest in lengths], device=device)
    ids_RL = torch.tensor([[fill] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    return ids_RL, real_RL, (real_RL.cumsum(-1) - 1).clamp(min=0)[:, before : before + longest]
