"""docs/method.md's equations in float64, as loops over tokens and the vocabulary: nothing here shares code with the product."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def log_softmax(logits: Row) -> list[float]:
    largest = max(logits)
    total = math.log(sum(math.exp(z - largest) for z in logits)) + largest
    return [z - total for z in logits]


def superior(
    reference: Row, pairs: Sequence[tuple[float, Row, Row]], strength: float, clip: float = math.inf, plausibility: float = 0.0
) -> list[float]:
    """Equation (3) for one state: weighted, clipped contrasts on the plausible set, added to the reference's logits."""
    pi_ref = [math.exp(x) for x in log_softmax(reference)]
    logs = [(weight, log_softmax(wanted), log_softmax(unwanted)) for weight, wanted, unwanted in pairs]
    logits = []
    for a in range(len(reference)):
        delta = 0.0
        if pi_ref[a] >= plausibility * max(pi_ref):
            for weight, wanted, unwanted in logs:
                delta += weight * min(max(wanted[a] - unwanted[a], -clip), clip)
        logits.append(reference[a] + strength * delta)
    return log_softmax(logits)


def loss(name: str, logp: Row, logq: Row, token: int, old_logp: float = 0.0, advantage: float = 0.0, clip: float = 0.2) -> float:
    """Equation (5) for one token: `logp` the policy, `logq` the superior policy."""
    if name == "squared":
        return 0.5 * (logq[token] - logp[token]) ** 2
    if name == "policy-gradient":
        ratio = math.exp(logp[token] - old_logp)
        return -min(advantage * ratio, advantage * min(max(ratio, 1 - clip), 1 + clip))
    total = 0.0
    for p, q in zip(logp, logq, strict=True):
        if name == "full-kl":
            total += math.exp(p) * (p - q)
        elif name == "forward-kl":
            total += math.exp(q) * (q - p)
        elif name == "prob-squared":
            total += (math.exp(p) - math.exp(q)) ** 2
        else:
            raise AssertionError(name)
    return total


def full_kl_gradient(logp: Row, logq: Row) -> list[float]:
    """Equation (6): the gradient of KL(π‖π̃) in the policy's logits."""
    kl = loss("full-kl", logp, logq, 0)
    return [math.exp(p) * (p - q - kl) for p, q in zip(logp, logq, strict=True)]


def advantages(rewards: Sequence[Sequence[float]], gamma: float, centre: bool) -> list[list[float]]:
    """Discounted rewards-to-go of each response, less their mean over all tokens if asked."""
    found = [[sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))] for row in rewards]
    tokens = [a for row in found for a in row]
    mean = sum(tokens) / len(tokens) if centre else 0.0
    return [[a - mean for a in row] for row in found]
