"""Decoding by steps that are all alike: the same operations on the same memory for every token, so that a card can replay one it has recorded.

Launching a token's operations takes the host longer than computing them takes a card. A CUDA graph launches all of them at once, if they never
change and never wait for the host. So everything lies in fixed memory here: keys and values, a mask over all places that may be read, the noise
of all positions, the ids as they are drawn. A counter on the device says where a token goes. The host looks at the ids now and then only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from iqlite.device import repeated
from iqlite.model.forward import Forward
from iqlite.model.keyvalues import Decoding
from iqlite.model.sampling import Sampler, choose, noise

CHECK_EVERY = 16  # tokens between two looks at what has ended; our choice
LEAVE_AT = 0.5  # rows that have ended leave when no more than this share of the batch is left: each time the step is recorded anew
RECORD_FROM = 4  # tokens that a recording must be good for: making it takes the host as long as two or three; our choice
SPAN = 128  # places read grow by so many at a time, and each time the step is recorded anew; our choice


class Steps:
    """B answers under each of several readings, rows of one batch; `step` draws one token more of each.

    `ids_R1` are the tokens drawn last, `position_R1` their positions, `real_RP` which of the `filled` places before them are real tokens;
    `ended_b` which answers have ended, `numbers` their requests'. Each has its first token, of `sampler.max_new_tokens`.
    """

    def __init__(
        self,
        forward: Forward,
        cache: Decoding,
        predict: Callable[[Mapping[str, Tensor]], Tensor],
        readings: Sequence[str],
        stop_ids: Sequence[int],
        sampler: Sampler,
        step: int,
        numbers: np.ndarray,
        ids_R1: Tensor,
        position_R1: Tensor,
        real_RP: Tensor,
        ended_b: Tensor,
    ):
        device, places = forward.device, real_RP.shape[1] + sampler.max_new_tokens - 1
        self.forward, self.cache, self.predict, self.readings, self.sampler = forward, cache, predict, readings, sampler
        self.ids_R1, self.position_R1, self.ended_b = ids_R1.clone(), position_R1.clone(), ended_b.to(device)
        uniform = [noise(sampler.seed, sampler.stream, step, numbers, position) for position in range(1, sampler.max_new_tokens)]
        self.uniform_Tb = torch.stack(uniform).to(device)
        self.token_Tb = torch.zeros(self.uniform_Tb.shape, dtype=torch.long, device=device)
        self.stop = torch.tensor(list(stop_ids), device=device)
        self.at_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.slot_1 = torch.full((1,), real_RP.shape[1], device=device)
        # Added to attention's scores, whichever implementation: 0 where a place may be read. A row's length divides by 8, as kernels like it.
        dtype = cache.dtype
        self.mask_R11P = torch.full((len(ids_R1), 1, 1, -(-places // 8) * 8), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.mask_R11P[:, 0, 0, : real_RP.shape[1]].masked_fill_(real_RP.bool(), 0)
        self.places, self.span = places, 0

    def reach(self, filled: int) -> bool:
        """Makes the place behind `filled` ones readable; true if the steps from now on differ from those before."""
        if filled < self.span:
            return False
        self.span = min(-(-(filled + 1) // SPAN) * SPAN, self.places)
        self.cache.hold(self.slot_1, self.span)
        return True

    def step(self) -> None:
        """One token of every row. Nothing here depends on the host, and what is kept is written last: a step that failed may be repeated."""
        self.mask_R11P.index_fill_(-1, self.slot_1, 0)
        state_RD = self.forward.decoder(
            input_ids=self.ids_R1,
            attention_mask=self.mask_R11P[..., : self.span],
            position_ids=self.position_R1,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits_bV = self.predict(dict(zip(self.readings, state_RD.split(len(self.ended_b)), strict=True)))
        uniform_b = self.uniform_Tb.index_select(0, self.at_1)[0]
        token_b = choose(logits_bV, uniform_b, self.sampler.temperature, self.sampler.top_p, waits=False)
        token_b = torch.where(self.ended_b, self.stop[0], token_b)
        ended_b = (token_b[:, None] == self.stop).any(-1)
        self.token_Tb.index_copy_(0, self.at_1, token_b[None])
        self.ended_b.copy_(ended_b)
        self.ids_R1.copy_(token_b.repeat(len(self.readings))[:, None])
        for counter in (self.position_R1, self.slot_1, self.at_1):
            counter.add_(1)

    def keep(self, stays_b: Tensor) -> None:
        """Drops all answers but these (indices, on the host)."""
        stays_b = stays_b.to(self.forward.device)
        stays_R = torch.cat([stays_b + reading * len(self.ended_b) for reading in range(len(self.readings))])
        self.cache.keep(stays_R)
        self.ids_R1, self.position_R1, self.mask_R11P = self.ids_R1[stays_R], self.position_R1[stays_R], self.mask_R11P[stays_R]
        self.uniform_Tb, self.token_Tb, self.ended_b = self.uniform_Tb[:, stays_b], self.token_Tb[:, stays_b], self.ended_b[stays_b]


def steadily(
    steps: Steps, which_b: Tensor, filled: int, count: int, every: int, *, record: bool = True
) -> Generator[tuple[Tensor, Tensor], Tensor | None, None]:
    """(Which answers go on [b], their next ids [b]) for at most `count` tokens, on the host, until all have ended, as `draw` does.

    The host waits for the device once in `every` tokens; what an answer drew in these after its end is a stop id here. `record`
    False runs the step itself each time and never a recording of it.
    """
    again, done, stop = None, 0, steps.stop.cpu()
    ended_b = steps.ended_b.cpu().clone()  # the steps write on theirs
    while done < count:
        some = min(every, count - done)
        for at in range(done, done + some):
            if steps.reach(filled + at):
                again = None
            if again is not None:
                again()
            elif record and min(count - at, steps.span - filled - at) > RECORD_FROM:
                again = repeated(steps.step, steps.forward.device)
            else:
                steps.step()
        told = False
        drawn_kb = steps.token_Tb[done : done + some].cpu()  # the one wait
        done += some
        for token_b in drawn_kb:
            token_b = torch.where(ended_b, stop[0], token_b)
            enough_b = yield which_b, token_b
            ended_b = torch.isin(token_b, stop) | ended_b
            if enough_b is not None:
                ended_b, told = ended_b | enough_b, True
            if bool(ended_b.all()):
                return
        if told:
            steps.ended_b.copy_(ended_b)
        if int((~ended_b).sum()) <= LEAVE_AT * len(which_b):
            again, stays_b = None, (~ended_b).nonzero().squeeze(1)
            steps.keep(stays_b)
            which_b, ended_b = which_b[stays_b], ended_b[stays_b]
