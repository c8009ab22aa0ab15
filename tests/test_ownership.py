"""Checks before any work: outputs against inputs, and what may be replaced."""
import hashlib
import json
import os
from pathlib import Path

import pytest

from mcl.errors import InputError
from mcl.files import atomic_write, write_record
from mcl.ownership import (
    FOLDER_MARKER,
    OutputFile,
    check_io_conflicts,
    check_readable,
    check_writable,
    file_state,
    sha256_of,
)


def test_outputs_that_collide_are_rejected_with_their_options(tmp_path):
    (tmp_path / "clip").touch()
    os.link(tmp_path / "clip", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("clip")
    inputs = [("--ref", tmp_path / "clip")]
    check_io_conflicts(inputs, [OutputFile("--out", tmp_path / "b")])
    for name in ("clip", "hard", "soft", f"../{tmp_path.name}/clip"):
        with pytest.raises(InputError, match="is read by --ref. Give --out another name"):
            check_io_conflicts(inputs, [OutputFile("--out", tmp_path / name)])
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("images/deep")
    for name in ("images/a.webp", "images/deep/a.mp4", "link/a.mp4"):
        with pytest.raises(InputError, match="(images|deep|link): is read by --ref. Give --out"):
            check_io_conflicts([("--ref", tmp_path / "images")],
                               [OutputFile("--out", tmp_path / name)])
    for first, second in (("n", "n"), ("n", f"../{tmp_path.name}/n")):
        outputs = [OutputFile("--out", tmp_path / first), OutputFile("--maps", tmp_path / second)]
        with pytest.raises(InputError, match="also written by --out. Give --maps another name"):
            check_io_conflicts(inputs, outputs)


@pytest.mark.parametrize("reads, writes, message", [
    ([("--motion", "fr/m")], [("--out", "fr", "folder")], "fr: a file in it is read by --motion"),
    ([("--ref", "pics")], [("--save-motion", "pics/3.png", "file")], "pics: is read by --ref"),
    ([("--base", "pipe")], [("--out", "pipe/unet/c.json", "file")], "c.json: is read by --base"),
    ([("--ref", "pics")], [("--save-motion", "linked.png", "file")], "linked.png: is read by"),
    ([("--ref", "by-link")], [("--out", "pics/9.gif", "file")], "pics: is read by --ref"),
    ([("--ref", "pics")], [("--inversion-dir", "pics", "cache")], "pics: is read by --ref"),
    ([("--ref", "v.mp4")], [("--inversion-dir", ".", "cache")], "cannot be the name"),
    ([], [("--maps", "m", "folder"), ("--out", "m/o.gif", "file")], "m: is also written by --maps"),
    ([], [("--save-motion", "m/x", "file"), ("--out", "m", "folder")],
     "m: a file in it is also written by --save-motion. Give --out another name"),
    ([], [("--out", "m", "folder"), ("--inversion-dir", "m/i", "cache")], "m: is also written by"),
    ([], [("--out", "m", "folder"), ("--inversion-dir", "m", "cache")], "m: is also written by"),
    ([], [("--inversion-dir", "m", "cache"), ("--out", "m/o.gif", "file")],
     "m: is also written by --inversion-dir. Give --out another name")])
def test_path_that_contains_another_one_is_rejected(tmp_path, monkeypatch, reads, writes, message):
    monkeypatch.chdir(tmp_path)
    with atomic_write(tmp_path / "fr", is_folder=True) as folder:
        (folder / "m").touch()
    for name in ("pics/1.png", "pipe/unet/c.json", "linked.png", "v.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "m").mkdir()
    (tmp_path / "pics" / "2.png").symlink_to("../linked.png")
    (tmp_path / "by-link").symlink_to("pics")
    outputs = [OutputFile(option, Path(path), kind) for option, path, kind in writes]
    with pytest.raises(InputError, match=message):
        check_io_conflicts([(option, Path(path)) for option, path in reads], outputs)


def test_jobs_may_share_a_cache_but_no_other_output(tmp_path):
    cache = OutputFile("--inversion-dir", tmp_path / "i", "cache")
    check_io_conflicts([], [cache, cache])
    with pytest.raises(InputError, match="i: is also written by --out"):
        check_io_conflicts([], [OutputFile("--out", tmp_path / "i")] * 2)


def test_file_that_the_user_did_not_name_is_replaced_only_if_a_record_lists_it(tmp_path):
    path, record = tmp_path / "a-0.gif", tmp_path / "a-0.gif.json"
    outputs = [OutputFile("--out", path, "file", record),
               OutputFile("--out", record, "file", record)]
    check_io_conflicts([], outputs)
    path.write_text("mine")
    for content in (None, {"motionclone": True}, {"written": {}}):
        if content is not None:
            record.write_text(json.dumps(content))
        with pytest.raises(InputError, match="a-0.gif: was not written by this program"):
            check_io_conflicts([], outputs)
    check_io_conflicts([], [OutputFile("--out", path)])        # the user named it
    for key, listed in (("written", {f"x/{path.name}": sha256_of(path)}),
                        ("replacing", [[path.name, sha256_of(path)]])):
        write_record(record, {"written": {"y": "0"}} | {key: listed})
        check_io_conflicts([], outputs)
    path.write_text("edited")
    with pytest.raises(InputError, match="a-0.gif: was not written by this program, or was ch"):
        check_io_conflicts([], outputs)
    path.unlink()
    record.write_text(record.read_text().replace('"0"', '"1"'))
    with pytest.raises(InputError, match="a-0.gif.json: was not written by this program"):
        check_io_conflicts([], outputs)


@pytest.mark.parametrize("change, name", [
    (lambda folder: (folder / "notes.txt").touch(), "notes.txt"),
    (lambda folder: (folder / "0.png").write_text("edited"), "0.png"),
    (lambda folder: (folder / "link").symlink_to("0.png"), "link"),
    (lambda folder: (folder / "new").mkdir() or (folder / "new" / "x").touch(), "new/x"),
    (lambda folder: os.mkfifo(folder / "pipe"), "pipe"),
    (lambda folder: (folder / FOLDER_MARKER).write_text("{}"), FOLDER_MARKER)])
def test_folder_is_replaced_only_if_its_record_lists_every_file(tmp_path, change, name):
    for content in ("1", "2"):
        with atomic_write(tmp_path / "fr", is_folder=True) as folder:
            (folder / "0.png").write_text(content)
            (folder / "1.png").touch()
    (tmp_path / "fr" / "1.png").unlink()        # a missing file is no loss
    check_writable(tmp_path / "fr", "folder")
    change(tmp_path / "fr")
    with pytest.raises(InputError, match=f"fr/{name}: was not written by this program"):
        check_writable(tmp_path / "fr", "folder")
    with pytest.raises(InputError, match="was not written"), atomic_write(tmp_path / "fr", True):
        pass


@pytest.mark.parametrize("kind", ["file", "folder", "cache"])
def test_path_that_cannot_be_replaced_is_rejected(tmp_path, kind):
    (tmp_path / "dangling").symlink_to("none")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("dangling", "loop"):
        with pytest.raises(InputError, match=f"{name}: exists and is not a f"):
            check_writable(tmp_path / name, kind)
    with pytest.raises(InputError, match="there is no folder"):
        check_writable(Path("a/" * 2100 + "b"), kind)
    with pytest.raises(InputError, match="there is no folder"):
        check_writable(tmp_path / "loop" / "a", kind)
    if kind == "folder":
        with pytest.raises(InputError, match="/dev/shm: exists and is not a folder to"):
            check_writable(Path("/dev/shm"), kind)              # a mount point


def test_state_of_a_file_or_folder_changes_with_its_content(tmp_path):
    (tmp_path / "a").write_text("1")
    states = [file_state(tmp_path / "a"), file_state(tmp_path)]
    assert [file_state(tmp_path / "a"), file_state(tmp_path)] == states
    (tmp_path / "b").write_text("1")
    os.replace(tmp_path / "b", tmp_path / "a")
    assert file_state(tmp_path / "a") != states[0] and file_state(tmp_path) != states[1]
    assert file_state(tmp_path / "none") == ()


@pytest.mark.parametrize("name", ["", ".", "-", "..", "--", "a\0", "\ud800.mp4", "n" * 251])
def test_an_impossible_name_is_rejected(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = type(tmp_path)(name)
    for kind in ("file", "folder", "cache"):
        with pytest.raises(InputError, match="cannot be the name of a f"):
            check_writable(path, kind)
    if name not in ("", ".", ".."):
        with pytest.raises(InputError, match="no such file or folder"):
            check_readable(path)
    check_writable(tmp_path / ("n" * 228))


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


