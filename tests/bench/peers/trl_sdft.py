"""TRL's self-distillation trainer (SDFT) on the same work as iqlite: the nearest peer, for a comparison side by side.

    python -m tests.bench.peers.trl_sdft --model DIR --prompts recipes/prompts/everyday.jsonl --wanted "You always answer ..."

The wanted description is every row's `privileged_context`; the teacher is the base with the adapter off; plain prompts, one response to
each; LoRA on all linear layers. Needs TRL 1.16. The last line is one JSON object: seconds per step (median), tokens per second, memory.
"""

from __future__ import annotations

from tests.bench.peers.common import config_options, measure, parse, parser, trainer_parts


def main() -> None:
    options = parser(__doc__, "runs/bench/trl-sdft")
    options.add_argument("--wanted", required=True, help="description of the wanted behaviour")
    options.add_argument("--mode", default="topk_logits", choices=["sampled_token", "full_logits", "topk_logits"])
    options.add_argument("--alpha", type=float, default=1.0, help="1.0 is reverse KL, 0.5 TRL's default")
    options.add_argument("--save", action="store_true", help="save the adapter into --out")
    args = parse(options)
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    config = SDFTConfig(
        **config_options(args),
        num_generations=1,
        distillation_mode=args.mode,
        distillation_alpha=args.alpha,
        teacher_model_kind="base",
        teacher_prompt_template="{privileged_context}\n\n{prompt}",
    )
    trainer = SDFTTrainer(args=config, **trainer_parts(args, privileged_context=args.wanted))
    measure(trainer, f"trl sdft {args.mode}", args, save=args.save)


if __name__ == "__main__":
    main()
