"""Sample responses from a role, or from what several readings predict together, and make the response mask: the one place where
eligibility is decided.

The sampling noise is a function of (seed, stream, step, prompt index, position) alone, so the ids don't depend on how the batch was split
(ties within rounding apart).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from iqlite.machine.ranks import ALONE, Ranks
from iqlite.machine.sizes import Sizes
from iqlite.model.decoding import draw
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.records import Messages, Rollout

FOLD_FROM = 4  # tokens to decode from which one matrix a layer pays for being made


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
    ranks: Ranks = ALONE,
) -> Rollout:
    """Answers to B prompts by `role`, as many at a time as `sizes` allows. `index` are the prompts' numbers; they and `step` key the noise.

    `shared` are ids that prompts may begin with; they are read once for all that do.
    """
    return sample_readings(
        policy,
        role,
        requests,
        {role: prompt_ids},
        {role: shared},
        lambda states: policy.head(states[role]),
        index,
        stop_ids,
        sampler,
        step=step,
        sizes=sizes,
        progress=progress,
        ranks=ranks,
    )


def sample_readings(
    policy: Policy,
    role: str,
    requests: Sequence[Messages],
    prompts: Mapping[str, Sequence[Sequence[int]]],
    shared: Mapping[str, Sequence[int]],
    predict: Callable[[Mapping[str, Tensor]], Tensor],
    index: Sequence[int],
    stop_ids: Sequence[int],
    sampler: Sampler,
    *,
    step: int = 0,
    sizes: Sizes,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Rollout:
    """Answers to B requests drawn from what `predict` makes of several readings by `role` (see `decoding.draw`).

    `prompts` are the B prompts under each reading; those of the first are the rollout's own. Several processes (`ranks`) draw some each, and all
    get all.
    """
    plain, new, fill = next(iter(prompts.values())), sampler.max_new_tokens, stop_ids[0]
    tokens_BT = torch.full((len(plain), new), fill, dtype=torch.long)
    lengths = [max(map(len, readings)) for readings in zip(*prompts.values(), strict=True)]
    # Prompts of like length decode together, longest first: the least padding, and the largest batch comes before the others.
    mine = ranks.mine(lengths)
    order = sorted(mine, key=lambda row: -lengths[row])
    with policy.acting_as(role, decoding=new >= FOLD_FROM, folded=sizes.fold and new >= FOLD_FROM):
        at = 0
        while at < len(order):
            longest = lengths[order[at]] + new
            for attempt in sizes.attempts("rollout_tokens"):
                part = order[at : at + max(1, sizes.together(longest, (len(order) - at) * len(prompts)) // len(prompts))]
                some = {name: [ids[row] for row in part] for name, ids in prompts.items()}
                with attempt.of(len(part), longest * len(prompts)):
                    drawn = draw(policy.forward, some, shared, predict, stop_ids, sampler, step, [index[row] for row in part])
                    tokens_BT[part] = _gathered(drawn, len(part), new, fill)
            at += len(part)
            if progress is not None:
                progress(len(part))
    if ranks.size > 1:
        tokens_BT = ranks.in_order({"ids": tokens_BT[mine]}, mine, [1] * len(mine))["ids"]
        if progress is not None:
            progress(len(plain) - len(mine))
    mask_BT, ended_B = response_mask(tokens_BT, stop_ids)
    width = int(mask_BT.sum(-1).max())
    return Rollout(
        index=tuple(index),
        requests=tuple(requests),
        prompt_ids=tuple(map(tuple, plain)),
        tokens_BT=tokens_BT[:, :width],
        mask_BT=mask_BT[:, :width],
        ended_B=ended_B,
    )


def part_of(ranks: Ranks, rollout: Rollout) -> Rollout:
    """The rows that this process reads and learns from, by the lengths of prompt and answer."""
    if ranks.size == 1:
        return rollout
    answer_B = rollout.mask_BT.sum(-1).tolist()
    return rollout.some(ranks.mine([len(prompt) + answer for prompt, answer in zip(rollout.prompt_ids, answer_B, strict=True)]))


def response_mask(tokens_BT: Tensor, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(mask [B, T], ended [B]): true up to and including the first end-of-turn token, also where it doubles as padding."""
    stops_BT = torch.isin(tokens_BT, torch.tensor(list(stop_ids)))
    before_BT = stops_BT.long().cumsum(-1) - stops_BT.long()
    return before_BT == 0, stops_BT.any(-1)


def _gathered(drawn: Iterable[tuple[Tensor, Tensor]], count: int, new: int, fill: int) -> Tensor:
    """Ids [B, new] of `count` answers that are drawn position by position, filled behind their ends."""
    tokens_BT = torch.full((count, new), fill, dtype=torch.long)
    for position, (which_b, token_b) in enumerate(drawn):
        tokens_BT[which_b, position] = token_b
    return tokens_BT
