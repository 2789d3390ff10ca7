"""Forward passes: hidden states at the positions that predict a response, and prefixes that many rows share.

It knows the decoder and nothing of roles: whose weights read now, and whether they move, a policy tells it. Another backend takes this class's
place; where layers are streamed, `model.layerwise` sends many batches through them in one pass.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from iqlite.base.anatomy import Anatomy, numbers
from iqlite.model.keyvalues import Decoding, OwnCache, Prefix, Seen, before_rows, keeps_keys_only

WINDOWS = ("sliding_window", "attention_chunk_size")  # transformers' names of how far back some layers look


@dataclass(frozen=True)
class Batch:
    """Rows that are read at once by `role`, "" for the policy in training, with a gradient; the rest is as `Forward.hidden_states` takes it."""

    role: str
    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    width: int
    shared: Sequence[Sequence[int]] = ()


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
        self.recomputes = False  # layers keep their inputs only, and are computed again in the backward pass
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
        begun = self.begun(prompts, shared, longest=max(map(len, prompts)) + max(map(len, responses)))
        elsewhere = self.offload and torch.is_grad_enabled()
        with save_on_cpu(pin_memory=self.device.type == "cuda") if elsewhere else nullcontext():
            hidden_BLD = self.decoder(**self.inputs(prompts, responses, begun)).last_hidden_state
        return self.predicting(hidden_BLD, prompts, responses, begun, width)

    def inputs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], begun: Sequence[Prefix | None]
    ) -> dict[str, Any]:
        """What the decoder is called with for rows that start with `begun`."""
        # The last response token predicts nothing that is asked for.
        rows = [[*p, *r[:-1]][0 if start is None else len(start) :] for p, r, start in zip(prompts, responses, begun, strict=True)]
        longest = max(map(len, rows))
        ids_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        cache = before_rows(begun, len(self.layers))
        if cache is None:
            return {"input_ids": ids_BL, "use_cache": False}
        done_B = torch.tensor([0 if start is None else len(start) for start in begun], device=self.device)
        before = int(done_B.max())
        return {
            "input_ids": ids_BL,
            "attention_mask": torch.arange(before + longest, device=self.device) >= (before - done_B)[:, None],
            "position_ids": done_B[:, None] + torch.arange(longest, device=self.device),
            "past_key_values": cache,
            "use_cache": True,
        }

    def predicting(
        self,
        hidden_BLD: Tensor,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        begun: Sequence[Prefix | None],
        width: int,
    ) -> Tensor:
        """The states [B, width, D] that predict the responses, out of those of all positions."""
        batch = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start = begun[row]
            at = len(prompt) - (0 if start is None else len(start)) - 1  # the state before the first response token
            used = hidden_BLD[row, at : at + len(response)]
            batch.append(torch.nn.functional.pad(used, (0, 0, 0, width - len(response))))
        return torch.stack(batch)

    def prefix(self, ids: Sequence[int]) -> Prefix:
        """Keys and values of `ids` as the model reads them now; those of weights that don't move are kept for the whole run."""
        if (kept := self.kept(ids)) is not None:
            return kept
        seen = Seen(len(self.layers))
        self.decoder(input_ids=torch.tensor([list(ids)], device=self.device), past_key_values=seen, use_cache=True)
        made = Prefix.of(ids, seen)
        self.keep(made)
        return made

    def kept(self, ids: Sequence[int]) -> Prefix | None:
        """What the weights that read now made of `ids`, if it was kept."""
        return self._prefixes.get((self.reader(), tuple(ids)))

    def keep(self, made: Prefix) -> None:
        """Keeps a prefix for the whole run, if the weights that read it don't move."""
        if not self.moving():
            self._prefixes[(self.reader(), made.ids)] = made

    def forget_prefixes(self) -> None:
        """Frees the prefixes kept so far, for who tries many descriptions; those still needed are read again."""
        self._prefixes.clear()

    def begun(
        self,
        prompts: Sequence[Sequence[int]],
        shared: Sequence[Sequence[int]],
        *,
        longest: int,
        make: Callable[[tuple[int, ...]], Prefix] | None = None,
    ) -> list[Prefix | None]:
        """The prefix that each row starts with, where sharing one saves work and changes nothing; `make` reads it instead of `prefix`."""
        uses = Counter(tuple(start) for start in shared)
        moving = self.moving()
        made: dict[tuple[int, ...], Prefix] = {}
        begun: list[Prefix | None] = []
        for prompt, start in zip(prompts, shared or [()] * len(prompts), strict=True):
            ids = tuple(start)
            starts = 0 < len(ids) < len(prompt) and tuple(prompt[: len(ids)]) == ids
            shares = self.plain and starts and longest <= self._window and (uses[ids] > 1 or not moving)
            if shares and ids not in made:
                made[ids] = (make or self.prefix)(ids)
            begun.append(made[ids] if shares else None)
        return begun

    def recompute_layers(self) -> None:
        """Activation checkpointing: a layer's backward pass computes its activations again instead of keeping them.

        transformers' own drops the cache that shared prefixes need.
        """
        self.recomputes = True
        for layer in self.layers:
            layer.forward = functools.partial(self._recomputed, layer.forward)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block layers keep their activations: it is a backward pass of its own."""
        was, self.recomputes = self.recomputes, False
        try:
            yield
        finally:
            self.recomputes = was

    def _recomputed(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.recomputes and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
