"""Checkpoints stored in FP8, MXFP4 or compressed-tensors → folders of their weights in 16 bits, dequantised by transformers.

Cached by what the files are, in IQLITE_CACHE or the user's cache folder, and written beside its final place first, so that an interrupted
conversion leaves nothing behind. From there on, such a base is like any other: quantised to NF4 when it is loaded, merged into in 16 bits.
No torch at the top.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from iqlite.errors import BaseError, first_line
from iqlite.integrity import put
from iqlite.places import cache_folder, making, note_origin

CONVERSION = 1  # raise it when the conversion changes, so that old caches aren't read
READ = {"fp8": None, "mxfp4": None, "compressed-tensors": "compressed_tensors"}  # and the module that transformers needs to read one
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "README.md"]


def method_of(config: Any) -> str | None:
    """How a configuration says that its weights are quantised; None for plain ones."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    told: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return str(told.get("quant_method", "an unknown way"))


def dequantised(source: str, config: Any, name: str, revision: str | None = None) -> str:
    """`source` itself, or the folder of its dequantised weights if it is stored in a way that transformers can dequantise.

    BaseError if a package is missing for that, or it can't be read or written.
    """
    method = method_of(config)
    if method not in READ:
        return source
    package = READ[method]
    if package and importlib.util.find_spec(package) is None:
        raise BaseError(f"base {name!r} is stored as {method}, which needs one more package to be read: pip install {method}")
    import torch
    from safetensors import SafetensorError

    from iqlite.base.anatomy import FAULTS, auto_class

    kept = _on_disk(source, name, revision)
    folder = cache_folder() / f"{method}-{_digest(kept)}-v{CONVERSION}"
    if (folder / "config.json").is_file():
        return str(folder)
    out = making(folder.name)
    told = config.quantization_config if isinstance(config.quantization_config, dict) else config.quantization_config.to_dict()
    config.quantization_config = {**told, "dequantize": True}
    try:
        out.mkdir(parents=True, exist_ok=True)
        model, found = auto_class(config, name).from_pretrained(
            kept, config=config, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        lost = sorted(found["missing_keys"] | {str(key) for key in found["mismatched_keys"]})
        if lost:  # transformers would fill them with random numbers
            raise BaseError(f"base {name!r} lacks {len(lost)} of its weights, such as {lost[0]}; download it again.")
        for key in ("quantization_config", "_pre_quantization_dtype"):
            vars(model.config).pop(key, None)
        model.hf_quantizer, model.is_quantized, model._weight_conversions = None, False, None  # else they are saved as they were stored
        model.to(torch.bfloat16).save_pretrained(out)
        del model
        for file in kept.iterdir():  # tokenizer, chat template, generation's settings: as they are
            if file.is_file() and file.name != "config.json" and ".safetensors" not in file.name:
                shutil.copyfile(file, out / file.name)
        note_origin(out, name)
        put(out, folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # else another process was quicker
            raise BaseError(
                f"base {name!r}: its dequantised weights can't be written to {cache_folder()} ({first_line(error)}); free some space or set IQLITE_CACHE."
            ) from None
    except FAULTS as error:
        raise BaseError(
            f"base {name!r} is stored as {method} in a way that transformers can't dequantise ({first_line(error)}): take the model's 16-bit original, or a GGUF file."
        ) from None
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return str(folder)


def _on_disk(source: str, name: str, revision: str | None) -> Path:
    """The folder of the stored files, downloaded if they aren't here."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=WANTED))
    except OSError as error:
        raise BaseError(
            f"base {name!r} can't be downloaded ({first_line(error)}): connect to the network, or name a local folder."
        ) from None


def _digest(folder: Path) -> str:
    """Of the configuration and every weights file's content."""
    whole = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:32]
