"""The HTML report: what is written, and what a browser shows of it."""
import base64
import contextlib
import json
import re
import shutil
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcl import AttentionRequest, InputError, Motion, Reference, SamplerStep, clone, read_reference
from mcl.clone import subject_masks
from mcl.evaluation import html_report
from mcl.evaluation.html_report import TEMPLATE, ClipView, write_html_report, write_page
from mcl.evaluation.report import METRICS, PREVIEW_STEPS, sample_unguided
from mcl.files import FOLDER_MARKER
from mcl.motion import reference_noise
from mcl.presets import build_config
from tests.conftest import randn

CHROMIUM = shutil.which("chromium")
REF = Path(__file__).parents[2] / "examples" / "figure_eight.mp4"
PROMPT = 'a star </script><script>document.title = "x"</script> <b>&amp;</b>'
QUICK = {"steps": 4, "guidance_steps": 2, "height": 64, "width": 64}


def data_of(page):
    """Return the data of a page, and its maps (table, layer, position, head, f, f)."""
    data = json.loads(re.search('id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[1])
    f = data["shape"][0]
    maps = np.frombuffer(zlib.decompress(base64.b64decode(data["maps"])), np.uint8)
    rows, columns = data["grid"]
    return data, maps.reshape(len(data["clips"]) + 1, len(data["layers"]), rows * columns,
                              data["heads"], f, f)


def dense_map(motion, layer):
    """Return the map (h*w, heads, f, f) of a motion that holds all values."""
    return torch.zeros(motion.values[layer].shape).scatter(
        -1, motion.indices[layer], motion.values[layer])


def write_report(folder, model, prompt=PROMPT, source=REF, report=None, **settings):
    """Sample a clone and an unguided clip, and write their report into a folder."""
    config = build_config(model.config.sample, **QUICK | settings)
    reference = read_reference(model, source, config)
    clip = clone(reference, prompt, model=model, **QUICK | settings)
    latents = {"unguided": sample_unguided(model, prompt, config, 0, num_steps=2),
               "clone": clip.latents}
    write_html_report(folder, model, prompt, config, reference, latents, clip.steps,
                      {"prompt": prompt, "fps": clip.fps, "report": report or {}})
    return folder / "index.html", config, reference, clip


class Report(NamedTuple):
    """A written report and what it was made of."""

    page: Path
    views: list
    motion: Motion
    masks: tuple
    clip: object


@pytest.fixture(scope="module")
def report(tmp_path_factory, embedded):
    folder, calls = tmp_path_factory.mktemp("report"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_report, "write_page", lambda *a: (calls.append(a), write_page(*a)))
        page, config, reference, clip = write_report(
            folder / "maps", embedded, top_k=2, ref_prompt="a circle", subject=("circle", "star"))
    assert sorted(p.name for p in (folder / "maps").iterdir()) == [FOLDER_MARKER, "index.html"]
    _, views, motion, masks, *_ = calls[0]
    expected = subject_masks(embedded, PROMPT, reference, config).masks(config.extraction_timestep)
    assert motion is reference.motion and all(map(torch.equal, masks, expected))
    return Report(page, views, motion, masks, clip)


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


def test_page_holds_the_steps_the_masks_and_the_record(report):
    data, _ = data_of(report.page)
    assert data["record"] == {"prompt": PROMPT, "fps": report.clip.fps, "report": {}}
    assert data["steps"] == [[s.timestep, s.loss, s.guidance_weight] for s in report.clip.steps]
    assert [t for t, _, _ in data["steps"]] == [999, 750, 749, 0]
    assert [w > 0 for _, _, w in data["steps"]] == [True, True, False, False]
    small = F.interpolate(report.masks.foreground[None], (4, 4))[0] * 100
    assert np.abs(np.array(data["masks"][0]) - small.flatten(1).numpy()).max() <= 0.5
    assert (report.page.read_text("utf-8").count("<script"), len(data["masks"])) == (2, 2)


@pytest.mark.parametrize("settings", [
    {"method": "inversion", "inversion_steps": 2, "top_k": 0},
    {"motion_weight": 0.0, "guidance_steps": 0},
    {"height": 56, "width": 80, "num_frames": 5},
    {"num_frames": 1}, {"num_frames": 20, "height": 32, "width": 32, "closed_loop": True},
    {"num_frames": 3, "height": 32, "width": 32}], ids=lambda settings: " ".join(settings))
def test_page_is_complete_for_every_way_of_sampling(settings, tmp_path, embedded):
    page, *_ = write_report(tmp_path / "maps", embedded, **settings)
    data, maps = data_of(page)
    assert all(clip["sprite"] for clip in data["clips"])
    assert np.allclose(maps[:-1].sum(axis=-1) / 255, 1, atol=0.05)
    assert (((maps[-1] == 2).sum(axis=-1) == 1) & ((maps[-1] > 0).sum(axis=-1) >= 1)).all()


def test_page_says_how_many_steps_the_unguided_clip_had(tmp_path, embedded):
    settings = {"num_frames": 2, "height": 32, "width": 32, "steps": 10}
    measured = {"clone": dict.fromkeys(METRICS, 0.9), "unguided": dict.fromkeys(METRICS, 0.125)}
    result = "Verdict: follows. corrected fidelity 0.90 (unguided 0.12), "
    for report, steps, text in (({}, PREVIEW_STEPS, ""), (measured, 10, result)):
        page, *_ = write_report(tmp_path / "maps", embedded, report=report, **settings)
        data, _ = data_of(page)
        assert f"in {steps} steps;" in data["clips"][1]["note"]
        assert data["result"].startswith(text) and bool(data["result"]) == bool(report)


def test_page_of_a_motion_file_shows_the_values_in_the_file(tmp_path, embedded):
    config = build_config(embedded.config.sample, **QUICK, top_k=3)
    motion = read_reference(embedded, REF, config).motion
    page, *_ = write_report(tmp_path / "maps", embedded, source=motion, top_k=3)
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
    (folder / FOLDER_MARKER).touch()
    write_page(*arguments)
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


def luminance(color):
    full = color if len(color) == 7 else "#" + "".join(2 * c for c in color[1:])
    parts = [int(full[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_enough_contrast_in_the_light_and_the_dark_theme():
    """WCAG 2.2 asks for a contrast of 4.5."""
    themes = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text("utf-8"), re.S)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--(\w+): (#\w+)", theme))
        pairs = [(front, back) for front in ("ink", "soft", "accent", "second")
                 for back in ("ground", "panel")]
        for front, back in [*pairs, ("ink", "bar")]:
            low, high = sorted((luminance(colors[front]), luminance(colors[back])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


@contextlib.contextmanager
def chromium(profile):
    """Yield a driver of Chromium at the width of a phone."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True})
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(report, tmp_path_factory):
    """Chromium with the page open."""
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(report.page.as_uri())
        wait_for(lambda: driver.execute_script("return 'ready' in document.body.dataset"))
        yield driver


def wait_for(condition, seconds=30):
    """Return the value of a condition as soon as it is true.

    A page may replace an element while the condition reads it. Then the condition is tried again.
    """
    from selenium.common.exceptions import StaleElementReferenceException
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StaleElementReferenceException):
            if value := condition():
                return value
        assert time.monotonic() < end
        time.sleep(0.05)


def find(browser, css):
    return browser.find_elements("css selector", css)


def read_table(browser):
    """Return the attention row on the page: its marks, and the values of the three clips (3, f)."""
    lines = [line.text.split() for line in find(browser, "#rows tbody tr")]
    values = torch.tensor([[float(word) for word in line[-3:]] for line in lines])
    return [line[:-3] for line in lines], values.T


def click(browser, canvas, x, y):
    """Click at a position of a canvas, given as fractions of its width and height."""
    from selenium.webdriver import ActionChains
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    w, h = canvas.size["width"], canvas.size["height"]
    ActionChains(browser).move_to_element_with_offset(
        canvas, round((x - 0.5) * w), round((y - 0.5) * h)).click().perform()


def assert_table_shows(browser, report, position, layer, head, frame):
    """Check the table against the attention, to its three digits and 8 bits."""
    name = list(report.motion.values)[layer]
    marks, values = read_table(browser)
    expected = torch.stack([dense_map(view.motion, name)[position, head, frame]
                            for view in report.views])
    assert (values - expected).abs().max() < 0.5 / 255 + 0.0005 + 1e-6
    first, second = report.motion.indices[name][position, head, frame].tolist()
    for j, words in enumerate(marks):
        assert words == ["●"] * (j == first) + ["○"] * (j == second) + [str(j + 1)]


def test_click_shows_the_attention_of_the_position(browser, report):
    canvases = find(browser, "#clips canvas")
    texts = set()
    for n, (x, y) in enumerate([(0, 0), (3, 1), (2, 3)]):
        click(browser, canvases[n], (x + 0.5) / 4, (y + 0.5) / 4)
        assert_table_shows(browser, report, 4 * y + x, 0, 0, 0)
        text, = [element.text for element in find(browser, "[role=status]")]
        assert text.startswith(f"Row {y + 1} of 4, column {x + 1} of 4. Frame 1 of the reference")
        texts.add(text)
    assert len(texts) == 3


def test_layer_head_and_frame_can_be_chosen(browser, report):
    from selenium.webdriver.common.keys import Keys
    click(browser, find(browser, "#clips canvas")[0], 0.6, 0.4)
    find(browser, "#layer option")[3].click()
    find(browser, "#head option")[2].click()
    slider, = find(browser, "#frame")
    slider.send_keys(Keys.END)
    assert_table_shows(browser, report, 6, 3, 2, 15)
    assert slider.get_attribute("aria-valuetext") == "16 of 16"
    slider.send_keys(Keys.HOME)
    find(browser, "#layer option")[0].click()
    find(browser, "#head option")[0].click()
    assert_table_shows(browser, report, 6, 0, 0, 0)


def test_arrow_keys_choose_a_position_and_stay_inside(browser, report):
    from selenium.webdriver.common.keys import Keys
    canvas = find(browser, "#clips canvas")[0]
    click(browser, canvas, 0.6, 0.6)
    canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_UP)
    assert_table_shows(browser, report, 1, 0, 0, 0)
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert_table_shows(browser, report, 7, 0, 0, 0)


def test_clips_play_together_and_pause(browser):
    def pixels():
        return browser.execute_script(
            "return [...document.querySelectorAll('#clips canvas')].map(c => c.toDataURL())")

    play, number = find(browser, "#play")[0], find(browser, "#number")[0]
    before = pixels()
    play.click()
    assert wait_for(lambda: number.text != "1 of 16") and play.text == "Pause"
    play.click()
    stopped = number.text
    assert play.text == "Play" and all(a != b for a, b in zip(before, pixels()))
    time.sleep(0.4)
    assert number.text == stopped
    assert f"Frame {stopped.split()[0]} of" in find(browser, "[role=status]")[0].text


def test_overlay_and_tracks_change_the_clips(browser):
    def pixels():
        return browser.execute_script(
            "return [...document.querySelectorAll('#clips canvas')].map(c => c.toDataURL())")

    images = set()
    for option in find(browser, "#over option"):
        option.click()
        images.add(pixels()[0])
    assert len(images) == 4
    before = pixels()
    find(browser, "#tracks")[0].click()
    tracked = [bool(clip["tracks"]) for clip in json.loads(
        find(browser, "#data")[0].get_attribute("textContent"))["clips"]]
    assert [a != b for a, b in zip(before, pixels())] == tracked and any(tracked)


def test_page_fits_a_phone_escapes_the_prompt_and_fetches_nothing(browser, report):
    width = "return document.documentElement.scrollWidth"
    find(browser, "summary")[0].click()
    assert browser.execute_script(width) <= 360
    assert browser.title == find(browser, "h1")[0].text == PROMPT
    assert PROMPT in [element.text for element in find(browser, "dd")]
    num_unlabeled = browser.execute_script("""return [...document.querySelectorAll(
        'button, select, input, canvas')].filter(e => !(e.getAttribute('aria-label') ||
        (e.labels && e.labels.length) || e.textContent)).length""")
    assert num_unlabeled == 0
    assert [e["message"] for e in browser.get_log("browser")] == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events
            if e["method"] == "Network.requestWillBeSent"
            and e["params"]["documentURL"] == report.page.as_uri()}
    assert {url.partition(":")[0] for url in urls} == {"file", "data"}
    assert [url for url in urls if url.startswith("file")] == [report.page.as_uri()]
