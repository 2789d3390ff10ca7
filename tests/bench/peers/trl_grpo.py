"""TRL's GRPOTrainer with a constant reward on the same work as iqlite: what a step of reinforcement learning costs, nothing is learned.

    python -m tests.bench.peers.trl_grpo --model DIR --prompts recipes/prompts/everyday.jsonl

GRPO compares responses to the same prompt, so it needs two or more of each: a step generates `--batch` responses in all, as the smallest
number of generations that divides it (--batch 8 is 4 prompts × 2 generations), half the prompts of the other trainers' step. beta is 0:
no reference model. Every reward is 0.0, so advantages and gradients are zero, but generation, forward, backward and the optimizer's step
are all done. Needs TRL 1.16. The last line is one JSON object: seconds per step (median), tokens per second, memory.
"""

from __future__ import annotations

from typing import Any

from tests.bench.peers.common import config_options, measure, parse, parser, trainer_parts


def constant_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def main() -> None:
    args = parse(parser(__doc__, "runs/bench/trl-grpo"), least_batch=2)
    from trl import GRPOConfig, GRPOTrainer

    generations = next(n for n in range(2, args.batch + 1) if args.batch % n == 0)
    config = GRPOConfig(**config_options(args), num_generations=generations, beta=0.0)
    trainer = GRPOTrainer(args=config, reward_funcs=constant_reward, **trainer_parts(args))
    measure(trainer, f"trl grpo {args.batch // generations}x{generations}", args)


if __name__ == "__main__":
    main()
