"""Clips and checks that the tests of reading and writing share."""
import warnings

import av
import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from PIL import Image

from mcl.errors import InputError
from mcl.video.read import read_video


@pytest.fixture(autouse=True)
def unexpected_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def smooth_frames(f=6, H=32, W=48):
    """Return gradients that change from frame to frame."""
    t, y, x = torch.meshgrid(torch.linspace(-1, 1, f), torch.linspace(-1, 1, H),
                             torch.linspace(-1, 1, W), indexing="ij")
    return torch.stack([t, y * t, (x + t) / 2], dim=1)


def random_frames(f, H=64, W=64):
    """Return uniform noise in [-1, 1]."""
    return torch.rand(f, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1


def numbered_frames(numbers):
    """Return one gray frame for each number, with ten times the number as its level."""
    return repeat(torch.tensor(numbers) * 10 / 127.5 - 1, "f -> f 3 16 16")


def frame_numbers(frames):
    """Return the numbers of frames made by `numbered_frames`."""
    return [round(level) for level in ((frames.mean((1, 2, 3)) + 1) * 12.75).tolist()]


def encode_video(path, codec="libx264", numbers=range(12), rate=24, format=None, title=""):
    """Write numbered frames in a format that `write_video` does not have."""
    with av.open(str(path), "w", format=format) as container:
        container.metadata["title"] = title
        b_frames = {} if codec in ("wmv2", "rv20") else {"bf": "3", "b_strategy": "0"}
        stream = container.add_stream(codec, rate=rate, options=b_frames)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in numbers:
            image = np.full((32, 64, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))


def image_folder(path, images):
    """Write images by name to a new folder and return its path."""
    path.mkdir()
    for name, image in images.items():
        Image.fromarray(np.asarray(image)).save(path / name)
    return path


def gray_levels(frames):
    """Return a frame (1, 3, H, W) in [-1, 1] of equal channels as gray levels (H, W)."""
    assert (frames == frames[:, :1]).all()
    return rearrange((frames[:, 0] + 1) * 127.5, "1 H W -> H W")


def assert_rejected(path, message):
    """Check that reading a clip raises InputError with its name, in one line."""
    with pytest.raises(InputError, match=message) as error:
        read_video(path, 1, (16, 16))
    assert path.name in str(error.value) and "\n" not in str(error.value)
