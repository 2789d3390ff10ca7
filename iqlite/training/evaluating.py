"""What a step's answers and held-out answers are like, in numbers."""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from iqlite.machine.ranks import ALONE
from iqlite.method.loss import TokenStatistics
from iqlite.model.sampling import SPOKEN_TEMPERATURE, SPOKEN_TOP_P, Sampler
from iqlite.records import ERROR, HELD_OUT_FORWARD_KL, HELD_OUT_KL, Messages, Prompts, Rollout, StepMetrics
from iqlite.run.rundir import RunDir
from iqlite.scoring.measures import HARMLESS
from iqlite.training.measuring import by_kind, measured
from iqlite.training.monitors import Monitors, Verdict
from iqlite.training.order import spread
from iqlite.training.session import Session


class Reporter(Protocol):
    """What a person sees of a run."""

    def step(self, metrics: StepMetrics, total: int) -> None: ...
    def sample(self, step: int, prompt: str, draw: Callable[[], tuple[str, str]]) -> None:
        """A held-out prompt; `draw` answers it, (the base, the policy now), and takes the time that takes. Nothing of the run depends on it."""

    def verdict(self, step: int, verdict: Verdict) -> None: ...


def evaluate(session: Session, run: RunDir, report: Reporter, monitors: Monitors, step: int) -> tuple[dict[str, float], list[Verdict]]:
    """Answers held-out prompts with fixed noise: the KL of policy and superior, the latter always read by the bare base, and the recipe's measure."""
    values: dict[str, float] = {}
    answers: dict[str, tuple[Prompts, list[str]]] = {}
    thoughts: list[str] = []
    for name, prompts in (("eval", session.eval), ("contrary", session.contrary_eval), ("outside", session.outside)):
        if prompts is None:
            continue
        asked, rollout = answered(session, "policy", name, prompts)
        statistics = session.score(rollout, weights="base")
        found = describe(rollout, statistics)
        for key, metric in _EVALUATED.items():
            values[f"{name}/{key}"] = found[metric]
        if name == "eval":
            for key, metric in ((HELD_OUT_KL, "kl/policy_superior"), (HELD_OUT_FORWARD_KL, "kl/superior_policy")):
                if metric in found:  # the second, where it is the objective
                    values |= {key: found[metric], key + ERROR: error_by_answers(statistics.values[metric], rollout)}
        answers[name] = asked, [session.chat.text(rollout.response_ids(row)) for row in range(len(asked))]
        if name != "outside":
            thoughts += [session.chat.thought(rollout.response_ids(row)) for row in range(len(asked))]
    measure, (asked, texts) = session.recipe.judge.measure, answers["eval"]
    if measure == HARMLESS and "contrary" in answers:  # both kinds of right answer
        asked, texts = asked + answers["contrary"][0], texts + answers["contrary"][1]
    score_P = measured(session, measure, asked, texts)
    if monitors.base_measure != measure:  # the base's own answers, from the same noise
        # An untouched policy is the base.
        untouched = step == 0 and session.recipe.adapter.start is None
        base = texts if untouched else _texts_of_base(session, measure == HARMLESS and "contrary" in answers)
        monitors.judged_by(measure, measured(session, measure, asked, base).tolist())
    values |= {"eval/measure": float(score_P.mean()), "eval/measure_base": stats.fmean(monitors.base_scores)}
    if measure == HARMLESS:
        values |= {f"eval/{kind}_right_share": yes / of for kind, (yes, of) in by_kind(asked, texts).items() if of}
    shown = (step // session.recipe.train.eval_every) % len(answers["eval"][1])
    for row, (request, text, thought, score) in enumerate(zip(asked.requests, texts, thoughts, score_P.tolist(), strict=False)):
        run.add_sample(step, request[-1]["content"], text, score, thought)
        if row == shown and session.ranks.leads:
            report.sample(step, request[-1]["content"], partial(spoken, session, request, row))
    best, verdicts = monitors.after_eval(step, values, score_P.tolist(), asked.expected if measure == HARMLESS else ())
    if best:
        run.save_folder(run.best, lambda folder: session.policy.save_adapter(folder, step=step))
    return values, verdicts


def answered(session: Session, role: str, name: str, prompts: Prompts) -> tuple[Prompts, Rollout]:
    """(those of a held-out set that evaluations ask, a role's answers to them), from the set's own noise."""
    chosen = spread(range(len(prompts)), session.recipe.prompts.eval_count)
    asked = prompts.some(chosen)
    rollout = session.answers(role, asked.requests, session.sampler(name), index=chosen)
    return asked, replace(rollout, contrary=len(asked) if name == "contrary" else 0)


def spoken(session: Session, request: Messages, number: int) -> tuple[str, str]:
    """(the base's answer, the policy's) as a person would hear them in a chat, from noise of their own, the same for both; by this process alone."""
    session = replace(session, ranks=ALONE)
    sampler = Sampler(session.recipe.train.seed, session.recipe.rollout.max_new_tokens, SPOKEN_TEMPERATURE, SPOKEN_TOP_P, "shown")
    rollouts = [session.answers(role, [request], sampler, index=[number]) for role in ("reference", "policy")]
    before, now = (session.chat.text(rollout.response_ids(0)) for rollout in rollouts)
    return before, now


def _texts_of_base(session: Session, both: bool) -> list[str]:
    rollouts = [answered(session, "reference", "eval", session.eval)[1]]
    rollouts += [answered(session, "reference", "contrary", session.contrary_eval)[1]] if both and session.contrary_eval else []
    return [session.chat.text(r.response_ids(row)) for r in rollouts for row in range(len(r.index))]


_EVALUATED = {
    "kl_policy_superior": "kl/policy_superior",
    "kl_policy_reference": "kl/policy_reference",
    "entropy": "policy/entropy",
    "repetition": "response/repetition",
    "ended_share": "response/ended_share",
    "length": "response/length",
}


def describe(rollout: Rollout, statistics: TokenStatistics) -> dict[str, float]:
    """docs/method.md's watch list for one rollout: masked means in nats a token, lengths in tokens, shares in 0…1.

    What concerns the target is of the other prompts' tokens where some are contrary; of those, KL(policy‖reference), which is their target.
    """
    means, contrary = statistics.means(), {}
    if 0 < rollout.contrary < len(rollout.index):
        of_contrary_n = statistics.values["contrary"] == 1
        statistics, beside = (
            TokenStatistics({name: value_n[which_n] for name, value_n in statistics.values.items()})
            for which_n in (~of_contrary_n, of_contrary_n)
        )
        means, contrary = statistics.means(), {"kl/contrary_policy_reference": beside.means()["kl/policy_reference"]}
    ended = float(rollout.ended_B.double().mean())
    return {
        **{name: value for name, value in means.items() if name not in ("reward", "logp", "contrary")},
        **contrary,
        "reward/mean": means["reward"],
        "reward/variance": float(statistics.values["reward"].double().var(correction=0)),
        "response/length": float(rollout.mask_BT.sum(-1).double().mean()),
        "response/tokens": float(rollout.mask_BT.sum()),
        "response/ended_share": ended,
        "response/truncated_share": 1.0 - ended,
        "response/repetition": repetition([rollout.response_ids(row) for row in range(len(rollout.index))]),
    }


def error_by_answers(value_n: torch.Tensor, rollout: Rollout) -> float:
    """The standard error of a mean over tokens [n], whose tokens come by answers: that of a ratio estimate (Cochran 1977, equation 6.13); 0 for one answer."""
    mask_BT = rollout.learned_BT if bool(rollout.learned_BT.any()) else rollout.mask_BT
    count_B = mask_BT.sum(-1)
    sum_B = torch.stack([part.sum() for part in torch.split(value_n.double(), count_B.tolist())])
    beside_B = (sum_B - value_n.double().mean() * count_B)[count_B > 0]
    answers = len(beside_B)
    return float((beside_B.square().sum() * answers / (answers - 1)).sqrt() / count_B.sum()) if answers > 1 else 0.0


def repetition(responses: list[list[int]], n: int = 3) -> float:
    """Share of n-grams that stood earlier in the same response, over all responses."""
    seen = sum(max(0, len(ids) - n + 1) for ids in responses)
    distinct = sum(len({tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}) for ids in responses)
    return 1.0 - distinct / seen if seen else 0.0
