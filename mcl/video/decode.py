"""Decode videos, animations and image folders to frames with the times at which they are shown.

imageio writes this project's images, but its two back ends are used directly to read. PyAV decodes
videos, because imageio does not return edit lists, rotation and color properties. Pillow decodes
images, because imageio refuses damaged EXIF data, turns gray images along the wrong axis and clips
16-bit gray to white.
"""
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from PIL import ExifTags, Image, ImageFile, ImageOps, ImageSequence

from ..errors import InputError
from ..ownership import check_readable
from .hdr import TRANSFERS, tonemap_hdr_to_sdr

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# First bytes of the files that Pillow decodes. FFmpeg decodes all others, whatever their name.
IMAGE_MAGIC = re.compile(rb"GIF8|RIFF.{4}WEBP|\x89PNG|\xff\xd8\xff|BM.{4}\0\0\0\0", re.DOTALL)
UNTIMED_FPS = 8                     # for frames without a time: a folder, a gif without delays

# FFmpeg would follow playlists to other files, but no protocol to open them is named "none".
FFMPEG_OPTIONS = {"protocol_whitelist": "none"}
# First names of the formats that are read. They contain the video itself.
FORMATS = ("mov matroska avi mpeg mpegts mpegvideo m4v h264 hevc flv asf ogg mxf yuv4mpegpipe ivf "
           "nut dv rm wtv obu").split()
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
            # The stream that players show first, or else any that is not cover art.
            streams = (container.streams.best("video"), *container.streams.video)
            stream: Any = next((stream for stream in streams if stream and stream.codec_context
                                and not stream.disposition & Disposition.attached_pic), None)
            if stream is None:
                raise InputError(f"{path}: holds no video in a known codec. Encode it again")
            # FFmpeg's Theora decoder sometimes returns damaged frames with several threads.
            stream.thread_type = "NONE" if stream.codec_context.name == "theora" else "AUTO"
            transfer = stream.codec_context.color_trc       # decoding may reset it
            # The average rate may count the ticks of the clock (DV).
            fps = min(filter(None, (stream.average_rate, stream.guessed_rate)), default=UNTIMED_FPS)
            aspect = float(stream.sample_aspect_ratio or 1)
            aspect = aspect if 0.1 <= aspect <= 10 else 1.0         # a damaged ratio is ignored
            frames: chain[Any] = chain([None], _decode_stream(path, stream), [None])
            for count, ((before, frame), (_, after)) in enumerate(pairwise(pairwise(frames)), 1):
                time = origin + end if frame.time is None else frame.time
                origin = time if count == 1 else origin
                # Joined recordings restart their clock: continue at the end of the last frame.
                start = time - origin if time - origin > start else end
                end = start + float(1 / fps)
                pixel_aspect = 1 / aspect if round(frame.rotation / 90) % 2 else aspect
                decode = partial(_video_rgba, frame, transfer, before, after)
                yield TimedFrame(start, end, decode, pixel_aspect)
    except av.FFmpegError as error:
        place = f"at about frame {count}, {end:.2f} s" if count else "from its start"
        raise InputError(f"{path}: cannot be decoded {place} ({error.strerror}). Use a shorter "
                         "duration, or another video") from error


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
    is_cut, count, num_hidden, end, num_intact = False, 0, 0, 0.0, float("inf")
    container, decoder = stream.container, stream.codec_context
    is_avi = container.format.name == "avi"
    alpha_decoder = ALPHA_DECODERS.get(decoder.name)
    if stream.metadata.get("alpha_mode") == "1" and alpha_decoder in av.codecs_available:
        decoder = av.CodecContext.create(alpha_decoder, "r")
    for packet in container.demux(stream):
        is_cut |= packet.is_corrupt
        num_hidden += packet.is_discard             # by an edit list
        for frame in decoder.decode(packet):
            # AVI stores no presentation times, and FFmpeg's guesses are out of order. The time of
            # the packet that completes a frame is right, also after a pause.
            frame.pts = frame.dts if is_avi else frame.pts
            if frame.time is not None and frame.time_base is not None:
                end = max(end, frame.time + float(frame.duration * frame.time_base))
            count += 1
            num_intact = 0 if frame.is_corrupt else num_intact + 1      # since the last damage
            yield frame
    if is_cut:
        raise InputError(f"{path}: is cut short. Give the whole file, or a shorter duration")
    # The pauses of an AVI count as frames. FFmpeg reduces the duration of an AVI that is cut.
    count = max(count, stream.duration or 0) if is_avi else count
    duration = _declared_duration(container, stream)
    if 0 < count < stream.frames - num_hidden:
        warnings.warn(f"{path}: may be cut short: {count} of {stream.frames} frames", stacklevel=2)
    elif not stream.frames and end and duration - end > 1.5 / (stream.average_rate or UNTIMED_FPS):
        warnings.warn(f"{path}: may be cut short: {end:.2f} of {duration:.2f} s", stacklevel=2)
    elif num_intact <= decoder.reorder_depth:
        warnings.warn(f"{path}: may be cut short: the last frame is damaged", stacklevel=2)


def _declared_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Return the end of a stream in seconds as its file declares it, or 0 if it does not.

    Matroska declares it as text, 00:00:02.500000000.
    """
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        return sum(float(n) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    # The longest stream sets the duration of its file.
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _video_rgba(frame: av.VideoFrame, declared_transfer: int, *neighbors: Any) -> np.ndarray:
    """Return a video frame as (h, w, 4) uint8 sRGB, deinterlaced and rotated upright.

    The frame's own transfer function is used, or that of its container if the frame has none. The
    frames before and after it are needed if it is interlaced.
    """
    frame = _deinterlace(frame, *neighbors)
    transfer = frame.color_trc if frame.color_trc != ColorTrc.UNSPECIFIED else declared_transfer
    if transfer in TRANSFERS:
        has_matrix = frame.colorspace in (Colorspace.BT2020, Colorspace.ITU709)
        deep = frame.to_ndarray(format="rgba64le",
                                src_colorspace=None if has_matrix else Colorspace.BT2020)
        rgba: np.ndarray = (deep // 256).astype(np.uint8)
        is_bt2020 = frame.color_primaries != ColorPrimaries.BT709
        rgba[..., :3] = tonemap_hdr_to_sdr(deep[..., :3], transfer, is_bt2020)
    else:
        # FFmpeg's fast conversion writes 8 or 16 columns at a time. At other widths, a thread may
        # write over the columns of another, and the last columns may be left out.
        rgba = frame.to_ndarray(format="rgba", threads=1)
        if 0 < frame.width % 8 < 5:
            rgba[:, -4:] = frame.to_ndarray(format="rgba64le")[:, -4:] // 256
    return np.rot90(rgba, round(frame.rotation / 90))


def _deinterlace(frame: av.VideoFrame, before: Any = None, after: Any = None) -> av.VideoFrame:
    """Return a frame without the combs of interlacing; a progressive frame is not changed."""
    if not frame.interlaced_frame or min(frame.width, frame.height) < 16:   # bwdif's limit is lower
        return frame
    layout, graph = (frame.width, frame.height, frame.format), av.filter.Graph()
    graph.link_nodes(graph.add_buffer(None, *layout, time_base=Fraction(1)),
                     graph.add("bwdif", "mode=send_frame:deint=interlaced"),
                     graph.add("buffersink")).configure()
    for near in filter(None, (before, frame, after)):       # joined recordings may differ in size
        graph.vpush(near.reformat(*layout[:2], frame.format.name))
    graph.vpush(None)
    return [graph.vpull() for near in (before, frame) if near][-1]


def _animation_frames(path: Path) -> Iterator[TimedFrame]:
    """Yield the frames of a gif, webp or animated png file."""
    end = 0.0
    with _open_image(path) as image:
        if image.get_format_mimetype() not in ("image/gif", "image/webp", "image/apng"):
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
    names.sort(key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)])
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
def _open_image(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image. The errors of Pillow's decoders become InputError."""
    check_readable(path)                            # opening a pipe would block
    try:
        with Image.open(path) as image:
            yield image
    except PILLOW_ERRORS as error:
        if isinstance(error, InputError):           # which is a ValueError
            raise
        raise InputError(f"{path}: cannot be decoded ({error}). Give an intact image") from error
