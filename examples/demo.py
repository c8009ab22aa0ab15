"""A page on which visitors clone motions: pip install -e '.[demo]', then python examples/demo.py

Each clip is made by sample.py in a process of its own. So the page says what the command says, the
work for a visitor who leaves ends at once, and a file that brings a decoder down leaves the server
standing. The price is that the model is read anew for each clip. How the library is called inside
a program of one's own is in README.md.
"""
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import quote

import gradio as gr

from mcl.command import Parser, answer, carry_out, explain
from mcl.command.options import check, parse
from mcl.decode import pictures
from mcl.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
LONGEST, LARGEST = 20, 50               # seconds and megabytes of a clip
WAITING = 8                             # visitors, beside the one who is served
PATIENCE = 10                           # seconds for a command to end in order
BAR = re.compile(r"(.+): +\d+%\|.*\| (\d+)/(\d+) ")


class Visit:
    """An open page: the clips that it brought, the command that runs for it, and what was made."""

    def __init__(self, folder: Path):
        self.folder, self.over, self.brought = folder, False, set[Path]()
        self.process: subprocess.Popen[str] | None = None

    def run(self, options: list[str]) -> subprocess.Popen[str]:
        self.process = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *options],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        text=True, errors="replace")
        if self.over:                   # since a moment ago
            self.process.terminate()
        return self.process

    def end(self) -> None:
        self.over = True
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:       # in one long operation of torch
                self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Desk:
    """All visits by their sessions, and what is done for them."""

    def __init__(self, folder: Path, options: list[str]):
        self.folder, self.options, self.visits = folder, options, dict[str | None, Visit]()

    def enter(self, request: gr.Request) -> None:
        self.visits[request.session_hash] = Visit(Path(tempfile.mkdtemp(dir=self.folder)))

    def leave(self, request: gr.Request) -> None:
        visit = self.visits.pop(request.session_hash)
        visit.end()
        # What two visitors brought alike is one file.
        for path in visit.brought.difference(*(other.brought for other in self.visits.values())):
            path.unlink(missing_ok=True)

    def look(self, clip: str | None, request: gr.Request) -> None:
        """Refuses a clip that is too long or cannot be read, before anybody waits for it."""
        try:
            if request.session_hash not in self.visits:
                raise InputError("the server was started anew; load this page again")
            if clip is None:
                raise InputError("there is no clip yet; upload or record one")
            self.visits[request.session_hash].brought.add(Path(clip))
            if any(end > LONGEST for _, end, _ in pictures(Path(clip))):
                raise InputError(f"{clip}: is longer than {LONGEST} s; cut a part out of it")
        except InputError as error:
            raise refusal(explain(error)[1], clip) from error

    def clone(self, clip: str, prompt: str, seed: int | None, request: gr.Request,
              progress: gr.Progress = gr.Progress()) -> tuple[str, str]:
        """The clone beside its reference, and the page of --maps, as HTML."""
        visit, said = self.visits[request.session_hash], [""]
        folder = Path(tempfile.mkdtemp(dir=visit.folder))
        progress(0, desc="reading")
        with visit.run([*self.options, f"--ref={clip}", f"--prompt={prompt}", f"--seed={seed or 0}",
                        f"--out={folder / 'clone.mp4'}", "--compare",
                        f"--maps={folder / 'page'}"]) as process:
            for line in map(str.strip, process.stderr or ()):   # each state of a bar is a line
                if bar := BAR.match(line):
                    progress((int(bar[2]), int(bar[3])), desc=bar[1], unit="steps")
                elif line:
                    said.append(line)
        if process.returncode:
            raise refusal(said[-1], clip)
        for old in set(visit.folder.iterdir()) - {folder}:
            shutil.rmtree(old)
        one, both, page = (f"gradio_api/file={quote(str(folder / name))}" for name in (
            "clone.mp4", "clone-compare.mp4", "page/index.html"))
        notes = "".join(f"<p>{tidy(line, clip)}</p>" for line in said[1:])
        return f"""<video src="{both}" controls autoplay loop muted playsinline style="width: 100%"
            aria-label="The reference, and beside it the clone"></video>
            <p>Left the reference, right its clone. Download <a href="{one}" download>the clone</a>,
            <a href="{both}" download>both</a>, <a href="{page}" download>the page</a>.</p>{notes}
            """, f"""<iframe src="{page}" title="What the method saw and did" loading="lazy"
            sandbox="allow-scripts" style="width: 100%; height: 90vh; border: 0"></iframe>"""


def tidy(line: str, clip: str | None) -> str:
    """A line as HTML, without the folder of an upload, which tells its owner nothing."""
    return html.escape(line.replace(f"{Path(clip).parent}{os.sep}" if clip else "\0", ""))


def refusal(line: str, clip: str | None) -> gr.Error:
    return gr.Error(tidy(line, clip), duration=None, print_exception=False)


def laid_out(desk: Desk) -> gr.Blocks:
    with gr.Blocks(title="MotionClone", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# The motion of your clip, in a new video\nBring a clip of at most "
                    f"{LONGEST} s and {LARGEST} MB, and say what the new video shows.")
        with gr.Tab("Clone"), gr.Row():
            with gr.Column():
                clip = gr.Video(label="Clip whose motion is cloned", sources=["upload", "webcam"])
                prompt = gr.Textbox("a red star on a navy background", label="Prompt", max_length=500)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)
                go = gr.Button("Clone the motion", variant="primary")
            made = gr.HTML("<p>The clone comes here.</p>", min_height=240)
        with gr.Tab("How it came about"):
            explained = gr.HTML("<p>With the clone comes a page of what the method saw.</p>")
        page.load(desk.enter, queue=False, api_visibility="private")
        page.unload(desk.leave)
        clip.input(desk.look, clip, queue=False, api_visibility="private")
        go.click(desk.look, clip, queue=False, api_visibility="private").success(
            desk.clone, [clip, prompt, seed], [made, explained], show_progress_on=made,
            api_visibility="private")
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def serve(argv: list[str]) -> None:
    p = Parser(prog="examples/demo.py", description="A page on which visitors clone motions.",
               epilog="All other options are sample.py's, as --weights, --device and --steps.",
               allow_abbrev=False)
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    p.add_argument("--port", type=int, help="the first free one from 7860 on without it")
    p.add_argument("--share", action="store_true", help="at a public address of gradio's, too")
    args, options = p.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="motionclone-") as name:
        # Apart from the uploads: of what is made, pages too are shown by the browser.
        made, cache = Path(name, "made"), Path(name, "cache")
        made.mkdir()
        check(parse([*options, f"--ref={ROOT / 'examples' / 'zigzag.mp4'}", "--prompt=",
                     f"--out={made / 'clone.mp4'}"]))
        os.environ |= {"GRADIO_TEMP_DIR": str(cache), "GRADIO_ANALYTICS_ENABLED": "False"}
        gr.routes.DEFAULT_TEMP_DIR = str(cache)     # which was settled at the import
        desk = Desk(made, options)
        page = laid_out(desk)
        try:
            page.launch(server_name=args.host, server_port=args.port, share=args.share,
                        max_file_size=f"{LARGEST}mb", allowed_paths=[str(made)],
                        theme=gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace"),
                        prevent_thread_lock=True, footer_links=[], run_history=False,
                        ssr_mode=False)
            threading.Event().wait()
        except OSError as error:
            raise InputError(f"--host {args.host}, --port {args.port}: {error}") from error
        finally:
            page.close()
            for visit in desk.visits.values():
                visit.end()


if __name__ == "__main__":
    carry_out(lambda: answer(lambda: serve(sys.argv[1:])))
