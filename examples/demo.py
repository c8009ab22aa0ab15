"""Web page on which visitors clone motions: python examples/demo.py --set steps=50."""
import argparse
import ast
import base64
import html
import os
import signal
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

UPLOADS = tempfile.TemporaryDirectory(prefix="motionclone-")    # gradio asks for it when imported
os.environ |= {"GRADIO_TEMP_DIR": UPLOADS.name, "GRADIO_ANALYTICS_ENABLED": "False"}
try:
    import gradio as gr
except ImportError:
    sys.exit("error: this page needs gradio: pip install -e '.[demo]'")

import mcl
from mcl.evaluation.html_report import write_html_report
from mcl.evaluation.report import PREVIEW_STEPS, sample_unguided
from mcl.presets import build_config
from mcl.video.decode import iter_frames

MAX_SECONDS, MAX_MEGABYTES, MAX_WAITING = 20, 50, 8     # of a clip; visitors in the queue
RESULT = """<video src="{1}" style="width: 100%" controls autoplay loop muted playsinline
    aria-label="The reference, and beside it the clone"></video><p>Left: your clip. Right: its
    clone. Download <a href="{0}" download="clone.mp4">the clone</a> or <a href="{1}"
    download="compare.mp4">both</a>.</p><p>Words that the model was not trained on: {2}.</p>"""
REPORT = """<iframe srcdoc="{}" title="How the clone came about" sandbox="allow-scripts"
    style="width: 100%; height: 90vh; border: 0"></iframe>"""
uploads = defaultdict[str | None, set[str]](set)        # files of each visitor, by session


def leave(request: gr.Request) -> None:
    """Delete the uploads of a visitor, except those that another visitor uploaded as well."""
    for path in uploads.pop(request.session_hash, set()).difference(*uploads.values()):
        Path(path).unlink(missing_ok=True)


def check(path: str | None, request: gr.Request) -> None:
    """Refuse a clip that is too long or cannot be read, before the visitor waits for it."""
    try:
        if path is None:
            raise mcl.InputError("There is no clip yet. Upload or record one.")
        uploads[request.session_hash].add(path)
        if any(frame.end > MAX_SECONDS for frame in iter_frames(Path(path))):
            raise mcl.InputError(f"{path}: longer than {MAX_SECONDS} s. Cut a part out of it.")
    except mcl.InputError as error:
        raise refusal(error, path) from error


def refusal(error: mcl.InputError, path: str | None) -> gr.Error:
    """Return an error message for the visitor, without the folder of the uploaded file."""
    message = str(error).replace(os.path.join(os.path.dirname(path or ""), ""), "")
    return gr.Error(html.escape(message), duration=None, print_exception=False)


def make_page(model: mcl.Model, config: mcl.SampleConfig) -> gr.Blocks:
    """Return the page. One visitor is served at a time; the others wait in a queue."""
    def clone(path: str, prompt: str, seed: int | None, request: gr.Request,
              progress: gr.Progress = gr.Progress()) -> tuple[str, str]:    # noqa: B008
        def stop_if_left(_: mcl.SamplerStep) -> None:
            if request.session_hash not in uploads:
                raise mcl.InputError("The visitor left.")
        try:
            reference = mcl.read_reference(model, path, config, progress=progress.tqdm)
            clip = mcl.clone(reference, prompt, model=model, seed=seed or 0, callback=stop_if_left,
                             progress=progress.tqdm, **vars(config))
            return make_html(model, config, prompt, seed or 0, reference, clip)
        except mcl.InputError as error:
            raise refusal(error, path) from error
        except (mcl.NumericalError, MemoryError, torch.OutOfMemoryError) as error:
            raise gr.Error("The clone failed. Try again later, or with another clip.") from error

    with gr.Blocks(title="MotionClone", delete_cache=(3600, 86400)) as page:
        gr.Markdown("# The motion of your clip, in a new video")
        with gr.Tab("Clone"), gr.Row():
            with gr.Column():
                clip = gr.Video(label=f"Clip, at most {MAX_SECONDS} s and {MAX_MEGABYTES} MB")
                prompt = gr.Textbox("a red star on a navy background", label="Prompt")
                seed = gr.Number(0, label="Seed, 0 or more", precision=0)
                button = gr.Button("Clone the motion", variant="primary")
            result = gr.HTML("<p>The clone will appear here.</p>", min_height=240)
        with gr.Tab("How it came about"):
            report = gr.HTML("<p>A report on each clone will appear here.</p>")
        page.unload(leave)
        gr.on([clip.upload, clip.stop_recording], check, clip, concurrency_limit=2)
        button.click(check, clip, concurrency_limit=2).success(
            clone, [clip, prompt, seed], [result, report], show_progress_on=result)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def make_html(model: mcl.Model, config: mcl.SampleConfig, prompt: str, seed: int,
              reference: mcl.Reference, clip: mcl.Clip) -> tuple[str, str]:
    """Return the reference beside its clone, and the HTML report, with all data in them."""
    unguided = sample_unguided(model, prompt, config, seed, num_steps=PREVIEW_STEPS)
    record = {"prompt": prompt, "seed": seed, "fps": clip.fps, "settings": vars(config)}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "clone.mp4"), Path(folder, "pair.mp4")]
        pair = [frames for frames in (reference.frames, clip.frames) if frames is not None]
        for path, frames in zip(files, (clip.frames, torch.cat(pair, dim=-1)), strict=True):
            mcl.write_video(path, frames, clip.fps)
        write_html_report(Path(folder, "report"), model, prompt, config, reference,
                          {"unguided": unguided, "clone": clip.latents}, clip.steps, record)
        report = Path(folder, "report", "index.html").read_text("utf-8")
        urls = [f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
                for path in files]
    words = html.escape(", ".join(model.out_of_vocabulary(prompt)) or "none")
    return RESULT.format(*urls, words), REPORT.format(html.escape(report))


def parse_setting(text: str) -> tuple[str, Any]:
    """Return the name and the value of name=value; a value that is no Python literal is text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main() -> None:
    """Serve the page until the process is stopped."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    for name, default in ("host", "127.0.0.1"), ("weights", None), ("device", "auto"), (
            "dtype", "auto"):
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}")
    parser.add_argument("--port", type=int, help="default: the first free port from 7860 on")
    parser.add_argument("--share", action="store_true", help="serve at a public address, too")
    parser.add_argument("--set", type=parse_setting, action="append", default=[],
                        metavar="NAME=VALUE", help="a field of SampleConfig, such as steps=50")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # an exit deletes the uploads
    try:
        model = mcl.load_model(args.weights, args.device, args.dtype)
        config = build_config(model.config.sample, **dict(args.set))
        model.config.latent_shape(config)              # refuses an impossible size
        make_page(model, config).launch(
            server_name=args.host, server_port=args.port, share=args.share,
            max_file_size=f"{MAX_MEGABYTES}mb", footer_links=[])
    except (mcl.InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
