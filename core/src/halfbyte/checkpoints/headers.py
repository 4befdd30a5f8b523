"""Safetensors headers: which tensors a checkpoint has, and where their bytes are. Torch-free.

Source: the format description of huggingface/safetensors. A file is the length of the header (8 bytes, little
endian), the header (JSON), and the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from halfbyte.errors import CheckpointError

#: The longest header that safetensors itself reads.
MAX_HEADER_BYTES: Final = 100_000_000
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: name, file, safetensors' dtype, shape, and its bytes [start, stop) in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start

    def error(self, what: str) -> CheckpointError:
        """An error about this tensor, which names it and its file."""
        return CheckpointError(f"{self.file}: tensor {self.name!r}: {what}")


def read_headers(folder: Path) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Every tensor of the checkpoint in `folder` by name, and notes about what is odd but harmless.

    The shards' own headers count; the index only says which files there are. CheckpointError for a file that is not
    safetensors or is truncated, a tensor in two files, and one that the index names but no file has.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE), ()
    if (folder / INDEX_FILE).is_file():
        return _read_indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.gguf") for file in folder.glob(pattern))
        found = f"; found {', '.join(others)}, which cannot be read" if others else ""
        raise CheckpointError(f"{folder} has no .safetensors file{found}")
    return _read_files(files), ()


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes; CheckpointError unless all of it is sound."""
    header, data_start, size = _read_json(file)
    header.pop("__metadata__", None)
    infos = [_tensor_info(file, name, entry, data_start) for name, entry in header.items()]
    infos.sort(key=attrgetter("start", "stop"))
    expected = data_start
    for info in infos:
        if info.start != expected:
            raise info.error(f"its bytes start at {info.start}, expected {expected}: tensors overlap or leave a hole")
        if info.stop > size:
            raise info.error(f"its bytes end at {info.stop}, but the file has {size}: it is truncated")
        expected = info.stop
    if expected != size:
        raise CheckpointError(f"{file}: has {size} bytes, but its tensors end at {expected}")
    return {info.name: info for info in infos}


def read_floats(infos: Iterable[TensorInfo]) -> dict[str, tuple[float, ...]]:
    """All values of small float32 tensors by tensor name, without torch. Other dtypes are a CheckpointError."""
    values = {}
    for file, group in groupby(sorted(infos, key=attrgetter("file", "start")), key=attrgetter("file")):
        with file.open("rb") as stream:
            for info in group:
                if info.dtype != "F32":
                    raise info.error(f"is {info.dtype}, expected F32")
                stream.seek(info.start)
                values[info.name] = struct.unpack(f"<{info.nbytes // 4}f", stream.read(info.nbytes))
    return values


def _read_indexed(folder: Path) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    files = []
    for name in sorted(set(weight_map.values())):
        tensor = next(tensor for tensor, file in weight_map.items() if file == name)
        if Path(name).name != name:
            raise CheckpointError(f"{index}: tensor {tensor!r} is said to be in {name!r}, which is no plain file name")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: is missing; {INDEX_FILE} says that it has tensor {tensor!r}")
        files.append(folder / name)
    infos = _read_files(files)
    if missing := weight_map.keys() - infos.keys():
        first = min(missing)
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder / weight_map[first]}: tensor {first!r}{more} is in the index but in no file")
    return infos, tuple(_index_notes(weight_map, infos))


def _index_notes(weight_map: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> Iterable[str]:
    if extra := infos.keys() - weight_map.keys():
        yield f"{INDEX_FILE} does not name {len(extra)} tensors that the files have, such as {min(extra)}"
    if moved := [name for name, file in weight_map.items() if infos[name].file.name != file]:
        yield f"{INDEX_FILE} names the wrong file for {len(moved)} tensors, such as {min(moved)}"


def _read_files(files: Iterable[Path]) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for file in files:
        header = read_header(file)
        if twice := infos.keys() & header.keys():
            info = header[min(twice)]
            raise info.error(f"is also in {infos[info.name].file.name}")
        infos |= header
    return infos


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError naming the file if it holds anything else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the tensors' bytes start, size of the file)."""
    try:
        size, opened = file.stat().st_size, file.open("rb")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    with opened as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or (length > size - 8 and length <= MAX_HEADER_BYTES):
            raise CheckpointError(f"{file}: {size} bytes are too few for its header of {length}: it is truncated")
        if length > MAX_HEADER_BYTES:
            is_pointer = first == b"version "
            what = "a Git LFS pointer; download the real file" if is_pointer else "no safetensors file"
            raise CheckpointError(
                f"{file}: its header would have {length} bytes, more than the {MAX_HEADER_BYTES} that safetensors "
                f"allows: it is {what}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is {type(header).__name__}, expected a JSON object")
    return header, 8 + length, size


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file}: tensor {name!r}: its header entry has no dtype, shape and data_offsets: {entry!r}"
        ) from None
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{file}: tensor {name!r}: unknown dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise CheckpointError(f"{file}: tensor {name!r}: shape {list(shape)} or offsets [{begin}, {end}] are no sizes")
    bits = math.prod(shape) * _BITS[dtype]
    if (end - begin) * 8 != bits:
        raise CheckpointError(
            f"{file}: tensor {name!r}: {dtype} {list(shape)} needs {bits / 8:g} bytes, "
            f"but its offsets [{begin}, {end}] hold {end - begin}"
        )
    return TensorInfo(name, file, dtype, shape, data_start + begin, data_start + end)
