"""Downloads, from a local server that speaks the protocol of the Hugging Face Hub."""
import errno
import hashlib
import http.server
import os
import re
import shutil
import signal
import sys
import threading

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file

from mcl.checkpoints.detect import LORAS, OPTIONS
from mcl.cli.convert import parse_args
from mcl.cli.hub import read_presets
from tests.cli.conftest import ROOT
from tests.foreign import convert, ldm, mini_weights, motion, save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5/v1-5-pruned-emaonly.safetensors"
MODULE, ADAPTER = "guoyww/animatediff/v3_sd15_mm.ckpt", "guoyww/animatediff/v3_sd15_adapter.ckpt"
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.{}to_q{}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers HEAD and GET of /OWNER/REPO/resolve/REVISION/FILE, with the server's faults."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        hub, (repository, _, rest) = self.server, self.path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        content, first = hub.files.get(f"{repository}/{file}"), self.headers.get("Range")
        if rest:                            # not a question about something else than files
            hub.requests.append((self.command, f"{repository}/{file}", first))
        status, code = hub.error or (
            (404, "RevisionNotFound") if revision not in ("main", "v1", COMMIT) else
            (404, "EntryNotFound") if content is None else (206 if first else 200, ""))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            status, code = 401, "GatedRepo"
        first = int(re.match(r"bytes=(\d+)-", first)[1]) if first else 0
        body = (content or b"")[first:] if status < 300 else b""
        digest = hub.hash(content or b"").hexdigest()
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Repo-Commit": COMMIT, "ETag": f'"{digest}"',
                            "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(content or b""),
                            "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        return body

    def do_GET(self):
        hub, body = self.server, self.do_HEAD()
        if hub.damage:
            body = body[:-1] + bytes([body[-1] ^ 1])
        is_cut = bool(body and hub.cuts)
        self.wfile.write(body[:len(body) // 2 if is_cut else None])
        self.wfile.flush()
        if is_cut:
            hub.cuts -= 1
            hub.proceed.wait()
            self.close_connection = True


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a small random Stable Diffusion under the names of the preset sd15-v3, as bytes."""
    folder = tmp_path_factory.mktemp("hub")
    processor = LAYER.format("processor.", "_lora.{}.weight")
    contents = {BASE: ldm(), MODULE: motion("v3"), ADAPTER: {
        processor.format("down"): torch.ones(1, 64), processor.format("up"): torch.ones(64, 1)}}
    return {name: save(folder / name.replace("/", "-"), state).read_bytes()
            for name, state in contents.items()}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """Return a running server, to which huggingface_hub connects, with an empty cache."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.error, server.token = dict(files), [], None, None
        server.cuts, server.damage, server.proceed = 0, False, threading.Event()
        server.hash = hashlib.sha256        # git's own files, which are small, have another
        server.proceed.set()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        server.home = tmp_path / "home"
        for name, value in {
                "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE":
                server.url + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_CACHE": server.home / "hub", "HF_TOKEN_PATH": server.home / "token",
                "AGENT_HARNESSES_PATH": server.home / "agents"}.items():
            monkeypatch.setattr(constants, name, str(value), raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.proceed.set()
        server.shutdown()
        thread.join()


def blobs(hub):
    """Return the files in the cache, other than locks and notes."""
    return sorted(path.name for path in hub.home.glob("hub/models--*/blobs/*"))


def digest(content):
    return hashlib.sha256(content).hexdigest()


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_a_preset_is_downloaded_once_and_converted(hub, files, tmp_path, capsys):
    out = tmp_path / "sd15.safetensors"
    names = (f"hf:{name}" for name in files)
    for downloads, argv in ((3, ("--preset", "sd15-v3", "--dtype", "fp32", "--out", out)),
                            (0, ("--check", *names))):
        assert convert(*argv) == 0
        assert sum(method == "GET" for method, *_ in hub.requests) == downloads
        total = sum(map(len, files.values())) / 1e9
        assert (f"downloading {total:.2f} GB" in capsys.readouterr().err) == bool(downloads)
        hub.requests.clear()
    assert blobs(hub) == sorted(map(digest, files.values()))
    weights, name = load_file(out), f"unet.{LAYER.format('', '.weight')}"
    assert torch.equal(weights[name], mini_weights()[name] + 1)         # the adapter is merged
    name = "unet.conv_in.weight"
    assert torch.equal(weights[name], mini_weights()[name])


def test_all_names_are_looked_up_before_the_first_download(hub, tmp_path, capsys):
    del hub.files[ADAPTER]
    assert convert("--preset", "sd15-v3", "--out", tmp_path / "a.safetensors") == 2
    assert last_line(capsys) == (f"error: hf:{ADAPTER}: no such file or revision in this "
                                 "repository. Check the name")
    assert {method for method, *_ in hub.requests} == {"HEAD"} and not blobs(hub)


def test_a_preset_takes_more_options_but_none_twice(hub, tmp_path, capsys):
    args = parse_args(["--preset", "animatelcm", "--lora", "a.safetensors:0.5", "--vae", "b.ckpt"])
    assert [scale for _, scale in vars(args)["--lora"]] == [0.5, 0.8]
    assert vars(args)["--vae"].name == "b.ckpt" and vars(args)["--base"].as_posix()[:3] == "hf:"
    assert convert("--preset", "sd15-v3", "--base", "a.ckpt", "--out", tmp_path / "a") == 2
    assert "--base is given twice" in last_line(capsys)


def test_the_list_names_every_preset_with_options_and_sizes(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(["--list"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    names = re.findall(r"^(\S+): ", text, re.MULTILINE)
    assert names == list(read_presets()) == [
        "sd15-v3", "sd15-v2", "realistic-vision-v3", "sd15-v3-sparsectrl-rgb",
        "sd15-v3-sparsectrl-scribble", "lightning-4", "animatelcm"]
    sizes = {}
    for name, block in zip(names, text.split("\n\n"), strict=True):
        args = parse_args(["--preset", name])
        paths = [vars(args)[option] for option in OPTIONS.values() if vars(args)[option]] + [
            path for option in LORAS for path, _ in vars(args)[option]]
        lines = re.findall(r"^  (--\S+) (hf:\S+?)(?::[\d.]+)? \(([\d.]+) GB\)$", block, re.M)
        assert {file for _, file, _ in lines} == {path.as_posix() for path in paths}
        for _, file, size in lines:
            assert sizes.setdefault(file, size) == size
        download, space = map(float, re.search(r": ([\d.]+) GB .*, ([\d.]+) GB", block).groups())
        assert download == pytest.approx(sum(float(size) for *_, size in lines))
        model = 2.97 + 0.07 * ("v3" not in name) + ("sparsectrl" in name)       # as float16
        assert space == pytest.approx(download + model)


def test_a_revision_and_the_scale_of_a_lora_follow_the_name(hub, tmp_path):
    out = tmp_path / "a.safetensors"
    assert convert("--base", f"hf:{BASE}@v1", "--motion-module", f"hf:{MODULE}@{COMMIT}",
                   "--adapter", f"hf:{ADAPTER}:0.5", "--dtype", "fp32", "--out", out) == 0
    name = f"unet.{LAYER.format('', '.weight')}"
    assert torch.equal(load_file(out)[name], mini_weights()[name] + 0.5)


def test_check_describes_a_file_on_the_hub_and_goes_on_after_an_error(hub, capsys):
    assert convert("--check", "hf:a/b/c.ckpt", f"hf:{MODULE}") == 2
    output = capsys.readouterr().out
    assert "hf:a/b/c.ckpt: no such file" in output and "for --motion-module" in output


def test_a_download_that_is_cut_is_resumed(hub, files, monkeypatch, capsys):
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 10)
    hub.cuts = 2
    assert convert("--check", f"hf:{MODULE}") == 0
    starts = [first for method, _, first in hub.requests if method == "GET"]
    starts = [int(first.strip("bytes=-")) if first else 0 for first in starts]
    size = len(files[MODULE])           # each request gets half of the rest, in whole chunks
    assert starts == pytest.approx([0, size / 2, size * 3 / 4], abs=1 << 11)


def test_a_file_that_needs_a_token_is_downloaded_with_it(hub, monkeypatch, capsys):
    hub.token = "hf_secret"
    assert convert("--check", f"hf:{ADAPTER}") == 2
    assert "needs a token" in capsys.readouterr().out
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert convert("--check", f"hf:{ADAPTER}") == 0


@pytest.mark.parametrize("error, message", [
    ((401, "RepoNotFound"), "no such repository, or it needs a token. Check the name, or run "
                            "`hf auth login`"), ((401, ""), "needs a token"),
    ((403, "GatedRepo"), "not allowed. Accept the terms on its web page, and run `hf auth login`"),
    ((403, ""), "not allowed"),
    ((404, "RepoNotFound"), "no such file"), ((404, ""), "no such file"),
    ((418, ""), "cannot be downloaded (")])
def test_errors_of_the_hub_are_one_line(error, message, hub, tmp_path, capsys):
    hub.error = error
    assert convert("--base", f"hf:{BASE}", "--out", tmp_path / "a.safetensors") == 2
    line = last_line(capsys)
    assert line.startswith(f"error: hf:{BASE}: ") and message in line


@pytest.mark.parametrize("name, message", [
    ("hf:", "names no file"), ("hf:owner/repo", "names no file"), ("hf:owner/repo@v1", "names no"),
    ("hf:o/r/f@", "names no file. Write hf:OWNER/REPO/FILE[@REVISION]"),
    ("hf:o/r/f@v2", "no such file or revision"), ("hf:-o/r/f.ckpt", "cannot be downloaded"),
    ("hf:o/r/../../f.ckpt", "cannot be downloaded")])
def test_impossible_names_are_one_line(name, message, hub, tmp_path, capsys):
    assert convert("--base", name, "--out", tmp_path / "a.safetensors") == 2
    assert f"error: {name}: " in (line := last_line(capsys)) and message in line


def test_a_damaged_file_is_noticed_and_downloaded_again_after_it_is_deleted(hub, files, capsys):
    hub.damage = True
    for _ in range(2):                                  # the second run finds it in the cache
        assert convert("--check", f"hf:{MODULE}") == 2
        blob, = hub.home.glob("hub/models--*/blobs/*")
        assert capsys.readouterr().out == (f"{blob}: is damaged, because its SHA-256 is not its "
                                           "name. Delete this file, and run the command again\n")
    blob.unlink()
    hub.damage = False
    assert convert("--check", f"hf:{MODULE}") == 0 and blobs(hub) == [digest(files[MODULE])]


@pytest.mark.parametrize("kind", ["in git itself", "in a cache without links"])
def test_a_file_whose_cache_entry_has_no_sha256_is_taken(kind, hub, monkeypatch):
    if kind == "in git itself":
        hub.hash = hashlib.sha1
    else:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    assert convert("--check", f"hf:{MODULE}") == 0
    file, = hub.home.glob("hub/models--*/snapshots/*/*.ckpt")
    assert file.is_symlink() == (kind == "in git itself")


def test_a_full_disk_is_one_line(hub, monkeypatch, tmp_path, capsys):
    def write(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(file_download, "http_get", write)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    assert convert("--base", f"hf:{BASE}", "--out", tmp_path / "a.safetensors") == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert any(line.startswith("warning: Not enough free disk space") for line in warnings)
    assert re.search(r"cannot be downloaded \(.*No space left.*\)\. Check .* disk", error)
    assert not blobs(hub)


def test_offline_only_files_of_the_cache_are_found(hub, monkeypatch, capsys):
    assert convert("--check", f"hf:{MODULE}") == 0
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert convert("--check", f"hf:{MODULE}") == 0
    assert convert("--check", f"hf:{BASE}") == 2
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"hf:{BASE}: not in the cache, and the Hub is unreachable. Check the network and "
        "HF_HUB_OFFLINE")
    assert not hub.requests


def test_huggingface_hub_is_needed_only_for_names_on_the_hub(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    path = tmp_path / "mm.ckpt"
    path.write_bytes(files[MODULE])
    assert convert("--check", path) == 0
    assert convert("--check", "hf:o/r/f") == 2
    assert capsys.readouterr().out.splitlines()[-1] == (
        "hf:o/r/f: needs a package. Run pip install huggingface_hub")


def test_a_wrong_output_is_reported_before_anything_is_downloaded(hub, tmp_path):
    assert convert("--preset", "sd15-v3", "--out", tmp_path / "no" / "folder.safetensors") == 2
    assert not hub.requests


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_an_interrupted_download_ends_in_one_line_and_leaves_no_file(start, hub, tmp_path):
    hub.cuts = 1
    hub.proceed.clear()
    process = start(
        [ROOT / "convert_weights.py", "--preset", "sd15-v3", "--out", "a.safetensors"], tmp_path,
        HF_ENDPOINT=hub.url, HF_HUB_CACHE=f"{hub.home}/hub")
    while hub.cuts:
        os.kill(process.pid, 0)
        hub.proceed.wait(0.05)
    os.kill(process.pid, signal.SIGINT)
    *_, last = process.stderr.read().splitlines()
    assert process.wait() == 130 and last == "interrupted; no unfinished file is left"
    assert not blobs(hub) and list(tmp_path.iterdir()) == [hub.home]
