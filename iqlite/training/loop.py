"""The loop of docs/method.md: answer prompts, read the answers under the descriptions, reward every token, update the adapter, repeat.

`train` is the algorithm. Everything it needs is in a `Session`; everything it leaves is in a `RunDir`; what a person sees goes
through a `Reporter`. A run resumes exactly: all noise is a function of (seed, step, prompt), so a checkpoint is tensors and counters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from iqlite.machine.clock import Clock
from iqlite.records import StepMetrics
from iqlite.run.rundir import RunDir
from iqlite.training.checkpoint import resume, save_checkpoint
from iqlite.training.evaluating import Reporter, describe, evaluate
from iqlite.training.monitors import Monitors
from iqlite.training.optimizer import learning_rate, make_optimizer
from iqlite.training.order import prompts_and_contrary
from iqlite.training.readings import read
from iqlite.training.rollout import part_of
from iqlite.training.session import Session
from iqlite.training.update import training_batches, update


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
    first, monitors, why = resume(session, run, optimizer, monitors)

    if first == 0:  # nothing is there yet: what the untrained policy is like
        values, _ = evaluate(session, run, report, monitors, 0)
        run.add_metrics(StepMetrics(0, values))
        save_checkpoint(session, run, optimizer, monitors, 0, None)

    step = max(0, first - 1)
    while step < total and why is None:
        step += 1
        clock = Clock(policy.device)

        # 1. sample prompts, contrary ones last; 2. generate responses with the policy
        prompts, chosen, contrary = prompts_and_contrary(session, step)
        rollout = session.answers("policy", prompts, session.sampler("train"), step=step, index=chosen)
        rollout = replace(rollout, contrary=contrary)  # their target is the reference itself
        clock.lap("rollout")

        # 3. read them under the reference, wanted and unwanted descriptions: what π̃ is made from. With several processes, each its part
        mine = part_of(session.ranks, rollout)
        scores = read(policy, session.chat, mine, session.readings, session.sizes, training_batches(session, mine))
        clock.lap("read")

        # 4. token rewards; 5. update the adapter by the objective
        rate = learning_rate(step, total, peak=recipe.train.learning_rate, warmup=recipe.train.warmup, schedule=recipe.train.schedule)
        statistics, norm = update(session, optimizer, mine, scores, rate)
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
        why = session.ranks.told(why)  # different machines could round to different verdicts
        if why is None and step < total and any(session.ranks.gathered(interrupted())):
            why = "interrupted"
        if step % recipe.train.checkpoint_every == 0 or step == total or why is not None:
            save_checkpoint(session, run, optimizer, monitors, step, why)

    why = why or "finished"
    if why in ("finished", "interrupted") or not run.best.is_dir():
        run.save_folder(run.adapter, lambda folder: policy.save_adapter(folder, step=step))
    else:  # a monitor stopped it: what is left is the best adapter, not the last
        run.save_folder(run.adapter, run.copy_best)
    outcome = Outcome(step, total, why, monitors.best_step, monitors.best_kl)
    if why != "interrupted":
        run.write_result(vars(outcome))
    return outcome
