"""Files of any kind to pictures and the times at which they are shown.

imageio's own interface does not tell when a frame is shown, so that its two back ends, PyAV for
videos and Pillow for pictures, are used themselves.
"""
import os
import re
import struct
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import av
import numpy as np
from av.container import InputContainer
from av.video import VideoStream
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from PIL import ExifTags, Image, ImageSequence

from .hdr import TRANSFERS, tonemap_hdr_to_sdr
from ..errors import InputError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

UNTIMED_FPS = 8  # for frames that carry no time: a folder, a gif without delays

# On screen from, and to, in seconds from the start of the clip; decodes it to (h, w, 4) uint8.
Picture = tuple[float, float, Callable[[], np.ndarray]]

# How pictures begin, which are Pillow's; FFmpeg knows the rest, whatever the name.
PICTURES = re.compile(rb"GIF8|RIFF.{4}WEBP|\x89PNG|\xff\xd8\xff|BM.{4}\0\0\0\0", re.DOTALL)
# Read is what holds video itself, and no list of other files that FFmpeg would follow.
ALLOWED = {"format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,asf,"
                               "ogg,mxf",
           "protocol_whitelist": "file"}

# FFmpeg's own decoders leave the transparency of these out.
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Before PyAV 19 it has to be asked for what 19 always does: metadata that is no UTF-8 does not
# hinder a file from opening.
ANY_METADATA: dict[str, Any] = (
    {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {})

# Where Pillow puts what tells the orientation, and the orientations that swap width and height.
EXIF = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
LYING = (5, 6, 7, 8)

# All but the first come from Pillow's parsers of broken files.
PILLOW_ERRORS = (OSError, IndexError, SyntaxError, ValueError, struct.error,
                 Image.DecompressionBombError)


def iter_frames(path: Path) -> Iterator[Picture]:
    """Those of a clip, in the order of their times. Raises InputError where it cannot be read."""
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no such file or folder, or no permission to read it")
    if path.is_dir():
        return _folder_pictures(path)
    return _animation_pictures(path) if _begins_as_picture(path) else _video_pictures(path)


def has_audio(path: str | os.PathLike) -> bool:
    """Whether a clip that `read_video` can read has sound, which is not read."""
    path = Path(path)
    if path.is_dir() or _begins_as_picture(path):
        return False
    with _container(path) as container:
        return bool(container.streams.audio)


def _begins_as_picture(path: Path) -> bool:
    if not (path.is_file() and os.access(path, os.R_OK)):       # a pipe would be waited for
        return False
    with open(path, "rb") as file:
        return PICTURES.match(file.read(16)) is not None


def _video_pictures(path: Path) -> Iterator[Picture]:
    count, first, begin, end = 0, 0.0, -1.0, 0.0
    try:
        with _container(path) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise InputError(f"{path}: holds no video that is known; give a clip that plays")
            # Theora decoded frame beside frame comes out spoiled now and then.
            stream.thread_type = "NONE" if stream.codec_context.name == "theora" else "AUTO"
            promised = stream.codec_context.color_trc       # which decoding may take away
            step = float(1 / (stream.average_rate or stream.guessed_rate or UNTIMED_FPS))
            # AVI stores no presentation times; what FFmpeg makes up for it is out of order.
            timed = container.format.name != "avi"
            for count, frame in enumerate(_frames(path, container, stream), start=1):
                stamp = frame.time if timed and frame.pts is not None else first + end
                first = stamp if count == 1 else first
                # Joined recordings start their clock again: go on where the last frame ended.
                begin = stamp - first if stamp - first > begin else end
                end = begin + step
                yield begin, end, partial(_video_rgba, frame, promised)
    except av.FFmpegError as error:
        place, advice = (f"at about frame {count}, {end:.2f} s", "encode it again, or read only a "
                         "part before that with a shorter duration") if count else (
                         "from its start", "give a video that plays, or a folder of images")
        raise InputError(f"{path}: cannot be decoded {place} ({error.strerror}): it is damaged, "
                         f"cut short or not a video; {advice}") from error


@contextmanager
def _container(path: Path) -> Iterator[InputContainer]:
    """An open video file, whose name FFmpeg does not see: it would guess by it what the file is."""
    if not path.is_file():
        raise InputError(f"{path}: is a device or a pipe; give a file, or a folder of images")
    with open(path, "rb") as file:
        unnamed = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
        with av.open(unnamed, options=ALLOWED, **ANY_METADATA) as container:
            yield container


def _frames(path: Path, container: InputContainer, stream: VideoStream
            ) -> Iterator[av.VideoFrame]:
    """Those of a stream; at their end InputError, if the file ends within one, and a warning, if
    it says that there are more."""
    cut_short, count, hidden, end = False, 0, 0, 0.0
    decoder: Any = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and (
            WITH_ALPHA.get(decoder.name) in av.codecs_available):
        decoder = av.CodecContext.create(WITH_ALPHA[decoder.name], "r")
    for packet in container.demux(stream):
        cut_short = cut_short or packet.is_corrupt
        hidden += packet.is_discard         # by an edit list
        for frame in decoder.decode(packet):
            if frame.time is not None and frame.time_base is not None:
                end = max(end, frame.time + float(frame.duration * frame.time_base))
            count += 1
            yield frame
    if cut_short:
        raise InputError(f"{path}: is cut short; give the whole file, or read only a part before "
                         "its end with a shorter duration")
    lasts = _promised(container, stream)
    if 0 < count < stream.frames - hidden:
        warnings.warn(f"{path}: promises {stream.frames} frames, but {count} could be decoded; the "
                      "file may be cut short")
    elif not stream.frames and end and lasts - end > 1.5 / (stream.average_rate or UNTIMED_FPS):
        warnings.warn(f"{path}: promises {lasts:.2f} s, but ends at {end:.2f} s; the file may be "
                      "cut short")


def _promised(container: InputContainer, stream: VideoStream) -> float:
    """The end of a stream in seconds, as its file says; 0 where it does not."""
    if "DURATION" in stream.metadata:       # Matroska's, 00:00:02.000000000
        parts = stream.metadata["DURATION"].split(":")
        if len(parts) == 3 and all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
            hours, minutes, seconds = map(float, parts)
            return 3600 * hours + 60 * minutes + seconds
    alone = len(container.streams) == 1     # another may be longer
    return (container.duration or 0) / av.time_base if alone else 0.0


def _video_rgba(frame: av.VideoFrame, promised: int) -> np.ndarray:
    """The transfer function is the frame's own, or, if it has none, what its container promised."""
    transfer = promised if frame.color_trc == ColorTrc.UNSPECIFIED else frame.color_trc
    if transfer in TRANSFERS:
        known = frame.colorspace in (Colorspace.BT2020, Colorspace.ITU709)
        deep = frame.to_ndarray(format="rgba64le",
                                src_colorspace=None if known else Colorspace.BT2020)
        wide = frame.color_primaries != ColorPrimaries.BT709
        rgb = tonemap_hdr_to_sdr(deep[..., :3], transfer, wide)
        rgba = np.dstack([rgb, (deep[..., 3] // 256).astype(np.uint8)])
    else:
        rgba = frame.to_ndarray(format="rgba")
    return np.rot90(rgba, round(frame.rotation / 90))


def _animation_pictures(path: Path) -> Iterator[Picture]:
    end = 0.0
    with _opened(path) as image:
        if image.format not in ("GIF", "WEBP") and not (
                image.format == "PNG" and getattr(image, "is_animated", False)):
            raise InputError(f"{path}: is a picture, not a clip; give a folder of them, or a video")
        for frame in ImageSequence.Iterator(image):
            rgba = _upright(frame)      # also decodes, before which webp has no delay
            begin = end
            end = begin + (frame.info.get("duration") or 1000 / UNTIMED_FPS) / 1000
            yield begin, end, partial(np.asarray, rgba)


def _folder_pictures(folder: Path) -> Iterator[Picture]:
    held = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    names = ([name for name in held if name.lower().endswith(IMAGES)] or
             [name for name in held if _begins_as_picture(folder / name)])
    if not names:
        raise InputError(f"{folder}: holds no image; give a folder of {', '.join(IMAGES)} files")
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part
                                 for part in re.split(r"(\d+)", name)])
    sizes = set()
    for index, name in enumerate(names):
        with _opened(folder / name) as image:
            sizes.add(image.size[::-1] if _orientation(image) in LYING else image.size)
        if len(sizes) > 1:
            raise InputError(f"{folder}: {name} differs in size from {names[0]}; "
                             "the images of a folder must all have one size")
        yield index / UNTIMED_FPS, (index + 1) / UNTIMED_FPS, partial(image_rgba, folder / name)


def image_rgba(path: Path) -> np.ndarray:
    with _opened(path) as image:
        if image.mode == "I;16":  # convert alone would clip 16-bit grey to white
            image = image.convert("I").point(lambda level: level / 257).convert("L")
        return _upright(image)


def _upright(image: Image.Image) -> np.ndarray:
    """(h, w, 4) uint8, turned as the camera was held."""
    rgba = np.asarray(image.convert("RGBA"))
    orientation = _orientation(image)
    rgba = rgba.swapaxes(0, 1) if orientation in LYING else rgba
    rgba = rgba[:, ::-1] if orientation in (2, 3, 6, 7) else rgba
    return rgba[::-1] if orientation in (3, 4, 7, 8) else rgba


def _orientation(image: Image.Image) -> Any:
    """EXIF's, 1 to 8; 1 where there is none, or none that can be read."""
    if EXIF.isdisjoint(image.info):     # else Pillow would decode a png to look for it
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except PILLOW_ERRORS:
        return 1


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except PILLOW_ERRORS as error:
        raise InputError(f"{path}: cannot be decoded ({error}); it is damaged, cut short or not "
                         "what its name says; give one that opens elsewhere") from error
