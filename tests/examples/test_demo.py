"""The demo page: what visitors see in a browser, and which files their visits leave."""
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import mcl
from tests.browser import chromium, click, find, wait_for
from tests.conftest import randn

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
DEMO = ROOT / "examples" / "demo.py"
REF = ROOT / "examples" / "figure_eight.mp4"
PROMPT = "a red star on a navy <b>zebu</b>"
SETTINGS = {"steps": 2, "guidance_steps": 1, "num_frames": 8, "height": 64, "width": 64}
OPTIONS = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
TIMEOUT = 300                           # seconds, for machines that are busy


def start(folder, *argv):
    """Start the server with its temporary files in a folder."""
    return subprocess.Popen(
        [sys.executable, "-u", DEMO, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=folder, env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of the server, and the folder of its temporary files, which is empty at the end."""
    folder = tmp_path_factory.mktemp("temporary")
    process = start(folder, *OPTIONS)
    output = []
    for line in process.stdout:
        output.append(line)
        if "http://" in line:
            break
    yield line.split()[-1], folder
    process.terminate()
    output += process.communicate(timeout=TIMEOUT)[0].splitlines(keepends=True)
    assert "Traceback" not in "".join(output), "".join(output)
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def wait(condition):
    return wait_for(condition, TIMEOUT)


def upload(browser, address, clip):
    """Open the page and upload a clip."""
    browser.get(address)
    wait(lambda: find(browser, "input[type=file]"))[0].send_keys(str(clip))
    wait(lambda: find(browser, "video"))


def fill(field, text):
    field.clear()
    field.send_keys(text)


def press(browser, text):
    wait(lambda: [b.click() or b for b in find(browser, "button")
                  if b.text == text and b.is_displayed()])


def messages(browser):
    return [element.text for element in find(browser, "[role=status] .toast-message-text")]


def uploaded_files(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_page_shows_the_clip_of_clone_and_its_report(server, browser, tmp_path):
    address, _ = server
    upload(browser, address, REF)
    prompt, = find(browser, "textarea, input[type=text]")
    seed, = find(browser, "input[type=number]")
    fill(prompt, PROMPT)
    fill(seed, "3")
    press(browser, "Clone the motion")
    video, = wait(lambda: find(browser, "video[aria-label]"))
    wait(lambda: browser.execute_script("return arguments[0].videoWidth", video) == 128)
    link, *_ = find(browser, "a[download]")
    served = browser.execute_async_script("""const [address, done] = arguments;
        fetch(address).then(r => r.arrayBuffer()).then(b => done([...new Uint8Array(b)]))""",
                                          link.get_attribute("href"))
    mcl.clone(REF, PROMPT, seed=3, **SETTINGS).save(tmp_path / "a.mp4")
    assert bytes(served) == (tmp_path / "a.mp4").read_bytes()

    assert find(browser, "strong")[0].text.startswith("Verdict: ")
    assert "nan" not in find(browser, "strong")[0].text
    assert any("that the model was not trained on: b, zebu, b." in p.text
               for p in find(browser, "p"))

    press(browser, "How it came about")
    browser.switch_to.frame(wait(lambda: find(browser, "iframe"))[0])
    wait(lambda: browser.execute_script("return 'ready' in document.body.dataset"))
    click(browser, find(browser, "#clips canvas")[0], 0.9, 0.1)
    assert find(browser, "#said")[0].text.startswith("Row 1 of 4, column 4 of 4.")
    assert find(browser, "#result")[0].text.startswith("Verdict: ")
    assert int(find(browser, "#maps canvas")[0].get_attribute("width")) > 60
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    browser.switch_to.default_content()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    unlabeled = browser.execute_script("""return [...document.querySelectorAll(
        'input:not([type=file]), textarea')].filter(e => !(e.getAttribute('aria-label') ||
        e.labels && e.labels.length)).map(e => e.outerHTML)""")
    assert unlabeled == []
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_wrong_input_is_refused_in_one_line_without_server_paths(server, browser, tmp_path):
    address, folder = server
    (tmp_path / "text.mp4").write_text("no film")
    mcl.write_video(tmp_path / "long.mp4", torch.zeros(22, 3, 32, 32), fps=1)
    for name, start_of_message in (
            ("text.mp4", "text.mp4: cannot be decoded. Upload another clip"),
            ("long.mp4", "long.mp4: longer than 20 s. Cut a part out of it.")):
        upload(browser, address, tmp_path / name)
        text = "".join(wait(lambda start=start_of_message: [m for m in messages(browser)
                                                            if m.startswith(start)]))
        assert "/" not in text and "--" not in text and "\n" not in text, text
    assert str(ROOT) not in browser.page_source
    browser.get(address)
    press(browser, "Clone the motion")
    wait(lambda: "There is no clip yet. Upload or record one." in messages(browser))


def test_seeds_that_are_negative_or_not_whole_are_refused(server, browser):
    address, _ = server
    upload(browser, address, REF)
    for seed in ("-1", "1.5"):
        fill(find(browser, "input[type=number]")[0], seed)
        press(browser, "Clone the motion")
        refusal = f"seed = {seed} is out of range: 0 to 9007199254740991, a whole number."
        wait(lambda start=refusal: start in messages(browser))
    assert not find(browser, "video[aria-label]")
    for values, error in (([-1], "seed = -1 is"), ([2 ** 53], "seed = 9007199254740992 is"),
                          (["x"], "seed = &#x27;x&#x27; is"), ([[1]], "seed = [1] is"),
                          ([3], "There is no clip yet.")):       # sent by a program
        call = f"{address}/gradio_api/call/clone"
        body = json.dumps({"data": [None, "a star", *values]}).encode()
        request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{call}/{event}") as answer:
            assert error in answer.read().decode()


def test_clips_that_the_model_will_hardly_follow_are_told_of_when_they_are_uploaded(
        server, browser, tmp_path):
    address, _ = server
    still, noise = torch.full((8, 3, 64, 64), 0.2), randn(40, 3, 64, 64).clamp(-1, 1)
    for name, frames, fps, starts in (
            ("still", still, 8, ["The clip hardly moves, so"]),
            ("few", still[:5], 5, ["The clip has 5 frames in 1.0 s, and the model looks at 8: 1 s",
                                   "The clip hardly moves, so"]),
            ("noise", noise, 8, ["The clip has 40 frames in 5.0 s, and the model looks at 8: 1 s",
                                 "The model was not trained on clips like"])):
        mcl.write_video(tmp_path / f"{name}.mp4", frames, fps)
        upload(browser, address, tmp_path / f"{name}.mp4")
        texts = wait(lambda n=len(starts): [m for m in messages(browser) if m][:n][n - 1:] and [
            m for m in messages(browser) if m])
        assert len(texts) == len(starts) and "--" not in "".join(texts)
        assert all(any(m.startswith(start) for m in texts) for start in starts), texts


def test_examples_are_chosen_by_a_click_and_the_known_words_are_listed(server, browser):
    address, folder = server
    browser.get("about:blank")
    wait(lambda: uploaded_files(folder) == [])
    browser.get(address)
    for name, prompt in (("zigzag", "a fox on a teal background"),
                         ("camera_zoom", "a white heart on a checkered teal background")):
        press(browser, f"Example: {prompt}")
        wait(lambda clip=name: [v for v in find(browser, "video")
                                if v.get_attribute("src").endswith(f"/{clip}.mp4")])
        assert find(browser, "textarea, input[type=text]")[0].get_attribute("value") == prompt
    assert messages(browser) == [] and str(ROOT) not in browser.page_source
    words, = find(browser, "details")
    words.click()
    known = mcl.load_model().config.training_vocabulary
    assert words.text == f"The {len(known)} words that the model knows\n{', '.join(known)}"
    browser.get("about:blank")
    wait(lambda: uploaded_files(folder) == [])


def test_visitors_wait_in_turn_and_their_files_are_deleted_when_they_leave(server, browser):
    address, folder = server
    browser.get("about:blank")
    wait(lambda: uploaded_files(folder) == [])
    upload(browser, address, REF)
    first = browser.current_window_handle
    press(browser, "Clone the motion")
    browser.switch_to.new_window("tab")
    upload(browser, address, REF)
    press(browser, "Clone the motion")
    with contextlib.suppress(AssertionError):       # the first clone may finish before it is seen
        wait_for(lambda: any("queue: 1/1" in element.text for element in
                             find(browser, "[data-testid=status-tracker]")), 20)
    second = browser.current_window_handle
    browser.switch_to.window(first)
    browser.close()
    browser.switch_to.window(second)
    wait(lambda: find(browser, "video[aria-label]"))
    assert uploaded_files(folder) == [REF.name]
    browser.get("about:blank")
    wait(lambda: uploaded_files(folder) == [])


def test_missing_gradio_is_named_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(DEMO)
    assert end.value.code == "error: this page needs gradio: pip install -e '.[demo]'"


@pytest.fixture(scope="module")
def demo_main():
    """Return main() of the page, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        yield runpy.run_path(DEMO)["main"]


@pytest.mark.parametrize("argv, message", [
    (["--set", "cfg_scale=-1"], "cfg_scale = -1 is"),
    (["--set", "stpes=9"], "did you mean 'steps'?"),
    (["--set", "height=100"], "use multiples of 8"),
    (["--colour"], "unrecognized arguments: --colour"),
    (["--port", "x"], "argument --port: invalid int value: 'x'"),
    (["--port", "TAKEN"], "TAKEN")])
def test_wrong_options_are_named_in_one_line(argv, message, demo_main, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["demo.py", *(
            word.replace("TAKEN", port) for word in argv)])
        with pytest.raises(SystemExit) as end:
            demo_main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and message.replace("TAKEN", port) in error
    assert error.splitlines()[-1].startswith("demo.py: error: ")
