"""Whether a description is worth training, before any training: what the readings differ by and where, what prompted base and superior say,
which strength, and whether human preferences agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iqlite.evaluation.answers import Answerer, collect, prompted_answerers
from iqlite.evaluation.beginning import unsaid
from iqlite.model.sampling import Sampler
from iqlite.recipe.pairs import Pair, answer_ids
from iqlite.records import Messages, Prompts, Rollout
from iqlite.scoring.intervals import FEWEST, Array, Estimate, paired, wilson
from iqlite.training.measuring import measured
from iqlite.training.placement import moved
from iqlite.training.session import Session

PARTS = 4  # quarters of an answer
STRENGTHS = (1.0, 2.0, 3.0, 5.0)
WEAK_KL = 0.02  # nats a token between π̃ and π_ref under which there is nothing to learn; our choice
STRANGE = 1.0  # nats a token that a suggested strength's answers may be stranger to the base than the prompted ones; our choice


@dataclass(frozen=True)
class Contrast:
    """What the readings differ by on the base's own answers, nats a token, and where in the answer.

    `kl_wanted` is KL(π⁺‖π_ref), `kl_opposed` KL(π⁺‖π⁻), `kl_superior` KL(π_ref‖π̃) at the recipe's strength; None without such readings.
    """

    kl_wanted: float | None
    kl_opposed: float | None
    kl_superior: float
    kl_by_part: tuple[float | None, ...]  # None where no answer is long enough to have that quarter
    clipped_share: float
    implausible_mass: float
    tokens: int
    unsaid: float | None = None  # see beginning.unsaid


def contrast(session: Session, rollout: Rollout) -> Contrast:
    """KLs between the readings, KL(π_ref‖π̃) by quarters of the answers, clipped share and implausible mass. The rollout is the base's."""
    values = session.score(rollout, weights="base").values
    length_B = rollout.mask_BT.sum(-1)
    part_BT = torch.arange(rollout.mask_BT.shape[1])[None] * PARTS // length_B[:, None].clamp(min=1)
    part_N, kl_N = part_BT[rollout.learned_BT if bool(rollout.learned_BT.any()) else rollout.mask_BT], values["kl/policy_superior"]
    by_part = tuple(float(kl_N[part_N == part].mean()) if (part_N == part).any() else None for part in range(PARTS))

    def mean(name: str) -> float:
        return float(values[name].mean()) if name in values else 0.0

    def between(other: str) -> float | None:
        nats = moved(session, rollout, session.placement, other=other)
        return None if math.isnan(nats) else nats

    return Contrast(
        between("reference"),
        between("unwanted"),
        float(kl_N.mean()),
        by_part,
        mean("superior/clipped_share"),
        mean("superior/implausible_mass"),
        len(kl_N),
        unsaid(session),
    )


@dataclass(frozen=True)
class Voice:
    """Some answers' score by the recipe's measure: mean, its standard error, difference from the base's, strangeness.

    The intervals of all voices' differences hold at once in 95 %.
    """

    name: str
    score: float
    score_se: float
    difference: Estimate
    differs: float
    base_nll: float
    example: str


def voices(
    session: Session, asked: Prompts, index: Sequence[int], sampler: Sampler, strengths: Sequence[float], done: Callable[[str], None]
) -> list[Voice]:
    """Base, prompted base and superiors of several strengths on the same prompts from the same noise, by the recipe's measure; what is kept
    from a look isn't asked again."""
    who = [(one, session) for one in (Answerer("base", "reference"), *prompted_answerers(session))]
    who += [(Answerer("superior", "superior"), session.with_strength(strength)) for strength in strengths]
    names = [one.name for one, _ in who if one.role != "superior"] + [f"superior, strength {strength:g}" for strength in strengths]
    found: list[Voice] = []
    base: list[str] = []
    base_P: Array | None = None
    for name, (one, of) in zip(names, who, strict=True):
        answers = collect(of, None, one, asked.requests, [sampler], lambda _: None, index=index)[0]
        texts = [answer.answer for answer in answers]
        base = base or texts
        score = measured(session, session.recipe.judge.measure, asked, texts)
        base_P = score if base_P is None else base_P
        tokens = sum(answer.tokens for answer in answers)
        nll = sum((answer.nll or 0.0) * answer.tokens for answer in answers) / max(1, tokens)
        differs = float(np.mean([a != b for a, b in zip(texts, base, strict=True)]))
        error = float(score.std(ddof=1) / len(score) ** 0.5) if len(score) > 1 else 0.0
        difference = paired((score - base_P)[:, None], comparisons=len(who) - 1)
        found.append(Voice(name, float(score.mean()), error, difference, differs, nll, texts[0]))
        done(name)
    return found


def _sane(found: Sequence[Voice]) -> list[Voice]:
    """Prompted answers, and those superiors' that aren't much stranger to the base than these (than the plain ones, where there are none)."""
    prompted = [voice for voice in found if voice.name.startswith("prompted")]
    limit = max(voice.base_nll for voice in prompted or found[:1]) + STRANGE
    return prompted + [voice for voice in found if voice.name.startswith("superior") and voice.base_nll <= limit]


def suggested(found: Sequence[Voice]) -> str | None:
    """The weakest superior within a standard error of the best, among those that score above the base and aren't much stranger to it."""
    better = [voice for voice in _sane(found) if voice.name.startswith("superior") and voice.difference.value > 0]
    if not better:
        return None
    best = max(better, key=lambda voice: voice.score)
    return next(voice.name for voice in better if voice.score >= best.score - best.score_se)


def verdict(where: Contrast, found: Sequence[Voice], measure: str, answers: int) -> tuple[bool, str]:
    """(whether training is likely to help, why): in a sentence. `answers` of each voice were measured."""
    if where.kl_superior < WEAK_KL:
        return False, (
            f"Training is unlikely to help: the superior policy is only {where.kl_superior:.3f} nats a token from the base, so there is next to nothing to learn. "
            "Add demonstrations, say the behaviour in simpler words, or raise superior.strength."
        )
    if answers < FEWEST:
        return (
            False,
            f"{answers} held-out prompts are too few to tell whether training helps: give prompts.eval, and --prompts, at least {FEWEST}.",
        )
    better = [voice for voice in _sane(found) if voice.difference.low > 0]
    if better and not any(voice.name.startswith("superior") for voice in better):
        return False, (
            f"Training is unlikely to help as the recipe stands: {better[0].name} moves {measure} by {better[0].difference} from the base, but no superior does whose "
            'answers stay plausible to the base. Try a lower --strength, or superior.estimator = "prompted".'
        )
    if not better:
        return False, (
            f"Training is unlikely to help, as far as {measure} tells: neither prompting the base nor the superior policy improves it beyond chance while its answers stay plausible to the base. "
            "Add demonstrations, use a larger base, or judge by another measure."
        )
    best = max(better, key=lambda voice: voice.score)
    return True, f"Training is likely to help: {best.name} moves {measure} by {best.difference} from the base."


RANKINGS = {
    "superior − base, sum": "log π̃ − log π_ref over the answer",
    "superior − base, per token": "the same, a token",
    "likelihood, sum": "log π_ref over the answer: a control",
    "likelihood, per token": "the same, a token: a control",
    "the shorter answer": "a control, whole answers",
}
ESTIMATE = next(iter(RANKINGS))


def agreement(ranked: Mapping[str, Estimate], pairs: int) -> str:
    """What the superior estimate says of pairs beside the controls: in a sentence."""
    first = ranked[ESTIMATE]
    if pairs >= FEWEST and first.high < 0.5:
        return f"This base's superior estimate ranks these {pairs} pairs worse than chance: it prefers what people rejected."
    if pairs < FEWEST or not first.low > 0.5:
        return f"This base's superior estimate can't be told from chance on these {pairs} pairs."
    reach = {name: abs(ranked[name].value - 0.5) + 0.5 for name, what in RANKINGS.items() if "a control" in what}
    control = max(reach, key=lambda name: reach[name])
    if reach[control] >= first.low and not ranked[control].excludes(0.5):
        return f"The superior estimate agrees with these pairs beyond chance; whether better than {control} does, a control, can't be told from so few."
    if reach[control] >= first.low:
        how = ", read upside down," if ranked[control].value < 0.5 else ""
        return f"The superior estimate agrees with these pairs beyond chance, but so does {control}{how} ({reach[control]:.0%}): a control, which knows no description."
    return "The superior estimate agrees with these pairs beyond chance, and better than every control."


def ranks(session: Session, pairs: Sequence[Pair], longest: int, progress: Callable[[int], None]) -> tuple[dict[str, Estimate], int]:
    """How often each way to rank puts the chosen answer first, with Wilson's interval; how many answers were cut at `longest` tokens."""
    sides = {side: _values(session, [(p.request, getattr(p, side)) for p in pairs], longest, progress) for side in ("chosen", "rejected")}
    found = {}
    for name in RANKINGS:
        first, second = (_ranking(name, sides[side]) for side in ("chosen", "rejected"))
        won = float((first > second).sum() + 0.5 * (first == second).sum())
        found[name] = wilson(won, len(pairs))
    return found, sum(int((values["length"] > longest).sum()) for values in sides.values())


def _ranking(name: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    what, _, how = name.partition(", ")
    if what == "the shorter answer":
        return -values["length"]
    total = values["logp"] if what == "likelihood" else values["reward"]
    return total / values["tokens"] if how == "per token" else total


def _values(
    session: Session, answers: Sequence[tuple[Messages, str]], longest: int, progress: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Sums over each answer: log π̃ − log π_ref, log π_ref, tokens read; its whole length. The adapter is untouched, so the policy is the base."""
    chat, found = session.chat, {"reward": [], "logp": [], "tokens": [], "length": []}  # type: ignore[var-annotated]
    step = 16
    for at in range(0, len(answers), step):
        part = answers[at : at + step]
        whole = [answer_ids(chat, text) for _, text in part]
        ids = [row[:longest] for row in whole]
        width = max(map(len, ids))
        tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask_BT = torch.arange(width)[None] < torch.tensor([[len(row)] for row in ids])
        requests = tuple(chat.cut(request, session.policy.base.context - width - 256) for request, _ in part)
        prompts = tuple(tuple(chat.ids(request)) for request in requests)
        rollout = Rollout(tuple(range(len(part))), requests, prompts, tokens_BT, mask_BT, torch.ones(len(part), dtype=torch.bool))
        values = session.score(rollout, weights="base").values
        for name in ("reward", "logp"):
            per_BT = torch.zeros(mask_BT.shape)
            per_BT[mask_BT] = values[name]
            found[name] += per_BT.double().sum(-1).tolist()
        found["tokens"] += mask_BT.sum(-1).tolist()
        found["length"] += map(len, whole)
        progress(len(part))
    return {name: np.array(value) for name, value in found.items()}
