"""HDR video is brought to the standard dynamic range."""
import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange

from mcl.video import decode
from mcl.video.read import read_video


@pytest.mark.parametrize("depth", ["yuv420p10le", "yuv420p"])
@pytest.mark.parametrize("is_full_range", [False, True])
@pytest.mark.parametrize("transfer", [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])
def test_hdr_colors_match_the_inverse_of_bt2100(tmp_path, transfer, is_full_range, depth):
    """Encode colors of known light (white is 203 cd/m2) by BT.2100's formulas, then read them."""
    light = np.array([[1, 1, 1], [.5, .5, .5], [.02, .02, .02], [.5, 0, 0], [0, .5, 0], [0, 0, .5],
                      [.6, .3, .2], [4, 2, 2]])
    bt2020 = light @ np.array([[.6274, .3293, .0433], [.0691, .9195, .0114],
                               [.0164, .088, .8956]]).T
    if transfer == ColorTrc.SMPTE2084:
        y = (bt2020 * .0203) ** (2610 / 16384)
        signal = ((.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    else:
        y = bt2020 * .203 * (bt2020 * .203 @ [.2627, .678, .0593])[:, None] ** (-1 / 6)
        signal = np.where(y <= 1 / 12, (3 * y) ** .5,
                          .17883277 * np.log((12 * y - .28466892).clip(1e-9)) + .55991073)
    bars = np.rint(signal.clip(0, 1) * 65535).astype(np.uint16).repeat(16, 0)[None].repeat(64, 0)
    color_range = ColorRange.JPEG if is_full_range else ColorRange.MPEG
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 64, depth
        codec = stream.codec_context
        codec.color_trc, codec.color_range = transfer, color_range
        if is_full_range:                        # a file without a matrix means BT.2020, too
            codec.colorspace = Colorspace.BT2020
        frame = av.VideoFrame.from_ndarray(bars.copy(), "rgb48le").reformat(
            format=depth, dst_colorspace=Colorspace.BT2020, dst_color_range=color_range)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    image = read_video(tmp_path / "a.mkv", 1, (64, 128))[0, :, 16:48]
    colors = (rearrange(image, "c h (n w) -> n c h w", w=16)[..., 5:11].mean((2, 3)) + 1) * 127.5
    assert 245 <= colors[0].mean() <= 255
    expected = torch.from_numpy(255 * light ** (1 / 2.4))
    assert (colors - expected)[1:7].abs().max() < (16 if depth == "yuv420p10le" else 30)
    highlight = (colors[7] / 255) ** 2.4             # is dimmed and keeps its hue
    assert (highlight / highlight[0] - torch.tensor([1, .5, .5])).abs().max() < 0.1


def test_transfer_and_primaries_come_from_the_frame_or_else_the_container():
    red = np.zeros((2, 2, 3), np.uint16) + np.array([30000, 0, 0], np.uint16)
    frame = av.VideoFrame.from_ndarray(red, "rgb48le")
    sdr, declared = (decode._video_rgba(frame, trc)[0, 0] for trc in (1, ColorTrc.SMPTE2084))
    assert sdr[0] < 120 and declared[0] > 150
    frame.color_trc, frame.color_primaries = ColorTrc.SMPTE2084, ColorPrimaries.BT709
    bt709 = decode._video_rgba(frame, 1)[0, 0]
    assert declared[0] > bt709[0] > 120 and bt709[1] == declared[1] == 0
