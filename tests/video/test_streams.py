"""Videos of other programs: choice of the stream, times, pixel shapes, interlacing, cut files."""
import io
import struct
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from mcl.errors import InputError
from mcl.video.decode import iter_frames
from mcl.video.read import FITS, read_video
from tests.video.conftest import assert_rejected, encode_video, frame_numbers, gray_levels


def encode_streams(path, streams, sound=False, cover=None):
    """Write gray clips as the streams of one file: each (codec, gray levels, disposition)."""
    with av.open(str(path), "w") as container:
        encoded = []
        for codec, levels, disposition in streams:
            stream = container.add_stream(codec, rate=24)
            stream.width, stream.height, stream.disposition = 64, 32, disposition
            stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
            encoded.append((stream, levels))
        if cover:
            container.add_attachment("cover.png", "image/png", cover)
        if sound:
            track = container.add_stream("aac", rate=44100)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate = 44100
        for stream, levels in encoded:
            for level in levels:
                image = av.VideoFrame.from_ndarray(np.full((32, 64, 3), level, np.uint8))
                container.mux(stream.encode(image.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode(None))
        if sound:
            container.mux(track.encode(silence))
            container.mux(track.encode(None))


def encode(path, codec, images, pts=None, aspect=Fraction(1), rotation=0, **options):
    """Write images (h, w, 3) at 25 frames per second, or at the times `pts` of that clock."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "rgb24" if codec == "qtrle" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for time, image in zip(pts or range(len(images)), images, strict=True):
            frame = av.VideoFrame.from_ndarray(image).reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def noise(count, height=64, width=64):
    """Return noise images, which give large frames."""
    return list(np.random.default_rng(0).integers(0, 255, (count, height, width, 3), np.uint8))


def test_the_default_stream_of_two_is_read(tmp_path):
    encode_streams(tmp_path / "a.mkv", [("libx264", [200] * 3, Disposition(0)),
                                        ("libx264", [10, 20, 30], Disposition.default)])
    assert frame_numbers(read_video(tmp_path / "a.mkv", 3, (16, 16))) == [1, 2, 3]


def test_cover_art_is_not_read(tmp_path):
    """The cover is the first stream, and FFmpeg prefers it to the video of the second file."""
    encode_streams(tmp_path / "a.mp4", [("png", [200], Disposition.attached_pic),
                                        ("libx264", [10, 20, 30], Disposition.default)])
    content = (tmp_path / "a.mp4").read_bytes()
    video, cover = content.index(b"trak") - 4, content.index(b"udta") - 4
    end = cover + int.from_bytes(content[cover:cover + 4])
    (tmp_path / "a.mp4").write_bytes(content[:video] + content[cover:end] + content[video:cover] +
                                     content[end:])
    image = io.BytesIO()
    Image.new("L", (64, 32), 200).save(image, "PNG")
    encode_streams(tmp_path / "a.mkv", [("libx264", [10, 20, 30], Disposition.visual_impaired)],
                   cover=image.getvalue())
    for name, cover_index in (("a.mp4", 0), ("a.mkv", 1)):
        with av.open(str(tmp_path / name)) as container:
            assert [stream.disposition for stream in container.streams.video][
                cover_index] == Disposition.attached_pic
        assert frame_numbers(read_video(tmp_path / name, 3, (16, 16))) == [1, 2, 3]


@pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="Pillow 11.3 and later")
def test_all_frames_of_an_animated_avif_are_read(tmp_path):
    first, *rest = [Image.new("RGB", (64, 64), (10 * number,) * 3) for number in range(5)]
    first.save(tmp_path / "a.avif", save_all=True, append_images=rest, duration=40, quality=90)
    assert frame_numbers(read_video(tmp_path / "a.avif", 5, (16, 16))) == list(range(5))


def test_sound_with_a_cover_is_not_a_clip(tmp_path):
    encode_streams(tmp_path / "a.mp4", [("png", [200], Disposition.attached_pic)], sound=True)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video and container.streams.audio
    assert_rejected(tmp_path / "a.mp4", "holds no video")


def test_a_format_that_is_not_read_is_named(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w", format="swf") as container:
        stream = container.add_stream("flv", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8))))
        container.mux(stream.encode(None))
    assert_rejected(tmp_path / "a.mp4", r"has the format SWF \(ShockWave Flash\).* Convert it")
    (tmp_path / "b.mp4").write_text("1\n00:00:01,000 --> 00:00:02,000\nhello\n")
    assert_rejected(tmp_path / "b.mp4", "has the format SubRip")


def test_dv_plays_at_its_rate_and_pixel_aspect_ratio(tmp_path):
    encode(tmp_path / "a.dv", "dvvideo", [np.full((576, 720, 3), 10 * n, np.uint8)
                                          for n in range(4)], aspect=Fraction(16, 15))
    frames = list(iter_frames(tmp_path / "a.dv"))
    assert [frame.start for frame in frames] == pytest.approx([0, 0.04, 0.08, 0.12])
    assert frames[-1].end == pytest.approx(0.16) and frames[0].pixel_aspect == 16 / 15
    assert frame_numbers(read_video(tmp_path / "a.dv", 4, (16, 16))) == [0, 1, 2, 3]


@pytest.mark.parametrize("codec, options", [
    ("mpeg4", {}), ("mpeg4", {"bf": "2"}), ("libx264", {"bf": "0"}), ("mpeg2video", {"bf": "2"}),
    ("libx264", {"bf": "3", "b_strategy": "0"})])
def test_an_avi_with_pauses_has_the_times_of_the_same_packets_in_mkv(tmp_path, codec, options):
    pts = [*range(7), *range(30, 37), *range(50, 58)]
    images = [np.full((32, 64, 3), 10 * number, np.uint8) for number in range(len(pts))]
    for name in ("a.avi", "a.mkv"):
        encode(tmp_path / name, codec, images, pts, **options)
        frames = list(iter_frames(tmp_path / name))
        assert [frame.start * 25 for frame in frames] == pytest.approx(pts, abs=0.02)
        levels = [frame.decode()[..., 0].mean() / 10 for frame in frames]
        assert levels == pytest.approx(range(len(pts)), abs=0.8)
        with warnings.catch_warnings(action="error"):       # a pause is no lack of frames
            frames = read_video(tmp_path / name, 20, (16, 16))
        assert len(frames.unique(dim=0)) < 20 < len(pts)


def test_an_avi_that_ends_with_a_pause_is_whole_unless_its_file_is_cut(tmp_path):
    encode_video(tmp_path / "a.avi", "mpeg4")
    content = bytearray((tmp_path / "a.avi").read_bytes())
    length = content.index(b"strh") + 40
    assert content[length:length + 4] == struct.pack("<I", 12)
    content[length:length + 4] = struct.pack("<I", 20)
    (tmp_path / "a.avi").write_bytes(content)
    assert frame_numbers(read_video(tmp_path / "a.avi", 12, (16, 16))) == list(range(12))
    (tmp_path / "a.avi").write_bytes(content[:content.rindex(b"idx1")])
    with pytest.warns(UserWarning, match=r"may be cut short: 19 of 20 frames"):
        read_video(tmp_path / "a.avi", 12, (16, 16))


def circle(height, width, aspect):
    """Return a white disk on gray, round when a pixel is `aspect` times as wide as high."""
    y, x = np.mgrid[:height, :width]
    inside = ((x - width / 2) * aspect) ** 2 + (y - height / 2) ** 2 < (height / 6) ** 2
    return np.repeat(np.where(inside, 255, 80).astype(np.uint8)[..., None], 3, axis=2)


def extent(mask):
    """Return the number of rows and of columns that a mask touches."""
    return int(mask.any(1).sum()), int(mask.any(0).sum())


@pytest.mark.parametrize("name, aspect, rotation", [
    ("a.mp4", Fraction(32, 27), 0), ("a.mp4", Fraction(32, 27), 90), ("a.mp4", Fraction(2), 270),
    ("a.mp4", Fraction(8, 9), 180), ("a.ts", Fraction(64, 45), 0), ("a.avi", Fraction(8, 9), 0)])
def test_a_circle_of_pixels_that_are_not_square_is_round(tmp_path, name, aspect, rotation):
    encode(tmp_path / name, "libx264", [circle(96, 128, float(aspect))], aspect=aspect,
           rotation=rotation)
    for *size, fit in ((96, 96, "crop"), (60, 96, "crop"), (120, 120, "pad"), (96, 160, "pad")):
        levels = gray_levels(read_video(tmp_path / name, 1, size, fit=fit))
        height, width = extent(levels > 160)
        assert height == pytest.approx(width, abs=2)
        height, width = extent(levels > 40)         # without bars
        shape = float(aspect) * 128 / 96
        assert (height, width) == tuple(size) if fit == "crop" else width / height == pytest.approx(
            shape if rotation % 180 == 0 else 1 / shape, rel=0.05)
    stretched = gray_levels(read_video(tmp_path / name, 1, (64, 64), fit="stretch"))
    assert int(stretched[:, 32].gt(160).sum()) == pytest.approx(
        64 / 3 if rotation % 180 == 0 else 64 / float(aspect) / 4, abs=1)


@pytest.mark.parametrize("ratio", [(0, 1), (1, 0), (1, 1000), (1000, 1)])
def test_a_damaged_pixel_aspect_ratio_is_ignored(tmp_path, ratio):
    encode(tmp_path / "a.mov", "qtrle", [circle(64, 64, 1.0)], aspect=Fraction(4, 3))
    content = (tmp_path / "a.mov").read_bytes()
    stored = b"pasp" + struct.pack(">II", 4, 3)
    assert stored in content
    content = content.replace(stored, b"pasp" + struct.pack(">II", *ratio))
    (tmp_path / "a.mov").write_bytes(content)
    for fit in FITS:
        levels = gray_levels(read_video(tmp_path / "a.mov", 1, (64, 64), fit=fit))
        assert extent(levels > 160) == pytest.approx((21, 21), abs=1)


def combed(count, height, width):
    """Return moving bars whose odd lines are half a frame later than the even lines."""
    y, x = np.mgrid[:height, :width]
    return [np.repeat(((x + 3 * (2 * t + y % 2)) // 8 % 2 * 200).astype(np.uint8)[..., None], 3, 2)
            for t in range(count)]


def ffmpeg_deinterlaced(path):
    """Return the RGBA frames that FFmpeg's filter gives for a whole video."""
    with av.open(str(path)) as container:
        stream, graph, images = container.streams.video[0], av.filter.Graph(), []
        graph.link_nodes(graph.add_buffer(template=stream, time_base=stream.time_base),
                         graph.add("bwdif", "mode=send_frame:deint=interlaced"),
                         graph.add("buffersink")).configure()
        for frame in [*container.decode(stream), None]:
            graph.vpush(frame)
            images.append(None)
        return [graph.vpull().to_ndarray(format="rgba", threads=1) for _ in images[1:]]


@pytest.mark.parametrize("name, codec", [("a.mpg", "mpeg2video"), ("a.mkv", "libx264")])
def test_interlaced_frames_are_deinterlaced_as_by_ffmpeg(tmp_path, name, codec):
    encode(tmp_path / name, codec, combed(6, 64, 96), flags="+ildct+ilme", bf="0",
           **({"x264-params": "tff=1"} if codec == "libx264" else {}))
    frames = list(iter_frames(tmp_path / name))
    assert [frame.start * 25 for frame in frames] == pytest.approx(range(6), abs=0.02)
    for frame, expected in zip(frames, ffmpeg_deinterlaced(tmp_path / name), strict=True):
        image = frame.decode()
        assert np.array_equal(image, expected)
        even, odd = (image[lines, :, 0].astype(float) for lines in (slice(0, -1, 2),
                                                                    slice(1, None, 2)))
        assert np.abs(even - odd).mean() < 20       # 75 with combs


def test_a_small_interlaced_video_is_read(tmp_path):
    encode(tmp_path / "a.mpg", "mpeg2video", combed(3, 4, 64), flags="+ildct+ilme", bf="0")
    assert [frame.decode().shape for frame in iter_frames(tmp_path / "a.mpg")] == [(4, 64, 4)] * 3


def test_joined_interlaced_recordings_may_differ_in_size(tmp_path):
    parts = b""
    for size in ((64, 96), (96, 64)):
        encode(tmp_path / "a.mpg", "mpeg2video", combed(3, *size), flags="+ildct+ilme", bf="0")
        parts += (tmp_path / "a.mpg").read_bytes()
    (tmp_path / "a.mpg").write_bytes(parts)
    assert {frame.decode().shape for frame in iter_frames(tmp_path / "a.mpg")} == {
        (64, 96, 4), (96, 64, 4)}


@pytest.mark.parametrize("width", range(34, 50, 2))
def test_all_columns_of_a_video_are_decoded(tmp_path, width):
    """FFmpeg may leave columns out, which then have the colors of a picture before."""
    encode(tmp_path / "a.mkv", "ffv1", [np.full((32, width, 3), 9 * n, np.uint8) for n in range(9)])
    for number, frame in enumerate(iter_frames(tmp_path / "a.mkv")):
        image = frame.decode()
        assert np.abs(image[..., :3].astype(int) - 9 * number).max() <= 2
        assert (image[..., 3] == 255).all()


@pytest.mark.parametrize("name, codec", [
    ("a.mpg", "mpeg1video"), ("a.mpg", "mpeg2video"), ("a.vob", "mpeg2video"),
    ("a.m2v", "mpeg2video")])
def test_a_program_stream_cut_at_any_length_is_rejected_or_warned_of(tmp_path, name, codec):
    encode(tmp_path / name, codec, noise(12), bf="2")
    content = (tmp_path / name).read_bytes()
    assert len(list(iter_frames(tmp_path / name))) == 12
    for percent in range(40, 96, 5):
        (tmp_path / name).write_bytes(content[:len(content) * percent // 100])
        with pytest.raises((InputError, UserWarning), match="cut short|cannot be decoded"):
            list(iter_frames(tmp_path / name))


def test_damage_in_the_middle_is_not_a_cut(tmp_path):
    encode(tmp_path / "a.m2v", "mpeg2video", noise(12), bf="0")
    content = bytearray((tmp_path / "a.m2v").read_bytes())
    middle = len(content) // 2
    content[middle:middle + 50] = b"\xaa" * 50
    (tmp_path / "a.m2v").write_bytes(content)
    with av.open(str(tmp_path / "a.m2v")) as container:
        assert any(frame.is_corrupt for frame in container.decode(video=0))
    assert len(list(iter_frames(tmp_path / "a.m2v"))) == 12
