"""Answers drawn from the superior policy itself, without training: contrastive decoding (METHOD, equation 3, at every position).

The base reads what was said so far plain, under the wanted and under the unwanted description, as rows of one batch; the recipe's own
estimator combines what they predict, and the token that is drawn is said to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from iqlite.errors import RecipeError
from iqlite.keyvalues import Decoding
from iqlite.policy import Policy
from iqlite.recipe import Recipe
from iqlite.records import Messages, Rollout
from iqlite.rollout import Sampler, choose, noise, padded, response_mask
from iqlite.session import Session, readings


def check_heard(recipe: Recipe) -> None:
    """RecipeError where π̃ isn't made of readings of the base."""
    if recipe.superior.estimator == "adapter":
        raise RecipeError(
            f"{recipe.path}: superior.estimator = 'adapter' can't be spoken with: it can for contrastive, prompted and mixture."
        )


def superior_answers(
    session: Session,
    requests: Sequence[Messages],
    sampler: Sampler,
    *,
    index: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Rollout:
    """Answers to requests drawn from π̃, the base's weights reading; noise as in a rollout, by the requests' numbers `index`."""
    check_heard(session.recipe)
    policy, stop_ids, new = session.policy, session.chat.stop_ids, sampler.max_new_tokens
    which = readings(session.recipe, session.placement, "base")
    prompts = {reading.name: [session.chat.ids(request, reading.description) for request in requests] for reading in which}
    numbers = list(range(len(requests)) if index is None else index)
    lengths = [max(len(ids[row]) for ids in prompts.values()) for row in range(len(requests))]
    order = sorted(range(len(requests)), key=lambda row: -lengths[row])
    tokens_BT = torch.full((len(requests), new), stop_ids[0], dtype=torch.long)
    at = 0
    while at < len(order):
        longest = lengths[order[at]] + new
        part = order[at : at + max(1, session.sizes.together(longest) // len(which))]
        with session.sizes.fitting("rollout_tokens", len(part) * len(which), longest) as again:
            some = {name: [ids[row] for row in part] for name, ids in prompts.items()}
            drawn = draw(policy, "reference", some, lambda states: session.scoring(policy.head, states)[0], stop_ids, sampler, 0, [numbers[row] for row in part], session.sizes.fold)  # fmt: skip
            for position, token_B in enumerate(drawn):
                tokens_BT[part, position] = token_B.cpu()
        if again:
            continue
        at += len(part)
        progress(len(part))
    mask_BT, ended_B = response_mask(tokens_BT, stop_ids)
    width = int(mask_BT.sum(-1).max())
    plain = tuple(tuple(session.chat.ids(request)) for request in requests)
    return Rollout(tuple(numbers), tuple(requests), plain, tokens_BT[:, :width], mask_BT[:, :width], ended_B)


def draw(
    policy: Policy, role: str, prompts: Mapping[str, Sequence[Sequence[int]]], predict: Callable[[Mapping[str, Tensor]], Tensor],
    stop_ids: Sequence[int], sampler: Sampler, step: int, index: Sequence[int], fold: bool,
) -> Iterator[Tensor]:  # fmt: skip
    """The next ids [B] of B answers, position by position until all have ended; behind its end an answer repeats a stop id.

    `prompts` are the ids of B requests under each reading; `predict` makes logits [B, V] of the readings' hidden states [B, D].
    """
    count, new, device = len(index), sampler.max_new_tokens, policy.device
    rows = [ids for reading in prompts.values() for ids in reading]
    longest = max(map(len, rows))
    ids_BL, real_BL, position_BL = padded(rows, new, stop_ids[0], device)
    stop = torch.tensor(list(stop_ids), device=device)
    ended_B = torch.zeros(count, dtype=torch.bool, device=device)
    with policy.acting_as(role, folded=fold):
        cache = Decoding(len(policy.decoder.layers), len(rows), longest + new, None)
        for position in range(new):
            states_BD = policy.decoder(
                input_ids=ids_BL,
                attention_mask=real_BL[:, : longest + position],
                position_ids=position_BL,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            logits_BV = predict({name: states_BD[i * count : (i + 1) * count] for i, name in enumerate(prompts)})
            uniform_B = noise(sampler.seed, sampler.stream, step, index, position)
            token_B = torch.where(ended_B, stop[0], choose(logits_BV, uniform_B, sampler.temperature, sampler.top_p))
            ended_B = ended_B | torch.isin(token_B, stop)
            yield token_B
            if bool(ended_B.all()):
                return
            ids_BL = token_B.repeat(len(prompts))[:, None]
            position_BL = position_BL[:, -1:] + 1
