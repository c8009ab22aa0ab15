"""The page of --maps: what is written, and what a browser makes of it."""
import base64
import contextlib
import json
import re
import shutil
import time
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample as command
from mcl import Motion, read_video
from mcl.cli.arguments import REFERENCE_SEED
from mcl.files import FOLDER_MARKER
from mcl.evaluation.html_report import TEMPLATE, Shown, write_page

from tests.conftest import randn
from tests.cli.test_sample import QUICK, REF, clone, run

CHROMIUM = shutil.which("chromium")
PROMPT = 'a star </script><script>document.title = "x"</script> <b>&amp;</b>'


def data_of(page):
    """What a page holds, and its maps (table, layer, place, head, f, f)."""
    data = json.loads(re.search('id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[1])
    f = data["shape"][0]
    maps = np.frombuffer(zlib.decompress(base64.b64decode(data["maps"])), np.uint8)
    rows, columns = data["grid"]
    return data, maps.reshape(len(data["clips"]) + 1, len(data["layers"]), rows * columns,
                              data["heads"], f, f)


def whole(motion, layer):
    """The map (h*w, heads, f, f) whose values a motion holds, all of them."""
    return torch.zeros(motion.values[layer].shape).scatter(
        -1, motion.indices[layer], motion.values[layer])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page, and what the command gave to be written there."""
    folder, given = tmp_path_factory.mktemp("made"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "write_page", lambda *a: (given.append(a), write_page(*a)))
        clone(folder / "a.mp4", "--top-k", 2, "--maps", folder / "maps", "--ref-prompt",
              "a circle", "--subject", "circle", "star", prompt=PROMPT)
    assert sorted(p.name for p in (folder / "maps").iterdir()) == [FOLDER_MARKER, "index.html"]
    return folder / "maps" / "index.html", given[0]


def test_the_page_holds_the_attention_of_the_noised_clips(made, embedded):
    page, (_, clips, kept, *_) = made
    data, maps = data_of(page)
    assert [clip["title"] for clip in data["clips"]] == [
        "reference", "unguided", "clone"]
    config = embedded.config.sample
    latents = embedded.vae.encode(read_video(REF, 16, (64, 64)))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(REFERENCE_SEED))
    z = embedded.schedule.add_noise(latents, noise, config.extraction_timestep)
    own = embedded.unet(z, config.extraction_timestep, embedded.encode_text([""]),
                        temporal=config.guidance_blocks)[1].temporal
    assert data["layers"] == list(own) and data["grid"] == [4, 4] and data["k"] == 2
    for n, (name, probs) in enumerate(own.items()):
        for table, clip in zip(maps, clips):
            close = torch.from_numpy(table[n] / 255.0) - whole(clip.motion, name)
            assert close.abs().max() < 0.5 / 255 + 1e-6
        assert torch.allclose(whole(clips[0].motion, name), probs, atol=1e-5)
        marks = torch.from_numpy(maps[-1][n].astype(np.int64))
        assert (marks.gather(-1, kept.indices[name]) == torch.tensor([2, 1])).all()
        assert (marks > 0).sum() == kept.indices[name].numel()


def test_the_page_holds_the_steps_the_masks_and_the_settings(made):
    page, (_, clips, _, masks, *_) = made
    data, _ = data_of(page)
    record = json.loads((page.parent.parent / "a.mp4.json").read_text())
    assert data["record"]["settings"] == record["settings"] and data["record"]["prompt"] == PROMPT
    assert [g for _, g, _ in data["steps"] if g is not None] == record["loss"]
    assert [w > 0 for _, _, w in data["steps"]] == [True, True, False, False]
    assert [t for t, _, _ in data["steps"]] == [999, 750, 749, 0]
    small = F.interpolate(masks.foreground[None], (4, 4))[0] * 100
    assert np.abs(np.array(data["masks"][0]) - small.flatten(1).numpy()).max() <= 0.5
    assert (page.read_text("utf-8").count("<script"), len(data["masks"])) == (2, 2)


@pytest.mark.parametrize("argv", [
    ["--method", "inversion", "--inversion-steps", "2", "--top-k", "all"],
    ["--motion-weight", "0", "--guidance-steps", "0"],
    ["--size", "80x56", "--num-samples", "2", "--frames", "5"],
    ["--frames", "1"], ["--frames", "20", "--size", "32x32", "--loop"],
    ["--frames", "3", "--size", "32x32", "--report"]])
def test_a_page_is_written_for_every_way_of_sampling(argv, tmp_path):
    clone(tmp_path / "a.gif", "--maps", tmp_path / "maps", *argv)
    pages = sorted(tmp_path.glob("maps*/index.html"))
    assert len(pages) == (2 if "--num-samples" in argv else 1)
    for page in pages:
        data, maps = data_of(page)
        assert all(clip["sprite"] for clip in data["clips"])
        assert np.allclose(maps[:-1].sum(axis=-1) / 255, 1, atol=0.05)
        assert (((maps[-1] == 2).sum(axis=-1) == 1) & ((maps[-1] > 0).sum(axis=-1) >= 1)).all()


def test_of_a_kept_motion_the_page_shows_what_was_kept(tmp_path):
    clone(tmp_path / "a.mp4", "--save-motion", tmp_path / "m", "--top-k", 3)
    assert run("--motion", tmp_path / "m", "--prompt", "", *QUICK, "--top-k", 3,
               "--out", tmp_path / "b.mp4", "--maps", tmp_path / "maps") == 0
    data, maps = data_of(tmp_path / "maps" / "index.html")
    assert data["clips"][0]["sprite"] == "" and data["clips"][1]["sprite"]
    assert ((maps[-1] > 0).sum(axis=-1) == 3).all() and not maps[0][maps[-1] == 0].any()
    assert maps[0].any()


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "index.html").write_bytes(b"of somebody")
    argv = ["--ref", REF, "--prompt", "", "--out", tmp_path / "a.mp4", "--maps", tmp_path / "maps"]
    assert run(*argv) == 2
    (tmp_path / "maps" / FOLDER_MARKER).touch()
    assert run(*argv, *QUICK) == 0 and data_of(tmp_path / "maps" / "index.html")


def test_sixteen_frames_of_512_are_at_most_three_megabytes(tmp_path):
    """With attention that no compression helps with: fewer places are kept, of finer layers too."""
    def attention(places):
        top = randn(places, 8, 16, 16).softmax(dim=-1).topk(16, dim=-1)
        return top.values, top.indices

    pairs = {f"up_blocks.{i % 2 + 1}.{i}": attention((256, 1024)[i % 2]) for i in range(6)}
    every = Motion({n: v for n, (v, _) in pairs.items()}, {n: i for n, (_, i) in pairs.items()},
                   {"frames": 16, "height": 64, "width": 64})
    kept = Motion({n: v[..., :1] for n, v in every.values.items()},
                  {n: i[..., :1] for n, i in every.indices.items()}, every.info)
    frames = F.interpolate(randn(16, 3, 48, 48), (512, 512), mode="bicubic").clamp(-1, 1)
    write_page(tmp_path / "maps", [Shown(title, "", frames, every) for title in "abc"], kept, None,
               [(t, 0.1, 9.0) for t in range(100)], {"prompt": "", "fps": 8})
    page = tmp_path / "maps" / "index.html"
    assert page.stat().st_size < 3e6
    data, maps = data_of(page)
    assert 4 <= data["grid"][0] < 16
    step = 16 / data["grid"][0]
    for n, size in ((0, 16), (1, 32)):      # the places in the middles of the cells
        at = [int((i + 0.5) * step * size / 16) for i in range(data["grid"][0])]
        expected = whole(every, data["layers"][n]).unflatten(0, (size, size))[at][:, at]
        assert np.abs(maps[0][n] / 255 - expected.flatten(0, 1).numpy()).max() < 0.5 / 255 + 1e-6


def luminance(color):
    full = color if len(color) == 7 else "#" + "".join(2 * c for c in color[1:])
    parts = [int(full[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_the_light_and_in_the_dark():
    """WCAG 2.2's contrast of text, 4.5, and of what is drawn, 3."""
    themes = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text("utf-8"), re.S)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--(\w+): (#\w+)", theme))
        for front, backs, least in (("ink", ("ground", "panel", "bar"), 4.5),
                                    ("soft", ("ground", "panel"), 4.5),
                                    ("accent", ("ground", "panel"), 4.5),
                                    ("second", ("ground", "panel"), 4.5)):
            for back in backs:
                low, high = sorted((luminance(colors[front]), luminance(colors[back])))
                assert (high + 0.05) / (low + 0.05) >= least, (front, back)


@contextlib.contextmanager
def chromium(profile):
    """Chromium, at the width of a phone."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
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
def browser(made, tmp_path_factory):
    """With the page open."""
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(made[0].as_uri())
        waited(lambda: driver.execute_script("return 'ready' in document.body.dataset"))
        yield driver


def waited(found, seconds=30):
    """What is found as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def find(browser, css):
    return browser.find_elements("css selector", css)


def table(browser):
    """The row that the page shows: the marks, and the values of the three clips (3, f)."""
    lines = [line.text.split() for line in find(browser, "#rows tbody tr")]
    values = torch.tensor([[float(word) for word in line[-3:]] for line in lines])
    return [line[:-3] for line in lines], values.T


def click(browser, canvas, x, y):
    """A click at shares of a canvas."""
    from selenium.webdriver import ActionChains
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    w, h = canvas.size["width"], canvas.size["height"]
    ActionChains(browser).move_to_element_with_offset(
        canvas, round((x - 0.5) * w), round((y - 0.5) * h)).click().perform()


def assert_shown(browser, made, place, layer, head, frame):
    """That the table is the rows of the tensors, to the three digits and the 255ths it has."""
    _, clips, kept, *_ = made[1]
    name = list(kept.values)[layer]
    marks, values = table(browser)
    expected = torch.stack([whole(c.motion, name)[place, head, frame] for c in clips])
    assert (values - expected).abs().max() < 0.5 / 255 + 0.0005 + 1e-6
    first, second = kept.indices[name][place, head, frame].tolist()
    for j, words in enumerate(marks):
        assert words == ["●"] * (j == first) + ["○"] * (j == second) + [str(j + 1)]


def test_a_click_shows_the_rows_of_the_place(browser, made):
    pictures = find(browser, "#clips canvas")
    said = set()
    for n, (x, y) in enumerate([(0, 0), (3, 1), (2, 3)]):
        click(browser, pictures[n], (x + 0.5) / 4, (y + 0.5) / 4)
        assert_shown(browser, made, 4 * y + x, 0, 0, 0)
        text, = [one.text for one in find(browser, "[role=status]")]
        assert text.startswith(f"Row {y + 1} of 4, column {x + 1} of 4. Frame 1 of the reference")
        said.add(text)
    assert len(said) == 3


def test_layer_head_and_frame_are_chosen(browser, made):
    from selenium.webdriver.common.keys import Keys
    click(browser, find(browser, "#clips canvas")[0], 0.6, 0.4)
    find(browser, "#layer option")[3].click()
    find(browser, "#head option")[2].click()
    slider, = find(browser, "#frame")
    slider.send_keys(Keys.END)
    assert_shown(browser, made, 6, 3, 2, 15)
    assert slider.get_attribute("aria-valuetext") == "16 of 16"
    slider.send_keys(Keys.HOME)
    find(browser, "#layer option")[0].click()
    find(browser, "#head option")[0].click()
    assert_shown(browser, made, 6, 0, 0, 0)


def test_keys_choose_a_place_and_stay_inside(browser, made):
    from selenium.webdriver.common.keys import Keys
    canvas = find(browser, "#clips canvas")[0]
    click(browser, canvas, 0.6, 0.6)
    canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_UP)
    assert_shown(browser, made, 1, 0, 0, 0)
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert_shown(browser, made, 7, 0, 0, 0)


def test_the_clips_play_in_step_and_pause(browser):
    def pixels():
        return browser.execute_script(
            "return [...document.querySelectorAll('#clips canvas')].map(c => c.toDataURL())")

    play, number = find(browser, "#play")[0], find(browser, "#number")[0]
    before = pixels()
    play.click()
    assert waited(lambda: number.text != "1 of 16") and play.text == "Pause"
    play.click()
    stopped = number.text
    assert play.text == "Play" and all(a != b for a, b in zip(before, pixels()))
    time.sleep(0.4)
    assert number.text == stopped
    assert f"Frame {stopped.split()[0]} of" in find(browser, "[role=status]")[0].text


def test_what_is_drawn_over_the_clips_changes(browser):
    def pixels():
        return browser.execute_script(
            "return [...document.querySelectorAll('#clips canvas')].map(c => c.toDataURL())")

    seen = set()
    for option in find(browser, "#over option"):
        option.click()
        seen.add(pixels()[0])
    assert len(seen) == 4
    before = pixels()
    find(browser, "#tracks")[0].click()
    tracked = [bool(clip["tracks"]) for clip in json.loads(
        find(browser, "#data")[0].get_attribute("textContent"))["clips"]]
    assert [a != b for a, b in zip(before, pixels())] == tracked and any(tracked)


def test_it_fits_a_phone_escapes_what_the_user_wrote_and_fetches_nothing(browser, made):
    width = "return document.documentElement.scrollWidth"
    find(browser, "summary")[0].click()
    assert browser.execute_script(width) <= 360
    assert browser.title == find(browser, "h1")[0].text == PROMPT
    assert PROMPT in [one.text for one in find(browser, "dd")]
    named = browser.execute_script("""return [...document.querySelectorAll(
        'button, select, input, canvas')].filter(e => !(e.getAttribute('aria-label') ||
        (e.labels && e.labels.length) || e.textContent)).length""")
    assert named == 0
    assert [e["message"] for e in browser.get_log("browser")] == []
    fetched = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in fetched
            if e["method"] == "Network.requestWillBeSent"
            and e["params"]["documentURL"] == made[0].as_uri()}
    assert {url.partition(":")[0] for url in urls} == {"file", "data"}
    assert [url for url in urls if url.startswith("file")] == [made[0].as_uri()]
