"""`iqlite merge`: a run's adapter summed into its base, shard by shard, as a model that needs neither iqlite nor PEFT."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from iqlite.export.card import MANIFEST, manifest, warnings, write_about
from iqlite.machine.memory import shape_of
from iqlite.run.rundir import check_space, explained, leaving, replace_with
from iqlite.terminal import bytes_done, facts

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FAR = 0.05  # nats a token between adapter and merged model from which the user is warned; ours


def run(
    run_path: Path,
    out: Path,
    *,
    adapter: str,
    base: str,
    strength: float,
    dtype: str | None,
    check: bool,
    force: bool,
    as_json: bool,
    console: Console,
) -> int:
    """Merges, measures, prints; returns the exit code. What can be refused is refused before torch is imported."""
    run_dir, folder = leaving(run_path, adapter, out, MANIFEST, strength=strength, force=force)
    recipe = run_dir.recipe()
    parameters = shape_of(recipe.model.base, recipe.folder, recipe.model.revision).parameters
    check_space(out, int(parameters * BYTES[dtype or "bfloat16"]), flag="-o")

    from iqlite.export.folder import fits_check, kl_to_merged, licence_of, opened, write_folder

    console.print(f"[dim]merging {run_path}/{adapter} into its base[/]")
    merge, chat = opened(run_dir, folder, base=base, strength=strength, dtype=dtype)
    making = out.with_name(f".making-{out.name}")
    done = sum(file.stat().st_size for file in making.glob("*.safetensors")) if making.is_dir() else 0
    check_space(out, merge.bytes() - done, flag="-o")
    made = {"format": "safetensors", "base_weights": base, "scale": strength, "dtype": dtype or "as stored"}
    about = manifest(run_dir, folder, chat, licence_of(merge.stored), made)
    job = {key: about[key] for key in ("base", "adapter", "made")}
    with explained(out, "go on with the same command"):
        with bytes_done(console, "writing", merge.bytes()) as wrote:
            write_folder(making, merge, chat, job, wrote)
        write_about(making, about)
        replace_with(making, out)  # it is whole: whatever the check below runs into, the merged model is there
    size, fits = merge.bytes(), fits_check(merge)
    del merge
    kl = None
    if check and fits:
        placement = run_dir.environment()["placement"]
        with explained(out, "merge again with --no-check"), TemporaryDirectory(dir=out.parent, prefix=".check-") as scratch:
            kl = kl_to_merged(
                recipe,
                folder,
                placement,
                out,
                Path(scratch) / "logp.npy",
                strength=strength,
                say=lambda text: console.print(f"[dim]{text}[/]"),
            )
            fits = kl is not None
            about["figures"] |= {} if kl is None else {"kl_adapter_merged": kl}
            write_about(out, about)
    if as_json:
        print(
            json.dumps(
                {
                    "path": str(out),
                    "bytes": size,
                    "kl_adapter_merged": kl,
                    "base_weights": base,
                    "scale": strength,
                    "warnings": warnings(about),
                }
            )
        )
        return 0
    if not check:
        measured = "not measured (--no-check)"
    elif not fits:
        measured = "not measured: the unquantised model doesn't fit this machine's memory"
    else:
        measured = f"{kl:.5f} nats a token on answers to held-out prompts"
    facts(
        console, {"merged": str(out), "size": f"{size / 2**30:.2f} GiB", "base weights": base, "KL(adapter on its base ‖ merged)": measured}
    )
    if kl is not None and kl > FAR:
        console.print(f"[yellow]The merged model differs from what was trained by {kl:.3f} nats a token: merge with --base trained.[/]")
    for sentence in warnings(about):
        console.print(f"[yellow]{sentence}[/]")
    console.print(f"next:  iqlite chat {shlex.quote(str(out))}", markup=False)
    return 0
