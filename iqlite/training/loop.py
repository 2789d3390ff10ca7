"""METHOD's loop: answer prompts, read the answers under the descriptions, reward every token, update the adapter, repeat.

`train` is the algorithm. Everything it needs is in a `Session`; everything it leaves is in a `RunDir`; what a person sees goes
through a `Reporter`. A run resumes exactly: all noise is a function of (seed, step, prompt), so a checkpoint is tensors and counters.
"""

from __future__ import annotations

import statistics as stats
import sys
import time
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from iqlite.errors import RunError
from iqlite.method.loss import TokenStatistics
from iqlite.records import HELD_OUT_KL, Messages, Prompts, Rollout, StepMetrics
from iqlite.run.rundir import RunDir, part
from iqlite.training.measuring import HARMLESS, by_kind, measured
from iqlite.training.monitors import Monitors, Verdict
from iqlite.training.optimizer import learning_rate, load_state_of, make_optimizer, state_of
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update


class Reporter(Protocol):
    """What a person sees of a run."""

    def step(self, metrics: StepMetrics, total: int) -> None: ...
    def sample(self, step: int, prompt: str, answer: str) -> None: ...
    def verdict(self, step: int, verdict: Verdict) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `why` is "finished", "interrupted", or the rule that stopped it."""

    step: int
    total: int
    why: str
    best_step: int
    best_kl: float


def train(session: Session, run: RunDir, report: Reporter, interrupted: Callable[[], bool] = lambda: False) -> Outcome:
    """Trains the session's adapter from the run's last checkpoint, or from the beginning, to the end or until a monitor stops it."""
    recipe, policy = session.recipe, session.policy
    total = recipe.total_steps(len(session.train))
    optimizer = make_optimizer(policy, recipe.train.optimizer)
    monitors = Monitors(recipe.train.max_kl_reference, recipe.train.until_converged)
    first, monitors, why = _resume(session, run, optimizer, monitors)

    if first == 0:  # nothing is there yet: what the untrained policy is like
        values, _ = evaluate(session, run, report, monitors, 0)
        run.add_metrics(StepMetrics(0, values))
        _checkpoint(session, run, optimizer, monitors, 0, None)

    step = max(0, first - 1)
    while step < total and why is None:
        step += 1
        clock = Clock(policy.device)

        # 1. sample prompts, contrary ones last; 2. generate responses with the policy
        prompts, chosen, contrary = prompts_and_contrary(session, step)
        rollout = session.answers("policy", prompts, session.sampler("train"), step=step, index=chosen)
        rollout = replace(rollout, contrary=contrary)  # their target is the reference itself
        clock.lap("rollout")

        # 3. read them under the reference, wanted and unwanted descriptions: what π̃ is made from
        scores = read(policy, session.chat, rollout, session.readings, session.sizes)
        clock.lap("read")

        # 4. token rewards; 5. update the adapter by the objective
        rate = learning_rate(step, total, peak=recipe.train.learning_rate, warmup=recipe.train.warmup, schedule=recipe.train.schedule)
        statistics, norm = update(session, optimizer, rollout, scores, rate)
        clock.lap("update")

        # 6. repeat until the steps end or the monitors say it has converged
        values = {**describe(rollout, statistics), "policy/grad_norm": norm, "policy/learning_rate": rate}
        verdicts = monitors.after_step(values)
        if step % recipe.train.eval_every == 0 or step == total:
            measured, more = evaluate(session, run, report, monitors, step)
            values, verdicts = values | measured, verdicts + more
            clock.lap("eval")
        values |= clock.metrics(int(rollout.mask_BT.sum()))
        run.add_metrics(StepMetrics(step, values))
        report.step(StepMetrics(step, values), total)
        for verdict in verdicts:
            report.verdict(step, verdict)
            why = verdict.rule if verdict.stop else why
        if why is None and step < total and interrupted():
            why = "interrupted"
        if step % recipe.train.checkpoint_every == 0 or step == total or why is not None:
            _checkpoint(session, run, optimizer, monitors, step, why)

    why = why or "finished"
    if why in ("finished", "interrupted") or not run.best.is_dir():
        run.save_folder(run.adapter, lambda folder: policy.save_adapter(folder, step=step))
    else:  # a monitor stopped it: what is left is the best adapter, not the last
        run.save_folder(run.adapter, run.copy_best)
    outcome = Outcome(step, total, why, monitors.best_step, monitors.best_kl)
    if why != "interrupted":
        run.write_result(vars(outcome))
    return outcome


def prompts_of_step(prompts: Sized, step: int, count: int, seed: int) -> list[int]:
    """Prompt (or pair) numbers of a step (1-based): each pass over the set is its own permutation, a function of (seed, pass) alone."""
    chosen: list[int] = []
    at = (step - 1) * count
    while len(chosen) < count:
        pass_number, offset = divmod(at + len(chosen), len(prompts))
        order = np.random.Generator(np.random.PCG64([seed, pass_number])).permutation(len(prompts))
        chosen += order[offset : offset + count - len(chosen)].tolist()
    return chosen


def prompts_and_contrary(session: Session, step: int) -> tuple[list[Messages], list[int], int]:
    """A step's requests, their numbers, and how many of them, the last ones, are contrary; these are numbered behind the training prompts."""
    recipe, contrary = session.recipe, session.contrary
    chosen = prompts_of_step(session.train, step, recipe.rollout.prompts_per_step, recipe.train.seed)
    more = prompts_of_step(contrary, step, recipe.contrary_per_step, recipe.train.seed) if contrary else []
    requests = [session.train.requests[i] for i in chosen] + ([contrary.requests[i] for i in more] if contrary else [])
    return requests, [*chosen, *(len(session.train) + i for i in more)], len(more)


def spread(total: int, count: int) -> list[int]:
    """Up to `count` of `total` numbers, evenly spread: held-out prompts from all sources."""
    chosen: list[int] = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    return chosen


def evaluate(session: Session, run: RunDir, report: Reporter, monitors: Monitors, step: int) -> tuple[dict[str, float], list[Verdict]]:
    """Answers held-out prompts with fixed noise: KL(policy‖superior), the superior always read by the bare base, and the recipe's measure."""
    values: dict[str, float] = {}
    answers: dict[str, tuple[Prompts, list[str]]] = {}
    for name, prompts in (("eval", session.eval), ("contrary", session.contrary_eval), ("outside", session.outside)):
        if prompts is None:
            continue
        asked, rollout = answered(session, "policy", name, prompts)
        found = describe(rollout, session.score(rollout, weights="base"))
        for key, metric in _EVALUATED.items():
            values[f"{name}/{key}"] = found[metric]
        answers[name] = asked, [session.chat.text(rollout.response_ids(row)) for row in range(len(asked))]
    measure, (asked, texts) = session.recipe.judge.measure, answers["eval"]
    if measure == HARMLESS and "contrary" in answers:  # both kinds of right answer
        asked, texts = asked + answers["contrary"][0], texts + answers["contrary"][1]
    score_P = measured(session, measure, asked, texts)
    if monitors.base_measure != measure:  # the base's own answers, from the same noise
        # An untouched policy is the base.
        untouched = step == 0 and session.recipe.adapter.start is None
        base = texts if untouched else _texts_of_base(session, measure == HARMLESS and "contrary" in answers)
        monitors.base_scores, monitors.base_measure = measured(session, measure, asked, base).tolist(), measure
    values |= {"eval/measure": float(score_P.mean()), "eval/measure_base": stats.fmean(monitors.base_scores)}
    if measure == HARMLESS:
        values |= {f"eval/{kind}_right_share": yes / of for kind, (yes, of) in by_kind(asked, texts).items() if of}
    shown = (step // session.recipe.train.eval_every) % len(answers["eval"][1])
    for row, (request, text, score) in enumerate(zip(asked.requests, texts, score_P.tolist(), strict=True)):
        run.add_sample(step, request[-1]["content"], text, score)
        if row == shown:
            report.sample(step, request[-1]["content"], text)
    best, verdicts = monitors.after_eval(step, values, score_P.tolist())
    if best:
        run.save_folder(run.best, lambda folder: session.policy.save_adapter(folder, step=step))
    return values, verdicts


def answered(session: Session, role: str, name: str, prompts: Prompts) -> tuple[Prompts, Rollout]:
    """(those of a held-out set that evaluations ask, a role's answers to them), from the set's own noise."""
    chosen = spread(len(prompts), session.recipe.prompts.eval_count)
    asked = prompts.some(chosen)
    rollout = session.answers(role, asked.requests, session.sampler(name), index=chosen)
    return asked, replace(rollout, contrary=len(asked) if name == "contrary" else 0)


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
assert HELD_OUT_KL == "eval/kl_policy_superior"


def describe(rollout: Rollout, statistics: TokenStatistics) -> dict[str, float]:
    """METHOD's watch list for one rollout: masked means in nats a token, lengths in tokens, shares in 0…1.

    What concerns the target is of the other prompts' tokens where some are contrary; of those, KL(policy‖reference), which is their target.
    """
    means, contrary = statistics.means(), {}
    if 0 < rollout.contrary < len(rollout.index):
        of_contrary_n = statistics.values["contrary"] == 1
        statistics, beside = (
            TokenStatistics({name: value_n[which_n] for name, value_n in statistics.values.items()})
            for which_n in (~of_contrary_n, of_contrary_n)
        )
        means, contrary = statistics.means(), {"contrary/kl_policy_reference": beside.means()["kl/policy_reference"]}
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


def repetition(responses: list[list[int]], n: int = 3) -> float:
    """Share of n-grams that stood earlier in the same response, over all responses."""
    seen = sum(max(0, len(ids) - n + 1) for ids in responses)
    distinct = sum(len({tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}) for ids in responses)
    return 1.0 - distinct / seen if seen else 0.0


class Clock:
    """Seconds of a step's phases, and peak memory."""

    def __init__(self, device: torch.device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()  # type: ignore[var-annotated]

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[f"time/{name}_s"], self.last = now - self.last, now

    def metrics(self, tokens: int) -> dict[str, float]:
        """time/*_s, response tokens a second of the phases and of the step, and memory/peak_gib."""
        rates = {f"time/{name}_tokens_per_s": tokens / self.laps[f"time/{name}_s"] for name in ("rollout", "read", "update")}
        step_s = sum(self.laps[f"time/{name}_s"] for name in ("rollout", "read", "update"))
        return {**self.laps, **rates, "time/step_s": step_s, "time/tokens_per_s": tokens / step_s, "memory/peak_gib": peak_gib(self.device)}


def peak_gib(device: torch.device) -> float:
    """Highest memory of this process so far, GiB: allocated on the card, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def snapshot(session: Session, optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, state) of adapter, average, optimizer, loss scale and widths, for an exact resume. Noise and data order are functions of the step."""
    moments, numbers = state_of(optimizer)
    groups = {"adapter": session.policy.state(), "optimizer": moments}
    if session.recipe.superior.weights == "ema":
        groups["ema"] = session.policy.state("ema")
    tensors = {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    return tensors, {"optimizer": numbers, "loss_scale": session.policy.loss_scale, "sizes": session.sizes.record()}


def restore(session: Session, optimizer: Any, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Puts back what `snapshot` took."""
    session.policy.load_state(part(tensors, "adapter."))
    if session.recipe.superior.weights == "ema":
        session.policy.load_state(part(tensors, "ema."), "ema")
    load_state_of(optimizer, part(tensors, "optimizer."), state["optimizer"])
    session.policy.loss_scale = state["loss_scale"]
    session.sizes.restore(state.get("sizes", {}))


def _checkpoint(session: Session, run: RunDir, optimizer: Any, monitors: Monitors, step: int, why: str | None) -> None:
    tensors, state = snapshot(session, optimizer)
    stopped = None if why in (None, "interrupted") else why
    run.save_checkpoint(step, tensors, {**state, "monitors": monitors.state(), "stopped": stopped})


def _resume(session: Session, run: RunDir, optimizer: Any, monitors: Monitors) -> tuple[int, Monitors, str | None]:
    """(first step to do, monitors, rule that had stopped the run) from the last checkpoint; step 0 is the look before any update."""
    found = run.load_checkpoint()
    if found is None:
        return 0, monitors, None
    tensors, state = found
    if not part(tensors, "adapter."):
        raise RunError(f"{run.path}: its last checkpoint holds no adapter; delete that checkpoint's folder and resume from the one before.")
    restore(session, optimizer, tensors, state)
    return state["step"] + 1, Monitors.restore(state["monitors"]), state["stopped"]
