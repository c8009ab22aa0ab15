"""A page on which visitors clone motions: pip install -e '.[demo]', then python examples/demo.py

Each clip is made by sample.py in a process of its own, whose errors are the page's, and which ends
with its visitor or by a bad file, not the server. The price: the model is read anew each time.
"""
import html
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
try:
    import gradio as gr
except ImportError:
    sys.exit("error: this page needs gradio: pip install -e '.[demo]'")

from mcl.cli import OneLineErrorParser, exit_code_of, run_main, format_error
from mcl.cli.arguments import check, parse
from mcl.video.decode import iter_frames
from mcl.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
LONGEST, LARGEST, WAITING = 20, 50, 8   # seconds and megabytes of a clip; visitors in the queue
BAR = re.compile(r"(.+): +\d+%\|.*\| (\d+)/(\d+) ")


class Desk:
    """What is done for visitors, and by their sessions what is undone when their page is closed."""

    def __init__(self, folder: str, options: list[str]):
        self.folder, self.options = folder, options
        self.visits, self.held = dict[str | None, ExitStack](), Counter[str]()

    def leave(self, request: gr.Request) -> None:
        self.visits.pop(request.session_hash, ExitStack()).close()

    def hold(self, clip: str, visit: ExitStack) -> None:
        """Has an upload stay for this visit; gradio keeps it once for all who brought the same."""
        self.held[clip] += 1
        visit.callback(self.release, clip)

    def release(self, clip: str) -> None:
        self.held[clip] -= 1
        if not self.held[clip]:
            Path(clip).unlink(missing_ok=True)

    def look(self, clip: str | None, request: gr.Request) -> None:
        """Refuses a clip that is too long or cannot be read, before anybody waits for it."""
        try:
            if clip is None:
                raise InputError("there is no clip yet; upload or record one")
            self.hold(clip, self.visits.setdefault(request.session_hash, ExitStack()))
            if any(end > LONGEST for _, end, _ in iter_frames(Path(clip))):
                raise InputError(f"{clip}: is longer than {LONGEST} s; cut a part out of it")
        except InputError as error:
            raise gr.Error(shown(format_error(error)[1], clip), None, print_exception=False) from error

    def clone(self, clip: str, prompt: str, seed: int | None, request: gr.Request,
              progress: gr.Progress = gr.Progress()) -> tuple[str, str]:
        """The clone beside its reference, and the page of --maps, as HTML."""
        visit, said = self.visits.get(request.session_hash, ExitStack()), [""]
        before = visit.pop_all()        # which stays until there is something new
        visit.callback(before.close)
        self.hold(clip, visit)
        folder = visit.enter_context(tempfile.TemporaryDirectory(dir=self.folder))
        process = subprocess.Popen(
            [sys.executable, ROOT / "sample.py", *self.options, f"--ref={clip}", "--compare",
             f"--prompt={prompt}", f"--seed={seed or 0}", f"--out={folder}/clone.mp4",
             f"--maps={folder}/page"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace")
        visit.callback(process.wait)
        visit.callback(process.kill)    # first of all; what is unfinished lies in the folder
        if request.session_hash not in self.visits:             # whoever waited for it
            visit.close()
        with process:
            for line in map(str.strip, process.stderr or ()):   # each state of a bar is a line
                if bar := BAR.match(line):
                    progress((int(bar[2]), int(bar[3])), desc=bar[1], unit="steps")
                elif line:
                    said.append(shown(line, clip))
        if process.returncode:
            line = said[-1] if process.returncode > 0 else f"failed: signal {-process.returncode}"
            raise gr.Error(line, None, print_exception=False)
        before.close()
        base = f"gradio_api/file={folder}"
        return f"""<video src="{base}/clone-compare.mp4" style="width: 100%" controls autoplay loop
            muted playsinline aria-label="The reference, and beside it the clone"></video>
            <p>Left the reference, right its clone. Download <a href="{base}/clone.mp4" download>the
            clone</a>, <a href="{base}/clone-compare.mp4" download>both</a>, <a
            href="{base}/page/index.html" download>the page</a></p>{"<br>".join(said)}""", f"""
            <iframe src="{base}/page/index.html" title="What the method saw and did" loading="lazy"
            sandbox="allow-scripts" style="width: 100%; height: 90vh; border: 0"></iframe>"""


def shown(line: str, clip: str | None) -> str:
    """A line as HTML, without the folder of an upload, which tells its owner nothing."""
    return html.escape(line.replace(os.path.dirname(clip) + os.sep, "") if clip else line)


def laid_out(desk: Desk) -> gr.Blocks:
    with gr.Blocks(title="MotionClone", delete_cache=(3600, 86400)) as page:
        gr.Markdown("# The motion of your clip, in a new video")
        with gr.Tab("Clone"), gr.Row():
            with gr.Column(scale=2):
                clip = gr.Video(label=f"Clip, at most {LONGEST} s and {LARGEST} MB")
                prompt = gr.Textbox("a red star on a navy background", label="Prompt")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)
                go = gr.Button("Clone the motion", variant="primary")
            with gr.Column(scale=3):
                made = gr.HTML("<p>The clone comes here.</p>", min_height=240)
        with gr.Tab("How it came about"):
            explained = gr.HTML("<p>With the clone comes a page of what the method saw.</p>")
        page.unload(desk.leave)
        gr.on([clip.upload, clip.stop_recording], desk.look, clip, concurrency_limit=2)
        go.click(desk.look, clip, concurrency_limit=2).success(
            desk.clone, [clip, prompt, seed], [made, explained], show_progress_on=made)
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def serve(argv: list[str]) -> None:
    p = OneLineErrorParser(prog="examples/demo.py", allow_abbrev=False, epilog="All others are sample.py's.")
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    p.add_argument("--port", type=int, help="the first free one from 7860 on without it")
    p.add_argument("--share", action="store_true", help="at a public address of gradio's, too")
    args, options = p.parse_known_args(argv)
    # Two: of what is made the browser shows pages as well, of what is uploaded nothing but clips.
    with (tempfile.TemporaryDirectory(prefix="motionclone-") as made,
          tempfile.TemporaryDirectory(prefix="motionclone-") as uploads):
        check(parse([*options, "--prompt=", f"--ref={made}", f"--out={made}/clone.mp4"]))
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        gr.routes.DEFAULT_TEMP_DIR = uploads        # which was settled at the import
        desk = Desk(made, options)
        try:
            laid_out(desk).launch(
                server_name=args.host, server_port=args.port, share=args.share, show_error=True,
                max_file_size=f"{LARGEST}mb", allowed_paths=[made], footer_links=[],
                theme=gr.themes.Default(primary_hue="blue", font="system-ui"), run_history=False)
        except OSError as error:
            raise InputError(f"--host {args.host}, --port {args.port}: {error}") from error
        finally:
            for visit in list(desk.visits.values()):
                visit.close()


if __name__ == "__main__":
    run_main(lambda: exit_code_of(lambda: serve(sys.argv[1:])))
