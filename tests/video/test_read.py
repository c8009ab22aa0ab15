"""Selection of frames by time, and their size."""
import re

import numpy as np
import pytest
import torch

from mcl.errors import InputError
from mcl.video.read import FITS, read_video, resize_frames
from mcl.video.write import write_video
from tests.video.conftest import (
    encode_video,
    frame_numbers,
    gray_levels,
    image_folder,
    numbered_frames,
)


@pytest.mark.parametrize("num_frames, start, duration, expected", [
    (12, 0, None, list(range(12))),
    (6, 0, None, [0, 2, 4, 6, 8, 10]),
    (5, 0, None, [0, 2, 5, 7, 9]),
    (1, 0, None, [0]),
    (3, 0.25, None, [6, 8, 10]),
    (6, 0.25, 0.25, [6, 7, 8, 9, 10, 11]),
    (3, 0, 0.125, [0, 1, 2]),
    (1, 0.01, 0.001, [0]),
])
def test_frames_are_spread_evenly_in_time(tmp_path, num_frames, start, duration, expected):
    encode_video(tmp_path / "a.mp4")
    frames = read_video(tmp_path / "a.mp4", num_frames, (16, 16), start, duration)
    assert frame_numbers(frames) == expected


def test_a_part_that_ends_early_gives_a_warning(tmp_path):
    encode_video(tmp_path / "a.mp4")
    message = r"a.mp4: ends at 0.50 s. The part from 0.25 s on has only 0.25 of the 100 s$"
    with pytest.warns(UserWarning, match=message):
        assert frame_numbers(read_video(tmp_path / "a.mp4", 2, (16, 16), 0.25, 100)) == [6, 9]
    with pytest.warns(UserWarning, match="ends at 0.50 s"):
        read_video(tmp_path / "a.mp4", 2, (16, 16), 0.25, 0.25 + 1.1 / 24)
    read_video(tmp_path / "a.mp4", 2, (16, 16), 0.25, 0.25 + 0.9 / 24)


@pytest.mark.parametrize("num_frames, start, stride, expected", [
    (12, 0, 1, list(range(12))), (4, 0, 3, [0, 3, 6, 9]), (2, 0.25, 5, [6, 11])])
def test_a_stride_takes_every_nth_frame(tmp_path, num_frames, start, stride, expected):
    encode_video(tmp_path / "a.mp4")
    frames = read_video(tmp_path / "a.mp4", num_frames, (16, 16), start, stride=stride)
    assert frame_numbers(frames) == expected


def test_frame_steps_much_longer_than_in_training_give_a_warning(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(list(range(24))), fps=4)
    message = r"4 frames are 1.50 s apart.* 0.125 s. Use duration = 0.5"
    for arguments in ({}, {"stride": 6}):
        with pytest.warns(UserWarning, match=message):
            frames = read_video(tmp_path / "a.mp4", 4, (16, 16), model_fps=8, **arguments)
            assert frame_numbers(frames) == [0, 6, 12, 18]
    read_video(tmp_path / "a.mp4", 4, (16, 16), duration=1, model_fps=8)
    read_video(tmp_path / "a.mp4", 4, (16, 16), model_fps=1)


def test_the_warning_of_long_steps_begins_at_2_1_times_the_training_step(tmp_path):
    """The clip's steps are 0.1 s: 2.09 and 2.11 times those of 20.9 and 21.1 frames per second."""
    write_video(tmp_path / "a.gif", numbered_frames([1, 2, 3, 4]), fps=10)
    read_video(tmp_path / "a.gif", 4, (16, 16), model_fps=20.9)
    with pytest.warns(UserWarning, match="0.10 s apart"):
        read_video(tmp_path / "a.gif", 4, (16, 16), model_fps=21.1)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_repeated_frames_keep_their_duration(tmp_path, name):
    numbers = [0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5]
    write_video(tmp_path / name, numbered_frames(numbers), fps=8)
    with pytest.warns(UserWarning, match="only 6 different frames for 15"):
        assert frame_numbers(read_video(tmp_path / name, 15, (16, 16))) == numbers
    last_frame_is_cut = read_video(tmp_path / name, 3, (16, 16), start=1.0, duration=0.375)
    assert frame_numbers(last_frame_is_cut) == [3, 4, 5]


def test_a_short_clip_repeats_frames_with_a_warning(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames([1, 2, 3]), fps=8)
    with pytest.warns(UserWarning, match="a.mp4: there are only 3 different frames for 6"):
        assert frame_numbers(read_video(tmp_path / "a.mp4", 6, (16, 16))) == [1, 1, 2, 2, 3, 3]
    with pytest.warns(UserWarning, match="a.mp4: there are only 2 different frames for 3"):
        assert frame_numbers(read_video(tmp_path / "a.mp4", 3, (16, 16), start=0.13)) == [2, 2, 3]


@pytest.mark.parametrize("is_portrait", [False, True])
def test_fit_crops_pads_or_stretches(tmp_path, is_portrait):
    landscape = np.arange(4 * 8, dtype=np.uint8).reshape(4, 8) * 8
    folder = image_folder(tmp_path / "clip", {"a.png": landscape.T if is_portrait else landscape})

    def read(H, W, fit):
        frames = read_video(folder, 1, (W, H) if is_portrait else (H, W), fit=fit)
        return gray_levels(frames).T.round() if is_portrait else gray_levels(frames).round()

    image = torch.from_numpy(landscape).float()
    assert read(4, 4, "crop").equal(image[:, 2:6])
    padded = read(8, 8, "pad")
    assert padded[2:6].equal(image)
    assert padded[:2].eq(0).all() and padded[6:].eq(0).all()
    assert read(4, 8, "stretch").equal(image)
    stretched = read(4, 4, "stretch")
    assert (stretched[:, 1:3] - (image[:, 2:6:2] + image[:, 3:6:2]) / 2).abs().max() <= 1


@pytest.mark.parametrize("fit", FITS)
def test_extreme_aspect_ratios_are_resized(tmp_path, fit):
    line = image_folder(tmp_path / "clip", {"a.png": np.full((1, 64), 200, np.uint8)})
    for size in ((16, 16), (64, 1)):
        assert gray_levels(read_video(line, 1, size, fit=fit)).max().round() == 200


def test_downscaling_does_not_alias(tmp_path):
    checkers = np.indices((63, 63)).sum(0).astype(np.uint8) % 2 * 255
    folder = image_folder(tmp_path / "clip", {"a.png": checkers})
    assert (gray_levels(read_video(folder, 1, (9, 9))) - 127.5).abs().max() < 8


def test_downscaling_stays_within_the_range(tmp_path):
    folder = image_folder(tmp_path / "clip", {"a.png": np.zeros((21, 21), np.uint8)})
    assert read_video(folder, 1, (16, 16)).min() == -1


def test_the_shortest_duration_gives_one_frame(tmp_path):
    encode_video(tmp_path / "a.mp4")
    with pytest.warns(UserWarning, match="only 1 different frames"):
        assert frame_numbers(read_video(tmp_path / "a.mp4", 2, (16, 16), duration=5e-324)) == [0, 0]


@pytest.mark.parametrize("arguments, message", [
    ({"num_frames": 0}, "num_frames = 0 "), ({"size": (0, 16)}, "size = (0, 16) is out of range"),
    ({"start": -1.0}, "start = -1.0"), ({"duration": 0.0}, "duration = 0.0"),
    ({"fit": "zoom"}, "fit = 'zoom' is out of range: it must be crop or pad or stretch"),
    ({"start": 0.5}, "a.mp4: start = 0.5 s is past the end, 0.50 s"),
    ({"start": 9.0, "duration": 1.0}, "past the end, 0.50 s"),
    ({"stride": 0}, "stride = 0 is out of range: it must be 1 or more"),
    ({"stride": 2, "duration": 1.0}, "without a duration"),
    ({"stride": 4, "start": 0.1}, "4 frames need 13, and there are 10. Use a smaller stride"),
])
def test_an_argument_out_of_range_is_rejected(tmp_path, arguments, message):
    encode_video(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_video(tmp_path / "a.mp4", **{"num_frames": 4, "size": (16, 16), **arguments})
    assert "\n" not in str(error.value)


def test_frames_in_memory_are_selected_and_resized_like_a_video(tmp_path):
    frames = numbered_frames(list(range(12)))
    write_video(tmp_path / "frames", frames, fps=8)
    assert torch.equal(resize_frames(frames, 6, (16, 16)), frames[::2])
    for fit in FITS:
        assert torch.allclose(resize_frames(frames, 4, (8, 12), fit),
                              read_video(tmp_path / "frames", 4, (8, 12), fit=fit), atol=1e-6)


@pytest.mark.parametrize("frames, message", [
    (torch.zeros(3, 8, 8), "torch.float32 (3, 8, 8)"), (torch.zeros(2, 1, 8, 8), "(2, 1, 8, 8)"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
    (torch.full((2, 3, 8, 8), 255.0), "[255, 255], not in [-1, 1]"),
    (torch.full((2, 3, 8, 8), float("nan")), "[nan, nan]")])
def test_frames_in_memory_of_another_kind_are_rejected(frames, message):
    with pytest.raises(InputError, match=re.escape(message)):
        resize_frames(frames, 2, (8, 8))
