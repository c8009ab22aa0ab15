"""Test of the benchmark at full size, with a tenth of the channels."""
import re

from tests.benchmarks.full_size import main


def test_files_are_written_converted_and_cloned_with(tmp_path, capfd):
    assert main(["--folder", str(tmp_path / "files"), "--tiny"]) == 0
    output = capfd.readouterr()
    assert "1130 tensors used" in output.err and "264 of them changed by LoRAs" in output.err
    titles = re.findall(r"^(.*): \d+ s, \d\.\d\d GB$", output.out, re.MULTILINE)
    assert titles == ["convert", "24 frames in bfloat16"]
    assert main(["--folder", str(tmp_path / "files"), "--tiny"]) == 2       # may not be replaced
