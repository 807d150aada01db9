"""Files of weights, read without running anything that they hold: PyTorch, safetensors, NumPy and TensorFlow."""

from __future__ import annotations

import math
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_BYTES = 2 * 2**30
"""Of tensors in a compressed file: a few hundred times Inception-BN's, with an optimiser's moments many dozen."""

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
"""Under which training programs store the tensors; Lightning's Polyak averaging keeps the average in the first."""

TENSORFLOW_TABLE = struct.pack("<Q", 0xDB4775248B80FB57)
"""How TensorFlow's own files (SSTables) end."""


CADENE = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"
SLIM = "http://download.tensorflow.org/models/inception_v2_2016_08_28.tar.gz"

WHERE_FROM = (
    "name a checkpoint of syncbn fit (RUN_FOLDER/checkpoints/...), or a file published with weights of ImageNet:"
    f" {CADENE} or, unpacked, {SLIM} (docs/weights.md); a fit without model.weights begins with random weights"
)
"""Weights, in a message."""


class WeightsError(ValueError):
    """A file cannot be taken as weights; the message names it and says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"weights {path}: {reason}")


@dataclass(frozen=True)
class FileContent:
    """What was read from a file.

    Attributes:
        tensors: By their keys.
        others: Keys next to them whose values are no tensors.
        metadata: What else the file says: safetensors' metadata, or the top level of a checkpoint.
    """

    tensors: dict[str, Tensor]
    others: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_file(path: Path) -> FileContent:
    """Read the tensors of a file, whose kind is told by its content.

    Args:
        path: Of a PyTorch checkpoint, a safetensors file, an .npz archive; or of a TensorFlow checkpoint, whose path
            is what its files have in common.

    Raises:
        WeightsError: There is no such file, or it is no weights, damaged, or holds more than data.
    """
    if path.suffix == ".index" or not path.exists():
        prefix = path.with_suffix("") if path.suffix == ".index" else path
        if Path(f"{prefix}.index").is_file():
            return _read_tensorflow(prefix)
    if not path.exists():
        raise WeightsError(path, f"there is no such file; {WHERE_FROM}")
    if path.is_dir():
        raise WeightsError(path, "it is a folder: name the file of weights in it")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(16)
        file.seek(-min(8, size), os.SEEK_END)
        end = file.read()
    if size == 0:
        raise WeightsError(path, "it is empty")
    if start.startswith(b"PK"):
        return _read_zip(path)
    if len(start) > 8 and start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith(b"\x80"):
        return _read_torch(path)
    if end == TENSORFLOW_TABLE:
        return _read_tensorflow(path)
    if start.startswith(b"version https://"):
        raise WeightsError(path, "it is a pointer of Git LFS instead of the weights: `git lfs pull` fetches them")
    if path.suffix == ".onnx":
        raise WeightsError(path, "it is a graph, which onnxruntime runs: name the weights that it was exported from")
    raise WeightsError(path, "it is none of PyTorch's, safetensors', NumPy's .npz and TensorFlow's files of weights")


# ---- zip archives: PyTorch's, or NumPy's ---------------------------------------------------------


def _read_zip(path: Path) -> FileContent:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise WeightsError(path, f"it is truncated or damaged ({error})") from error
    if members and all(member.filename.endswith(".npy") for member in members):
        return _read_npz(path, members)
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or sum(member.file_size for member in members) > path.stat().st_size:
        raise WeightsError(path, "its members are compressed or overlap, which PyTorch never writes: it is refused")
    return _read_torch(path)


def _read_npz(path: Path, members: list[zipfile.ZipInfo]) -> FileContent:
    total = sum(member.file_size for member in members)
    if total > MAX_BYTES:
        raise WeightsError(path, f"its arrays would take {total / 2**30:.1f} GiB: it is refused")
    tensors, others = {}, []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in members:
                array = _read_npy(archive, member)
                name = member.filename.removesuffix(".npy")
                if array is None:
                    others.append(name)
                else:
                    tensors[name] = torch.from_numpy(array)
    except Exception as error:  # whatever zlib and NumPy may raise at junk
        raise WeightsError(path, f"it cannot be read as arrays ({_first_line(error)})") from error
    return FileContent(tensors, tuple(others))


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray | None:
    """An array of numbers; None for another one. Its header is checked before memory is taken for it."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects")
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} promises {dtype} of shape {shape}, more than it holds")
    if dtype.kind not in "fiu":
        return None
    with archive.open(member) as file:
        return np.ascontiguousarray(np.lib.format.read_array(file, allow_pickle=False))


# ---- PyTorch -------------------------------------------------------------------------------------


def _read_torch(path: Path) -> FileContent:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a pickle that is refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling junk may raise
        raise WeightsError(path, _why_unreadable(error)) from error
    if not isinstance(content, dict):
        raise WeightsError(path, f"it holds a {type(content).__name__}, not a state_dict")
    state = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), content)
    metadata = {} if state is content else {key: value for key, value in content.items() if value is not state}
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise WeightsError(path, f"{key} is sparse, quantised or without data: plain tensors are read")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                path,
                f"{key} has the shape {tuple(tensor.shape)} but fewer numbers, repeated: save a clone() of it instead",
            )
    return FileContent(tensors, tuple(str(key) for key in state if str(key) not in tensors), metadata)


def _why_unreadable(error: Exception) -> str:
    """Of what torch.load raised, what a user can do something about."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return (
            f"it asks for the Python object {code.group(1)}, and only tensors are loaded: save a state_dict() instead"
        )
    if isinstance(error, pickle.UnpicklingError):  # whose first lines advise to load it with code and all
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        return (
            f"it is damaged, or a pickle that torch.save did not write ({reason or 'no tensors'}), and only tensors"
            " are loaded: save a state_dict() by torch.save instead"
        )
    return f"it is truncated, damaged or no checkpoint ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}"


# ---- safetensors and TensorFlow ------------------------------------------------------------------


def _read_safetensors(path: Path) -> FileContent:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return FileContent(tensors, (), file.metadata() or {})
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise WeightsError(path, f"it is damaged or no safetensors file ({_first_line(error)})") from error


def _read_tensorflow(path: Path) -> FileContent:
    try:
        from tensorflow.train import load_checkpoint
    except ImportError as error:
        raise WeightsError(
            path,
            "it is a TensorFlow checkpoint, which the package tensorflow reads: install it, or where it is installed"
            " save the variables by numpy.savez(FILE, **{name: reader.get_tensor(name) for name in"
            " reader.get_variable_to_shape_map()}) with reader = tensorflow.train.load_checkpoint(...)",
        ) from error
    tensors, others = {}, []
    try:
        reader = load_checkpoint(str(path))
        types = reader.get_variable_to_dtype_map()
        for name in reader.get_variable_to_shape_map():
            if types[name].is_floating or types[name].is_integer:
                tensors[name] = torch.from_numpy(np.array(reader.get_tensor(name)))
            else:
                others.append(name)
    except Exception as error:  # TensorFlow's own kinds of errors
        raise WeightsError(path, f"TensorFlow cannot read it ({_first_line(error)})") from error
    return FileContent(tensors, tuple(others))
