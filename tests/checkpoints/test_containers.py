"""Containers: no code of a pickle runs, and files that are no checkpoints are named."""
import io
import json
import os
import pickle
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file

from mcl import InputError
from mcl.checkpoints.containers import find_weights, open_checkpoint
from mcl.checkpoints.pickles import TensorUnpickler
from tests.foreign import convert


class Hostile:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *argv):
        self.call = function, argv

    def __reduce__(self):
        return self.call


def attacks(mark):
    return [Hostile(os.system, f"touch {mark}"),
            Hostile(exec, f"open({str(mark)!r}, 'w')"),
            Hostile(eval, f"open({str(mark)!r}, 'w')"),
            Hostile(getattr, Hostile(__import__, "os"), "system"),
            Hostile(os.mkdir, str(mark))]


@pytest.mark.parametrize("new", [True, False])
def test_a_hostile_pickle_runs_no_code(new, tmp_path):
    mark = tmp_path / "ran"
    file = tmp_path / "hostile.ckpt"
    for attack in attacks(mark):
        torch.save({"state_dict": {"w": torch.arange(3.0), "x": attack}, "y": [attack]}, file,
                   _use_new_zipfile_serialization=new)
        checkpoint = open_checkpoint(file)
        assert torch.equal(checkpoint.tensors["w"].read(), torch.arange(3.0))
        assert list(checkpoint.tensors) == ["w"] and checkpoint.non_tensors == ("y", "x")
        convert("--check", file)
        assert not mark.exists()
    torch.load(file, weights_only=False)            # PyTorch itself runs the code
    assert mark.exists()


@pytest.mark.parametrize("code", [
    b"cos\nsystem\n(S'touch {}'\ntR.", b"(S'touch {}'\nios\nsystem\n.",
    b"(cos\nsystem\nS'touch {}'\no.", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
    b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R}\x8c\x0c__setstate__cos\nsystem\nsb."])
def test_no_pickle_opcode_calls_a_function(code, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    monkeypatch.setattr(os, "system", lambda *_: mark.touch())
    file = tmp_path / "x.ckpt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", code.replace(b"{}", str(mark).encode()))
    open_checkpoint(file)
    assert not mark.exists()


class OddList(list):
    pass


class OddDict(dict):
    pass


def test_objects_of_other_programs_are_ignored(tmp_path):
    odd_list, odd_dict = OddList([1, torch.zeros(2), 3]), OddDict(a=1, b=torch.zeros(3))
    odd_list.attribute = odd_dict
    content = {"list": odd_list, "dict": odd_dict, "score": numpy.float64(0.5),
               "array": numpy.zeros(3), "set": {1, 2}, "w": torch.ones(2), "one": OddList([1]),
               "dtype": torch.float16, "size": torch.Size([1]), "path": tmp_path}
    for new in (True, False):
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        checkpoint = open_checkpoint(tmp_path / "x.pt")
        assert list(checkpoint.tensors) == ["w"] and len(checkpoint.non_tensors) == len(content) - 1


def test_an_encrypted_archive_is_rejected(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(start)
        while place >= 0:
            data[place + flags] |= 1
            place = data.find(start, place + 1)
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(InputError, match="x.pt: the file is truncated or damaged .*password"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("names, expected", [
    (["model.bin", "model.safetensors"], "model.safetensors"),
    (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
    (["pytorch_model.bin", "model.fp16.safetensors"], "model.fp16.safetensors"),
    (["pytorch_model.fp16.bin", "x.bin"], "pytorch_model.fp16.bin"),
    (["model.fp16.safetensors.index.json"], "model.fp16.safetensors.index.json"),
    (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json"),
    (["pytorch_model.bin.index.json", "other.safetensors"], "pytorch_model.bin.index.json")])
def test_the_weights_of_a_folder_are_chosen_by_format_and_precision(names, expected, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    assert find_weights(tmp_path) == tmp_path / expected


@pytest.mark.parametrize("name", [
    "builtins getattr", "torch load", "torch._utils __dict__", "collections OrderedDict.fromkeys",
    "mcl.files shutil.rmtree"])
def test_a_global_is_its_name_and_a_call_of_it_is_none(name, tmp_path):
    function = b"c" + name.replace(" ", "\n").encode() + b"\n"
    unpickler = TensorUnpickler(tmp_path, None)
    assert unpickler.load(io.BytesIO(function + b".")) == name
    assert unpickler.load(io.BytesIO(function + b"]\x85R.")) is None


@pytest.mark.parametrize("new", [True, False])
def test_tensors_of_every_layout_are_read_unchanged(new, tmp_path):
    whole = torch.randn(6, 5)
    tensors = {"slice": whole[2:4, 1:3], "transposed": whole.T, "empty": torch.zeros(0, 3),
               "scalar": torch.tensor(2.5), "whole": whole, "long": torch.arange(4),
               "half": whole.half(), "bf16": whole.bfloat16(), "bool": whole > 0,
               "parameter": torch.nn.Parameter(whole)}
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    checkpoint = open_checkpoint(tmp_path / "x.pt").tensors
    assert checkpoint.keys() == tensors.keys()
    for name, t in tensors.items():
        assert checkpoint[name].shape == t.shape and checkpoint[name].dtype == t.dtype
        assert torch.equal(checkpoint[name].read(), t.detach())


def test_a_tensor_larger_than_its_storage_is_rejected(tmp_path):
    torch.save({"w": torch.zeros(4)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(b"K\x04\x85", b"K\x09\x85"))
    with pytest.raises(InputError, match="y.pt: the file is truncated or damaged .* cannot hold"):
        open_checkpoint(tmp_path / "y.pt")


def test_every_dtype_of_safetensors_is_read(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
             torch.int64, torch.uint8, torch.bool]
    save_file({str(kind): torch.ones(2, dtype=kind) for kind in kinds}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors").tensors
    for kind in kinds:
        assert checkpoint[str(kind)].dtype == kind == checkpoint[str(kind)].read().dtype


def files(folder):
    """Return the content of files that are no checkpoints, by name."""
    save_file({"w": torch.zeros(100)}, folder / "good.safetensors")
    torch.save({"w": torch.zeros(100)}, folder / "good.ckpt")
    torch.save({"w": torch.zeros(100)}, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr("a.png", b"a picture")
    good, new, old = ((folder / name).read_bytes()
                      for name in ("good.safetensors", "good.ckpt", "old.ckpt"))
    return {
        "empty.ckpt": b"", "page.safetensors": b"\n<!DOCTYPE html><title>404</title>",
        "pointer.ckpt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        "readme.ckpt": ("x" + "è" * 3000).encode(), "image.ckpt": b"\x89PNG\r\n\0\0" * 9,
        "header.safetensors": good[:20], "cut.safetensors": good[:-9], "cut.ckpt": new[:-90],
        "cut_old.ckpt": old[:-9], "cut_pickle.ckpt": old[:60],
        "photos.ckpt": (folder / "photos.zip").read_bytes(), "list.ckpt": None}


@pytest.mark.parametrize("name, message", [
    ("empty.ckpt", "the file is empty"), ("page.safetensors", "the file is an HTML page"),
    ("pointer.ckpt", "the file is a git-lfs pointer"), ("readme.ckpt", "the file is text"),
    ("image.ckpt", "the file is neither safetensors nor a PyTorch checkpoint"),
    ("header.safetensors", "the file is truncated or damaged"),
    ("cut.safetensors", "the file is truncated or damaged"),
    ("cut.ckpt", "the file is truncated or damaged"),
    ("cut_old.ckpt", "the file is truncated or damaged"),
    ("cut_pickle.ckpt", "the file is truncated or damaged"),
    ("photos.ckpt", "the file is a zip archive, not a PyTorch checkpoint"),
    ("list.ckpt", "a checkpoint without tensors"), ("none.ckpt", "no such file")])
def test_files_that_are_no_checkpoints_are_named(name, message, tmp_path, capsys):
    torch.save([torch.zeros(2)], tmp_path / "list.ckpt")
    content = files(tmp_path).get(name)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert convert("--base", tmp_path / name, "--out", tmp_path / "out.safetensors") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / name}: {message}") and error.count("\n") == 1


def test_a_damaged_tensor_is_rejected_when_it_is_read(tmp_path):
    torch.save({"w": torch.arange(100.0)}, tmp_path / "x.ckpt")
    data = bytearray((tmp_path / "x.ckpt").read_bytes())
    place = data.find(torch.tensor([41.0, 42.0]).numpy().tobytes())
    data[place] ^= 255
    (tmp_path / "x.ckpt").write_bytes(data)
    tensor = open_checkpoint(tmp_path / "x.ckpt").tensors["w"]
    with pytest.raises(InputError, match="x.ckpt: the file is truncated or damaged .*CRC"):
        tensor.read()


def test_a_missing_shard_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "config.json").write_text("{}")
    for text, message in (
            ('{"weight_map": {"w": "../../model-00001-of-00001.safetensors"}}',
             f"{tmp_path}/model-00001-of-00001.safetensors: cannot be read: No such file"),
            ("{}", "has no weight_map"), ("[]", "not a JSON object"), ("{", "not a JSON object")):
        index.write_text(text)
        with pytest.raises(InputError, match=message):
            open_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(InputError, match="a folder without weights"):
        open_checkpoint(tmp_path)


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize("weight_map, problem", [
    ({"v": FIRST, "w": SECOND}, ""),
    ({"v": FIRST}, "1 of 2 shards"),
    ({"v": FIRST, "w": SECOND, "x": SECOND}, f"x in {SECOND}"),
    ({"v": FIRST, "w": FIRST, "x": SECOND}, f"w in {FIRST}"),
    ({"v": FIRST, "y": SECOND}, f"w in {SECOND}")])
def test_an_index_names_exactly_the_tensors_of_all_its_shards(weight_map, problem, tmp_path):
    save_file({"v": torch.zeros(1)}, tmp_path / FIRST)
    save_file({"w": torch.ones(1)}, tmp_path / SECOND)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    if not problem:
        assert {name: t.read().item() for name, t in open_checkpoint(tmp_path).tensors.items()} == {
            "v": 0, "w": 1}
        return
    with pytest.raises(InputError, match=f"^{index}: does not fit its shards: {problem}. Download"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("second", [{"dtype": "F16", "shape": [2]}, {"dtype": "F32", "shape": [1]}])
def test_two_tensors_of_one_name_in_a_header_are_rejected(second, tmp_path):
    """The safetensors package takes the last of them."""
    entries = [{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
               second | {"data_offsets": [0, 4]}]
    header = "{" + ", ".join(f'"w": {json.dumps(entry)}' for entry in entries) + "}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(InputError, match="x.safetensors: .*two values have the name 'w'"):
        open_checkpoint(path)


@pytest.mark.parametrize("setitems", [
    b"(X\x01\0\0\0wh\x01X\x01\0\0\0wh\x02u", b"X\x01\0\0\0wh\x01sX\x01\0\0\0wh\x02s"])
def test_two_tensors_of_one_name_in_a_pickle_are_rejected(setitems, tmp_path):
    """A pickle that sets one key of a dict twice, in one step or in two."""
    tensor = (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
              b"X\x01\0\0\0%dX\x03\0\0\0cpuK\x01tQK\0K\x01\x85K\x01\x85\x89Nt R".replace(b" ", b""))
    code = b"\x80\x02" + tensor % 0 + b"q\x010" + tensor % 1 + b"q\x020}" + setitems + b"."
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", code)
        archive.writestr("x/data/0", bytes(4))
        archive.writestr("x/data/1", bytes(4))
    with pytest.raises(InputError, match="x.ckpt: .*two entries have the name 'w'"):
        open_checkpoint(tmp_path / "x.ckpt")


def test_entries_of_a_pickle_that_are_no_text_have_no_names(tmp_path):
    torch.save({"w": torch.ones(1), "state": 0, 1: torch.ones(1), 2: torch.ones(1)},
               tmp_path / "x.ckpt")
    assert set(open_checkpoint(tmp_path / "x.ckpt").tensors) == {"w", "<int 2>", "<int 3>"}


def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="neither safetensors nor"):
        open_checkpoint(tmp_path / "x.pkl")
