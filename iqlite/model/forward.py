"""Forward passes: hidden states at the positions that predict a response, and prefixes that many rows share.

It knows the decoder and nothing of roles: whose weights read now, and whether they move, a policy tells it. What loads layers one by one, or
another backend, takes this class's place.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from iqlite.base.anatomy import Anatomy, numbers
from iqlite.model.keyvalues import Decoding, OwnCache, Prefix, Seen, before_rows, keeps_keys_only

WINDOWS = ("sliding_window", "attention_chunk_size")  # transformers' names of how far back some layers look


class Forward:
    """The decoder of one model. `reader` names the weights that read now, "" for the policy in training; `moving` says whether they learn.

    `plain`: every layer keeps keys and values of each token and nothing else, so that rows can share a prefix. Other layers (linear
    attention, convolutions, state spaces) decode with transformers' own cache and read each row whole. `steady`: tokens may be decoded by steps
    that are all alike (`model.steady`), which a card is quick at and a CPU isn't.
    """

    def __init__(self, anatomy: Anatomy, device: torch.device, reader: Callable[[], str], moving: Callable[[], bool]):
        self.decoder, self.config, self.layers = anatomy.decoder, anatomy.config, anatomy.layers
        self.device, self.reader, self.moving = device, reader, moving
        self.offload = False  # what autograd keeps of a read, the layers' inputs under checkpointing, waits in the computer's memory
        self.plain, self.steady = keeps_keys_only(anatomy.config), device.type == "cuda"
        self._prefixes: dict[tuple[str, tuple[int, ...]], Prefix] = {}
        # Left padding between a shared prefix and a shorter row's tokens adds to the distance that a window of attention counts.
        self._window: float = min((size for key in WINDOWS for size in numbers(anatomy.config, key)), default=math.inf)

    def room(self, tokens: int, begun: Sequence[Prefix | None]) -> Decoding | OwnCache:
        """What keeps the rows being decoded, each of `tokens` at most with all padding."""
        return Decoding(len(self.layers), tokens, begun, blank=self.steadies(tokens)) if self.plain else OwnCache(config=self.config)

    def steadies(self, tokens: int) -> bool:
        """True where rows of so many tokens at most, with all padding, are decoded by steps that are all alike: no window hides any of them."""
        return self.steady and self.plain and tokens <= self._window

    def hidden_states(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], width: int, shared: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """Last hidden states [B, width, D] (compute dtype, after the final norm) at the positions that predict the responses.

        `shared` are the ids that each row's prompt begins with, as many other rows' do (empty for none): what they come to is computed
        once and not for every row. Sequences are padded on the right, where a causal model's real tokens can't see the padding.
        Rows shorter than `width` end in zeros.
        """
        window = max(map(len, prompts)) + max(map(len, responses))
        begun = self.begun(prompts, shared, longest=window)
        # The last response token predicts nothing that is asked for.
        rows = [[*p, *r[:-1]][0 if start is None else len(start) :] for p, r, start in zip(prompts, responses, begun, strict=True)]
        longest = max(map(len, rows))
        ids_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        cache = before_rows(begun)
        elsewhere = self.offload and torch.is_grad_enabled()
        with save_on_cpu(pin_memory=self.device.type == "cuda") if elsewhere else nullcontext():
            if cache is None:
                hidden_BLD = self.decoder(input_ids=ids_BL, use_cache=False).last_hidden_state
            else:
                done_B = torch.tensor([0 if start is None else len(start) for start in begun], device=self.device)
                before = int(done_B.max())
                real_BL = torch.arange(before + longest, device=self.device) >= (before - done_B)[:, None]
                hidden_BLD = self.decoder(
                    input_ids=ids_BL,
                    attention_mask=real_BL,
                    position_ids=done_B[:, None] + torch.arange(longest, device=self.device),
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
        batch = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start = begun[row]
            at = len(prompt) - (0 if start is None else len(start)) - 1  # the state before the first response token
            used = hidden_BLD[row, at : at + len(response)]
            batch.append(torch.nn.functional.pad(used, (0, 0, 0, width - len(response))))
        return torch.stack(batch)

    def prefix(self, ids: Sequence[int]) -> Prefix:
        """Keys and values of `ids` as the model reads them now; those of weights that don't move are kept for the whole run."""
        key = (self.reader(), tuple(ids))
        if key in self._prefixes:
            return self._prefixes[key]
        seen = Seen(len(self.layers))
        self.decoder(input_ids=torch.tensor([list(ids)], device=self.device), past_key_values=seen, use_cache=True)
        made = Prefix.of(ids, seen)
        if not self.moving():
            self._prefixes[key] = made
        return made

    def forget_prefixes(self) -> None:
        """Frees the prefixes kept so far, for who tries many descriptions; those still needed are read again."""
        self._prefixes.clear()

    def begun(self, prompts: Sequence[Sequence[int]], shared: Sequence[Sequence[int]], *, longest: int) -> list[Prefix | None]:
        """The prefix that each row starts with, where sharing one saves work and changes nothing."""
        uses = Counter(tuple(start) for start in shared)
        moving = self.moving()
        made: dict[tuple[int, ...], Prefix] = {}
        begun: list[Prefix | None] = []
        for prompt, start in zip(prompts, shared or [()] * len(prompts), strict=True):
            ids = tuple(start)
            starts = 0 < len(ids) < len(prompt) and tuple(prompt[: len(ids)]) == ids
            shares = self.plain and starts and longest <= self._window and (uses[ids] > 1 or not moving)
            if shares and ids not in made:
                made[ids] = self.prefix(ids)
            begun.append(made[ids] if shares else None)
        return begun


def recompute_layers(layers: Iterable[Any]) -> None:
    """Activation checkpointing: a layer's backward pass computes its activations again instead of keeping them.

    transformers' own drops the cache that shared prefixes need.
    """
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
