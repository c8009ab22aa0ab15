"""Clips read and written: which frames, which pixels, and what is said of a bad file."""

import errno
import os
import re
import struct
import warnings

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange, repeat
from PIL import Image, ImageOps

from mcl.video import decode
from mcl.video import write as writers
from mcl.video.decode import has_audio
from mcl.errors import InputError, NumericalError
from mcl.files import FOLDER_MARKER
from mcl.video.read import FITS, read_image, read_video
from mcl.video.write import check_output_path, write_video


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def smooth_frames(f=6, H=32, W=48):
    """Gradients that change from frame to frame."""
    t, y, x = torch.meshgrid(torch.linspace(-1, 1, f), torch.linspace(-1, 1, H),
                             torch.linspace(-1, 1, W), indexing="ij")
    return torch.stack([t, y * t, (x + t) / 2], dim=1)


def noise_frames(f, H=64, W=64):
    return torch.rand(f, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1


def counting_frames(numbers):
    """One grey frame for each number, its level ten times the number."""
    return repeat(torch.tensor(numbers) * 10 / 127.5 - 1, "f -> f 3 16 16")


def counted(frames):
    return [round(level) for level in ((frames.mean((1, 2, 3)) + 1) * 12.75).tolist()]


def encode(path, codec="libx264", numbers=range(12), rate=24, format=None, title=""):
    """Frames like those of `counting_frames` in files that `write_video` does not write."""
    with av.open(str(path), "w", format=format) as container:
        container.metadata["title"] = title
        reordered = {} if codec == "wmv2" else {"bf": "3", "b_strategy": "0"}
        stream = container.add_stream(codec, rate=rate, options=reordered)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in numbers:
            picture = np.full((32, 64, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))


def image_folder(path, images):
    path.mkdir()
    for name, image in images.items():
        Image.fromarray(np.asarray(image)).save(path / name)
    return path


def levels(frames):
    """(1, 3, H, W) in [-1, 1] to (H, W) grey levels, the channels being equal."""
    assert (frames == frames[:, :1]).all()
    return rearrange((frames[:, 0] + 1) * 127.5, "1 H W -> H W")


# Writing, and reading what was written

@pytest.mark.parametrize("name, worst", [("a.mp4", 15), ("a.gif", 12), ("a.webp", 0), ("a", 0)])
def test_round_trip(tmp_path, name, worst):
    frames = (smooth_frames() * 1.2).to(torch.bfloat16).requires_grad_()
    write_video(tmp_path / name, frames, fps=7.5)
    again = read_video(tmp_path / name, 6, (32, 48))
    assert again.shape == frames.shape and again.dtype == torch.float32
    error = ((again - frames.float().clamp(-1, 1)) * 127.5).abs()
    assert error.max() <= worst + 0.51  # half a level is what uint8 loses
    assert os.listdir(tmp_path) == [name]


def test_mp4_keeps_colours_and_names_them(tmp_path):
    colors = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [0.6, -0.2, -0.6]])
    write_video(tmp_path / "a.mp4", repeat(colors, "f c -> f c 32 32"), fps=7.5)
    again = read_video(tmp_path / "a.mp4", 4, (32, 32))
    assert ((again.mean((2, 3)) - colors) * 127.5).abs().max() < 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.colorspace, stream.color_primaries, stream.color_trc) == (1, 1, 1)  # BT.709
        assert stream.color_range == 1 and stream.pix_fmt == "yuv420p"
        assert stream.average_rate == 7.5


def test_mp4_quality_and_size_are_those_of_crf_14(tmp_path):
    """Grey noise at crf 14: 41.5 dB, 14.2 kB. At 18: 37.9 dB. At 8: 17.3 kB."""
    frames = noise_frames(4)[:, :1].expand(-1, 3, -1, -1)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    error = (read_video(tmp_path / "a.mp4", 4, (64, 64)) - frames) / 2
    assert -10 * error.square().mean().log10() > 40
    assert (tmp_path / "a.mp4").stat().st_size < 15_700


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp"])
def test_same_frames_same_bytes(tmp_path, name):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_video(folder / name, noise_frames(3), fps=8)
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_one_frame(tmp_path):
    for name in ("a.mp4", "a.gif", "a.webp", "a"):
        write_video(tmp_path / name, counting_frames([7]), fps=8)
        assert counted(read_video(tmp_path / name, 1, (16, 16))) == [7]


def test_name_that_looks_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("12:30.mp4", counting_frames([1, 2]), fps=8)
    assert counted(read_video("12:30.mp4", 2, (16, 16))) == [1, 2]


def test_folder_of_frames_is_replaced_whole(tmp_path):
    target = tmp_path / "frames"
    write_video(target, counting_frames([1, 2, 3]), fps=8)
    write_video(target, counting_frames([4, 5]), fps=8)
    assert sorted(os.listdir(target)) == [FOLDER_MARKER, "00000.png", "00001.png"]
    assert counted(read_video(target, 2, (16, 16))) == [4, 5]
    assert os.listdir(tmp_path) == ["frames"]


def test_link_to_a_folder_stays(tmp_path):
    write_video(tmp_path / "frames", counting_frames([1, 2]), fps=8)
    (tmp_path / "link").symlink_to(tmp_path / "frames")
    write_video(tmp_path / "link", counting_frames([3]), fps=8)
    assert (tmp_path / "link").is_symlink()
    assert counted(read_video(tmp_path / "frames", 1, (16, 16))) == [3]
    assert sorted(os.listdir(tmp_path)) == ["frames", "link"]


@pytest.mark.parametrize("name", ["a.mp4", "a"])
@pytest.mark.parametrize("failure, raised", [
    (OSError(errno.ENOSPC, "No space left on device"), InputError),
    (KeyboardInterrupt(), KeyboardInterrupt),
])
def test_failing_write_leaves_what_was_there(tmp_path, monkeypatch, name, failure, raised):
    target = tmp_path / name
    write_video(target, counting_frames([1, 2]), fps=8)
    write = writers.WRITERS[target.suffix]

    def fail_at_the_end(*arguments):
        write(*arguments)
        raise failure

    monkeypatch.setitem(writers.WRITERS, target.suffix, fail_at_the_end)
    with pytest.raises(raised):
        write_video(target, counting_frames([3, 4, 5]), fps=8)
    assert os.listdir(tmp_path) == [name]
    assert counted(read_video(target, 2, (16, 16))) == [1, 2]


def test_refused_targets(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    black = np.zeros((4, 4), np.uint8)
    image_folder(tmp_path / "mine", {"00000.png": black, "holiday.png": black})
    for name, says in [("a.mov", ".mp4, .gif or .webp"), ("missing/a.mp4", "missing"),
                       ("file/a.mp4", "there is no folder"), ("file", "is a file"),
                       ("folder.mp4", "is a folder"), ("mine", "did not write")]:
        for refuse in (check_output_path, lambda path: write_video(path, smooth_frames(), 8)):
            with pytest.raises(InputError, match=re.escape(says)) as error:
                refuse(tmp_path / name)
            assert name in str(error.value) and "\n" not in str(error.value)
    assert len(os.listdir(tmp_path / "mine")) == 2


def test_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a test may run as root
    with pytest.raises(InputError, match="can be written to"):
        check_output_path(tmp_path / "a.mp4")


@pytest.mark.parametrize("fps", [0, -1, 1000, float("nan")])
def test_bad_fps(tmp_path, fps):
    with pytest.raises(InputError, match=f"fps is {fps}"):
        write_video(tmp_path / "a.mp4", smooth_frames(), fps)


def test_frames_that_are_not_finite_are_not_written_as_black(tmp_path):
    frames = smooth_frames()
    frames[3, 1, 5, 5] = float("nan")
    with pytest.raises(NumericalError, match="a.mp4: not written: its frames are not finite"):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert not any(tmp_path.iterdir())


def test_odd_size_in_mp4(tmp_path):
    with pytest.raises(InputError, match="31x48"):
        write_video(tmp_path / "a.mp4", smooth_frames(H=31), 8)
    write_video(tmp_path / "a.gif", smooth_frames(H=31), 8)


# Which frames are taken

@pytest.mark.parametrize("frames, start, duration, expected", [
    (12, 0, None, list(range(12))),
    (6, 0, None, [0, 2, 4, 6, 8, 10]),
    (5, 0, None, [0, 2, 5, 7, 9]),
    (1, 0, None, [0]),
    (3, 0.25, None, [6, 8, 10]),
    (6, 0.25, 0.25, [6, 7, 8, 9, 10, 11]),
    (2, 0.25, 100, [6, 9]),
    (3, 0, 0.125, [0, 1, 2]),
    (1, 0.01, 0.001, [0]),
])
def test_sampling_rule(tmp_path, frames, start, duration, expected):
    encode(tmp_path / "a.mp4")
    taken = read_video(tmp_path / "a.mp4", frames, (16, 16), start, duration)
    assert counted(taken) == expected


@pytest.mark.parametrize("frames, start, stride, expected", [
    (12, 0, 1, list(range(12))), (4, 0, 3, [0, 3, 6, 9]), (2, 0.25, 5, [6, 11])])
def test_every_so_manieth_frame(tmp_path, frames, start, stride, expected):
    encode(tmp_path / "a.mp4")
    taken = read_video(tmp_path / "a.mp4", frames, (16, 16), start, stride=stride)
    assert counted(taken) == expected


def test_steps_longer_than_motion_modules_know_are_warned_of(tmp_path):
    write_video(tmp_path / "a.mp4", counting_frames(list(range(24))), fps=4)
    for how in ({}, {"stride": 6}):
        with pytest.warns(UserWarning, match=r"4 frames .* 1.50 s apart, .* 0.125 s; duration = 0.5"
                          " reads a window that they know"):
            taken = read_video(tmp_path / "a.mp4", 4, (16, 16), known_fps=8, **how)
            assert counted(taken) == [0, 6, 12, 18]
    read_video(tmp_path / "a.mp4", 4, (16, 16), duration=1, known_fps=8)
    read_video(tmp_path / "a.mp4", 4, (16, 16), known_fps=1)


def test_the_warning_of_long_steps_begins_above_2_1_times_the_known_step(tmp_path):
    """The steps of the clip are 0.1 s: 2.09 and 2.11 times those of 20.9 and 21.1 per second."""
    write_video(tmp_path / "a.gif", counting_frames([1, 2, 3, 4]), fps=10)
    read_video(tmp_path / "a.gif", 4, (16, 16), known_fps=20.9)
    with pytest.warns(UserWarning, match="0.10 s apart"):
        read_video(tmp_path / "a.gif", 4, (16, 16), known_fps=21.1)


@pytest.mark.parametrize("name, codec, rate", [
    ("a.mov", "libx264", 24), ("a.mkv", "libx264", 240), ("a.webm", "libvpx-vp9", 24),
    ("a.avi", "libx264", 24), ("A.AVI", "mpeg4", 24), ("a.mpg", "mpeg2video", 24),
    ("a.ts", "libx264", 24), ("a.mts", "libx264", 24), ("a.flv", "libx264", 24),
    ("a.wmv", "wmv2", 24), ("a.3gp", "libx264", 24), ("a.m4v", "libx264", 24),
    ("a.ogv", "libvpx", 24), ("a.mxf", "mpeg2video", 25)])
def test_every_frame_of_every_container_whatever_its_name(tmp_path, name, codec, rate):
    encode(tmp_path / name, codec, rate=rate)
    assert counted(read_video(tmp_path / name, 12, (16, 16))) == list(range(12))
    for other in ("none", "x.png", "x%d.jpg", "x.gif", "x.mp3", "x.mpg"):
        (tmp_path / other).write_bytes((tmp_path / name).read_bytes())
        assert counted(read_video(tmp_path / other, 12, (16, 16))) == list(range(12))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_known_by_their_content(tmp_path, kind):
    first, *rest = [Image.new("RGB", (16, 16), (10 * n,) * 3) for n in range(5)]
    first.save(tmp_path / "a.mp4", kind, save_all=True, append_images=rest, duration=40,
               lossless=True)
    assert counted(read_video(tmp_path / "a.mp4", 5, (16, 16))) == list(range(5))


def test_a_picture_or_a_pipe_is_no_clip(tmp_path):
    for kind in ("PNG", "JPEG", "BMP"):
        Image.new("L", (16, 16)).save(tmp_path / "a.mp4", kind)
        assert_refused(tmp_path / "a.mp4", "a.mp4: is a picture, not a clip")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "is a device or a pipe")


@pytest.mark.parametrize("fps", [7.5, 30])
def test_times_of_a_gif_are_rounded(tmp_path, fps):
    write_video(tmp_path / "a.gif", counting_frames(list(range(12))), fps)
    assert counted(read_video(tmp_path / "a.gif", 12, (16, 16))) == list(range(12))
    with pytest.raises(InputError, match=f"the clip is {12 / fps:.2f} s long"):
        read_video(tmp_path / "a.gif", 1, (16, 16), start=9)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_held_frames_keep_their_time(tmp_path, name):
    held = [0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5]
    write_video(tmp_path / name, counting_frames(held), fps=8)
    with pytest.warns(UserWarning, match="only 6 different frames for the 15"):
        assert counted(read_video(tmp_path / name, 15, (16, 16))) == held
    last_frame_is_cut = read_video(tmp_path / name, 3, (16, 16), start=1.0, duration=0.375)
    assert counted(last_frame_is_cut) == [3, 4, 5]


def test_gif_without_delays(tmp_path):
    first, *rest = [Image.new("L", (16, 16), 10 * number) for number in range(5)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    assert counted(read_video(tmp_path / "a.gif", 2, (16, 16), start=0.375)) == [3, 4]


def test_joined_recordings(tmp_path):
    encode(tmp_path / "a.mpg", "mpeg2video")
    (tmp_path / "b.mpg").write_bytes((tmp_path / "a.mpg").read_bytes() * 2)
    assert counted(read_video(tmp_path / "b.mpg", 24, (16, 16))) == list(range(12)) * 2


def test_stream_without_times(tmp_path):
    encode(tmp_path / "a.mp4", format="h264")
    assert counted(read_video(tmp_path / "a.mp4", 12, (16, 16))) == list(range(12))


def test_pictures_of_a_folder_may_lack_their_ending(tmp_path):
    folder = image_folder(tmp_path / "clip", {
        f"{number}.png": np.full((16, 16), 10 * number, np.uint8) for number in range(3)})
    for file in list(folder.iterdir()):
        file.rename(file.with_suffix(""))
    (folder / "notes").write_text("not an image")
    assert counted(read_video(folder, 3, (16, 16))) == [0, 1, 2]


def test_folder_is_in_natural_order_at_8_fps(tmp_path):
    folder = image_folder(tmp_path / "clip", {
        f"frame{number}.PNG": np.full((16, 16), 10 * number, np.uint8) for number in range(12)})
    (folder / "notes.txt").write_text("not an image")
    (folder / "._frame0.png").write_text("what macOS leaves behind")
    assert counted(read_video(folder, 12, (16, 16))) == list(range(12))
    assert counted(read_video(folder, 2, (16, 16), start=1.0, duration=0.25)) == [8, 9]


def test_too_few_frames_are_repeated(tmp_path):
    write_video(tmp_path / "a.mp4", counting_frames([1, 2, 3]), fps=8)
    with pytest.warns(UserWarning, match="a.mp4: only 3 different frames for the 6 asked for"):
        assert counted(read_video(tmp_path / "a.mp4", 6, (16, 16))) == [1, 1, 2, 2, 3, 3]


# Which pixels

@pytest.mark.parametrize("turned", [False, True])
def test_fit(tmp_path, turned):
    wide = np.arange(4 * 8, dtype=np.uint8).reshape(4, 8) * 8
    folder = image_folder(tmp_path / "clip", {"a.png": wide.T if turned else wide})

    def read(H, W, fit):
        frames = read_video(folder, 1, (W, H) if turned else (H, W), fit=fit)
        return levels(frames).T.round() if turned else levels(frames).round()

    picture = torch.from_numpy(wide).float()
    assert read(4, 4, "crop").equal(picture[:, 2:6])
    padded = read(8, 8, "pad")
    assert padded[2:6].equal(picture)
    assert padded[:2].eq(0).all() and padded[6:].eq(0).all()
    assert read(4, 8, "stretch").equal(picture)
    stretched = read(4, 4, "stretch")
    assert (stretched[:, 1:3] - (picture[:, 2:6:2] + picture[:, 3:6:2]) / 2).abs().max() <= 1


@pytest.mark.parametrize("fit", FITS)
def test_extreme_shapes(tmp_path, fit):
    thread = image_folder(tmp_path / "clip", {"a.png": np.full((1, 64), 200, np.uint8)})
    for size in ((16, 16), (64, 1)):
        assert levels(read_video(thread, 1, size, fit=fit)).max().round() == 200


def test_shrinking_does_not_alias(tmp_path):
    checkers = np.indices((63, 63)).sum(0).astype(np.uint8) % 2 * 255
    folder = image_folder(tmp_path / "clip", {"a.png": checkers})
    assert (levels(read_video(folder, 1, (9, 9))) - 127.5).abs().max() < 8


def test_shrinking_keeps_the_range(tmp_path):
    folder = image_folder(tmp_path / "clip", {"a.png": np.zeros((21, 21), np.uint8)})
    assert read_video(folder, 1, (16, 16)).min() == -1


@pytest.mark.parametrize("image, level", [
    (np.full((4, 4, 4), (200, 200, 200, 128), np.uint8), 200 * 128 / 255),
    (np.full((4, 4), 77, np.uint8), 77),
    (np.full((4, 4), 77 * 257, np.uint16), 77),
], ids=["transparent", "grey", "16-bit grey"])
def test_kinds_of_image(tmp_path, image, level):
    folder = image_folder(tmp_path / "clip", {"a.png": image})
    assert levels(read_video(folder, 1, (4, 4))).sub(level).abs().max() < 0.01


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_pictures_are_turned_as_the_camera_was_held(tmp_path, ending):
    """Against Pillow's own turning; the folder's pictures are all upright, whichever way stored."""
    stored = np.full((16, 32, 3), 128, np.uint8)
    stored[:8, :8], stored[:8, 24:] = 255, 0
    (tmp_path / "folder").mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.{ending}"
        Image.fromarray(stored).save(file, exif=exif, quality=100)
        with Image.open(file) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        found = read_image(file, expected.shape[:2])
        assert np.abs((found[0].movedim(0, -1).numpy() + 1) * 127.5 - expected).max() < 1e-3
        if orientation > 4:
            file.rename(tmp_path / "folder" / file.name)
    standing = np.zeros((32, 16, 3), np.uint8)
    Image.fromarray(standing).save(tmp_path / "folder" / f"9.{ending}")
    assert read_video(tmp_path / "folder", 5, (32, 16)).shape == (5, 3, 32, 16)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_picture_whose_exif_is_broken_is_taken_as_it_lies(tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    Image.new("L", (32, 16), 77).save(file, exif=b"Exif\0\0no EXIF at all")
    assert levels(read_image(file, (16, 32))).sub(77).abs().max() < 2


@pytest.mark.parametrize("name, codec, format", [
    ("a.webm", "libvpx-vp9", "yuva420p"), ("a.mkv", "libvpx", "yuva420p"),
    ("a.mov", "prores_ks", "yuva444p10le"), ("a.mov", "png", "rgba"), ("a.mov", "qtrle", "argb")])
def test_transparent_parts_of_videos_are_black(tmp_path, name, codec, format):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, format
        for level in (250, 150):
            picture = np.full((64, 64, 4), level, np.uint8)
            picture[:, :32, 3], picture[:, 32:, 3] = 0, 255
            frame = av.VideoFrame.from_ndarray(picture, "rgba").reformat(format=format)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for frame, level in zip(read_video(tmp_path / name, 2, (64, 64)), (250, 150)):
        seen = (frame + 1) * 127.5
        assert seen[..., :28].max() < 3 and (seen[..., 36:] - level).abs().max() < 6


def test_rotation_of_the_camera_is_undone(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)  # counterclockwise
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, :16] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    turned = levels(read_video(tmp_path / "a.mp4", 1, (64, 32)))
    assert turned[52:].min() > 250 and turned[:44].max() < 5


@pytest.mark.parametrize("depth", ["yuv420p10le", "yuv420p"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("transfer", [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])
def test_hdr_is_brought_to_the_usual_range(tmp_path, transfer, full, depth):
    """Colours of known light, 203 cd/m2 white, by the inverse of the formulas of BT.2100."""
    light = np.array([[1, 1, 1], [.5, .5, .5], [.02, .02, .02], [.5, 0, 0], [0, .5, 0], [0, 0, .5],
                      [.6, .3, .2], [4, 2, 2]])
    wide = light @ np.array([[.6274, .3293, .0433], [.0691, .9195, .0114], [.0164, .088, .8956]]).T
    if transfer == ColorTrc.SMPTE2084:
        y = (wide * .0203) ** (2610 / 16384)
        signal = ((.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    else:
        y = wide * .203 * (wide * .203 @ [.2627, .678, .0593])[:, None] ** (-1 / 6)
        signal = np.where(y <= 1 / 12, (3 * y) ** .5,
                          .17883277 * np.log((12 * y - .28466892).clip(1e-9)) + .55991073)
    bars = np.rint(signal.clip(0, 1) * 65535).astype(np.uint16).repeat(16, 0)[None].repeat(64, 0)
    levels = ColorRange.JPEG if full else ColorRange.MPEG
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 64, depth
        codec = stream.codec_context
        codec.color_trc, codec.color_range = transfer, levels
        if full:                        # else the file does not say, and means it all the same
            codec.colorspace = Colorspace.BT2020
        frame = av.VideoFrame.from_ndarray(bars.copy(), "rgb48le").reformat(
            format=depth, dst_colorspace=Colorspace.BT2020, dst_color_range=levels)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    picture = read_video(tmp_path / "a.mkv", 1, (64, 128))[0, :, 16:48]
    found = (rearrange(picture, "c h (n w) -> n c h w", w=16)[..., 5:11].mean((2, 3)) + 1) * 127.5
    assert 245 <= found[0].mean() <= 255
    expected = torch.from_numpy(255 * light ** (1 / 2.4))
    assert (found - expected)[1:7].abs().max() < (16 if depth == "yuv420p10le" else 30)
    highlight = (found[7] / 255) ** 2.4             # dimmed, and of the same hue
    assert (highlight / highlight[0] - torch.tensor([1, .5, .5])).abs().max() < 0.1


def test_the_transfer_and_the_primaries_are_what_file_or_frame_say():
    red = np.zeros((2, 2, 3), np.uint16) + np.array([30000, 0, 0], np.uint16)
    frame = av.VideoFrame.from_ndarray(red, "rgb48le")
    usual, promised = (decode._video_rgba(frame, trc)[0, 0] for trc in (1, ColorTrc.SMPTE2084))
    assert usual[0] < 120 and promised[0] > 150
    frame.color_trc, frame.color_primaries = ColorTrc.SMPTE2084, ColorPrimaries.BT709
    narrow = decode._video_rgba(frame, 1)[0, 0]
    assert promised[0] > narrow[0] > 120 and narrow[1] == promised[1] == 0


# What cannot be read

@pytest.mark.parametrize("name, content, says", [
    ("missing.mp4", None, "no such file"),
    ("empty.mp4", b"", "cannot be decoded from its start"),
    ("text.mp4", b"not a video\n" * 99, "cannot be decoded from its start"),
    ("text.gif", b"not a picture\n" * 99, "cannot be decoded"),
    ("notes.txt", b"a prompt\n" * 99, "cannot be decoded from its start"),
    ("photo.jpg", b"\xff\xd8\xff", "cannot be decoded"),
])
def test_bad_file(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, says)


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif"])
def test_cut_off_anywhere(tmp_path, name):
    write_video(tmp_path / name, noise_frames(3, 16, 16), fps=8)
    content = (tmp_path / name).read_bytes()
    read = []
    for length in range(1, len(content), 31):
        (tmp_path / name).write_bytes(content[:length])
        try:
            read_video(tmp_path / name, 1, (16, 16))
            read.append(length)
        except InputError as error:
            assert name in str(error) and "\n" not in str(error)
    if name == "a.gif":     # which does not say how many frames it has
        assert all(length > 600 for length in read)
    else:
        assert not read


def test_metadata_in_another_encoding(tmp_path):
    encode(tmp_path / "a.mkv", title="café")
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content.replace("é".encode(), b"\xe9."))
    assert counted(read_video(tmp_path / "a.mkv", 12, (16, 16))) == list(range(12))


def test_no_frame_and_no_video(tmp_path):
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        container.add_stream("mpeg4", rate=24)
        container.start_encoding()
    assert_refused(tmp_path / "none.avi", "no frame")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert_refused(tmp_path / "sound.mp4", "holds no video")
    assert has_audio(tmp_path / "sound.mp4") and not has_audio(tmp_path / "none.avi")
    assert not has_audio(image_folder(tmp_path / "clip", {}))


def test_bad_folder(tmp_path):
    small, large = np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)
    assert_refused(image_folder(tmp_path / "none", {}), "holds no image")
    assert_refused(image_folder(tmp_path / "sizes", {"a.png": small, "b.png": large}), "b.png")
    broken = image_folder(tmp_path / "broken", {"a.png": small})
    (broken / "a.png").write_text("not an image")
    assert_refused(broken, "a.png")
    cut = image_folder(tmp_path / "cut", {"a.bmp": np.zeros((99, 99), np.uint8)})
    content = (cut / "a.bmp").read_bytes()
    (cut / "a.bmp").write_bytes(content[:2000])
    assert_refused(cut, "a.bmp")
    enormous = struct.pack("<ii", 1 << 20, 1 << 20)
    (cut / "a.bmp").write_bytes(content[:18] + enormous + content[26:])
    assert_refused(cut, "a.bmp")


def test_damage_in_the_middle(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, noise_frames(40), fps=8)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 20000] = bytes(20000)
    path.write_bytes(content)
    assert_refused(path, r"at about frame \d+, .*shorter duration")
    assert read_video(path, 4, (64, 64), duration=0.5).shape == (4, 3, 64, 64)


def test_cut_short_but_playable(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, noise_frames(40), fps=8)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    assert_refused(path, "cut short.*shorter duration")
    assert read_video(path, 4, (64, 64), duration=0.5).shape == (4, 3, 64, 64)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        last = max(packet.pos or 0 for packet in container.demux(video=0))
    path.write_bytes(content[:last])    # between two frames: it may be one that was trimmed
    with pytest.warns(UserWarning, match="a.mp4: promises 40 frames, but 39"):
        assert read_video(path, 4, (64, 64)).shape == (4, 3, 64, 64)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_a_file_that_promises_seconds_and_ends_before(tmp_path, name, recwarn):
    encode(tmp_path / name, "libvpx-vp9" if name == "a.webm" else "libx264")
    read_video(tmp_path / name, 4, (16, 16))
    assert not recwarn.list
    with av.open(str(tmp_path / name)) as container:
        last = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[-3]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:last])
    with pytest.warns(UserWarning, match=f"{name}: promises 0.50 s, but ends at"):
        read_video(tmp_path / name, 4, (16, 16))


def test_frames_that_an_edit_list_hides_are_not_missed(tmp_path, recwarn):
    encode(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as whole, av.open(
            str(tmp_path / "b.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as trimmed:
        source = whole.streams.video[0]
        stream = trimmed.add_stream_from_template(source)
        for packet in whole.demux(source):
            if packet.dts is not None:
                packet.pts -= 4 * packet.duration
                packet.dts -= 4 * packet.duration
                packet.stream = stream
                trimmed.mux(packet)
    assert counted(read_video(tmp_path / "b.mp4", 8, (16, 16))) == list(range(4, 12))
    assert not recwarn.list


def test_no_window_is_too_short(tmp_path):
    encode(tmp_path / "a.mp4")
    with pytest.warns(UserWarning, match="only 1 different frames"):
        assert counted(read_video(tmp_path / "a.mp4", 2, (16, 16), duration=5e-324)) == [0, 0]


@pytest.mark.parametrize("wrong, says", [
    ({"frames": 0}, "frames is 0"), ({"size": (0, 16)}, "size 0x16"),
    ({"start": -1.0}, "start is -1.0"), ({"duration": 0.0}, "duration 0.0"),
    ({"fit": "zoom"}, "'zoom'; it must be one of crop, pad, stretch"),
    ({"start": 0.5}, "a.mp4: start 0.5 s is past the end; the clip is 0.50 s long"),
    ({"start": 9.0, "duration": 1.0}, "the clip is 0.50 s long"),
    ({"stride": 0}, "stride = 0 is not possible: 1 or more"),
    ({"stride": 2, "duration": 1.0}, "without a duration"),
    ({"stride": 4, "start": 0.1}, "4 frames would span 13, from the start on there are 10; give a"),
])
def test_bad_number(tmp_path, wrong, says):
    encode(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=re.escape(says)) as error:
        read_video(tmp_path / "a.mp4", **{"frames": 4, "size": (16, 16), **wrong})
    assert "\n" not in str(error.value)


def assert_refused(path, says):
    with pytest.raises(InputError, match=says) as error:
        read_video(path, 1, (16, 16))
    assert path.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "ffconcat version 1.0\nfile 'other.mp4'\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"])
def test_lists_of_other_files_are_not_followed(tmp_path, text):
    write_video(tmp_path / "other.mp4", counting_frames([1, 2]), fps=8)
    (tmp_path / "a.mp4").write_text(text)
    assert_refused(tmp_path / "a.mp4", "cannot be decoded")
