"""How much is computed at once in each phase, and what happens when it was too much: halve, say so once, go on with the same result but for rounding."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch

from iqlite.device import is_out_of_memory, let_go
from iqlite.errors import BaseError
from iqlite.machine.ranks import Ranks
from iqlite.machine.timing import Fused
from iqlite.recipe.schema import Recipe

WORDS = {
    "rollout_tokens": "tokens of answers decoded at once",
    "read_tokens": "tokens in one reading",
    "update_tokens": "tokens in one backward pass",
}


@dataclass
class Sizes:
    """How much work each phase does at once.

    `rows`, `rollout_tokens`: answers decoded together, capped by their count and by their tokens in all. `read_tokens`: tokens in a forward pass
    without a gradient. `update_tokens`: with one. `chunk_tokens`: tokens through the LM head. `fold`: on a CPU, decode with base and adapter added
    into one float32 matrix a layer. `fused`: how many rows a card decodes with 4-bit weights as they are; None where that doesn't matter.

    They change memory and time, not the result but for rounding, so that they may shrink within a run. In 16 bits, rounding adds up: two runs of
    other widths go their own ways after some steps, as two of other seeds do.
    """

    rows: int
    rollout_tokens: int
    read_tokens: int
    update_tokens: int
    chunk_tokens: int
    fold: bool = False
    fused: Fused | None = field(default=None, compare=False)
    say: Callable[[str], None] = field(default=lambda _: None, compare=False, repr=False)

    def record(self) -> dict[str, int]:
        """The numbers, for the run directory: a resumed run goes on with them."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("say", "fused")}

    def restore(self, record: dict[str, int]) -> None:
        """Puts recorded numbers back; whether to fold is this machine's."""
        for name, value in record.items():
            if name != "fold":
                setattr(self, name, value)

    def agree(self, ranks: Ranks) -> None:
        """As little as any of several processes has room for: from here on all are as wide, and a checkpoint's widths are everyone's."""
        before, least = self.record(), ranks.least(self.record())
        self.restore(least)
        for which, words in WORDS.items():
            if least[which] < before[which]:
                self.say(f"another process has less memory: {least[which]} instead of {before[which]} {words} from now on.")

    def together(self, tokens: int, rows: int | None = None) -> int:
        """How many answers are decoded at once, if the longest may come to that many tokens with its prompt; `rows`: how many there are."""
        fit = max(1, min(self.rows, self.rollout_tokens // tokens))
        return fit if self.fused is None or rows is None else self.fused.together(rows, fit)

    def attempts(self, which: str) -> Iterator[Attempt]:
        """Attempts at the same work, until one has memory enough; after each that hadn't, the width called `which` is halved.

        for attempt in sizes.attempts("read_tokens"):
            ...  # how many rows fit now
            with attempt.of(rows, tokens):
                ...  # the work
        """
        while True:
            attempt = Attempt(self, which)
            yield attempt
            if attempt.done:
                return


class Attempt:
    """One attempt; `done` once its work had memory enough."""

    def __init__(self, sizes: Sizes, which: str):
        self.sizes, self.which, self.done = sizes, which, False

    @contextmanager
    def of(self, rows: int, tokens: int) -> Iterator[None]:
        """The work: `rows` rows of `tokens` tokens each at once. At one row there is nothing left to halve: BaseError names the keys."""
        try:
            yield
            self.done = True
            return
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # the failed forward's tensors hang in its frames
            if rows <= 1:
                raise BaseError(
                    "memory is full even with one row at a time; lower rollout.max_new_tokens, prompts.max_tokens or train.chunk_tokens with --set, or choose a smaller base (see iqlite plan)."
                ) from None
        fewer = rows // 2 * tokens
        setattr(self.sizes, self.which, fewer)
        let_go()
        self.sizes.say(
            f"memory was full: {fewer} instead of {rows * tokens} {WORDS[self.which]} from now on; the result is the same but for rounding, which may draw another token now and then."
        )


@contextmanager
def within_memory(recipe: Recipe, how: str) -> Iterator[None]:
    """A card that is too small, as one sentence with the keys that help and `how` to change them."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise BaseError(
            f"{recipe.path}: memory is full; lower rollout.max_new_tokens ({recipe.rollout.max_new_tokens}), prompts.max_tokens ({recipe.prompts.max_tokens}) or train.chunk_tokens {how}."
        ) from None
