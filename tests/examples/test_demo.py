"""The demo page: what visitors see of it in a real browser, and what stays of their visits."""
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcl import write_video
from mcl.cli import exit_code_of

from tests.evaluation.test_html_report import chromium, click, find, waited
from tests.cli.test_sample import PROMPT, QUICK, REF, ROOT, clone

pytest.importorskip("gradio")
DEMO = ROOT / "examples" / "demo.py"
PATIENCE = 300                          # seconds, of machines with much else to do


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Where it is, and the folder that its temporary files are in; none is left when it ends."""
    folder = tmp_path_factory.mktemp("temporary")
    process = subprocess.Popen(
        [sys.executable, "-u", DEMO, *QUICK], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)})
    said = []
    for line in process.stdout:
        said.append(line)
        if "http://" in line:
            break
    yield line.split()[-1], folder
    process.terminate()
    said += process.communicate(timeout=PATIENCE)[0].splitlines()
    assert "Traceback" not in "".join(said) and list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def soon(found):
    return waited(found, PATIENCE)


def enter(browser, address, clip):
    """Opens the page, and brings a clip."""
    browser.get(address)
    soon(lambda: find(browser, "input[type=file]"))[0].send_keys(str(clip))
    soon(lambda: find(browser, "video"))


def press(browser, text):
    soon(lambda: [b for b in find(browser, "button") if b.text == text and b.is_displayed()]
         )[0].click()


def refusals(browser):
    return [one.text for one in find(browser, "[role=status] .toast-message-text")]


def made(browser):
    return soon(lambda: find(browser, "video[aria-label]"))[0]


def kept(folder):
    """The names of all files of visits."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_clip_is_cloned_as_by_the_command_and_explained(server, browser, tmp_path):
    address, folder = server
    enter(browser, address, REF)
    prompt, = find(browser, "textarea, input[type=text]")
    seed, = find(browser, "input[type=number]")
    for field, text in ((prompt, PROMPT), (seed, "3")):
        field.clear()
        field.send_keys(text)
    press(browser, "Clone the motion")
    soon(lambda: browser.execute_script("return arguments[0].videoWidth", made(browser)) == 128)
    link, *_ = find(browser, "a[download]")
    served = browser.execute_async_script("""const [address, done] = arguments;
        fetch(address).then(r => r.arrayBuffer()).then(b => done([...new Uint8Array(b)]))""",
                                          link.get_attribute("href"))
    assert bytes(served) == clone(tmp_path / "a.mp4", "--seed", 3).read_bytes()

    press(browser, "How it came about")
    browser.switch_to.frame(soon(lambda: find(browser, "iframe"))[0])
    soon(lambda: browser.execute_script("return 'ready' in document.body.dataset"))
    click(browser, find(browser, "#clips canvas")[0], 0.9, 0.1)
    assert find(browser, "#said")[0].text.startswith("Row 1 of 4, column 4 of 4.")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    browser.switch_to.default_content()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    unnamed = browser.execute_script("""return [...document.querySelectorAll(
        'input:not([type=file]), textarea')].filter(e => !(e.getAttribute('aria-label') ||
        e.labels && e.labels.length)).map(e => e.outerHTML)""")
    assert unnamed == []
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_what_cannot_be_cloned_is_refused_as_by_the_command(server, browser, tmp_path):
    address, folder = server
    (tmp_path / "text.mp4").write_text("no film")
    write_video(tmp_path / "long.mp4", torch.zeros(22, 3, 32, 32), fps=1)
    for name, line in (("text.mp4", "error: text.mp4: cannot be decoded from its start"),
                       ("long.mp4", "error: long.mp4: is longer than 20 s; cut a part out of it")):
        enter(browser, address, tmp_path / name)
        soon(lambda: any(said.startswith(line) for said in refusals(browser)))
    browser.get(address)
    press(browser, "Clone the motion")
    soon(lambda: "error: there is no clip yet; upload or record one" in refusals(browser))


def test_visitors_wait_in_turn_and_who_leaves_leaves_nothing(server, browser):
    address, folder = server
    browser.get("about:blank")
    soon(lambda: kept(folder) == [])
    enter(browser, address, REF)
    first = browser.current_window_handle
    press(browser, "Clone the motion")
    at_work = soon(lambda: list(folder.glob("*/tmp*")))
    browser.switch_to.new_window("tab")
    enter(browser, address, REF)
    press(browser, "Clone the motion")
    soon(lambda: any("queue: 1/1" in one.text
                     for one in find(browser, "[data-testid=status-tracker]")))
    assert list(folder.glob("*/tmp*")) == at_work
    second = browser.current_window_handle
    browser.switch_to.window(first)
    browser.close()
    browser.switch_to.window(second)
    assert made(browser)
    assert not at_work[0].exists()
    assert kept(folder) == sorted([Path(REF).name, "clone.mp4", "clone.mp4.json", "index.html",
                                   "clone-compare.mp4", ".motionclone"])
    browser.get("about:blank")
    soon(lambda: kept(folder) == [])


def test_without_gradio_one_line_says_what_to_install():
    code = f"import sys, runpy; sys.modules['gradio'] = None; runpy.run_path({str(DEMO)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr == (
        "error: this page needs gradio: pip install -e '.[demo]'\n")


def test_wrong_options_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for argv, line in ((["--steps", "0"], "error: --steps 0 is not possible"),
                           (["--colour"], "error: unrecognized arguments: --colour"),
                           (["--port", "x"], "error: argument --port: invalid int value: 'x'"),
                           (["--port", str(port)], f"error: --host 127.0.0.1, --port {port}: ")):
            assert exit_code_of(lambda: demo.serve(argv)) == 2
            assert capsys.readouterr().err.splitlines()[-1].startswith(line)
