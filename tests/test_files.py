"""Atomic writes of files and folders, records as JSON, and safetensors files."""
import json
import os
import stat
import subprocess
import sys
from unittest.mock import ANY

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mcl.errors import InputError
from mcl.files import (
    atomic_write,
    open_safetensors,
    save_safetensors,
    stream_safetensors,
    write_record,
)
from mcl.ownership import FOLDER_MARKER, read_record


def names_in(folder):
    """Return the sorted names of a folder's entries."""
    return sorted(os.listdir(folder))


def test_the_target_is_checked_again_before_it_is_replaced(tmp_path):
    target = tmp_path / "a.json"
    for path, create in ((target, os.mkdir), (tmp_path / "b", os.mkfifo)):
        with pytest.raises(InputError, match="is not a file"), atomic_write(path) as temporary:
            temporary.write_text("x")
            create(path)
    assert stat.S_ISFIFO((tmp_path / "b").stat().st_mode)
    assert names_in(tmp_path) == ["a.json", "b"]


@pytest.mark.parametrize("error", [OSError(5, "no"), KeyboardInterrupt()])
def test_a_folder_is_restored_if_the_new_one_cannot_replace_it(tmp_path, monkeypatch, error):
    with atomic_write(tmp_path / "a", is_folder=True) as first:
        (first / "old").touch()
    replace, calls = os.replace, []

    def fail_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_second)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"cannot be written \(no\)|^$"):
        with atomic_write(tmp_path / "a", is_folder=True) as second:
            (second / "new").touch()
    assert names_in(tmp_path / "a") == [FOLDER_MARKER, "old"]
    assert names_in(tmp_path) == ["a"]


def test_temporary_files_of_dead_processes_are_deleted_and_of_others_are_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, living = process.pid, os.getppid()
    for pid in (dead, living):
        (tmp_path / f".{pid}.new.a.json").write_text("half")
        (tmp_path / f".{pid}.new.b.json").write_text("of another target")
    (tmp_path / f".{dead}.old.frames").mkdir()
    (tmp_path / f".{dead}.old.frames" / FOLDER_MARKER).touch()
    write_record(tmp_path / "a.json", {})
    assert set(names_in(tmp_path)) == {"a.json", f".{living}.new.a.json", f".{living}.new.b.json",
                                       f".{dead}.new.b.json", f".{dead}.old.frames"}
    with pytest.raises(KeyError), atomic_write(tmp_path / "frames", is_folder=True):
        raise KeyError
    assert (tmp_path / "frames" / FOLDER_MARKER).exists()


def test_record_is_strict_json_and_is_recognized_by_its_hash(tmp_path):
    path, content = tmp_path / "a.json", {"x": [None, {"y": None}, [1, 2.5]]}
    write_record(path, {"x": [float("nan"), {"y": float("-inf")}, (1, 2.5)]})
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read_record(path) == content and record == content | {"motionclone": ANY}
    changed = json.dumps(record | {"x": 1})
    for text in (changed, '{"motionclone": true}', '["motionclone"]', '"motionclone"', "{",
                 "[" * 10 ** 5):
        path.write_text(text)
        assert read_record(path) == {}
    assert read_record(tmp_path) == read_record(tmp_path / "none") == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streamed_safetensors_are_read_back(tmp_path, dtype):
    tensors = {"b": torch.randn(3, 5).to(dtype), "a": torch.randn(()).to(dtype),
               "c": torch.randn(4, 2).to(dtype).T, "empty": torch.zeros(0, 3, dtype=dtype)}
    path = tmp_path / "a.safetensors"
    stream_safetensors(path, tensors, iter(tensors.values()), {"name": "x"})
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"name": "x"}


def test_saved_safetensors_have_the_same_bytes_and_the_permissions_of_other_new_files(tmp_path):
    (tmp_path / "plain").touch()
    tensors = {"levels": torch.arange(3, dtype=torch.uint8), "x": torch.zeros(2, 3).T}
    for name in ("a", "b"):
        save_safetensors(tmp_path / name, tensors, {str(i): "x" for i in range(20)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    stored = load_file(tmp_path / "a")
    assert stored["x"].shape == (3, 2) and torch.equal(stored["levels"], tensors["levels"])


def test_safetensors_file_that_is_cut_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": torch.arange(1 << 16, dtype=torch.float32), "y": torch.ones(0, 3)},
                     {"key": "value"})
    metadata, tensors = open_safetensors(path)
    assert metadata == {"key": "value"} and tensors["y"].read().shape == (0, 3)
    assert torch.equal(tensors["x"].read(), torch.arange(1 << 16, dtype=torch.float32))
    for cut in (5000, 0):
        os.truncate(path, cut)
        with pytest.raises(InputError, match="a.safetensors: the file is truncated or damaged"):
            tensors["x"].read()
