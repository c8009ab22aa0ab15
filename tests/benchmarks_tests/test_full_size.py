"""Test of the benchmark at full size, with a tenth of the channels."""
import re

from tests.benchmarks import full_size
from tests.foreign import listing


def narrower(name):
    """Return the listing of a file with a quarter of the VAE's channels."""
    sizes = {"128": "32", "256": "64", "512": "128"}
    return {key: "x".join(sizes.get(n, n) for n in shape.split("x"))
            for key, shape in listing(name).items()}


def test_files_are_written_converted_and_cloned_with(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(full_size, "listing", narrower)
    assert full_size.main(["--folder", str(tmp_path / "files"), "--tiny"]) == 0
    output = capfd.readouterr()
    assert "1130 tensors used" in output.err and "264 of them changed by LoRAs" in output.err
    titles = re.findall(r"^(.*): \d+ s, \d\.\d\d GB$", output.out, re.MULTILINE)
    assert titles == ["convert", "24 frames in bfloat16"]
    assert full_size.main(["--folder", str(tmp_path / "files"), "--tiny"]) == 2     # not replaced
