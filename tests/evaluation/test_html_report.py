"""The HTML report: the data that is written."""
import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcl import AttentionRequest, InputError, Motion, Reference, SamplerStep, read_reference
from mcl.evaluation import html_report
from mcl.evaluation.html_report import ClipView, write_html_report, write_page
from mcl.motion import reference_noise
from mcl.presets import build_config
from tests.conftest import randn
from tests.evaluation.conftest import (
    CLIP_NAME,
    MEASURED,
    PROMPT,
    QUICK,
    REF,
    dense_map,
    write_report,
)


@pytest.fixture(autouse=True)
def still_tracks(monkeypatch):
    """Track no points, except in the report that all tests share."""
    monkeypatch.setattr(html_report, "tracklets", lambda frames: torch.zeros(1, len(frames), 2))


def data_of(page):
    """Return the data of a page, and its maps (table, layer, position, head, f, f)."""
    data = json.loads(re.search('id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[1])
    f = data["shape"][0]
    maps = np.frombuffer(zlib.decompress(base64.b64decode(data["maps"])), np.uint8)
    rows, columns = data["grid"]
    return data, maps.reshape(len(data["clips"]) + 1, len(data["layers"]), rows * columns,
                              data["heads"], f, f)


def test_page_holds_the_attention_of_the_noised_clips(report, embedded):
    data, maps = data_of(report.page)
    assert [clip["title"] for clip in data["clips"]] == ["reference", "unguided", "clone"]
    config = build_config(embedded.config.sample, **QUICK)
    latents = read_reference(embedded, REF, config).latents
    z = embedded.schedule.add_noise(latents, reference_noise(latents), config.extraction_timestep)
    expected = embedded.unet(z, config.extraction_timestep, embedded.encode_text([""]),
                             request=AttentionRequest(temporal=config.guidance_blocks)
                             )[1].temporal
    assert data["layers"] == list(expected) and data["grid"] == [4, 4] and data["k"] == 2
    for n, (name, probs) in enumerate(expected.items()):
        for table, view in zip(maps, report.views):
            difference = torch.from_numpy(table[n] / 255.0) - dense_map(view.motion, name)
            assert difference.abs().max() < 0.5 / 255 + 1e-6
        assert torch.allclose(dense_map(report.views[0].motion, name), probs, atol=1e-5)
        ranks = torch.from_numpy(maps[-1][n].astype(np.int64))
        indices = report.motion.indices[name]
        assert (ranks.gather(-1, indices) == torch.tensor([2, 1])).all()
        assert (ranks > 0).sum() == indices.numel()


def test_page_holds_the_steps_the_masks_and_the_record_without_folders(report):
    data, _ = data_of(report.page)
    measured = json.loads(json.dumps(MEASURED).replace("NaN", "null"))
    assert data["record"] == {
        "prompt": PROMPT, "fps": report.clip.fps, "report": measured, "reference": CLIP_NAME,
        "weights": "m.safetensors", "loras": [["l.safetensors", 0.5]], "images": [],
        "inputs": [[CLIP_NAME, "12"], ["m.safetensors", "34"]]}
    assert data["steps"] == [[s.timestep, s.loss, s.guidance_weight] for s in report.clip.steps]
    assert [t for t, _, _ in data["steps"]] == [999, 750, 749, 0]
    assert [w > 0 for _, _, w in data["steps"]] == [True, True, False, False]
    small = F.interpolate(report.masks.foreground[None], (4, 4))[0] * 100
    assert np.abs(np.array(data["masks"][0]) - small.flatten(1).numpy()).max() <= 0.5
    assert (report.page.read_text("utf-8").count("<script"), len(data["masks"])) == (2, 2)


@pytest.mark.parametrize("settings", [
    {"method": "inversion", "inversion_steps": 2, "top_k": 0, "num_frames": 4},
    {"motion_weight": 0.0, "guidance_steps": 0, "num_frames": 4},
    {"height": 56, "width": 80, "num_frames": 5},
    {"num_frames": 1}, {"num_frames": 20, "height": 32, "width": 32, "closed_loop": True},
    {"num_frames": 3, "height": 32, "width": 32}], ids=lambda settings: " ".join(settings))
def test_page_is_complete_for_every_way_of_sampling(settings, tmp_path, embedded):
    page, *_ = write_report(tmp_path / "maps", embedded, **settings)
    data, maps = data_of(page)
    assert all(clip["sprite"] for clip in data["clips"])
    assert np.allclose(maps[:-1].sum(axis=-1) / 255, 1, atol=0.05)
    assert (((maps[-1] == 2).sum(axis=-1) == 1) & ((maps[-1] > 0).sum(axis=-1) >= 1)).all()


def test_page_has_a_result_if_the_clips_were_measured(tmp_path, embedded):
    for report in ({}, MEASURED):
        page, *_ = write_report(tmp_path / "maps", embedded, record={"report": report},
                                num_frames=2, height=32, width=32)
        assert bool(data_of(page)[0]["result"]) == bool(report)


def test_page_of_a_motion_file_shows_the_values_in_the_file(tmp_path, embedded):
    config = build_config(embedded.config.sample, **QUICK, top_k=3, num_frames=6)
    motion = read_reference(embedded, REF, config).motion
    page, *_ = write_report(tmp_path / "maps", embedded, source=motion, top_k=3,
                            num_frames=6)
    data, maps = data_of(page)
    assert data["clips"][0]["sprite"] == "" and data["clips"][1]["sprite"]
    assert ((maps[-1] > 0).sum(axis=-1) == 3).all() and not maps[0][maps[-1] == 0].any()
    assert maps[0].any()


def test_reference_is_read_with_its_own_frames_where_the_clip_has_control_images(
        small, monkeypatch, tmp_path):
    calls, control = [], torch.zeros(1, 2, 4, 8, 8)
    control[:, -1, [0, 2]] = 1
    config = small.config.sample
    reference = Reference(html_report.extract_motion(small, randn(1, 4, 4, 8, 8)),
                          randn(4, 3, 32, 32).clamp(-1, 1), randn(1, 4, 4, 8, 8))
    monkeypatch.setattr(html_report, "control_condition", lambda _, images, __: images)
    monkeypatch.setattr(html_report, "extract_motion", lambda *_, control: (
        calls.append(control), reference.motion)[1])
    write_html_report(tmp_path / "maps", small, "", config, reference,
                      dict.fromkeys(("unguided", "clone"), reference.latents), [],
                      {"prompt": "", "fps": 8}, control)
    images, *others = calls
    assert all(other is control for other in others) and list(images) == [0, 2]
    assert all(torch.equal(image, reference.frames[i, None]) for i, image in images.items())


def test_folder_of_another_program_is_not_replaced(tmp_path, report):
    folder = tmp_path / "maps"
    folder.mkdir()
    (folder / "index.html").write_bytes(b"another program's")
    arguments = folder, report.views, report.motion, report.masks, report.clip.steps, {"fps": 8}
    with pytest.raises(InputError):
        write_page(*arguments)
    (folder / "index.html").unlink()
    write_page(*arguments)
    write_page(*arguments)                              # a page of this program is replaced
    assert data_of(folder / "index.html")


def test_sixteen_frames_of_512_pixels_give_at_most_three_megabytes(tmp_path):
    """Incompressible attention: fewer positions are stored, also of the finer layers."""
    sizes = {f"up_blocks.{i % 2 + 1}.{i}": (16, 32)[i % 2] for i in range(6)}
    top = {name: randn(n * n, 8, 16, 16).softmax(dim=-1).topk(16, dim=-1)
           for name, n in sizes.items()}
    metadata = {"num_frames": 16, "height": 64, "width": 64,
                "grids": {name: [n, n] for name, n in sizes.items()}}
    full, motion = (Motion({name: v[..., :k] for name, (v, _) in top.items()},
                           {name: i[..., :k] for name, (_, i) in top.items()}, metadata)
                    for k in (16, 1))
    frames = F.interpolate(randn(16, 3, 48, 48), (512, 512), mode="bicubic").clamp(-1, 1)
    steps = [SamplerStep(i, 999 - i, torch.empty(0), 0.1, 1.0, 9.0) for i in range(100)]
    write_page(tmp_path / "maps", [ClipView(title, "", frames, full) for title in "abc"], motion,
               (), steps, {"prompt": "", "fps": 8})
    page = tmp_path / "maps" / "index.html"
    assert page.stat().st_size < 3e6
    data, maps = data_of(page)
    assert 4 <= data["grid"][0] < 16
    step = 16 / data["grid"][0]
    for n, size in ((0, 16), (1, 32)):      # the positions at the cell centers
        rows = [int((i + 0.5) * step * size / 16) for i in range(data["grid"][0])]
        expected = dense_map(full, data["layers"][n]).unflatten(0, (size, size))[rows][:, rows]
        assert np.abs(maps[0][n] / 255 - expected.flatten(0, 1).numpy()).max() < 0.5 / 255 + 1e-6
