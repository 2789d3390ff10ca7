"""METHOD's loop: answer prompts, read the answers under the descriptions, reward every token, update the adapter, repeat.

`train` is the algorithm. Everything it needs is in a `Session`; everything it leaves is in a `RunDir`; what a person sees goes
through a `Reporter`. A run resumes exactly: all noise is a function of (seed, step, prompt), so a checkpoint is tensors and counters.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from iqlite.chunked import TokenStatistics, chunked_loss, chunked_statistics
from iqlite.errors import RunError
from iqlite.monitors import HELD_OUT_KL, Monitors, Verdict
from iqlite.objectives import advantages
from iqlite.optimizer import apply_update, learning_rate, load_state_of, make_optimizer, state_of
from iqlite.records import Rollout, StepMetrics, SuperiorScores
from iqlite.rundir import RunDir, part
from iqlite.session import Session
from iqlite.superior import batches as in_batches
from iqlite.superior import read


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

        # 1. sample prompts; 2. generate responses with the policy
        chosen = prompts_of_step(session.train, step, recipe.rollout.prompts_per_step, recipe.train.seed)
        rollout = session.answers("policy", [session.train.requests[i] for i in chosen], session.sampler("train"), step=step, index=chosen)
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


def update(session: Session, optimizer: Any, rollout: Rollout, scores: SuperiorScores, rate: float) -> tuple[TokenStatistics, float]:
    """Equations (4) and (5) on one rollout: `updates_per_rollout` optimizer steps, each accumulated over micro-batches.

    Returns the statistics of the first update's tokens (where policy and rollout agree) and the last gradient norm. Micro-batches
    add up to one masked mean over all response tokens, so their size doesn't change the result beyond rounding.
    """
    policy, recipe = session.policy, session.recipe
    total_tokens = int(rollout.mask_BT.sum())
    assert total_tokens > 0, "no response tokens to train on"
    old_logp_BT, advantage_BT = rollout_advantages(session, rollout, scores)
    first: TokenStatistics | None = None
    norm = math.nan
    for _ in range(recipe.train.updates_per_rollout):
        again = [True]
        while again:  # out of memory: the whole gradient once more, in smaller parts
            optimizer.zero_grad(set_to_none=True)
            parts: list[TokenStatistics] = []
            batches = micro_batches(session, rollout)
            widest = max(batches, key=len)
            with session.sizes.fitting("update_tokens", len(widest), row_tokens(session, rollout, widest[0])) as again:
                for rows in batches:
                    parts.append(backward(session, rollout, scores, rows, total_tokens, old_logp_BT, advantage_BT))
        first = first or TokenStatistics.join(parts)
        norm = apply_update(policy, optimizer, rate, recipe.train.max_grad_norm)
        optimizer.zero_grad(set_to_none=True)  # the next rollout can use their memory
        if recipe.superior.weights == "ema":
            policy.update_ema(recipe.superior.ema_rate)
    assert first is not None
    return first, norm


def backward(
    session: Session,
    rollout: Rollout,
    scores: SuperiorScores,
    rows: list[int],
    total_tokens: int,
    old_logp_BT: torch.Tensor | None,
    advantage_BT: torch.Tensor | None,
) -> TokenStatistics:
    """Adds some rows' part of the gradient. A function of its own: after an out-of-memory nothing of its graph stays alive."""
    policy, mask_bT = session.policy, rollout.mask_BT[rows]
    loss, statistics = chunked_loss(
        policy.head,
        policy_states(session, rollout, rows)[mask_bT.to(policy.device)],
        rollout.tokens_BT[rows][mask_bT],
        {name: states_BTD[rows][mask_bT] for name, states_BTD in scores.hidden.items()},
        session.scoring,
        session.objective,
        total_tokens=total_tokens,
        chunk_tokens=session.sizes.chunk_tokens,
        loss_scale=policy.loss_scale,
        old_logp_n=None if old_logp_BT is None else old_logp_BT[rows][mask_bT],
        advantage_n=None if advantage_BT is None else advantage_BT[rows][mask_bT],
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return statistics


def policy_states(session: Session, rollout: Rollout, rows: list[int]) -> torch.Tensor:
    """The policy's hidden states [b, T, D] at the response's positions of some rows; with a gradient outside role blocks."""
    start = session.chat.shared()
    return session.policy.hidden_states(
        [rollout.prompt_ids[r] for r in rows], [rollout.response_ids(r) for r in rows], rollout.mask_BT.shape[1], [start] * len(rows)
    )


def rollout_advantages(session: Session, rollout: Rollout, scores: SuperiorScores) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(log π_old, Â) [B, T] for objectives with a `gamma`: rewards under the policy before the update, computed once a rollout.

    log π_old comes from the training forward with the same micro-batches, so that ρ is exactly 1 at the first update.
    """
    settings, policy = session.recipe.objective.settings(), session.policy
    if "gamma" not in settings:
        return None, None
    logp_BT, reward_BT = torch.zeros(rollout.mask_BT.shape), torch.zeros(rollout.mask_BT.shape)
    for rows in micro_batches(session, rollout):
        mask_bT = rollout.mask_BT[rows]
        with policy.acting_as("policy"):
            hidden_bTD = policy_states(session, rollout, rows)
        hidden = {name: states_BTD[rows][mask_bT] for name, states_BTD in scores.hidden.items()}
        values = chunked_statistics(
            policy.head, hidden_bTD[mask_bT.to(policy.device)], rollout.tokens_BT[rows][mask_bT], hidden, session.scoring,
            chunk_tokens=session.sizes.chunk_tokens,
        ).values  # fmt: skip
        for target_BT, name in ((logp_BT, "logp"), (reward_BT, "reward")):
            part_bT = torch.zeros(mask_bT.shape)
            part_bT[mask_bT] = values[name]
            target_BT[rows] = part_bT
    return logp_BT, advantages(reward_BT, rollout.mask_BT, gamma=float(settings["gamma"]), centre=bool(settings["centre"]))


def micro_batches(session: Session, rollout: Rollout) -> list[list[int]]:
    """Row numbers in batches of at most `sizes.update_tokens` tokens, longest rows first."""
    lengths = [row_tokens(session, rollout, row) for row in range(len(rollout.index))]
    return in_batches(lengths, session.sizes.update_tokens)


def row_tokens(session: Session, rollout: Rollout, row: int) -> int:
    """Tokens that a row adds to a forward: its prompt without what all share, and its answer."""
    return len(rollout.prompt_ids[row]) + int(rollout.mask_BT[row].sum()) - len(session.chat.shared())


def prompts_of_step(prompts: Sized, step: int, count: int, seed: int) -> list[int]:
    """Prompt (or pair) numbers of a step (1-based): each pass over the set is its own permutation, a function of (seed, pass) alone."""
    chosen: list[int] = []
    at = (step - 1) * count
    while len(chosen) < count:
        pass_number, offset = divmod(at + len(chosen), len(prompts))
        order = np.random.Generator(np.random.PCG64([seed, pass_number])).permutation(len(prompts))
        chosen += order[offset : offset + count - len(chosen)].tolist()
    return chosen


def spread(total: int, count: int) -> list[int]:
    """Up to `count` of `total` numbers, evenly spread: held-out prompts from all sources."""
    chosen: list[int] = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    return chosen


def evaluate(session: Session, run: RunDir, report: Reporter, monitors: Monitors, step: int) -> tuple[dict[str, float], list[Verdict]]:
    """Answers held-out prompts with fixed noise and measures KL(policy‖superior), the superior always read by the bare base."""
    count = session.recipe.prompts.eval_count
    values = {}
    for name, prompts in (("eval", session.eval), ("outside", session.outside)):
        if prompts is None:
            continue
        chosen = spread(len(prompts), count)
        rollout = session.answers("policy", [prompts.requests[i] for i in chosen], session.sampler(name), index=chosen)
        found = describe(rollout, session.score(rollout, weights="base"))
        for key, metric in _EVALUATED.items():
            values[f"{name}/{key}"] = found[metric]
        if name == "eval":
            for row in range(len(rollout.index)):
                prompt, answer = rollout.requests[row][-1]["content"], session.chat.text(rollout.response_ids(row))
                run.add_sample(step, prompt, answer)
                if row == (step // session.recipe.train.eval_every) % len(rollout.index):
                    report.sample(step, prompt, answer)
    best, verdicts = monitors.after_eval(step, values)
    if best:
        run.save_folder(run.best, lambda folder: session.policy.save_adapter(folder, step=step))
    return values, verdicts


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
    """METHOD's watch list for one rollout: masked means in nats a token, lengths in tokens, shares in 0…1."""
    means = statistics.means()
    ended = float(rollout.ended_B.double().mean())
    return {
        **{name: value for name, value in means.items() if name not in ("reward", "logp")},
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
