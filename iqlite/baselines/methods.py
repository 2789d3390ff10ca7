"""What a comparison can be made with, by name. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from iqlite.errors import RunError

TRL = ("sft", "dpo", "sdft")
BASELINES = (*TRL, "ppo")
METHODS = ("superior", *BASELINES)


def check_names(names: Sequence[str]) -> None:
    """RunError for a method that there isn't."""
    for name in names:
        if name not in METHODS:
            raise RunError(
                f"--with {name!r} isn't one of {', '.join(METHODS)}: give names with commas between, such as --with superior,dpo."
            )
