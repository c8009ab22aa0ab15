"""Writing of videos, animations and image folders: pixels, colors, bytes, failures."""
import errno
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from einops import repeat
from PIL import Image, ImageSequence

from mcl.errors import InputError, NumericalError
from mcl.ownership import FOLDER_MARKER
from mcl.video import write
from mcl.video.read import read_video
from mcl.video.write import check_output_path, write_video
from tests.video.conftest import (
    frame_numbers,
    image_folder,
    numbered_frames,
    random_frames,
    smooth_frames,
)


@pytest.mark.parametrize("name, max_error", [("a.mp4", 15), ("a.gif", 12), ("a.webp", 0), ("a", 0)])
def test_written_frames_are_read_back(tmp_path, name, max_error):
    frames = (smooth_frames() * 1.2).to(torch.bfloat16).requires_grad_()
    write_video(tmp_path / name, frames, fps=7.5)
    decoded = read_video(tmp_path / name, 6, (32, 48))
    assert decoded.shape == frames.shape and decoded.dtype == torch.float32
    error = ((decoded - frames.float().clamp(-1, 1)) * 127.5).abs()
    assert error.max() <= max_error + 0.51  # half a level is what uint8 loses
    assert os.listdir(tmp_path) == [name]


def test_mp4_keeps_colors_and_declares_bt709(tmp_path):
    colors = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [0.6, -0.2, -0.6]])
    write_video(tmp_path / "a.mp4", repeat(colors, "f c -> f c 32 32"), fps=7.5)
    decoded = read_video(tmp_path / "a.mp4", 4, (32, 32))
    assert ((decoded.mean((2, 3)) - colors) * 127.5).abs().max() < 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.colorspace, stream.color_primaries, stream.color_trc) == (1, 1, 1)  # BT.709
        assert stream.color_range == 1 and stream.pix_fmt == "yuv420p"
        assert stream.average_rate == 7.5


def test_mp4_has_the_quality_and_size_of_crf_14(tmp_path):
    """Gray noise has 41.5 dB and 14.2 kB at crf 14, 37.9 dB at 18, and 17.3 kB at 8."""
    frames = random_frames(4)[:, :1].expand(-1, 3, -1, -1)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    error = (read_video(tmp_path / "a.mp4", 4, (64, 64)) - frames) / 2
    assert -10 * error.square().mean().log10() > 40
    assert (tmp_path / "a.mp4").stat().st_size < 15_700


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp"])
def test_same_frames_give_the_same_bytes(tmp_path, name):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_video(folder / name, random_frames(3), fps=8)
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_single_frame_is_written_and_read(tmp_path):
    for name in ("a.mp4", "a.gif", "a.webp", "a"):
        write_video(tmp_path / name, numbered_frames([7]), fps=8)
        assert frame_numbers(read_video(tmp_path / name, 1, (16, 16))) == [7]


@pytest.mark.parametrize("name", ["12:30.mp4", "~/a.gif", "~/frames", "a.zip/a.gif"])
def test_a_name_with_a_special_meaning_elsewhere_is_a_plain_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    write_video(name, numbered_frames([1, 2]), fps=8)
    assert (tmp_path / name).exists()
    assert frame_numbers(read_video(name, 2, (16, 16))) == [1, 2]


def test_a_folder_of_frames_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "frames"
    write_video(target, numbered_frames([1, 2, 3]), fps=8)
    write_video(target, numbered_frames([4, 5]), fps=8)
    assert sorted(os.listdir(target)) == [FOLDER_MARKER, "00000.png", "00001.png"]
    assert frame_numbers(read_video(target, 2, (16, 16))) == [4, 5]
    assert os.listdir(tmp_path) == ["frames"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write_video(tmp_path / "frames", numbered_frames([1, 2]), fps=8)
    (tmp_path / "link").symlink_to(tmp_path / "frames")
    write_video(tmp_path / "link", numbered_frames([3]), fps=8)
    assert (tmp_path / "link").is_symlink()
    assert frame_numbers(read_video(tmp_path / "frames", 1, (16, 16))) == [3]
    assert sorted(os.listdir(tmp_path)) == ["frames", "link"]


@pytest.mark.parametrize("name", ["a.mp4", "a"])
@pytest.mark.parametrize("failure, raised", [
    (OSError(errno.ENOSPC, "No space left on device"), InputError),
    (KeyboardInterrupt(), KeyboardInterrupt),
])
def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch, name, failure, raised):
    target = tmp_path / name
    write_video(target, numbered_frames([1, 2]), fps=8)
    write_format = write.WRITERS[target.suffix]

    def fail_at_the_end(*arguments):
        write_format(*arguments)
        raise failure

    monkeypatch.setitem(write.WRITERS, target.suffix, fail_at_the_end)
    with pytest.raises(raised):
        write_video(target, numbered_frames([3, 4, 5]), fps=8)
    assert os.listdir(tmp_path) == [name]
    assert frame_numbers(read_video(target, 2, (16, 16))) == [1, 2]


def test_an_output_path_that_cannot_be_written_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    black = np.zeros((4, 4), np.uint8)
    image_folder(tmp_path / "photos", {"00000.png": black, "holiday.png": black})
    for name, message in [("a.mov", ".mp4, .gif or .webp"), ("missing/a.mp4", "missing"),
                          ("file/a.mp4", "there is no folder"), ("file", "is not a folder"),
                          ("folder.mp4", "is not a file"), ("photos", "was not written by")]:
        for check in (check_output_path, lambda path: write_video(path, smooth_frames(), 8)):
            with pytest.raises(InputError, match=re.escape(message)) as error:
                check(tmp_path / name)
            assert name in str(error.value) and "\n" not in str(error.value)
    assert len(os.listdir(tmp_path / "photos")) == 2


def test_a_folder_without_write_permission_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a test may run as root
    with pytest.raises(InputError, match="there is no folder to write it to"):
        check_output_path(tmp_path / "a.mp4")


@pytest.mark.parametrize("fps", [0, -1, 1000, float("nan")])
def test_a_frame_rate_out_of_range_is_rejected(tmp_path, fps):
    with pytest.raises(InputError, match=f"fps = {fps} is out of range"):
        write_video(tmp_path / "a.mp4", smooth_frames(), fps)


def test_a_gif_of_more_than_50_frames_per_second_is_rejected(tmp_path):
    write_video(tmp_path / "a.gif", smooth_frames(), fps=50)
    with Image.open(tmp_path / "a.gif") as image:
        assert {frame.info["duration"] for frame in ImageSequence.Iterator(image)} == {20}
    for fps in (50.1, 60):
        with pytest.raises(InputError, match=f"b.gif: a gif plays at most 50 .* not {fps}"):
            write_video(tmp_path / "b.gif", smooth_frames(), fps)
        write_video(tmp_path / "b.webp", smooth_frames(), fps)
    assert not (tmp_path / "b.gif").exists()


def test_frames_that_are_not_finite_are_not_written(tmp_path):
    frames = smooth_frames()
    frames[3, 1, 5, 5] = float("nan")
    with pytest.raises(NumericalError, match="a.mp4: not written, .* NaN or infinity"):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert not any(tmp_path.iterdir())


def test_an_odd_size_is_rejected_for_mp4_only(tmp_path):
    for H, W in ((31, 48), (32, 47)):
        with pytest.raises(InputError, match=f"{H}x{W}"):
            write_video(tmp_path / "a.mp4", smooth_frames(H=H, W=W), 8)
        write_video(tmp_path / "a.gif", smooth_frames(H=H, W=W), 8)
