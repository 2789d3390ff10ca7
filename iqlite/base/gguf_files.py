"""GGUF files → folders in Hugging Face format.

The conversion (dequantised weights, tokenizer, chat template) is cached by the file's content hash, in IQLITE_CACHE or the user's
cache folder, and written beside its final place first, so that an interrupted one leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from pathlib import Path

from iqlite.base.architectures import GGUF_ARCHITECTURES
from iqlite.errors import BaseError
from iqlite.places import cache_folder

CONVERSION = 1  # raise it when the conversion changes, so that old caches aren't read
FLOAT32_UP_TO = 2 * 2**30  # bytes of GGUF; larger files are converted to float16, half the disk


def convert_gguf(path: Path, name: str) -> Path:
    """A folder in Hugging Face format with the file's dequantised weights, tokenizer and chat template; cached by content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / f"gguf-{digest[:32]}-v{CONVERSION}"
    if (folder / "config.json").is_file():
        return folder
    try:
        architecture = _architecture(path)
    except (ValueError, IndexError, KeyError, OSError, struct.error, AttributeError) as error:
        raise BaseError(f"base {name!r}: the GGUF file {path} can't be read ({error}); download it again.") from None
    if architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise BaseError(f"base {name!r}: a GGUF of architecture {architecture!r}, which isn't supported; choose one of: {known}.")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dtype = torch.float32 if path.stat().st_size <= FLOAT32_UP_TO else torch.float16
    link = cache_folder() / f"making-{digest[:32]}-{os.getpid()}"
    making = link.with_suffix(".out")
    try:
        link.mkdir(parents=True, exist_ok=True)
        making.mkdir(exist_ok=True)
        source = link / "model.gguf"  # transformers wants a folder and a file name; blobs have no suffix
        try:
            source.symlink_to(path.resolve())
        except OSError:  # Windows without the right to make links
            shutil.copyfile(path, source)
        tokenizer = AutoTokenizer.from_pretrained(str(link), gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(link), gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
        )
        model.save_pretrained(making)
        tokenizer.save_pretrained(making)
        del model
        os.replace(making, folder)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own error
        if folder.is_dir():  # another process was quicker
            return folder
        raise BaseError(
            f"base {name!r}: the conversion can't be written to {cache_folder()} ({error}); free some space or set IQLITE_CACHE."
        ) from None
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise BaseError(
            f"base {name!r}: a GGUF of architecture {architecture!r} that can't be converted ({error}); use the original model's folder."
        ) from None
    finally:
        shutil.rmtree(link, ignore_errors=True)
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _architecture(path: Path) -> str:
    from gguf import GGUFReader

    return str(GGUFReader(path).fields["general.architecture"].contents())
