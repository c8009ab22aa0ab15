"""Hostile files: impossible sizes, bombs, loops, and names with control characters."""
import json
import os
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from mcl import InputError, ModelConfig, load_model
from mcl.checkpoints.containers import open_checkpoint, parse_json
from mcl.checkpoints.model_file import FORMAT
from mcl.checkpoints.pickles import LEGACY_START
from mcl.config import (
    CLIPTextConfig,
    SampleConfig,
    SparseCtrlConfig,
    UNetConfig,
    VAEConfig,
    from_dict,
)
from mcl.errors import escape_control_characters
from tests.foreign import convert, ldm, motion, save


@pytest.mark.parametrize("config, values", [
    (UNetConfig, {"num_attention_heads": 0}), (UNetConfig, {"num_attention_heads": 7}),
    (UNetConfig, {"norm_num_groups": -4}), (UNetConfig, {"num_attention_heads": True}),
    (UNetConfig, {"num_attention_heads": "8"}), (UNetConfig, {"num_attention_heads": None}),
    (UNetConfig, {"layers_per_block": 10**6}), (UNetConfig, {"block_out_channels": ()}),
    (UNetConfig, {"block_out_channels": [320]}), (UNetConfig, {"block_out_channels": (1e9,)}),
    (UNetConfig, {"cross_attention_levels": (4,)}),
    (UNetConfig, {"cross_attention_levels": (1, 0)}),
    (UNetConfig, {"motion_modules": 1}), (UNetConfig, {"motion_max_seq_length": 10**9}),
    (VAEConfig, {"scaling_factor": float("nan")}), (VAEConfig, {"scaling_factor": 0}),
    (VAEConfig, {"norm_num_groups": 7}), (VAEConfig, {"latent_channels": -4}),
    (CLIPTextConfig, {"num_hidden_layers": 10**6}), (CLIPTextConfig, {"num_attention_heads": 5}),
    (CLIPTextConfig, {"vocab_size": 9}), (SparseCtrlConfig, {"kind": "depth"}),
    (SparseCtrlConfig, {"conditioning_embedding_channels": ()}),
    (SampleConfig, {"num_frames": "16"}), (SampleConfig, {"cfg_scale": float("nan")}),
    (ModelConfig, {"name": 3}), (ModelConfig, {"unet": {}}), (ModelConfig, {"fps": 0}),
    (ModelConfig, {"unet": UNetConfig(in_channels=9)}),
    (ModelConfig, {"sparsectrl": SparseCtrlConfig("rgb", motion_num_attention_heads=7)})], ids=str)
def test_impossible_values_are_rejected_when_a_config_is_created(config, values):
    with pytest.raises(InputError, match="^[a-z_]* = .* is out of range: it must be "):
        config(**values)


@pytest.mark.parametrize("values", [
    {"unet": 5}, {"unet": None}, {"unet": {"num_attention_heads": [8]}}, {"sample": []},
    {"training_vocabulary": "ab"}, {"unet": {"block_out_channels": [[320]]}}, [], {"strange": 1}],
    ids=str)
def test_json_of_another_structure_is_rejected(values):
    with pytest.raises(InputError):
        from_dict(ModelConfig, values)


@pytest.mark.parametrize("text", [
    "", "[", "[]", "3", '{"a":' * 100000, '{"a": ' + "9" * 6000 + "}", b"\xff"],
    ids=lambda t: t[:9])
def test_broken_json_is_rejected(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="x.json: not "):
        parse_json(tmp_path / "x.json", (tmp_path / "x.json").read_bytes())


def pairs(opcode, start, count=100):
    """Something that holds the one before twice, a hundred times over."""
    return start + b"\x94" + b"".join(
        b"(h%ch%c" % (i, i) + opcode + b"\x94" for i in range(count))


def frozensets(depth=40):
    """A chain of pairs of frozensets; to compare it with its copy takes 2**depth steps."""
    return (b"(\x91q\0(K\x01\x91q\1" + b"(h\0h\1\x91q\2(h\0h\1N\x91q\1h\2q\0000" * depth
            + b"00h\0")


def text(length):
    return b"X" + struct.pack("<I", length) + b"a" * length


def persid(numel):
    return b"(" + text(7).replace(b"aaaaaaa", b"storage") + b"ctorch\nFloatStorage\n" + text(
        1) + b"N" + numel + b"tQ"


def tensor(numel, size, stride):
    return (b"\x80\x02}" + text(1) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + persid(numel)
            + b"K\0" + size + stride + b"tRs.")


BOMBS = {
    "a dict in itself": b"\x80\x04}\x94\x8c\x0astate_dicth\x00s.",
    "tuples as a key": b"\x80\x04}(" + pairs(b"t", b")") + b"K\x01u.",
    "tuples in a set": b"\x80\x04\x8f(" + pairs(b"t", b")") + b"\x90.",
    "lists as a storage": b"\x80\x04" + pairs(b"e", b"]").replace(b"(", b"](") + b"Q.",
    "a number as a key": b"\x80\x04}\x8b" + struct.pack("<i", 9000) + b"\x7f" * 9000 + b"K\x01s.",
    "a far place of memory": b"\x80\x02}r\xff\xff\xff\xff.",
    "more bytes than there are": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "tuples in tuples": b"\x80\x04}K\x01" + b"\x85" * 100000 + b"K\x01s.",
    "the state of a tensor": b"\x80\x04ctorch._utils\n_rebuild_parameter\n}b.",
    "frozensets that are equal":
        b"\x80\x04}(" + frozensets() + b"K\x01" + frozensets() + b"K\x01u.",
    "numbers with one hash": b"\x80\x02}(" + b"".join(
        b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N"
        for n in range(1 << 17)) + b"u.",
    "names that are joined":
        b"\x80\x04" + text(1 << 22) + b"\x94" + b"h\0h\0\x93" * 200000 + b".",
    "a list as a length":
        b"\x80\x02(" + b"N" * (1 << 18) + b"lq\0" + persid(b"h\0") * 100000 + b".",
    "a text as a stride": tensor(b"K\x01", b"J\xff\xff\xff\x7f\x85", text(1 << 20) + b"\x85"),
    "a negative stride": tensor(b"K\x09", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
    "a tensor that repeats one number":
        tensor(b"K\x01", b"\x8a\x06" + bytes(5) + b"\x01\x85", b"K\0\x85"),
    "a storage of an exabyte":
        tensor(b"\x8a\x08" + bytes(7) + b"\x10", b"K\x02\x85", b"K\x01\x85"),
    "tuples as a type":
        b"\x80\x04" + pairs(b"t", b")") + b"(" + text(7).replace(b"a" * 7, b"storage")
        + b"hd" + text(1) + b"NK\x01tQ.",
    "tuples as a shape":
        b"\x80\x04" + pairs(b"t", b")") + tensor(b"K\x01", b"hd", b"hd")[2:],
    "many dimensions, many times": b"".join((
        b"\x80\x02(", b"K\x01" * (1 << 18), b"tq\1(", persid(b"K\x01"), b"K\0h\1h\1tq\2",
        b"ctorch._utils\n_rebuild_tensor_v2\nq\3", b"h\3h\2R" * 8000, b"."))}


@pytest.mark.parametrize("what", BOMBS)
def test_a_pickle_bomb_takes_no_time(what, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", BOMBS[what])
    assert convert("--check", tmp_path / "x.ckpt") == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_tuples_as_the_name_of_a_storage_take_no_time(tmp_path):
    legacy = LEGACY_START + b"N." + b"N." + b"}." + b"\x80\x04" + pairs(b"t", b")") + b"\x85."
    (tmp_path / "x.ckpt").write_bytes(legacy)
    with pytest.raises(InputError, match="x.ckpt: the file is truncated or damaged"):
        open_checkpoint(tmp_path / "x.ckpt")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 27)
                         + bytes(1 << 27) + b".")
    with pytest.raises(InputError, match="x.ckpt: the file is truncated or damaged"):
        open_checkpoint(tmp_path / "x.ckpt")


def test_a_storage_far_larger_than_its_file_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1 << 25)}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive, zipfile.ZipFile(
            tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    with pytest.raises(InputError, match="bomb.ckpt: .*an impossible size"):
        open_checkpoint(tmp_path / "bomb.ckpt")


def test_pipes_and_unreadable_files_are_rejected(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: neither a file nor a folder"):
        open_checkpoint(tmp_path / "pipe")
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("mcl.checkpoints.containers.open_file", refuse)
    with pytest.raises(InputError, match="x.safetensors: cannot be read: Permission denied"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_zip_entries_with_names_that_are_not_text_are_rejected(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "x.ckpt")
    data = bytearray((tmp_path / "x.ckpt").read_bytes())
    place = data.rfind(b"PK\x01\x02")
    data[place + 9] |= 8                        # says that the name is UTF-8
    data[place + 46] = 0xff
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(InputError, match="x.ckpt: the file is truncated or damaged"):
        open_checkpoint(tmp_path / "x.ckpt")


def test_complex_tensors_are_rejected(tmp_path):
    state = {"w": torch.zeros(2, dtype=torch.complex64)}
    for name in ("x.safetensors", "x.ckpt"):
        with pytest.raises(InputError, match=": the tensor w is .* Use float32"):
            open_checkpoint(save(tmp_path / name, state))


def test_fp8_in_pickles_is_read(tmp_path):
    w = torch.randn(3, 4).to(torch.float8_e4m3fn)
    tensors = open_checkpoint(save(tmp_path / "x.ckpt", {"w": w, "part": w[1:, :2]})).tensors
    assert tensors["w"].dtype == w.dtype and torch.equal(tensors["w"].read().float(), w.float())
    assert torch.equal(tensors["part"].read().float(), w[1:, :2].float())


def test_control_characters_of_file_names_and_keys_are_escaped(tmp_path, capsys):
    text = escape_control_characters("a\x1b[2J\n\u2028\u202e\udcffé 字")
    assert text == r"a\x1b[2J\n\u2028\u202e\udcffé 字"
    evil = "evil\n\x1b[2J\x1b[31mRED"
    torch.save({evil: torch.zeros(1)}, tmp_path / "x.ckpt")
    vae = save(tmp_path / f"{evil}.safetensors", {
        "decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)})
    assert convert("--check", tmp_path / "x.ckpt", vae) == 2
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 5 and "\x1b" not in captured.out + captured.err


def test_huge_numbers_in_keys_are_no_block_numbers(tmp_path):
    unet = {f"model.diffusion_model.input_blocks.{'9' * 5000}.0.op.weight": torch.zeros(1),
            "model.diffusion_model.input_blocks.999999999.0.op.weight": torch.zeros(1)}
    base = save(tmp_path / "x.safetensors", ldm() | unet)
    save(tmp_path / "mm.safetensors", {"mid_block.motion_modules.0.x": torch.zeros(1)})
    assert convert("--base", base, "--motion-module", tmp_path / "mm.safetensors", "--out",
                   tmp_path / "o.safetensors") == 2


def test_a_yaml_file_beside_a_checkpoint_can_declare_v_prediction(tmp_path, capsys):
    base = save(tmp_path / "x.safetensors", ldm(("unet",)))
    yaml = tmp_path / "x.yaml"
    yaml.write_text('model:\n  params:\n    parameterization: "eps"\n')
    assert convert("--check", base) == 0
    yaml.write_text('model:\n  params:\n    parameterization: "v"\n')
    assert convert("--check", base) == 2
    assert "a v-prediction model (yaml: v-prediction, by x.yaml)" in capsys.readouterr().out


def test_parts_of_another_method_are_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mcl.cli.convert.stream_safetensors", lambda *_: None)
    save(tmp_path / "base.safetensors", ldm())
    mm = save(tmp_path / "mm.ckpt", motion("v3") | {"img_encoder.x": torch.zeros(1)})
    assert convert("--base", tmp_path / "base.safetensors", "--motion-module", mm, "--out",
                   tmp_path / "o.safetensors") == 0
    assert f"warning: {mm}: ignored tensors of img_encoder, another" in capsys.readouterr().err


def test_a_model_file_with_impossible_sizes_is_rejected_by_name(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors", {
        "format": FORMAT, "config": json.dumps({"unet": {"num_attention_heads": 7}})})
    with pytest.raises(InputError, match="x.safetensors: .*multiples of 224"):
        load_model(tmp_path / "x.safetensors", device="cpu")
