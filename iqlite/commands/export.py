"""`iqlite export`: what was trained, for PEFT, transformers, llama.cpp, LM Studio or Ollama."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from iqlite.base.identity import check_mergeable
from iqlite.base.names import find_gguf, shape_of
from iqlite.commands.options import Base, BaseWeights, Force, Json, Out, Scale, Weights, Which
from iqlite.errors import RunError
from iqlite.terminal import bytes_done, facts
from iqlite.terminal import console as terminal

BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}  # a weight; the others take less than q8_0, through a float16 file
ADAPTER_TYPES = ("f32", "f16")
EXAMPLES = (
    "iqlite export runs/cheerful-135m --to gguf -o cheerful.gguf --quant q8_0",
    "iqlite export runs/cheerful-135m --to ollama -o cheerful",
)


class Format(StrEnum):
    """What a run is exported as."""

    peft = "peft"
    hf = "hf"
    gguf = "gguf"
    gguf_adapter = "gguf-adapter"
    ollama = "ollama"


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    target: Annotated[Format, typer.Option("--to", help="What for.")],
    out: Out,
    quant: Annotated[str | None, typer.Option(help="Type of a GGUF's weights: f16 by default, q8_0, q4_k_m, …")] = None,
    which: Which = "adapter",
    weights: Weights = BaseWeights.trained,
    scale: Scale = 1.0,
    base: Base = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export a run for PEFT, llama.cpp, LM Studio or Ollama."""
    from iqlite.export import converter
    from iqlite.export.card import BESIDE, MANIFEST, manifest, put_beside, warnings, write_about
    from iqlite.export.checks import leaving
    from iqlite.export.gguf_file import check_quant, quantize_with, write_adapter, write_model
    from iqlite.export.gguf_keys import ARCHITECTURE
    from iqlite.export.peft import write_peft
    from iqlite.run.files import check_place, check_space, explained, replace_with

    console, to = terminal(stderr=as_json), target.value
    quant = quant.lower() if quant else None
    making = out.with_name(f".making-{out.name}")
    put_beside(making, out)
    run_dir, folder = leaving(run, which, out, MANIFEST, scale=scale, force=force, base=base)
    for beside in (out.with_name(f"{out.name}{ending}") for ending in BESIDE if to.startswith("gguf")):
        check_place(beside, MANIFEST, force=force)
    recipe = run_dir.recipe()
    original = find_gguf(recipe.model.base, recipe.folder)
    small = to == "gguf-adapter" or (to == "ollama" and original is not None)  # only the adapter is written
    if quant is not None and (to in ("peft", "hf") or (small and quant not in ADAPTER_TYPES)):
        raise RunError(
            f"--quant {quant} isn't for --to {to}" + (f": an adapter is written as {' or '.join(ADAPTER_TYPES)}." if small else ".")
        )
    tool = None if small or to in ("peft", "hf") else check_quant(quant or "f16")
    if to != "peft":
        check_mergeable(folder)
    from iqlite.export.folder import licence_of, opened, write_folder

    console.print(f"[dim]exporting {run}/{which} as {to}[/]")
    merge, chat = opened(run_dir, folder, base="stored" if small else weights.value, scale=scale, dtype=None)
    if small and merge.stored.config.model_type not in ARCHITECTURE:
        raise RunError(
            f"an adapter for a GGUF of a {merge.stored.config.model_type} model can't be written: export the whole model with --to gguf, or the adapter with --to peft."
        )
    other = converter.needed(merge.stored.config.model_type) if to in ("gguf", "ollama") and not small else None
    if other and tool is None and (quant or "f16") not in converter.WRITES:
        tool = check_quant(f"{quant}", own=False)
    if not small and to != "peft":
        parameters = shape_of(recipe.model.base, recipe.folder, recipe.model.revision).parameters
        bits = BITS.get(quant or "f16", 8.5) + (16 if tool else 0) + (16 if other else 0)  # what stands beside it for a while
        check_space(out, int(parameters * bits / 8), flag="-o")
    made: dict[str, Any] = {"format": to, "scale": scale}
    made |= {} if small or to == "peft" else {"base_weights": weights.value}
    made |= {"quantization": quant or ("f32" if small else "f16")} if to in ("gguf", "gguf-adapter", "ollama") else {}
    about = manifest(run_dir, folder, chat, licence_of(merge.stored), made)
    name = run.resolve().name
    next_command = ""

    def model_file(path: Path) -> None:
        whole = path if tool is None else path.with_name(f"{path.name}.f16")
        kind = "f16" if tool else quant or "f16"
        with bytes_done(console, "writing", merge.bytes()) as wrote:
            if other is None:
                write_model(whole, merge, chat.tokenizer, chat.stop_ids, quant=kind, name=name, wrote=wrote)
            else:
                merged = path.with_name(f"{path.name}.merged")
                write_folder(merged, merge, chat, {key: about[key] for key in ("base", "adapter", "made")}, wrote)
        if other is not None:
            console.print("[dim]llama.cpp's converter writes the GGUF[/]")
            try:
                converter.convert(other, merged, whole, kind)
            finally:
                shutil.rmtree(merged)
        if tool is not None:
            quantize_with(tool, whole, path, str(quant))
            whole.unlink()

    with explained(out, "export again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        if to == "hf":
            with bytes_done(console, "writing", merge.bytes()) as wrote:
                write_folder(making, merge, chat, {key: about[key] for key in ("base", "adapter", "made")}, wrote)
        elif to == "gguf":
            model_file(making)
            next_command = f"llama-cli -m {shlex.quote(str(out))}"
        elif to == "gguf-adapter":
            write_adapter(making, merge, quant=quant or "f32", name=name)
            next_command = f"llama-cli -m {shlex.quote(str(original or 'THE-BASE.gguf'))} --lora {shlex.quote(str(out))}"
        else:
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
        if to == "peft":
            write_peft(making, folder, chat, scale=scale)
        if to == "ollama":
            next_command = _ollama(making, out, recipe.model.base, original, merge, chat, quant, name, model_file, about)
        write_about(making, about, peft=to == "peft")
        replace_with(making, out)
        put_beside(making, out)
    size = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]))
    if as_json:
        print(json.dumps({"path": str(out), "format": to, "bytes": size, "warnings": warnings(about), **made}))
        return
    facts(console, {"exported": str(out), "as": to, "size": f"{size / 2**20:.1f} MiB"} | ({"next": next_command} if next_command else {}))
    for sentence in warnings(about):
        console.print(f"[yellow]{sentence}[/]")


def _ollama(
    making: Path,
    out: Path,
    base: str,
    original: Path | None,
    merge: Any,
    chat: Any,
    quant: str | None,
    name: str,
    model_file: Any,
    about: dict[str, Any],
) -> str:
    """Fills the folder for `ollama create`; returns that command."""
    from iqlite.export.gguf_file import write_adapter
    from iqlite.export.ollama import Template, modelfile

    if original is not None:
        write_adapter(making / "adapter.gguf", merge, quant=quant or "f32", name=name)
        source = base.removeprefix("ollama:") if base.startswith("ollama:") else str(original.resolve())
        text = modelfile(chat, source, "./adapter.gguf")
    else:
        model_file(making / "model.gguf")
        text = modelfile(chat, "./model.gguf", None)
    (making / "Modelfile").write_text(text, "utf-8")
    about["made"]["template_exact"] = Template.of(chat).is_exact(chat)
    if "strftime_now" in chat.template:
        about["made"]["template_dated"] = True
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"  # what Ollama takes
    return f"ollama create {plain} -f {shlex.quote(str(out / 'Modelfile'))}"
