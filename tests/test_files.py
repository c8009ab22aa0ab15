"""Atomic writes of files and folders, and checks of paths before any work."""
import hashlib
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mcl.errors import InputError
from mcl.files import (
    FOLDER_MARKER,
    OutputFile,
    atomic_write,
    check_io_conflicts,
    check_readable,
    check_writable,
    is_mcl_record,
    save_safetensors,
    sha256_of,
    stream_safetensors,
    write_json,
)


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
    write_json(tmp_path / "a.json", {})
    assert set(names_in(tmp_path)) == {"a.json", f".{living}.new.a.json", f".{living}.new.b.json",
                                       f".{dead}.new.b.json", f".{dead}.old.frames"}
    with pytest.raises(KeyError), atomic_write(tmp_path / "frames", is_folder=True):
        raise KeyError
    assert (tmp_path / "frames" / FOLDER_MARKER).exists()


def test_json_is_strict_and_marked_as_a_record_of_this_program(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [float("nan"), {"y": float("-inf")}, (1, 2.5)]})
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record.pop("motionclone") is True and record == {"x": [None, {"y": None}, [1, 2.5]]}
    assert is_mcl_record(path)
    for text in ("{}", '["motionclone"]', '"motionclone"', "{", "[" * 10 ** 5):
        path.write_text(text)
        assert not is_mcl_record(path)
    assert not is_mcl_record(tmp_path) and not is_mcl_record(tmp_path / "none")


def test_outputs_that_collide_are_rejected_with_their_options(tmp_path):
    (tmp_path / "clip").touch()
    os.link(tmp_path / "clip", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("clip")
    (tmp_path / "dangling").symlink_to("none")
    inputs = [("--ref", tmp_path / "clip")]
    check_io_conflicts(inputs, [OutputFile("--out", tmp_path / "b")])
    for name in ("clip", "hard", "soft", f"../{tmp_path.name}/clip"):
        with pytest.raises(InputError, match="is read by --ref. Give --out another name"):
            check_io_conflicts(inputs, [OutputFile("--out", tmp_path / name)])
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("images/deep")
    for name in ("images/a.webp", "images/deep/a.mp4", "link/a.mp4"):
        with pytest.raises(InputError, match="images: is read by --ref. Give --out another name"):
            check_io_conflicts([("--ref", tmp_path / "images")],
                               [OutputFile("--out", tmp_path / name)])
    for first, second in (("n", "n"), ("n", f"../{tmp_path.name}/n"), ("none", "dangling")):
        outputs = [OutputFile("--out", tmp_path / first), OutputFile("--maps", tmp_path / second)]
        with pytest.raises(InputError, match="also written by --out. Give --maps another name"):
            check_io_conflicts(inputs, outputs)


def test_an_existing_file_that_the_user_did_not_name_is_replaced_only_if_it_may_be(tmp_path):
    (tmp_path / "a.json").touch()
    for path, is_replaceable in (("a.json", None), ("a.json", lambda: True), ("b", lambda: False)):
        check_io_conflicts([], [OutputFile("--out", tmp_path / path, False, is_replaceable)])
    with pytest.raises(InputError, match="a.json: was not written by this program. Give --out"):
        check_io_conflicts([], [OutputFile("--out", tmp_path / "a.json", False, lambda: False)])


@pytest.mark.parametrize("name", ["", ".", "-", "..", "--", "a\0", "\ud800.mp4", "n" * 251])
def test_an_impossible_name_is_rejected(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = type(tmp_path)(name)
    for is_folder in (False, True):
        with pytest.raises(InputError, match="cannot be the name of a f"):
            check_writable(path, is_folder)
    if name not in ("", ".", ".."):
        with pytest.raises(InputError, match="no such file or folder"):
            check_readable(path)
    check_writable(tmp_path / ("n" * 240))


def test_a_path_that_cannot_be_read_is_rejected(tmp_path, monkeypatch):
    check_readable(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is a device, a pipe or a socket"):
        check_readable(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: False)     # a test may run as root
    with pytest.raises(InputError, match="no permission to read it"):
        check_readable(tmp_path)


def test_the_hash_of_a_folder_covers_names_and_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()
    hashes = [sha256_of(tmp_path)]
    (tmp_path / "a").rename(tmp_path / "b")
    hashes.append(sha256_of(tmp_path))
    (tmp_path / "b").write_bytes(b"2")
    hashes.append(sha256_of(tmp_path))
    (tmp_path / "c").mkdir()
    assert len(set(hashes)) == 3 and sha256_of(tmp_path) == hashes[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streamed_safetensors_are_read_back(tmp_path, dtype):
    tensors = {"b": torch.randn(3, 5).to(dtype), "a": torch.randn(()).to(dtype),
               "c": torch.randn(4, 2).to(dtype).T, "empty": torch.zeros(0, 3, dtype=dtype)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    path = tmp_path / "a.safetensors"
    stream_safetensors(path, shapes, dtype, iter(tensors.values()), {"name": "x"})
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"name": "x"}


def test_safetensors_get_the_permissions_of_other_new_files(tmp_path):
    (tmp_path / "plain").touch()
    save_safetensors(tmp_path / "a", {"x": torch.zeros(2, 3).T}, {})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert load_file(tmp_path / "a")["x"].shape == (3, 2)
