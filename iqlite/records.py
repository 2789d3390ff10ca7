"""The frozen records that flow from prompts to the update, and the legend of dimensions. Data only.

Legend, used as suffixes of tensor names: B sequences, T response tokens, L tokens of a whole sequence, n response tokens of a
chunk, V vocabulary, D hidden size. A `mask_BT` is bool and true on sampled tokens up to and including the first end of turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

Messages = tuple[dict[str, str], ...]
"""One request as chat turns, each `{"role": "system" | "user" | "assistant", "content": text}`; the last one is the user's."""


@dataclass(frozen=True)
class Prompts:
    """The requests of one prompt set, cleaned, in file order.

    `notes` are sentences for the user about rows that were skipped or shortened, with line numbers. `labels` are the requests'
    categories, "" for one without; empty if no row has any. `expected` is what is right for each, "refuse" or "answer" ("" where
    nobody says); empty if no row has any.
    """

    requests: tuple[Messages, ...]
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.requests)

    def some(self, numbers: Sequence[int], notes: tuple[str, ...] = ()) -> Prompts:
        """Those of these numbers, in that order."""
        labels, expected = (tuple(column[n] for n in numbers) if column else () for column in (self.labels, self.expected))
        return Prompts(tuple(self.requests[n] for n in numbers), notes, labels, expected)

    def expecting(self, otherwise: str) -> Prompts:
        """The same, where rows that don't say what is right say `otherwise`."""
        return replace(self, expected=tuple(one or otherwise for one in self.expected or ("",) * len(self)))

    def __add__(self, other: Prompts) -> Prompts:
        """These and then the others; without the others' notes."""

        def both(name: str) -> tuple[str, ...]:
            columns = [getattr(one, name) for one in (self, other)]
            return sum((c or ("",) * len(p) for c, p in zip(columns, (self, other), strict=True)), ()) if any(columns) else ()

        return Prompts(self.requests + other.requests, self.notes, both("labels"), both("expected"))


@dataclass(frozen=True)
class Rollout:
    """Responses sampled from one role for B requests.

    `index` are the requests' numbers in their prompt set (they key the sampling noise), `prompt_ids` the plain prompts as they
    were read, `tokens_BT` int64 response ids padded on the right, `mask_BT` the response mask, `ended_B` whether an end-of-turn
    token was sampled. The last `contrary` rows answer contrary prompts, for which the target is the reference itself. `part_BT` is the
    part of the response that is trained and scored, where that isn't all of it: the answer or the thinking before it. `rows` says which of
    the step's rows these are, where other processes have the others. Host memory.
    """

    index: tuple[int, ...]
    requests: tuple[Messages, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    tokens_BT: Tensor
    mask_BT: Tensor
    ended_B: Tensor
    contrary: int = 0
    part_BT: Tensor | None = None
    rows: tuple[int, ...] | None = None

    @property
    def learned_BT(self) -> Tensor:
        """The tokens that are trained and scored."""
        return self.mask_BT if self.part_BT is None else self.part_BT

    def response_ids(self, row: int) -> list[int]:
        """The sampled ids of one row, its end-of-turn token included."""
        return self.tokens_BT[row][self.mask_BT[row]].tolist()

    def is_contrary(self, row: int) -> bool:
        """True if row's prompt is one on which the behaviour isn't wanted."""
        return row >= len(self.index) - self.contrary

    def some(self, rows: Sequence[int]) -> Rollout:
        """Those of these rows, which ascend, so that the contrary ones stay the last."""
        return Rollout(
            index=tuple(self.index[row] for row in rows),
            requests=tuple(self.requests[row] for row in rows),
            prompt_ids=tuple(self.prompt_ids[row] for row in rows),
            tokens_BT=self.tokens_BT[rows],
            mask_BT=self.mask_BT[rows],
            ended_B=self.ended_B[rows],
            contrary=sum(map(self.is_contrary, rows)),
            part_BT=None if self.part_BT is None else self.part_BT[rows],
            rows=tuple(rows),
        )


@dataclass(frozen=True)
class SuperiorScores:
    """What the frozen base (or `policy`/`ema` weights) makes of the responses under each description.

    `hidden` maps a reading to its last hidden states [B, T, D] at the positions that predict the response's tokens: `reference`
    always, and `wanted`, `unwanted`, `adapter`, `unwanted_adapter`, or `wanted:NAME`/`unwanted:NAME` of a mixture. Host memory,
    compute dtype, no gradient. Logits are never stored.
    """

    hidden: Mapping[str, Tensor]


@dataclass(frozen=True)
class Chunk:
    """n response tokens as an objective sees them; float32. Only `logp_policy_nV` carries a gradient.

    `old_logp_n` and `advantage_n` are there for objectives that take their advantages from the rollout (those with a `gamma`). `contrary_n`
    is true on tokens of answers to contrary prompts, None where there are none.
    """

    tokens_n: Tensor
    logp_policy_nV: Tensor
    logp_superior_nV: Tensor
    old_logp_n: Tensor | None = None
    advantage_n: Tensor | None = None
    contrary_n: Tensor | None = None


@dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.jsonl`: the step (1-based) and its values, `namespace/name` → number, each in the unit its name says."""

    step: int
    values: Mapping[str, float]


HELD_OUT_KL = "eval/kl_policy_superior"
"""The metric that says how far the policy is from its target on prompts that it wasn't trained on, nats a token."""

HELD_OUT_FORWARD_KL = "eval/kl_superior_policy"
"""The other way round, where the objective is; what a run is judged by then."""

ERROR = "_se"
"""Ends the name of their standard errors, by answers."""


def judged_by(values: Mapping[str, float]) -> str:
    """The KL that a run is judged by: forward, where that is its objective, which makes the reverse one rise before it falls."""
    return HELD_OUT_FORWARD_KL if HELD_OUT_FORWARD_KL in values else HELD_OUT_KL
