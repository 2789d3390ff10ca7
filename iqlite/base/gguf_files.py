"""GGUF files → folders in Hugging Face format.

The conversion (dequantised weights, tokenizer, chat template) is cached by the file's content hash, in IQLITE_CACHE or the user's
cache folder, and written beside its final place first, so that an interrupted one leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from iqlite.base.gguf_config import correct, loses_sizes
from iqlite.base.gguf_header import gguf_header
from iqlite.errors import BaseError, first_line
from iqlite.integrity import of_the_disk, put
from iqlite.places import cache_folder, making, note_origin, usual_rights

CONVERSION = 3  # raise it when the conversion changes, so that old caches aren't read
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
FACTORS = ("rope_freqs", "rope_factors")  # tensors that scale positions
FLOAT32_UP_TO = 2 * 2**30  # bytes of GGUF; larger files are converted to float16, half the disk


def convert_gguf(path: Path, name: str) -> Path:
    """A folder in Hugging Face format with the file's dequantised weights, tokenizer and chat template; cached by content.

    `path` may be the first of the parts that a file was split into. BaseError if weights are missing, or nothing can be made of it.
    """
    files = parts_of(path, name)
    digest = _digest(files)
    folder = cache_folder() / f"gguf-{digest}-v{CONVERSION}"
    origin = str(path.resolve()) if name.endswith(path.name) else name  # a blob of Ollama's has no name that says anything
    if (folder / "config.json").is_file():
        note_origin(folder, origin)
        return folder
    architecture, fields, factors = told(files, name)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from iqlite.base.gguf_proof import prove

    dtype = torch.float32 if sum(file.stat().st_size for file in files) <= FLOAT32_UP_TO else torch.float16
    link = making(digest)
    out = link.with_name(f"{link.name}.out")  # not with_suffix: a host's name may have dots
    try:
        link.mkdir(parents=True, exist_ok=True)
        out.mkdir(exist_ok=True)
        source = link / "model.gguf"  # transformers wants a folder and a file name; blobs have no suffix
        if len(files) > 1:
            join(files, source)
        else:
            try:
                source.symlink_to(path.resolve())
            except OSError:  # Windows without the right to make links
                shutil.copyfile(path, source)
        given = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(str(link), **given)
        options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype, "output_loading_info": True, **given}
        if loses_sizes(architecture, fields):  # it takes half a minute to read a large vocabulary, so not for every file
            options["config"] = AutoConfig.from_pretrained(str(link), **given)
            correct(options["config"], architecture, fields, factors, name)
        model, found = AutoModelForCausalLM.from_pretrained(str(link), **options)
        correct(model.config, architecture, fields, factors, name)
        if found["missing_keys"]:  # transformers would fill them with random numbers
            missing = sorted(found["missing_keys"])
            raise BaseError(
                f"base {name!r}: the GGUF file {path} lacks {len(missing)} of its weights, such as {missing[0]}; download it again."
            )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        del model
        written = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, use_safetensors=True)  # what was written is proved
        prove(written, {tensor.name: tensor for file in files for tensor in _tensors(file)}, architecture, fields, name)
        del written
        note_origin(out, origin)
        usual_rights(out)
        shutil.rmtree(link, ignore_errors=True)  # before the last step: after that nobody would look for it
        put(out, folder)
    except (ValueError, LookupError, NotImplementedError, RuntimeError, AttributeError, TypeError, ArithmeticError) as error:
        raise BaseError(
            f"base {name!r}: a GGUF of architecture {architecture!r} that transformers can't convert ({first_line(error)}); use the original model's folder."
        ) from None
    except Exception as error:  # tokenizers raises nothing narrower
        if not of_the_disk(error):
            raise
        if folder.is_dir():  # another process was quicker
            return folder
        raise BaseError(
            f"base {name!r}: the conversion can't be written to {cache_folder()} ({error}); free some space or set IQLITE_CACHE."
        ) from None
    finally:
        shutil.rmtree(link, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    return folder


def parts_of(path: Path, name: str) -> list[Path]:
    """All parts of a GGUF file that was split (…-00001-of-00003.gguf), in order, or the file alone; BaseError names one that is missing."""
    split = SPLIT.search(path.name)
    if split is None:
        return [path]
    found = [path.with_name(f"{path.name[: split.start()]}-{part:05d}-of-{split[2]}.gguf") for part in range(1, int(split[2]) + 1)]
    missing = [part.name for part in found if not part.is_file()]
    if missing:
        raise BaseError(f"base {name!r} is split into {len(found)} parts, and {missing[0]} isn't beside the others: download all of them.")
    return found


def tensors_of(path: Path) -> list[Any]:
    """The tensors of a GGUF file, or of all its parts, as the gguf library reads them."""
    return [tensor for part in parts_of(path, str(path)) for tensor in _tensors(part)]


def _tensors(part: Path) -> Iterable[Any]:
    import gguf

    found: Iterable[Any] = gguf.GGUFReader(part).tensors
    return found


def join(parts: Sequence[Path], out: Path) -> None:
    """One GGUF file of the parts that it was split into."""
    import gguf

    readers = [gguf.GGUFReader(part) for part in parts]
    writer = gguf.GGUFWriter(out, str(readers[0].fields["general.architecture"].contents()))
    copy_fields(readers[0], writer, ("GGUF.", "general.architecture", "split."))
    for reader in readers:
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_fields(reader: Any, writer: Any, but: tuple[str, ...]) -> None:
    """Every field of a file whose name doesn't begin with one of `but`."""
    import gguf

    for field in reader.fields.values():
        if not field.name.startswith(but):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)


def _digest(files: Sequence[Path]) -> str:
    sums = []
    for path in files:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    return (sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest())[:32]


def told(files: Sequence[Path], name: str) -> tuple[str, dict[str, Any], dict[str, list[float]]]:
    """(architecture, metadata, tensors of rotation factors by their names); BaseError for a file that can't be read."""
    try:
        headers = [gguf_header(file) for file in files]  # the gguf library takes seconds over one, and believes what it says
        scaled = [file for file, (_, tensors) in zip(files, headers, strict=True) if any(key.startswith(FACTORS) for key in tensors)]
        factors = {t.name: t.data.tolist() for file in scaled for t in _tensors(file) if t.name.startswith(FACTORS)}
        return str(headers[0][0]["general.architecture"]), headers[0][0], factors
    except (ValueError, LookupError, TypeError, OSError, ArithmeticError, AttributeError) as error:
        raise BaseError(f"base {name!r}: the GGUF file {files[0]} can't be read ({first_line(error)}); download it again.") from None
