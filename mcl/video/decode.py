"""Decode videos, animations and image folders to frames with the times at which they are shown.

imageio writes this project's images, but its two back ends are used directly to read. PyAV decodes
videos, because imageio does not return edit lists, rotation and color properties. Pillow decodes
images, because imageio refuses damaged EXIF data, turns gray images along the wrong axis and clips
16-bit gray to white.
"""
import math
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from PIL import ExifTags, Image, ImageOps, ImageSequence

from ..errors import InputError
from ..files import check_readable
from .hdr import TRANSFERS, tonemap_hdr_to_sdr

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# First bytes of the files that Pillow decodes. FFmpeg decodes all others, whatever their name.
IMAGE_MAGIC = re.compile(rb"GIF8|RIFF.{4}WEBP|\x89PNG|\xff\xd8\xff|BM.{4}\0\0\0\0", re.DOTALL)
MAX_PIXEL_ASPECT = 10               # wider or higher pixels are an error of the file
UNTIMED_FPS = 8                     # for frames without a time: a folder, a gif without delays

# FFmpeg would follow playlists to other files, but no protocol to open them is named "none".
FFMPEG_OPTIONS = {"protocol_whitelist": "none"}
# First names of the formats that are read. They contain the video itself.
FORMATS = ("mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "m4v", "h264", "hevc", "flv",
           "asf", "ogg", "mxf", "yuv4mpegpipe", "ivf", "nut", "dv", "rm", "wtv", "gxf", "obu")
# Metadata that is not UTF-8 must not stop a file from opening. PyAV 19 has no such option: it
# always replaces the wrong bytes.
METADATA_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if hasattr(
    av.container.InputContainer, "metadata_errors") else {}
# FFmpeg's own decoders of these codecs ignore the alpha channel.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Pillow's parsers of damaged files raise all of these.
PILLOW_ERRORS = (OSError, IndexError, SyntaxError, ValueError, struct.error,
                 Image.DecompressionBombError)


class TimedFrame(NamedTuple):
    """A frame, shown from `start` to `end` (seconds from the start of the clip).

    `decode()` returns its pixels as (h, w, 4) uint8 RGBA. `pixel_aspect` is the width of a pixel,
    divided by its height.
    """

    start: float
    end: float
    decode: Callable[[], np.ndarray]
    pixel_aspect: float = 1.0


def iter_frames(path: Path) -> Iterator[TimedFrame]:
    """Return an iterator over the frames of a video, animation or image folder, in time order.

    Raises:
        InputError: If the clip cannot be read; also later, while iterating.
    """
    check_readable(path)
    if path.is_dir():
        return _folder_frames(path)
    return _animation_frames(path) if _is_image_file(path) else _video_frames(path)


def has_audio(path: Path) -> bool:
    """Return whether a clip has an audio track, which `read_video` ignores."""
    check_readable(path)
    if path.is_dir() or _is_image_file(path):
        return False
    with _open_container(path) as container:
        return bool(container.streams.audio)


def image_rgba(path: Path) -> np.ndarray:
    """Return one image as (h, w, 4) uint8, turned by its EXIF orientation.

    Raises:
        InputError: If the image cannot be decoded.
    """
    with _open_image(path) as image:
        if image.mode == "I;16":        # converting to RGBA alone would clip 16-bit gray to white
            return _upright_rgba(image.convert("I").point(lambda level: level / 257).convert("L"))
        return _upright_rgba(image)


def _is_image_file(path: Path) -> bool:
    """Return whether a file begins like an image that Pillow decodes."""
    if not (path.is_file() and os.access(path, os.R_OK)):       # opening a pipe would block
        return False
    with open(path, "rb") as file:
        return IMAGE_MAGIC.match(file.read(16)) is not None


def _video_frames(path: Path) -> Iterator[TimedFrame]:
    """Yield the frames of a video's best video stream, which players show."""
    count, origin, start, end = 0, 0.0, -1.0, 0.0
    try:
        with _open_container(path) as container:
            stream = _best_stream(path, container)
            # FFmpeg's Theora decoder sometimes returns damaged frames with several threads.
            stream.thread_type = "NONE" if stream.codec_context.name == "theora" else "AUTO"
            declared_transfer = stream.codec_context.color_trc      # decoding may reset it
            # The average rate may count fields, or ticks of the clock.
            rate = min(filter(None, (stream.average_rate, stream.guessed_rate)),
                       default=UNTIMED_FPS)
            aspect = float(stream.sample_aspect_ratio or 1)
            aspect = aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0
            windows = _with_neighbors(_decode_stream(path, stream))
            for count, (before, frame, after) in enumerate(windows, start=1):
                time = origin + end if frame.time is None else frame.time
                origin = time if count == 1 else origin
                # Joined recordings restart their clock: continue at the end of the last frame.
                start = time - origin if time - origin > start else end
                end = start + float(1 / rate)
                yield TimedFrame(start, end, partial(_video_rgba, before, frame, after,
                                                     declared_transfer),
                                 1 / aspect if round(frame.rotation / 90) % 2 else aspect)
    except av.FFmpegError as error:
        place = f"at about frame {count}, {end:.2f} s" if count else "from its start"
        raise InputError(f"{path}: cannot be decoded {place} ({error.strerror}). Use a shorter "
                         "duration, or another video") from error


def _best_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """Return the video stream that FFmpeg plays. Cover art is none."""
    for stream in (container.streams.best("video"), *container.streams.video):
        if (isinstance(stream, av.VideoStream) and stream.codec_context is not None
                and not stream.disposition & Disposition.attached_pic):
            return stream
    raise InputError(f"{path}: holds no video in a known codec. Encode it again")


def _with_neighbors(frames: Iterator[av.VideoFrame]) -> Iterator[tuple]:
    """Yield each frame between the frames before and after it, if it is interlaced, or None."""
    before, frame = None, next(frames, None)
    while frame is not None:
        after = next(frames, None) if frame.interlaced_frame else None
        yield before, frame, after
        before, frame = frame, after or next(frames, None)


@contextmanager
def _open_container(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a video by its descriptor, because FFmpeg would guess the format from its name."""
    with (open(os.open(path, os.O_RDONLY), "rb") as file,
          av.open(file, options=FFMPEG_OPTIONS, **METADATA_OPTIONS) as container):
        if container.format.name.split(",")[0] not in FORMATS:
            raise InputError(f"{path}: has the format {container.format.long_name}, which is not "
                             "read. Convert it to .mp4 or .mkv")
        yield container


def _decode_stream(path: Path, stream: Any) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream, then check that it ends where its file declares.

    Raises InputError if the file ends inside a frame, and warns if frames are missing.
    """
    is_cut, count, num_hidden, end, last_damaged = False, 0, 0, 0.0, -math.inf
    container, decoder = stream.container, stream.codec_context
    is_avi = container.format.name == "avi"
    alpha_decoder = ALPHA_DECODERS.get(decoder.name)
    if stream.metadata.get("alpha_mode") == "1" and alpha_decoder in av.codecs_available:
        decoder = av.CodecContext.create(alpha_decoder, "r")
    for packet in container.demux(stream):
        is_cut |= packet.is_corrupt
        num_hidden += packet.is_discard             # by an edit list
        for frame in decoder.decode(packet):
            if is_avi:
                # AVI stores no presentation times, and FFmpeg's guesses are out of order. The time
                # of the packet that completes a frame is right, also after a pause.
                frame.pts = frame.dts
            if frame.time is not None and frame.time_base is not None:
                end = max(end, frame.time + float(frame.duration * frame.time_base))
            count += 1
            last_damaged = count if frame.is_corrupt else last_damaged
            yield frame
    if is_cut:
        raise InputError(f"{path}: is cut short. Give the whole file, or a shorter duration")
    if is_avi:              # pauses count as frames; FFmpeg reduces the duration of a cut file
        count = max(count, stream.duration or 0)
    duration, lack = _declared_duration(container, stream), ""
    if 0 < count < stream.frames - num_hidden:
        lack = f"{count} of {stream.frames} frames"
    elif not stream.frames and end and duration - end > 1.5 / (stream.average_rate or UNTIMED_FPS):
        lack = f"{end:.2f} of {duration:.2f} s"
    elif count - last_damaged <= decoder.reorder_depth:
        lack = "the last frame is damaged"
    if lack:
        warnings.warn(f"{path}: may be cut short: {lack}", stacklevel=2)


def _declared_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Return the end of a stream in seconds as its file declares it, or 0 if it does not."""
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, match.groups())        # Matroska
        return 3600 * hours + 60 * minutes + seconds
    # The longest stream sets the duration of its file.
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _video_rgba(before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None,
                declared_transfer: int) -> np.ndarray:
    """Return a video frame as (h, w, 4) uint8 sRGB, deinterlaced and rotated upright.

    The frame's own transfer function is used, or that of its container if the frame has none.
    """
    rotation = frame.rotation
    if frame.interlaced_frame:
        frame = _deinterlace(before, frame, after)
    transfer = frame.color_trc if frame.color_trc != ColorTrc.UNSPECIFIED else declared_transfer
    if transfer in TRANSFERS:
        has_matrix = frame.colorspace in (Colorspace.BT2020, Colorspace.ITU709)
        deep = frame.to_ndarray(format="rgba64le",
                                src_colorspace=None if has_matrix else Colorspace.BT2020)
        rgba: np.ndarray = (deep // 256).astype(np.uint8)
        is_bt2020 = frame.color_primaries != ColorPrimaries.BT709
        rgba[..., :3] = tonemap_hdr_to_sdr(deep[..., :3], transfer, is_bt2020)
    else:
        rgba = frame.to_ndarray(format="rgba")
    return np.rot90(rgba, round(rotation / 90))


def _deinterlace(before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None
                 ) -> av.VideoFrame:
    """Return an interlaced frame without combs: two moments on alternate lines become one."""
    layout = frame.width, frame.height, frame.format
    window = [near for near in (before, frame, after)
              if near is not None and (near.width, near.height, near.format.name) == (
                  frame.width, frame.height, frame.format.name)]
    graph = av.filter.Graph()
    graph.link_nodes(graph.add_buffer(None, *layout, time_base=Fraction(1)),
                     graph.add("bwdif", "mode=send_frame:deint=interlaced"),
                     graph.add("buffersink")).configure()
    for near in (*window, None):
        graph.vpush(near)
    return [graph.vpull() for _ in window][window.index(frame)]


def _animation_frames(path: Path) -> Iterator[TimedFrame]:
    """Yield the frames of a gif, webp or animated png file."""
    end = 0.0
    with _open_image(path) as image:
        if image.format not in ("GIF", "WEBP") and not (
                image.format == "PNG" and getattr(image, "is_animated", False)):
            raise InputError(f"{path}: is a single image. Give a folder of images, or a video")
        for frame in ImageSequence.Iterator(image):
            rgba, start = _upright_rgba(frame), end     # a webp has no duration before decoding
            end += (frame.info.get("duration") or 1000 / UNTIMED_FPS) / 1000
            yield TimedFrame(start, end, partial(np.asarray, rgba))


def _folder_frames(folder: Path) -> Iterator[TimedFrame]:
    """Yield the images of a folder in natural order (2 before 10)."""
    entries = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    names = ([name for name in entries if name.lower().endswith(IMAGE_SUFFIXES)] or
             [name for name in entries if _is_image_file(folder / name)])
    if not names:
        raise InputError(f"{folder}: holds no image. Give a folder of {', '.join(IMAGE_SUFFIXES)}")
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part
                                 for part in re.split(r"(\d+)", name)])
    sizes, step = set(), 1 / UNTIMED_FPS
    for index, name in enumerate(names):
        with _open_image(folder / name) as image:
            sizes.add(_upright_size(image))
        if len(sizes) > 1:
            raise InputError(f"{folder}: {name} and {names[0]} differ in size. Give one size")
        yield TimedFrame(index * step, (index + 1) * step, partial(image_rgba, folder / name))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the two sides of an image after its EXIF rotation, without decoding its pixels."""
    with suppress(*PILLOW_ERRORS):                  # damaged EXIF data
        # PngImageFile's own getexif decodes the pixels to search for EXIF data behind them.
        # Orientations 5 to 8 swap width and height.
        if Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            return image.height, image.width
    return image.size


def _upright_rgba(image: Image.Image) -> np.ndarray:
    """Return an image as (h, w, 4) uint8, turned by its EXIF orientation."""
    rgba = image.convert("RGBA")
    with suppress(*PILLOW_ERRORS):                  # damaged EXIF data
        ImageOps.exif_transpose(rgba, in_place=True)
    return np.asarray(rgba)


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image. The errors of Pillow's decoders become InputError."""
    check_readable(path)                            # opening a pipe would block
    try:
        with Image.open(path) as image:
            yield image
    except PILLOW_ERRORS as error:
        if isinstance(error, InputError):           # which is a ValueError
            raise
        raise InputError(f"{path}: cannot be decoded ({error}). Give an intact image") from error
