"""Options that several verbs share, and what all of them do with files that aren't there and with old spellings."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from iqlite.errors import PromptsError
from iqlite.places import exists, is_run

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output; progress goes to standard error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe: --set rollout.temperature=0.8")
]
Which = Annotated[str, typer.Option("--which", help="Which adapter of the run: adapter (the last) or best.")]
Scale = Annotated[float, typer.Option(help="How much of the adapter is added: 1 is as trained.")]
Base = Annotated[str | None, typer.Option("--base", metavar="PATH", help="Where the run's base is now, if it has moved.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write it.")]


class BaseWeights(StrEnum):
    """Which weights of the base a merge takes."""

    trained = "trained"
    stored = "stored"


Weights = Annotated[
    BaseWeights,
    typer.Option("--weights", help="The base's weights as the adapter learned on them (4 bits, dequantised), or as they are stored."),
]


def there(**files: Path | None) -> None:
    """A file that an option names and that isn't there is reported before torch is imported."""
    for option, path in files.items():
        if path is not None and not path.is_file():
            raise PromptsError(f"--{option.replace('_', '-')} {path}: no such file; a path is relative to the folder you are in.")


def examples(lines: Sequence[str]) -> str:
    """What stands below a verb's help."""
    return "\b\nExamples:\n  " + "\n  ".join(lines)


class Verbs(TyperGroup):
    """The group of verbs, whose help names completion in a line and not by two options."""

    def get_params(self, ctx: Any) -> Any:
        """typer's, with those of completion hidden."""
        found = super().get_params(ctx)
        for parameter in found:
            if parameter.name in ("install_completion", "show_completion"):
                parameter.hidden = True  # type: ignore[attr-defined]
        return found


class Verb(TyperCommand):
    """A command that still takes the spellings of 0.1.0, which no help shows."""

    renamed: ClassVar[dict[str, dict[str, str]]] = {
        "compare": {"--adapter": "--which"},
        "merge": {"--adapter": "--which", "--base=trained": "--weights=trained", "--base=stored": "--weights=stored"},
        "export": {"--adapter": "--which", "--base=trained": "--weights=trained", "--base=stored": "--weights=stored"},
        "probe": {"--prompts": "--count"},
    }

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts today's spelling in the place of an old one."""
        old = self.renamed.get(self.name or "", {})
        args = _joined(args, "--base")
        args = [old.get(arg, arg) for arg in args]
        if self.name == "chat":  # where --base alone asks for the bare base
            args = [arg.replace("--base=", "--base-path=", 1) if arg.startswith("--base=") else arg for arg in args]
        return super().parse_args(ctx, ["=".join([old.get(name, name), *rest]) for name, *rest in (arg.split("=", 1) for arg in args)])


def _joined(args: list[str], name: str) -> list[str]:
    """`--base X` as `--base=X`, where X is one of merge's two kinds of weights or a model that is here and no run."""
    found: list[str] = []
    for arg in args:
        if (
            found
            and found[-1] == name
            and (arg in [*BaseWeights] or (not arg.startswith("-") and exists(Path(arg)) and not is_run(Path(arg))))
        ):
            found[-1] = f"{name}={arg}"
        else:
            found.append(arg)
    return found
