"""Safetensors headers: agreement with the safetensors package, and every way in which a file can be broken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from halfbyte.checkpoints.headers import INDEX_FILE, SINGLE_FILE, read_floats, read_header, read_headers
from halfbyte.errors import CheckpointError
from support.checkpoints import write_checkpoint

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(0.5),
    "d": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
    "e": torch.empty(0, 3),
    "f": torch.arange(5, dtype=torch.uint8),
}


def write_raw(file: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_headers_of_one_file_agree_with_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    infos, notes = read_headers(tmp_path)
    raw = (tmp_path / SINGLE_FILE).read_bytes()
    with safe_open(tmp_path / SINGLE_FILE, "pt") as oracle:
        assert infos.keys() == set(oracle.keys())
        for name, info in infos.items():
            stored = oracle.get_slice(name)
            assert (info.dtype, list(info.shape)) == (stored.get_dtype(), stored.get_shape())
            tensor = oracle.get_tensor(name)
            if tensor.numel():
                assert raw[info.start : info.stop] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert notes == ()


def test_sharded_headers_are_read_from_all_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=3)
    infos, notes = read_headers(tmp_path)
    assert infos.keys() == TENSORS.keys()
    assert len({info.file for info in infos.values()}) == 3
    assert notes == ()


def test_shards_without_an_index_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2)
    (tmp_path / INDEX_FILE).unlink()
    assert read_headers(tmp_path)[0].keys() == TENSORS.keys()


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_truncated_file_names_the_tensor_that_is_cut(tmp_path: Path, cut: int) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    os.truncate(tmp_path / SINGLE_FILE, (tmp_path / SINGLE_FILE).stat().st_size - cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor '[a-f]': .* truncated"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: f.write_bytes(b""), "truncated"),
        (lambda f: f.write_bytes(b"\x10\0\0\0\0\0\0\0{"), "truncated"),
        (lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda f: f.write_bytes(b"\xff" * 64), "no safetensors file"),
        (lambda f: write_raw(f, b"not json"), "no JSON"),
        (lambda f: write_raw(f, b"\xff\xfe{}"), "no JSON"),
        (lambda f: write_raw(f, b"[" * 100_000), "no JSON"),
        (lambda f: write_raw(f, [1]), "header is list"),
        (lambda f: write_raw(f, {"t": 3}), "'t': its header entry"),
        (lambda f: write_raw(f, {"t": {"dtype": "U8"}}), "'t': its header entry"),
        (lambda f: write_raw(f, {"t": entry(offsets=[0])}), "'t': its header entry"),
        (lambda f: write_raw(f, {"t": entry(dtype="F3")}, bytes(4)), "'t': unknown dtype 'F3'"),
        (lambda f: write_raw(f, {"t": entry(dtype=["U8"])}, bytes(4)), "'t': unknown dtype"),
        (lambda f: write_raw(f, {"t": entry(shape=[-4], offsets=[0, 4])}, bytes(4)), "'t': shape"),
        (lambda f: write_raw(f, {"t": entry(shape=[4.0])}, bytes(4)), "'t': shape"),
        (lambda f: write_raw(f, {"t": entry(offsets=[-4, 0])}, bytes(4)), "'t': shape .* or offsets"),
        (lambda f: write_raw(f, {"t": entry(shape=[5])}, bytes(4)), "'t': U8 .5. needs 5 bytes"),
        (lambda f: write_raw(f, {"t": entry(offsets=[2, 6])}, bytes(6)), "'t': .* leave a hole"),
        (lambda f: write_raw(f, {"t": entry(), "u": entry(offsets=[2, 6])}, bytes(6)), "'u': .* overlap"),
        (lambda f: write_raw(f, {"t": entry()}, bytes(5)), "has 73 bytes, but its tensors end at 72"),
        (lambda f: write_raw(f, {"t": entry()}, bytes(3)), "'t': .* truncated"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=rf"broken\.safetensors.*{message}"):
        read_header(tmp_path / "broken.safetensors")


def test_a_link_to_nowhere_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        read_headers(tmp_path)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_a_tensor_that_only_the_index_has_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2)
    edit_index(tmp_path, lambda names: names.update(ghost="model-00002-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: tensor 'ghost'"):
        read_headers(tmp_path)


def test_tensors_unknown_to_the_index_or_in_another_file_are_noted_and_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2)

    def change(names: dict[str, str]) -> None:
        del names["b"]
        names["a"] = names["f"]

    edit_index(tmp_path, change)
    infos, notes = read_headers(tmp_path)
    assert infos["a"].file.name == "model-00001-of-00002.safetensors"
    assert "b" in infos
    assert [("1 tensors" in note, note.rpartition(" ")[2]) for note in notes] == [(True, "b"), (True, "a")]


def test_a_missing_shard_is_an_error_that_names_file_and_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: is missing.*'[def]'"):
        read_headers(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2)
    save_file({"a": torch.zeros(1), "f": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'a': is also in model-00001-of-00002"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "no plain file name"),
    ],
)
def test_a_broken_index_is_an_error(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        read_headers(tmp_path)


def test_floats_are_read_without_torch_and_other_dtypes_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    infos, _ = read_headers(tmp_path)
    assert read_floats([infos["a"], infos["c"]]) == {"a": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0), "c": (0.5,)}
    with pytest.raises(CheckpointError, match="'b': is BF16, expected F32"):
        read_floats([infos["b"]])
