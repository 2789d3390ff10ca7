"""The LM head, an estimator and an objective, chunk by chunk of response tokens: no [B, T, V] tensor ever exists.

A head maps hidden states to logits as the architecture does (`model.head`). `chunked_loss` runs the objective on `chunk_tokens` tokens at a time
and computes its gradient in the hidden states within the forward pass (autograd inside the chunk; equation 6 is its closed form
for `full-kl`), so that the largest tensors are a handful of [chunk_tokens, V] in float32, whatever B and T are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from iqlite.method.objectives import kl, of_tokens, token_reward
from iqlite.records import Chunk

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, D] → float32 logits [n, V]."""


@dataclass(frozen=True)
class Scoring:
    """How π̃ is made from the readings: the estimator with its settings bound, and the mixture's (name, weight) pairs."""

    estimator: Callable[..., Any]
    asks_for: tuple[str, ...]
    mixture: tuple[tuple[str, float], ...] = ()

    def __call__(self, head: Head, hidden: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Hidden states [n, D] of each reading → (log π̃, log π_ref), both [n, V], and per-token metrics."""
        reference_nV = head(hidden["reference"])
        readings: list[Any] = []
        for name in self.asks_for:
            if name == "behaviors":
                pairs = [(w, head(hidden[f"wanted:{key}"]), head(hidden[f"unwanted:{key}"])) for key, w in self.mixture]
                readings.append(pairs)
            else:
                readings.append(head(hidden[name]) if name in hidden else reference_nV)
        logp_superior_nV, metrics = self.estimator(reference_nV, *readings)
        return logp_superior_nV, reference_nV.log_softmax(-1), metrics


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token float32 values over the n response tokens of a batch, on the host: the one place where means are taken."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Masked means: the tokens here are exactly those inside the response mask."""
        return {name: float(value_n.double().mean()) for name, value_n in self.values.items()}

    @staticmethod
    def join(parts: list[TokenStatistics]) -> TokenStatistics:
        """The statistics of several micro-batches as one."""
        return TokenStatistics({name: torch.cat([part.values[name] for part in parts]) for name in (parts[0].values if parts else ())})


def chunked_statistics(
    head: Head,
    hidden_nD: Tensor,
    tokens_n: Tensor,
    hidden: Mapping[str, Tensor],
    scoring: Scoring,
    *,
    chunk_tokens: int,
    objective: Callable[[Chunk], Any] | None = None,
) -> TokenStatistics:
    """Rewards, KLs and entropy of the policy's hidden states [n, D] without a gradient, and an objective's own metrics; see `chunked_loss`."""
    values: dict[str, Tensor] = {}

    def add(at: slice) -> None:  # a function of its own, as in `chunked_loss`
        logp_nV = head(hidden_nD[at]).log_softmax(-1)
        logp_superior_nV, found = _statistics(head, logp_nV, tokens_n[at], {k: v[at] for k, v in hidden.items()}, scoring)
        if objective is not None:
            found |= objective(Chunk(tokens_n[at].to(logp_nV.device), logp_nV, logp_superior_nV))[1]
        _keep(values, at, len(tokens_n), found)

    with torch.no_grad():
        for at in spans(len(tokens_n), chunk_tokens):
            add(at)
    return _on_the_host(values)


def chunked_loss(
    head: Head,
    hidden_nD: Tensor,
    tokens_n: Tensor,
    hidden: Mapping[str, Tensor],
    scoring: Scoring,
    objective: Callable[[Chunk], Any],
    *,
    total_tokens: int,
    chunk_tokens: int,
    loss_scale: float = 1.0,
    old_logp_n: Tensor | None = None,
    advantage_n: Tensor | None = None,
    contrary_n: Tensor | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """Σ_t loss_t / total_tokens over n response tokens, differentiable in `hidden_nD`, and the tokens' statistics.

    `hidden_nD` are the policy's hidden states (compute dtype) at the positions that predict `tokens_n` (int64); `hidden` the
    readings' [n, D], no gradient. `total_tokens` counts the response tokens of the whole step, so that micro-batches add up to one
    masked mean. The gradient, not the returned loss, is multiplied by `loss_scale` (float16 compute needs it). Memory beyond the inputs: one [n, D] gradient, and about fourteen [chunk_tokens, V] float32.
    """
    gradient_nD = torch.zeros_like(hidden_nD)
    tokens_n = tokens_n.to(hidden_nD.device)  # what a chunk needs is there before the first: each upload of its own makes the host wait
    old_logp_n, advantage_n, contrary_n = (None if x is None else x.to(hidden_nD.device) for x in (old_logp_n, advantage_n, contrary_n))
    values: dict[str, Tensor] = {}

    def add(at: slice) -> None:  # a function of its own, so that nothing of a chunk is left when the next one begins
        leaf_nD = hidden_nD[at].detach().requires_grad_()
        with torch.enable_grad():
            logp_nV = head(leaf_nD).log_softmax(-1)
            logp_superior_nV, statistics = _statistics(head, logp_nV.detach(), tokens_n[at], {k: v[at] for k, v in hidden.items()}, scoring)
            chunk = Chunk(
                tokens_n=tokens_n[at],
                logp_policy_nV=logp_nV,
                logp_superior_nV=logp_superior_nV,
                old_logp_n=None if old_logp_n is None else old_logp_n[at],
                advantage_n=None if advantage_n is None else advantage_n[at],
                contrary_n=None if contrary_n is None else contrary_n[at],
            )
            loss_n, metrics = objective(chunk)
            (gradient_nD[at],) = torch.autograd.grad(loss_n.sum() * (loss_scale / total_tokens), leaf_nD)
        _keep(values, at, len(tokens_n), {**statistics, "loss": loss_n, **metrics})

    for at in spans(len(tokens_n), chunk_tokens):
        add(at)
    statistics = _on_the_host(values)
    loss = torch.zeros((), dtype=torch.float64)
    for at in spans(len(tokens_n), chunk_tokens):
        loss += statistics.values["loss"][at].double().sum() / total_tokens
    total: Tensor = _GradientInForward.apply(hidden_nD, loss.float().to(hidden_nD.device), gradient_nD)  # type: ignore[no-untyped-call]
    return total, statistics


def logps_of_tokens(
    head: Head, hidden_nD: Tensor, tokens_n: Tensor, hidden: Mapping[str, Tensor], scoring: Scoring, *, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(log π_θ, log π_ref, log π̃) [n] of tokens, nats, float32 on the host, without a gradient; arguments as for `chunked_loss`."""
    found = torch.zeros(3, len(tokens_n))
    with torch.no_grad():
        for at, logp_nV in logps_by_chunks(head, hidden_nD, chunk_tokens):
            superior_nV, reference_nV, _ = scoring(head, {name: states_nD[at] for name, states_nD in hidden.items()})
            for row, one_nV in enumerate((logp_nV, reference_nV, superior_nV)):
                found[row, at] = of_tokens(one_nV, tokens_n[at].to(one_nV.device)).cpu()
    return found[0], found[1], found[2]


def logps_by_chunks(head: Head, hidden_ND: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """(span, log-probabilities [n, V] float32) of hidden states, so many tokens at a time; with a gradient where they have one."""
    for at in spans(len(hidden_ND), chunk_tokens):
        yield at, head(hidden_ND[at]).log_softmax(-1)


def spans(length: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `length`, in order."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _statistics(
    head: Head, logp_nV: Tensor, tokens_n: Tensor, hidden: Mapping[str, Tensor], scoring: Scoring
) -> tuple[Tensor, dict[str, Tensor]]:
    """log π̃ [n, V] of a chunk, and docs/method.md's watch list for its tokens."""
    with torch.no_grad():
        logp_superior_nV, logp_reference_nV, metrics = scoring(head, hidden)
        chunk = Chunk(tokens_n.to(logp_nV.device), logp_nV, logp_superior_nV)
        values = {
            "reward": token_reward(chunk),
            "logp": of_tokens(logp_nV, chunk.tokens_n),
            "kl/policy_superior": kl(logp_nV, logp_superior_nV),
            "kl/policy_reference": kl(logp_nV, logp_reference_nV),
            "policy/entropy": -(logp_nV.exp() * logp_nV).sum(-1),
            **metrics,
        }
    return logp_superior_nV, values


def _keep(values: dict[str, Tensor], at: slice, total: int, found: Mapping[str, Tensor]) -> None:
    """Copies a chunk's per-token values into their places among all tokens', where they were computed: a copy to the host is a wait.

    Nothing small that a chunk allocates may outlive it: glibc puts it into the freed [n, V] blocks, and the next chunk's no longer fit
    there (6.9 GiB instead of 0.8 for 2,048 tokens at V = 152,064).
    """
    for name, value_n in found.items():
        if name not in values:
            values[name] = torch.zeros(total, device=value_n.device)
        values[name][at] = value_n.detach().float()


def _on_the_host(values: Mapping[str, Tensor]) -> TokenStatistics:
    """All values at once: one wait for all chunks."""
    if not values:
        return TokenStatistics()
    return TokenStatistics(dict(zip(values, torch.stack(list(values.values())).cpu(), strict=True)))


class _GradientInForward(torch.autograd.Function):
    """Hands a loss on whose gradient in the hidden states is known already."""

    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, loss: Tensor, gradient_nD: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_nD)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient_nD,) = ctx.saved_tensors
        return gradient_nD * grad_loss.to(gradient_nD.dtype), None, None
