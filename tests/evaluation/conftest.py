"""A report that the tests of its data and of its page share."""
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mcl import Motion, clone, read_reference
from mcl.clone import subject_masks
from mcl.evaluation import html_report
from mcl.evaluation.html_report import write_html_report, write_page
from mcl.evaluation.report import METRICS, sample_unguided
from mcl.files import FOLDER_MARKER
from mcl.presets import build_config

REF = Path(__file__).parents[2] / "examples" / "figure_eight.mp4"
PROMPT = 'a star </script><script>document.title = "x"</script> <b>&amp;</b>'
QUICK = {"steps": 2, "guidance_steps": 1, "height": 64, "width": 64}
CLIP_NAME = "my_clip  \"it's\" <b>_x.mp4"
PATHS = {"reference": f"/home/user/{CLIP_NAME}", "weights": "user/m.safetensors",
         "loras": [("/home/user/l.safetensors", 0.5)], "images": [],
         "inputs": {f"/home/user/{CLIP_NAME}": "12", "/home/user/other/m.safetensors": "34"}}
MEASURED = {"clone": dict.fromkeys(METRICS, 0.9) | {"corrected fidelity": math.nan},
            "unguided": dict.fromkeys(METRICS, 0.125)}


def dense_map(motion, layer):
    """Return the map (h*w, heads, f, f) of a motion that holds all values."""
    return torch.zeros(motion.values[layer].shape).scatter(
        -1, motion.indices[layer], motion.values[layer])


def write_report(folder, model, prompt=PROMPT, source=REF, record=None, **settings):
    """Sample a clone and an unguided clip, and write their report into a folder."""
    config = build_config(model.config.sample, **QUICK | settings)
    reference = read_reference(model, source, config)
    clip = clone(reference, prompt, model=model, **QUICK | settings)
    latents = {"unguided": sample_unguided(model, prompt, config, 0),
               "clone": clip.latents}
    write_html_report(folder, model, prompt, config, reference, latents, clip.steps,
                      {"prompt": prompt, "fps": clip.fps, **(record or {})})
    return folder / "index.html", config, reference, clip


class Report(NamedTuple):
    """A written report and what it was made of."""

    page: Path
    views: list
    motion: Motion
    masks: tuple
    clip: object


@pytest.fixture(scope="session")
def report(tmp_path_factory, embedded):
    folder, calls = tmp_path_factory.mktemp("report"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_report, "write_page", lambda *a: (calls.append(a), write_page(*a)))
        page, config, reference, clip = write_report(
            folder / "maps", embedded, top_k=2, ref_prompt="a circle", subject=("circle", "star"),
            record=PATHS | {"report": MEASURED}, steps=4, guidance_steps=2)
    assert sorted(p.name for p in (folder / "maps").iterdir()) == [FOLDER_MARKER, "index.html"]
    _, views, motion, masks, *_ = calls[0]
    expected = subject_masks(embedded, PROMPT, reference, config).masks(config.extraction_timestep)
    assert motion is reference.motion and all(map(torch.equal, masks, expected))
    return Report(page, views, motion, masks, clip)
