"""The HTML report: what a browser shows of it."""
import json
import re
import time

import numpy as np
import pytest
import torch

from mcl.evaluation.html_report import TEMPLATE
from tests.browser import chromium, click, find, wait_for
from tests.evaluation.conftest import CLIP_NAME, PROMPT, dense_map


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


@pytest.fixture(scope="module")
def browser(report, tmp_path_factory):
    """Chromium with the page open."""
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(report.page.as_uri())
        wait_for(lambda: driver.execute_script("return 'ready' in document.body.dataset"))
        yield driver


def read_table(browser):
    """Return the attention row on the page: its marks, and the values of the three clips (3, f)."""
    lines = [line.text.split() for line in find(browser, "#rows tbody tr")]
    values = torch.tensor([[float(word) for word in line[-3:]] for line in lines])
    return [line[:-3] for line in lines], values.T


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


def pixels(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#clips canvas')].map(c => c.toDataURL())")


def test_clips_play_together_with_their_text_and_pause(browser):
    play, status = find(browser, "#play")[0], find(browser, "#said")[0]
    number, before = find(browser, "#number")[0], pixels(browser)
    play.click()
    assert play.text == "Pause" and status.get_attribute("aria-live") == "off"
    assert wait_for(lambda: " Frame 1 of the reference" not in status.text)
    assert wait_for(lambda: all(a != b for a, b in zip(before, pixels(browser))))
    play.click()
    stopped = number.text
    assert play.text == "Play" and status.get_attribute("aria-live") == "polite"
    time.sleep(0.4)
    assert number.text == stopped and f"Frame {stopped.split()[0]} of the ref" in status.text


def test_space_plays_unless_a_control_has_the_focus(browser):
    from selenium.webdriver.common.keys import Keys
    play, tracks = find(browser, "#play")[0], find(browser, "#tracks")[0]
    canvas, scroll = find(browser, "#clips canvas")[1], "return scrollY"
    for element, label in ((canvas, "Pause"), (find(browser, "#frame")[0], "Play"),
                           (play, "Pause"), (play, "Play"), (tracks, "Play"), (tracks, "Play")):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        before = browser.execute_script(scroll)
        element.send_keys(Keys.SPACE)
        assert play.text == label and browser.execute_script(scroll) == before
    browser.execute_script("document.activeElement.blur()")
    find(browser, "body")[0].send_keys(Keys.SPACE)
    assert play.text == "Pause"
    find(browser, "body")[0].send_keys(Keys.SPACE)


def test_dragging_over_a_clip_or_a_map_moves_through_the_frames(browser):
    from selenium.webdriver import ActionChains
    number, play = find(browser, "#number")[0], find(browser, "#play")[0]
    clip = find(browser, "#clips canvas")[0]
    for canvas in (clip, find(browser, "#maps canvas")[0]):
        click(browser, clip, 0.1, 0.1)
        browser.execute_script("""choose({ frame: 3 });
            arguments[0].scrollIntoView({ block: "center" })""", canvas)
        numbers, quarter = [], canvas.size["width"] // 4
        mouse = ActionChains(browser, 0).move_to_element(canvas).click_and_hold()
        for distance in (4, quarter - 4, -2 * quarter):         # the first one is no drag yet
            mouse.move_by_offset(distance, 4).perform()
            mouse = ActionChains(browser, 0)
            wait_for(lambda: play.text == "Play")
            numbers.append(number.text)
            browser.execute_script("play(true)")                # dragging stops it
        mouse.release().perform()
        browser.execute_script("""play(false);
            dispatchEvent(new PointerEvent("pointermove", { clientX: 300 }))""")
        assert numbers == ["4 of 16", "8 of 16", "1 of 16"]
        assert find(browser, "#said")[0].text.startswith("Row 1 of 4, column 1 of 4. Frame 1 ")
    browser.execute_script("""
        clips[0].map.dispatchEvent(new PointerEvent("pointerdown", { button: 2 }));
        dispatchEvent(new PointerEvent("pointermove", { clientX: 300 }))""")
    assert number.text == "1 of 16"                     # the right button opens a menu


def test_maps_are_below_the_clips_and_a_click_on_a_row_chooses_its_frame(browser):
    bottom, top = browser.execute_script("""return [$("clips").getBoundingClientRect().bottom,
        $("maps").getBoundingClientRect().top]""")
    assert 0 <= top - bottom < 20
    canvas = find(browser, "#maps canvas")[2]
    size = canvas.size["height"]
    for frame in (16, 11, 1):
        click(browser, canvas, 0.9, (20 + (frame - 0.5) * (size - 20) / 16) / size)
        assert find(browser, "#number")[0].text == f"{frame} of 16"
    click(browser, canvas, 0.5, 0.01)                   # the numbers above the first row
    assert find(browser, "#number")[0].text == "1 of 16"


def test_maps_have_frame_numbers_that_fit_at_every_width(browser):
    browser.execute_script("""const write = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function(...words) {
            if (this.canvas === clips[1].map) written.push(words);
            write.apply(this, words);
        }""")
    for width, numbers in (1200, range(1, 17)), (360, [1, 5, 10, 15]):
        browser.execute_script("written = []; document.querySelector('main').hidden = true")
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True})
        browser.execute_script("document.querySelector('main').hidden = false")
        size = find(browser, "#maps canvas")[1].size["width"]
        centers = [20 + (i - 0.5) * (size - 20) / 16 for i in numbers]
        expected = [at for i, x in zip(numbers, centers) for at in ([i, x, 10], [i, 10, x])]
        written = wait_for(lambda: browser.execute_script("return written"))[-len(expected):]
        assert np.abs(np.array(written) - np.array(expected)).max() <= 0.5


def test_curves_have_axes_with_numbers(browser, report):
    svgs = find(browser, "#curves svg")
    for svg, values in zip(svgs, (
            [step.loss for step in report.clip.steps if step.loss is not None],
            [step.guidance_weight for step in report.clip.steps]), strict=True):
        *labels, name = browser.execute_script("""return [...arguments[0].querySelectorAll("text")]
            .map(t => [t.textContent, +t.getAttribute("x"), +t.getAttribute("y")])""", svg)
        highest, *steps = [float(text) for text, *_ in labels[2:]]
        assert highest == pytest.approx(max(values), rel=0.005)
        assert (steps, name[0], labels[0][0]) == ([1, 2, 4], "step", "0")
        line = browser.execute_script(
            "return arguments[0].querySelectorAll('path')[1].getAttribute('d')", svg)
        points = [[float(x) for x in p.split(",")] for p in line[1:].split("L")][1:]
        (x1, x2), (y0, y1) = (labels[3][1], labels[5][1]), (labels[0][2] - 4, labels[2][2] - 4)
        assert x2 > x1 and y1 < y0                      # larger values are higher
        assert points == [pytest.approx([x1 + (x2 - x1) * i / 3, y0 + (y1 - y0) * v / max(values)])
                          for i, v in enumerate(values)]


def test_overlay_and_tracks_change_the_clips_and_the_legend(browser):
    over, legend = find(browser, "#over")[0], find(browser, "#legend")[0]
    images, before, outline = set(), pixels(browser), legend.text
    assert over.get_attribute("value") == "" and outline.endswith("the chosen position.")
    for option in find(browser, "#over option"):
        option.click()
        images.add(pixels(browser)[0])
        assert option.text == "nothing" or f" {option.text}: " in f" {legend.text.lower()}"
    assert len(images) == 4
    find(browser, "#over option")[0].click()
    assert pixels(browser) == before and legend.text == outline
    find(browser, "#tracks")[0].click()
    tracked = [bool(clip["tracks"]) for clip in json.loads(
        find(browser, "#data")[0].get_attribute("textContent"))["clips"]]
    assert [a != b for a, b in zip(before, pixels(browser))] == tracked and any(tracked)
    assert "Tracked points: " in legend.text


def test_page_fits_a_phone_escapes_all_text_and_fetches_nothing(browser, report):
    width = "return document.documentElement.scrollWidth"
    find(browser, "summary")[0].click()
    assert browser.execute_script(width) <= 360
    assert find(browser, "dd")[0].size["width"] > 150       # file names need space
    assert browser.title == find(browser, "h1")[0].text == PROMPT
    settings = [element.text for element in find(browser, "dd")]
    assert {PROMPT, CLIP_NAME, f"{CLIP_NAME}, 12\nm.safetensors, 34", "0.900"} <= {*settings}
    result, intro, *_ = find(browser, "h1 ~ p")
    assert result.text.startswith("Verdict: follows (camera curves, change centroids). ")
    assert "nan" not in result.text
    assert " 0.90 (unguided 0.12)" in result.text
    sentences = intro.text.replace("arXiv 2406.05338", "").split(". ")
    assert [text.split()[0] for text in sentences] == ["An", "The", "Click"]
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


def test_page_that_cannot_be_shown_says_why(browser, report):
    hide = "delete window.DecompressionStream"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hide})
    browser.get(report.page.as_uri())
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    problem, view = find(browser, "#problem")[0], find(browser, "#view")[0]
    assert wait_for(lambda: "this browser has no DecompressionStream. Use " in problem.text)
    assert not view.is_displayed() and find(browser, "summary")[0].is_displayed()
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(report.page.as_uri())
    assert find(browser, "noscript p")[0].is_displayed()
    assert "This page needs JavaScript. Switch it on " in find(browser, "body")[0].text
    assert not find(browser, "main")[0].is_displayed()
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
