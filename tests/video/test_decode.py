"""Decoding of every kind of file: frames, times, pixels, errors."""
import os
import struct

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from mcl.errors import InputError
from mcl.video.decode import has_audio
from mcl.video.read import read_image, read_video
from mcl.video.write import write_video
from tests.video.conftest import (
    assert_rejected,
    encode_video,
    frame_numbers,
    gray_levels,
    image_folder,
    numbered_frames,
    random_frames,
)


@pytest.mark.parametrize("name, codec, rate", [
    ("a.mov", "libx264", 24), ("a.mkv", "libx264", 240), ("a.webm", "libvpx-vp9", 24),
    ("a.avi", "libx264", 24), ("A.AVI", "mpeg4", 24), ("a.mpg", "mpeg2video", 24),
    ("a.ts", "libx264", 24), ("a.mts", "libx264", 24), ("a.flv", "libx264", 24),
    ("a.wmv", "wmv2", 24), ("a.3gp", "libx264", 24), ("a.m4v", "libx264", 24),
    ("a.ogv", "libvpx", 24), ("a.mxf", "mpeg2video", 25), ("a.y4m", "wrapped_avframe", 24),
    ("a.ivf", "libvpx", 24), ("a.nut", "mpeg4", 24), ("a.rm", "rv20", 24),
    ("a.wtv", "mpeg2video", 24), ("a.obu", "libsvtav1", 24)])
def test_every_container_is_decoded_under_any_name(tmp_path, name, codec, rate):
    encode_video(tmp_path / name, codec, rate=rate)
    assert frame_numbers(read_video(tmp_path / name, 12, (16, 16))) == list(range(12))
    for other in ("none", "x.png", "x%d.jpg", "x.gif", "x.mp3", "x.mpg"):
        (tmp_path / other).write_bytes((tmp_path / name).read_bytes())
        assert frame_numbers(read_video(tmp_path / other, 12, (16, 16))) == list(range(12))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_recognized_by_their_content(tmp_path, kind):
    first, *rest = [Image.new("RGB", (16, 16), (10 * n,) * 3) for n in range(5)]
    first.save(tmp_path / "a.mp4", kind, save_all=True, append_images=rest, duration=40,
               lossless=True)
    assert frame_numbers(read_video(tmp_path / "a.mp4", 5, (16, 16))) == list(range(5))


def test_a_single_image_or_a_pipe_is_rejected_as_a_clip(tmp_path):
    for kind in ("PNG", "JPEG", "BMP"):
        Image.new("L", (16, 16)).save(tmp_path / "a.mp4", kind)
        assert_rejected(tmp_path / "a.mp4", "a.mp4: is a single image")
    folder = image_folder(tmp_path / "clip", {})
    for pipe in (tmp_path / "pipe", folder / "a.png"):
        os.mkfifo(pipe)
        with pytest.raises(InputError, match=f"{pipe.name}: is a device, a pipe or a socket"):
            read_image(pipe, (16, 16))
    assert_rejected(tmp_path / "pipe", "is a device, a pipe or a socket")
    assert_rejected(folder, "a.png: is a device, a pipe or a socket")


@pytest.mark.parametrize("fps", [7.5, 30])
def test_rounded_gif_times_select_the_right_frames(tmp_path, fps):
    write_video(tmp_path / "a.gif", numbered_frames(list(range(12))), fps)
    assert frame_numbers(read_video(tmp_path / "a.gif", 12, (16, 16))) == list(range(12))
    with pytest.raises(InputError, match=f"past the end, {12 / fps:.2f} s"):
        read_video(tmp_path / "a.gif", 1, (16, 16), start=9)


def test_a_gif_without_delays_plays_at_8_fps(tmp_path):
    first, *rest = [Image.new("L", (16, 16), 10 * number) for number in range(5)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    assert frame_numbers(read_video(tmp_path / "a.gif", 2, (16, 16), start=0.375)) == [3, 4]


def test_joined_recordings_play_one_after_the_other(tmp_path):
    encode_video(tmp_path / "a.mpg", "mpeg2video")
    (tmp_path / "b.mpg").write_bytes((tmp_path / "a.mpg").read_bytes() * 2)
    assert frame_numbers(read_video(tmp_path / "b.mpg", 24, (16, 16))) == list(range(12)) * 2


def test_a_stream_without_timestamps_is_decoded(tmp_path):
    encode_video(tmp_path / "a.mp4", format="h264")
    assert frame_numbers(read_video(tmp_path / "a.mp4", 12, (16, 16))) == list(range(12))


def test_images_of_a_folder_are_recognized_without_an_extension(tmp_path):
    folder = image_folder(tmp_path / "clip", {
        f"{number}.png": np.full((16, 16), 10 * number, np.uint8) for number in range(3)})
    for file in list(folder.iterdir()):
        file.rename(file.with_suffix(""))
    (folder / "notes").write_text("not an image")
    assert frame_numbers(read_video(folder, 3, (16, 16))) == [0, 1, 2]


def test_a_folder_plays_in_natural_order_at_8_fps(tmp_path):
    folder = image_folder(tmp_path / "clip", {
        f"frame{number}.PNG": np.full((16, 16), 10 * number, np.uint8) for number in range(12)})
    (folder / "notes.txt").write_text("not an image")
    (folder / "._frame0.png").write_text("written by macOS")
    assert frame_numbers(read_video(folder, 12, (16, 16))) == list(range(12))
    assert frame_numbers(read_video(folder, 2, (16, 16), start=1.0, duration=0.25)) == [8, 9]


@pytest.mark.parametrize("image, level", [
    (np.full((4, 4, 4), (200, 200, 200, 128), np.uint8), 200 * 128 / 255),
    (np.full((4, 4), 77, np.uint8), 77),
    (np.full((4, 4), 77 * 257, np.uint16), 77),
], ids=["transparent", "gray", "16-bit gray"])
def test_transparent_and_gray_images_are_decoded(tmp_path, image, level):
    folder = image_folder(tmp_path / "clip", {"a.png": image})
    assert gray_levels(read_video(folder, 1, (4, 4))).sub(level).abs().max() < 0.01


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_images_are_turned_by_their_exif_orientation(tmp_path, suffix):
    """Compare with Pillow. A folder may mix stored orientations if all are upright when turned."""
    stored = np.full((16, 32, 3), 128, np.uint8)
    stored[:8, :8], stored[:8, 24:] = 255, 0
    (tmp_path / "folder").mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(stored).save(file, exif=exif, quality=100)
        with Image.open(file) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        image = read_image(file, expected.shape[:2])
        assert np.abs((image[0].movedim(0, -1).numpy() + 1) * 127.5 - expected).max() < 1e-3
        if orientation > 4:
            file.rename(tmp_path / "folder" / file.name)
    upright = np.zeros((32, 16, 3), np.uint8)
    Image.fromarray(upright).save(tmp_path / "folder" / f"9.{suffix}")
    assert read_video(tmp_path / "folder", 5, (32, 16)).shape == (5, 3, 32, 16)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_with_damaged_exif_is_decoded_as_stored(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.new("L", (32, 16), 77).save(file, exif=b"Exif\0\0no EXIF at all")
    assert gray_levels(read_image(file, (16, 32))).sub(77).abs().max() < 2
    folder = image_folder(tmp_path / "folder", {})
    file.rename(folder / file.name)
    clip = folder / file.name if suffix == "webp" else folder       # a webp file is a clip, too
    assert gray_levels(read_video(clip, 1, (16, 32))).sub(77).abs().max() < 2


@pytest.mark.parametrize("name, codec, format", [
    ("a.webm", "libvpx-vp9", "yuva420p"), ("a.mkv", "libvpx", "yuva420p"),
    ("a.mov", "prores_ks", "yuva444p10le"), ("a.mov", "png", "rgba"), ("a.mov", "qtrle", "argb")])
def test_transparent_parts_of_videos_are_black(tmp_path, name, codec, format):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, format
        for level in (250, 150):
            image = np.full((64, 64, 4), level, np.uint8)
            image[:, :32, 3], image[:, 32:, 3] = 0, 255
            frame = av.VideoFrame.from_ndarray(image, "rgba").reformat(format=format)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for frame, level in zip(read_video(tmp_path / name, 2, (64, 64)), (250, 150), strict=True):
        levels = (frame + 1) * 127.5
        assert levels[..., :28].max() < 3 and (levels[..., 36:] - level).abs().max() < 6


def test_a_rotated_video_is_decoded_upright(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)  # counterclockwise
        image = np.zeros((32, 64, 3), np.uint8)
        image[:, :16] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    turned = gray_levels(read_video(tmp_path / "a.mp4", 1, (64, 32)))
    assert turned[52:].min() > 250 and turned[:44].max() < 5


@pytest.mark.parametrize("name, content, message", [
    ("missing.mp4", None, "no such file"),
    ("empty.mp4", b"", "cannot be decoded from its start"),
    ("text.mp4", b"not a video\n" * 99, "cannot be decoded from its start"),
    ("text.gif", b"not an image\n" * 99, "cannot be decoded"),
    ("notes.txt", b"a prompt\n" * 99, "cannot be decoded from its start"),
    ("photo.jpg", b"\xff\xd8\xff", "cannot be decoded"),
])
def test_an_undecodable_file_is_rejected(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_rejected(tmp_path / name, message)


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif"])
def test_a_file_cut_at_any_byte_gives_a_one_line_error(tmp_path, name):
    write_video(tmp_path / name, random_frames(3, 16, 16), fps=8)
    content = (tmp_path / name).read_bytes()
    read = []
    for length in range(1, len(content), 31):
        (tmp_path / name).write_bytes(content[:length])
        try:
            read_video(tmp_path / name, 1, (16, 16))
            read.append(length)
        except InputError as error:
            assert name in str(error) and "\n" not in str(error)
    if name == "a.gif":     # a gif does not declare its number of frames
        assert all(length > 600 for length in read)
    else:
        assert not read


def test_metadata_that_is_not_utf8_is_ignored(tmp_path):
    encode_video(tmp_path / "a.mkv", title="café")
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content.replace("é".encode(), b"\xe9."))
    assert frame_numbers(read_video(tmp_path / "a.mkv", 12, (16, 16))) == list(range(12))


def test_a_file_without_video_frames_is_rejected(tmp_path):
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        container.add_stream("mpeg4", rate=24)
        container.start_encoding()
    assert_rejected(tmp_path / "none.avi", "no frame")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert_rejected(tmp_path / "sound.mp4", "holds no video")
    assert has_audio(tmp_path / "sound.mp4") and not has_audio(tmp_path / "none.avi")
    assert not has_audio(image_folder(tmp_path / "clip", {}))


def test_a_folder_without_equal_intact_images_is_rejected(tmp_path):
    small, large = np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)
    assert_rejected(image_folder(tmp_path / "none", {}), "holds no image")
    assert_rejected(image_folder(tmp_path / "sizes", {"a.png": small, "b.png": large}), "b.png")
    broken = image_folder(tmp_path / "broken", {"a.png": small})
    (broken / "a.png").write_text("not an image")
    assert_rejected(broken, "a.png")
    cut = image_folder(tmp_path / "cut", {"a.bmp": np.zeros((99, 99), np.uint8)})
    content = (cut / "a.bmp").read_bytes()
    (cut / "a.bmp").write_bytes(content[:2000])
    assert_rejected(cut, "a.bmp")
    huge_size = struct.pack("<ii", 1 << 20, 1 << 20)
    (cut / "a.bmp").write_bytes(content[:18] + huge_size + content[26:])
    assert_rejected(cut, "a.bmp")


def test_damage_is_located_and_the_part_before_it_is_read(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, random_frames(40), fps=8)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 20000] = bytes(20000)
    path.write_bytes(content)
    assert_rejected(path, r"at about frame \d+, .*shorter duration")
    assert read_video(path, 4, (64, 64), duration=0.5).shape == (4, 3, 64, 64)


def test_a_file_cut_short_is_rejected_or_warned_of(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, random_frames(40), fps=8)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    assert_rejected(path, "cut short.*shorter duration")
    assert read_video(path, 4, (64, 64), duration=0.5).shape == (4, 3, 64, 64)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        last = max(packet.pos or 0 for packet in container.demux(video=0))
    path.write_bytes(content[:last])    # a cut between two frames: the file may be trimmed
    with pytest.warns(UserWarning, match="a.mp4: may be cut short: 39 of 40 frames"):
        assert read_video(path, 4, (64, 64)).shape == (4, 3, 64, 64)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_a_file_shorter_than_its_declared_duration_gives_a_warning(tmp_path, name, recwarn):
    encode_video(tmp_path / name, "libvpx-vp9" if name == "a.webm" else "libx264")
    read_video(tmp_path / name, 4, (16, 16))
    assert not recwarn.list
    with av.open(str(tmp_path / name)) as container:
        last = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[-3]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:last])
    with pytest.warns(UserWarning, match=rf"{name}: may be cut short: 0\.\d\d of 0.50 s"):
        read_video(tmp_path / name, 4, (16, 16))


def test_frames_hidden_by_an_edit_list_give_no_warning(tmp_path, recwarn):
    encode_video(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as source_file, av.open(
            str(tmp_path / "b.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as trimmed:
        source = source_file.streams.video[0]
        stream = trimmed.add_stream_from_template(source)
        for packet in source_file.demux(source):
            if packet.dts is not None:
                packet.pts -= 4 * packet.duration
                packet.dts -= 4 * packet.duration
                packet.stream = stream
                trimmed.mux(packet)
    assert frame_numbers(read_video(tmp_path / "b.mp4", 8, (16, 16))) == list(range(4, 12))
    assert not recwarn.list


@pytest.mark.parametrize("text", [
    "ffconcat version 1.0\nfile 'other.mp4'\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"])
def test_playlists_are_not_followed(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "other.mp4", numbered_frames([1, 2]), fps=8)
    (tmp_path / "a.mp4").write_text(text)
    assert_rejected(tmp_path / "a.mp4", "cannot be decoded")
