"""`iqlite merge`: a run's adapter summed into its base, shard by shard, as a model that needs neither iqlite nor PEFT."""

from __future__ import annotations

import json
import shlex
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from iqlite.base.names import shape_of
from iqlite.commands.options import Base, BaseWeights, Force, Json, Out, Scale, Weights, Which
from iqlite.terminal import bytes_done, facts
from iqlite.terminal import console as terminal

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FAR = 0.05  # nats a token between adapter and merged model from which the user is warned; our choice
EXAMPLES = ("iqlite merge runs/cheerful-135m -o cheerful",)


class DType(StrEnum):
    """What merged weights are written as."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def merge(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Out,
    which: Which = "adapter",
    weights: Weights = BaseWeights.trained,
    scale: Scale = 1.0,
    base: Base = None,
    dtype: Annotated[DType | None, typer.Option(help="What is written; by default what the base is stored in.")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Measure how far the merged model is from the adapter on its base.")
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Sum a run's adapter into its base, as a whole model.

    Written shard by shard in Hugging Face format, for programs that know neither iqlite nor PEFT.
    """
    from iqlite.export.card import MANIFEST, manifest, warnings, write_about
    from iqlite.export.checks import leaving
    from iqlite.run.files import check_space, explained, replace_with

    console = terminal(stderr=as_json)
    kind = dtype.value if dtype else None
    run_dir, folder = leaving(run, which, out, MANIFEST, scale=scale, force=force, base=base)
    recipe = run_dir.recipe()
    parameters = shape_of(recipe.model.base, recipe.folder, recipe.model.revision).parameters
    check_space(out, int(parameters * BYTES[kind or "bfloat16"]), flag="-o")

    from iqlite.export.distance import fits_check, kl_to_merged
    from iqlite.export.folder import licence_of, opened, write_folder

    console.print(f"[dim]merging {run}/{which} into its base[/]")
    merged, chat = opened(run_dir, folder, base=weights.value, scale=scale, dtype=kind)
    making = out.with_name(f".making-{out.name}")
    done = sum(file.stat().st_size for file in making.glob("*.safetensors")) if making.is_dir() else 0
    check_space(out, merged.bytes() - done, flag="-o")
    made = {"format": "safetensors", "base_weights": weights.value, "scale": scale, "dtype": kind or "as stored"}
    about = manifest(run_dir, folder, chat, licence_of(merged.stored), made)
    job = {key: about[key] for key in ("base", "adapter", "made")}
    with explained(out, "go on with the same command"):
        with bytes_done(console, "writing", merged.bytes()) as wrote:
            write_folder(making, merged, chat, job, wrote)
        write_about(making, about)
        replace_with(making, out)  # it is whole: whatever the check below runs into, the merged model is there
    size, fits = merged.bytes(), fits_check(merged)
    del merged
    kl = None
    if check and fits:
        with explained(out, "merge again with --no-check"), TemporaryDirectory(dir=out.parent, prefix=".check-") as scratch:
            kl = kl_to_merged(
                run_dir, folder, out, Path(scratch) / "logp.npy", scale=scale, say=lambda text: console.print(f"[dim]{text}[/]")
            )
            fits = kl is not None
            about["figures"] |= {} if kl is None else {"kl_adapter_merged": kl}
            write_about(out, about)
    if as_json:
        said = {"path": str(out), "bytes": size, "kl_adapter_merged": kl, "base_weights": weights.value, "scale": scale}
        print(json.dumps(said | {"warnings": warnings(about)}))
        return
    if not check:
        measured = "not measured (--no-check)"
    elif not fits:
        measured = "not measured: the unquantised model doesn't fit this machine's memory"
    else:
        measured = f"{kl:z.5f} nats a token on answers to held-out prompts"
    facts(
        console,
        {
            "merged": str(out),
            "size": f"{size / 2**30:.2f} GiB",
            "base weights": weights.value,
            "KL(adapter on its base ‖ merged)": measured,
        },
    )
    if kl is not None and kl > FAR:
        console.print(f"[yellow]The merged model differs from what was trained by {kl:.3f} nats a token: merge with --weights trained.[/]")
    for sentence in warnings(about):
        console.print(f"[yellow]{sentence}[/]")
    console.print(f"next:  iqlite chat {shlex.quote(str(out))}", markup=False)
