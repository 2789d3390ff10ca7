"""TRL's stable DistillationTrainer on the same work as iqlite: it makes no logits either, so it is the nearest peer in speed and memory.

    python -m tests.bench.peers.trl_distill --model DIR --prompts recipes/prompts/everyday.jsonl

Its teacher is the base itself with the adapter off, on the plain prompt, by reverse KL: one reading without gradient where iqlite has three. It learns
nothing by that; a step costs what a step with another teacher of this size would. The last line is one JSON object, as of the other peers.
"""

from __future__ import annotations

from typing import Any

from tests.bench.peers.common import config_options, measure, parse, parser, trainer_parts


def main() -> None:
    args = parse(parser(__doc__, "runs/bench/trl-distill"))
    from trl import DistillationConfig, DistillationTrainer

    class OneBase(DistillationTrainer):  # type: ignore[misc]
        """Teacher and student share the base: a second copy would only make it look worse."""

        def _get_last_hidden_state(self, model: Any, *rest: Any, **more: Any) -> Any:
            if model is not self.teacher_model:
                return super()._get_last_hidden_state(model, *rest, **more)
            with self.model.disable_adapter():
                return super()._get_last_hidden_state(model, *rest, **more)

    parts = trainer_parts(args)
    trainer = OneBase(args=DistillationConfig(**config_options(args), beta=1.0), teacher_model=parts["model"], **parts)
    measure(trainer, "trl distillation", args)


if __name__ == "__main__":
    main()
