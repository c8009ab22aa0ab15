"""Web page on which visitors clone motions: python examples/demo.py --set steps=50."""
import argparse
import ast
import base64
import contextlib
import html
import os
import signal
import sys
import tempfile
from collections import defaultdict
from functools import partial
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
from mcl.evaluation import report
from mcl.evaluation.html_report import write_html_report
from mcl.presets import build_config
from mcl.video.decode import iter_frames
from mcl.video.read import MAX_STEP_RATIO

MAX_SECONDS, MAX_MEGABYTES, MAX_WAITING = 20, 50, 8     # of a clip; visitors in the queue
MAX_SEED = 2 ** 53 - 1                  # a browser rounds larger numbers
EXAMPLES = [(str(Path(__file__).resolve().with_name(name)), prompt) for name, prompt in (
    ("figure_eight.mp4", "a red star on a navy background"),
    ("zigzag.mp4", "a fox on a teal background"),
    ("camera_zoom.mp4", "a white heart on a checkered teal background"))]
WORDS = "<details><summary>The {} words that the model knows</summary>{}</details>"
RESULT = """<p><strong>{3}</strong></p><video src="{1}" style="width: 100%" controls autoplay loop
    muted playsinline aria-label="The reference, and beside it the clone"></video><p>Left: your
    clip. Right: its clone. Download <a href="{0}" download="clone.mp4">the clone</a> or <a
    href="{1}" download="compare.mp4">both</a>.</p>
    <p>Words that the model was not trained on: {2}.</p>"""
REPORT = """<iframe srcdoc="{}" title="How the clone came about" sandbox="allow-scripts"
    style="width: 100%; height: 90vh; border: 0"></iframe>"""
uploads = defaultdict[str | None, set[str]](set)        # files of each visitor, by session


def leave(request: gr.Request) -> None:
    """Delete the uploads of a visitor, except those that another visitor uploaded as well."""
    for path in uploads.pop(request.session_hash, set()).difference(*uploads.values()):
        Path(path).unlink(missing_ok=True)


def check(path: str | None, request: gr.Request, seed: Any = 0) -> None:
    """Refuse what cannot be cloned, before the visitor waits for it."""
    if path is not None:
        uploads[request.session_hash].add(path)
    measure(path)
    read_seed(seed)


def measure(path: str | None) -> tuple[int, float]:
    """Return the number of frames of a clip, and its length in seconds."""
    if path is None:
        raise refusal("There is no clip yet. Upload or record one.")
    ends, name = [0.0], Path(path).name
    with contextlib.suppress(mcl.InputError):       # its words are for the command line
        for frame in iter_frames(Path(path)):
            ends.append(frame.end)
            if frame.end > MAX_SECONDS:
                raise refusal(f"{name}: longer than {MAX_SECONDS} s. Cut a part out of it.")
        if len(ends) > 1:
            return len(ends) - 1, ends[-1]
    raise refusal(f"{name}: cannot be decoded. Upload another clip, such as an MP4 file.")


def read_seed(value: Any) -> int:
    """Return the seed of the form, which may send any value; an empty field means 0."""
    value = 0 if value is None else value
    if not isinstance(value, (int, float)) or value % 1 or not 0 <= value <= MAX_SEED:
        raise refusal(f"seed = {value!r:.20} is out of range: 0 to {MAX_SEED}, a whole number.")
    return int(value)


def refusal(message: str) -> gr.Error:
    """Return an error message for the visitor, which leaves no traceback on the server."""
    return gr.Error(html.escape(message), duration=None, print_exception=False)


def warn(model: mcl.Model, config: mcl.SampleConfig, path: str) -> None:
    """Warn the visitor of a clip that the model is unlikely to follow."""
    (count, seconds), limits = measure(path), model.config
    if seconds * limits.fps > MAX_STEP_RATIO * config.num_frames or count < config.num_frames:
        gr.Warning(f"The clip has {count} frames in {seconds:.1f} s, and the model looks at "
                   f"{config.num_frames}: {config.num_frames / limits.fps:.0f} s are best.")
    if limits.min_reference_motion:         # else the model has no limits
        z = model.vae.encode(mcl.read_video(path, config.num_frames, (config.height, config.width)))
        if report.motion_magnitude(z) < limits.min_reference_motion:
            gr.Warning("The clip hardly moves, so there is little motion to clone. Choose one in "
                       "which an object or the camera moves.", duration=None)
        elif report.denoising_error(model, z) > limits.max_denoising_error:
            gr.Warning("The model was not trained on clips like this one, so the clone will "
                       "probably not follow it. Try a part of it, or another.", duration=None)


def make_page(model: mcl.Model, config: mcl.SampleConfig) -> gr.Blocks:
    """Return the page. One visitor is served at a time; the others wait in a queue."""
    def clone(path: str, prompt: str, seed: Any, request: gr.Request,
              progress: gr.Progress = gr.Progress()) -> tuple[str, str]:    # noqa: B008
        def stop_if_left(_: mcl.SamplerStep) -> None:
            if request.session_hash not in uploads:
                raise mcl.InputError("The visitor left.")
        seed, _ = read_seed(seed), measure(path)        # a program may call this directly
        try:
            reference = mcl.read_reference(model, path, config, progress=progress.tqdm)
            clip = mcl.clone(reference, prompt, model=model, seed=seed, callback=stop_if_left,
                             progress=progress.tqdm, **vars(config))
            return make_html(model, config, prompt, seed, reference, clip)
        except (mcl.InputError, mcl.NumericalError, MemoryError, torch.OutOfMemoryError) as error:
            print(f"A clone failed: {error}", file=sys.stderr)     # words of the command line
            raise refusal("The clone failed. Try again, or another clip or prompt.") from error

    words = model.config.training_vocabulary
    with gr.Blocks(title="MotionClone", delete_cache=(3600, 86400)) as page:
        gr.Markdown("# The motion of your clip, in a new video")
        with gr.Tab("Clone"), gr.Row():
            with gr.Column():
                clip = gr.Video(label=f"Clip, at most {MAX_SECONDS} s and {MAX_MEGABYTES} MB")
                prompt = gr.Textbox("a red star on a navy background", label="Prompt")
                gr.HTML(WORDS.format(len(words), ", ".join(words)), visible=bool(words))
                seed = gr.Number(0, label="Seed, a whole number, 0 or more")
                button = gr.Button("Clone the motion", variant="primary")
                for example in EXAMPLES:
                    gr.Button(f"Example: {example[1]}", size="sm").click(
                        partial(tuple, example), None, [clip, prompt]).success(check, clip)
            result = gr.HTML("<p>The clone will appear here.</p>", min_height=240)
        with gr.Tab("How it came about"):
            explanation = gr.HTML("<p>A report on each clone will appear here.</p>")
        page.unload(leave)
        gr.on([clip.upload, clip.stop_recording], check, clip).success(
            partial(warn, model, config), clip, concurrency_id="model", show_progress="hidden")
        button.click(check, [clip, seed]).success(
            clone, [clip, prompt, seed], [result, explanation], show_progress_on=result,
            concurrency_id="model")
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def make_html(model: mcl.Model, config: mcl.SampleConfig, prompt: str, seed: int,
              reference: mcl.Reference, clip: mcl.Clip) -> tuple[str, str]:
    """Return the reference beside its clone, and the HTML report, with all data in them."""
    unguided = report.sample_unguided(model, prompt, config, seed)
    latents = {"unguided": unguided, "clone": clip.latents}
    metrics = report.measure_clips(model, reference.frames, latents)
    record = {"prompt": prompt, "seed": seed, "fps": clip.fps, "settings": vars(config),
              "report": metrics}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "clone.mp4"), Path(folder, "pair.mp4")]
        pair = torch.cat([reference.frames, clip.frames], dim=-1)
        for path, frames in zip(files, (clip.frames, pair), strict=True):
            mcl.write_video(path, frames, clip.fps)
        write_html_report(Path(folder, "report"), model, prompt, config, reference, latents,
                          clip.steps, record)
        page = Path(folder, "report", "index.html").read_text("utf-8")
        urls = [f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
                for path in files]
    words = html.escape(", ".join(model.out_of_vocabulary(prompt)) or "none")
    verdict = report.result_line(metrics)
    return RESULT.format(*urls, words, verdict), REPORT.format(html.escape(page))


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
            max_file_size=f"{MAX_MEGABYTES}mb", footer_links=[],
            allowed_paths=[path for path, _ in EXAMPLES])
    except (mcl.InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
