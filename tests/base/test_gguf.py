"""GGUF files in: what llama.cpp's own converter wrote of a model comes back as that model, to the last bit; what is missing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig

from iqlite.base.anatomy import auto_class
from iqlite.base.gguf_config import _llama3, correct
from iqlite.base.gguf_files import convert_gguf, tensors_of
from iqlite.base.names import find_gguf, shape_of
from iqlite.base.shape import Shape
from iqlite.errors import BaseError
from iqlite.export.gguf_keys import rope_factors
from tests.helpers import llama_cpp
from tests.helpers.tiny import make_tokenizer, save_tiny

IDS = torch.arange(60).reshape(2, 30)
KNOWN = ("llama", "qwen2", "mistral", "gemma2", "qwen3", "gemma3_text", "phi3", "stablelm", "lfm2", "qwen3_moe")  # to both programs
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "llama3": ("llama", LLAMA3),
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "yarn": ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
    "qwen3-yarn": ("qwen3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
}


def logits(folder: Path) -> torch.Tensor:
    model = auto_class(AutoConfig.from_pretrained(folder), folder.name).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def made(folder: Path, architecture: str, **config: Any) -> Path:
    """A tiny model's folder with its file by llama.cpp's converter, model.gguf."""
    if architecture.startswith("gemma3"):  # the converter leaves its unused rows out
        config |= {"vocab_size": len(make_tokenizer(merges=True)), "num_hidden_layers": 6, "layer_types": None}  # both know one pattern
    save_tiny(folder, architecture, merges=True, **config)
    llama_cpp.converter("f32")(folder, folder / "model.gguf")
    return folder / "model.gguf"


@pytest.mark.parametrize("architecture", KNOWN)
def test_a_file_comes_back_as_its_model(architecture: str, tmp_path: Path) -> None:
    file = made(tmp_path / "model", architecture)
    assert torch.equal(logits(convert_gguf(file, "it")), logits(tmp_path / "model"))
    there, counted = shape_of(str(file)), Shape.of(AutoConfig.from_pretrained(tmp_path / "model").to_dict(), "it")
    assert (there.hidden, there.layers, there.tied, there.context) == (counted.hidden, counted.layers, counted.tied, counted.context)
    assert there.parameters == pytest.approx(counted.parameters, rel=0.02)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_scaling_of_positions_is_kept(scaling: str, tmp_path: Path) -> None:
    architecture, rope = SCALINGS[scaling]
    file = made(tmp_path / "model", architecture, rope_parameters=rope | {"rope_theta": 10000.0})
    plain = save_tiny(tmp_path / "plain", architecture, merges=True)
    expected = logits(tmp_path / "model")
    assert (expected - logits(plain)).abs().max() > 0.1  # the scaling does something at these lengths
    assert torch.allclose(logits(convert_gguf(file, "it")), expected, atol=1e-5)


@pytest.mark.parametrize("numbers", [(8.0, 500000.0, 8192, 128), (32.0, 500000.0, 8192, 64), (8.0, 10000.0, 64, 16), (4.0, 1e6, 4096, 128)])
def test_llama_3_s_numbers_are_found_again(numbers: tuple[float, float, int, int]) -> None:
    """From the factors that a file holds, the four numbers that made them."""
    factor, theta, original, size = numbers
    rope = LLAMA3 | {"factor": factor, "rope_theta": theta, "original_max_position_embeddings": original}
    config = AutoConfig.for_model("llama", head_dim=size, rope_parameters=rope)
    factors = rope_factors(config)
    assert factors is not None
    found = _llama3(config, [float(torch.tensor(value)) for value in factors], "it")  # as float32, as in a file
    assert found == {key: value for key, value in rope.items() if key != "rope_theta"}


@pytest.mark.parametrize(
    "fields", [{"rope.scale_linear": 4.0}, {"rope.scaling.factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}]
)
def test_older_spellings_of_a_linear_scaling(fields: dict[str, Any]) -> None:
    config = AutoConfig.for_model("llama")
    correct(config, "llama", {f"llama.{key}": value for key, value in fields.items()}, {}, "it")
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 4.0)


def test_a_scaling_that_cannot_be_carried_over_is_refused() -> None:
    config = AutoConfig.for_model("llama")
    with pytest.raises(BaseError, match="scaled by 'su', which can't be carried over"):
        correct(config, "llama", {"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}, {}, "it")
    with pytest.raises(BaseError, match="no known scaling"):
        correct(config, "llama", {}, {"rope_freqs.weight": [1.0, 3.0, 2.0, 8.0]}, "it")


def rewritten(file: Path, out: Path, but: tuple[str, ...] = (), **options: Any) -> None:
    """The file anew by the gguf library, without some tensors, or in parts of so many (`split_max_tensors`)."""
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(out, "llama", **options)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        if tensor.name not in but:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_parts_are_one_model(tmp_path: Path) -> None:
    file = made(tmp_path / "model", "llama")
    folder = tmp_path / "parts"
    folder.mkdir()
    rewritten(file, folder / "part.gguf", split_max_tensors=8)
    parts = sorted(folder.glob("part-*.gguf"))
    assert len(parts) == 3
    (folder / "mmproj-model-f16.gguf").write_bytes(b"GGUF")  # a vision projector beside it is none of its parts
    assert find_gguf(str(folder)) == parts[0]
    assert torch.equal(logits(convert_gguf(parts[0], "it")), logits(tmp_path / "model"))
    assert shape_of(str(folder)) == shape_of(str(file))
    assert find_gguf(str(parts[1])) == parts[0]  # whichever part is named
    assert [tensor.name for tensor in tensors_of(parts[0])] == [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    parts[1].unlink()
    with pytest.raises(BaseError, match="is split into 3 parts, and part-00002-of-00003.gguf isn't beside the others"):
        convert_gguf(parts[0], "it")


def test_a_missing_tensor_is_refused_and_nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IQLITE_CACHE", str(tmp_path / "cache"))
    file = made(tmp_path / "model", "llama")
    rewritten(file, tmp_path / "lacking.gguf", but=("blk.1.ffn_down.weight",))
    with pytest.raises(BaseError, match=r"lacks 1 of its weights, such as model\.layers\.1\.mlp\.down_proj\.weight"):
        convert_gguf(tmp_path / "lacking.gguf", "it")
    assert not list((tmp_path / "cache").iterdir())


def test_what_transformers_cannot_convert_is_said(tmp_path: Path) -> None:
    file = made(tmp_path / "model", "granite")
    with pytest.raises(BaseError, match="architecture 'granite' that transformers can't convert.*use the original model's folder"):
        convert_gguf(file, "it")
