"""Files named hf:OWNER/REPO/FILE[@REVISION], downloaded from the Hugging Face Hub.

The package huggingface_hub keeps them in its cache. Its variables HF_HOME, HF_TOKEN, HF_ENDPOINT
and HF_HUB_OFFLINE apply. It is imported when such a name is first used.
"""
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..ownership import sha256_of

NAME = re.compile(r"hf:([^/@]+/[^/@]+)/([^@]+)(?:@(.+))?")
# By the HTTP status of an error; 0 if the Hub did not answer.
ADVICE = {401: "no such repository, or it needs a token. Check the name, or run `hf auth login`",
          403: "not allowed. Accept the terms on its web page, and run `hf auth login`",
          404: "no such file or revision in this repository. Check the name",
          0: "not in the cache, and the Hub is unreachable. Check the network and HF_HUB_OFFLINE"}


def read_presets() -> dict[str, str]:
    """Return the lines of each preset in hub_presets.txt, by name: its files, options and sizes."""
    text = Path(__file__).with_name("hub_presets.txt").read_text("utf-8")
    return {block.partition(":")[0]: block for block in text.split("\n\n")}


def fetch(paths: Iterable[Path]) -> dict[Path, Path]:
    """Return the file of each path. Names that begin with hf: are downloaded, if not in the cache.

    All names are looked up before the first download, and the total size is printed.

    Raises:
        InputError: If a file cannot be downloaded, or is damaged.
    """
    files = {path: path for path in paths}
    infos = {p: call_hub(p, dry_run=True) for p in files if p.as_posix().startswith("hf:")}
    if size := sum(info.file_size or 0 for info in infos.values() if info.will_download):
        print(f"downloading {size / 1e9:.2f} GB from the Hugging Face Hub", file=sys.stderr)
    for name in infos:
        files[name] = file = Path(call_hub(name))
        # The link in the cache points to a file that is named by its SHA-256. Without links (on
        # Windows), huggingface_hub's own check of the size is the only one.
        digest = file.readlink().name if file.is_symlink() else ""
        if len(digest) == 64 and sha256_of(file) != digest:
            raise InputError(f"{file.resolve()}: is damaged, because its SHA-256 is not its name. "
                             "Delete this file, and run the command again")
    return files


def call_hub(name: Path, **options: Any) -> Any:
    """Return the result of huggingface_hub's hf_hub_download for a file.

    Raises:
        InputError: If the name is incomplete, and for any error of huggingface_hub.
    """
    if not (match := NAME.fullmatch(name.as_posix())):
        raise InputError(f"{name}: names no file. Write hf:OWNER/REPO/FILE[@REVISION]")
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise InputError(f"{name}: needs a package. Run pip install huggingface_hub") from error
    try:
        return hf_hub_download(match[1], match[2], revision=match[3], **options)
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        # Every answer of the Hub that is an error is the cause of another error.
        status = getattr(getattr(error.__cause__, "response", None), "status_code",
                         0 if isinstance(error, FileNotFoundError) else -1)
        reason = f"cannot be downloaded ({' '.join(str(error).split())}). Check network and disk"
        raise InputError(f"{name}: {ADVICE.get(status, reason)}") from error
