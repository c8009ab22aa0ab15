"""Text to token ids: the byte-level BPE of CLIP, as Stable Diffusion 1.5 reads its prompts.

The rule is that of OpenAI's CLIP (MIT; its merges file lies beside this one) with the standard
library alone: `_pieces` stands for a pattern of the `regex` package and `clean` for `ftfy`.
"""

import functools
import gzip
import html
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice, pairwise
from pathlib import Path

import torch

MAX_LENGTH = 77  # tokens in every encoded prompt, start and end included
START, END = 49406, 49407
MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")

_FIXED = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_RUN = re.compile("L+|N|X+")  # over the kinds of the characters, see `_kind`


class Tokenizer:
    """The 49,408 tokens of CLIP; making one reads the merges file (about 0.1 s).

    Raises ValueError, naming the file, where it is missing, damaged or another file.
    """

    def __init__(self) -> None:
        self._byte_ids, self._bytes, self._merges = _read_vocabulary(MERGES)
        self._cache: dict[str, tuple[int, ...]] = {
            "<|startoftext|>": (START,), "<|endoftext|>": (END,)}

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """One prompt, or b of them, as int64 (b, 77): each start, ids, end, padded with end.

        A prompt of more than 75 ids keeps its first 75 and the end; a warning shows the words that
        this drops or cuts. (OpenAI's `tokenize` pads with 0, Stable Diffusion 1.5 with the end.)
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), MAX_LENGTH), END)
        for row, text in zip(tokens, texts):
            pieces = self.split(text)
            ends = list(accumulate(len(ids) for _, ids in pieces))
            dropped = [word for (word, _), end in zip(pieces, ends) if end > MAX_LENGTH - 2]
            if dropped:
                warnings.warn(f"the prompt has {ends[-1]} tokens and {MAX_LENGTH - 2} are read; "
                              f"dropped: {' '.join(dropped)}", stacklevel=2)
            kept = [START, *(i for _, ids in pieces for i in ids)][:MAX_LENGTH - 1]
            row[:len(kept)] = torch.tensor(kept)
        return tokens

    def encode(self, text: str) -> list[int]:
        """The ids of a text, each 0 to 49407, without start and end and of any length."""
        return [i for _, ids in self.split(text) for i in ids]

    def split(self, text: str) -> list[tuple[str, list[int]]]:
        """The words, digits and signs of the cleaned text, in order, each with its ids.

        The first id of the first piece stands at position 1 of the encoded prompt.
        """
        return [(piece, list(self._encode_piece(piece))) for piece in _pieces(clean(text))]

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text of ids from 0 to 49407, with a space after each piece.

        Start, end and padding are left out; bytes that are not UTF-8 read U+FFFD. Raises
        ValueError for an id out of range.
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i <= END]:
            raise ValueError(f"token id {wrong[0]} is outside 0 to {END}")
        return b"".join(self._bytes[i] for i in ids if i < START).decode("utf-8", "replace").strip()

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        if piece not in self._cache:
            ids = [self._byte_ids[byte] for byte in piece.encode()]
            ids[-1] += 256  # the same byte at the end of a piece
            while pairs := [pair for pair in pairwise(ids) if pair in self._merges]:
                # Merges are numbered by rank, so the lowest id is the first to apply.
                new, best = min((self._merges[pair], pair) for pair in pairs)
                for at in range(len(ids)):
                    if tuple(ids[at:at + 2]) == best:
                        ids[at:at + 2] = [new]
            self._cache[piece] = tuple(ids)
        return self._cache[piece]


def clean(text: str) -> str:
    """A text as the vocabulary spells it: plain quotes and letters, NFC, single spaces, lower case.

    OpenAI: `ftfy.fix_text`, `html.unescape` twice, single spaces, lower case. Of ftfy this does
    what prompts need: curly quotes made straight, ligatures and full- or half-width forms made
    plain, control characters removed, surrogates paired or made U+FFFD. It differs in

    - text that looks wrongly decoded (mojibake, C1 controls), which ftfy repairs;
    - terminal escapes, of which only the escape character goes;
    - HTML entities: unescaped twice, before all else. ftfy knows more names in capitals, goes on
      while any is left, and leaves those without a semicolon or in a text with `<` to
      `html.unescape`, too late for its other rules;
    - U+FB05, here `st`, there U+017F and `t`;
    - characters newer than this Python's `unicodedata`, which count as signs.

    transformers' CLIPTokenizer 5 (before: CLIPTokenizerFast) only does NFC, single spaces and lower
    case. It differs in entities, curly quotes, ligatures, widths, control characters and
    surrogates; lowers a final capital sigma to U+03C3; finds `<|endoftext|>` in small letters only,
    but also right after a sign; takes U+017F after an apostrophe for no `s`; and keeps U+0345, lost
    here and in OpenAI's.
    Its slow class before 5 has ftfy's rules where ftfy is installed, without the final
    `html.unescape`, and else splits off each punctuation mark by itself.
    """
    text = html.unescape(html.unescape(text))
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = unicodedata.normalize("NFC", text.translate(_folds()))
    return " ".join(text.split()).lower()


@functools.cache
def _folds() -> dict[int, str]:
    removed = (*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF,
               *range(0xFFF9, 0xFFFD))
    ligatures = (0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4),
                 *range(0xFB00, 0xFB07))
    full_and_half_width = range(0xFF01, 0xFFF0)
    quotes = dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'")
    quotes |= dict.fromkeys(range(0x201C, 0x2020), '"')
    plain = {code: unicodedata.normalize("NFKC", chr(code)).translate(quotes)
             for code in (*ligatures, *full_and_half_width)}
    return plain | quotes | dict.fromkeys(removed, "")


def _pieces(text: str) -> list[str]:
    """The matches of OpenAI's pattern: special token, contraction, letters, one number, signs."""
    kinds = "".join(map(_kind, text))
    pieces, at = [], 0
    while at < len(text):
        match = _FIXED.match(text, at) or _RUN.match(kinds, at)
        if match:
            pieces.append(text[at:match.end()])
        at = match.end() if match else at + 1
    return pieces


def _kind(char: str) -> str:
    category = unicodedata.category(char)[0]
    if category in "LN":
        return category
    # As in `regex`, ignoring case: U+001C to U+001F are not white space, and U+0345, a mark whose
    # upper case is a letter, matches nothing.
    return " " if char == "\u0345" or char.isspace() and not "\x1c" <= char <= "\x1f" else "X"


def _read_vocabulary(path: Path) -> tuple[dict[int, int], list[bytes], dict[tuple[int, int], int]]:
    """The id of each byte, the bytes of each id below START, the id of each merged pair of ids."""
    symbols = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in symbols]
    symbols |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokens = [*symbols.values(), *(f"{symbol}</w>" for symbol in symbols.values())]
    ids = {token: i for i, token in enumerate(tokens)}
    table = [bytes([byte]) for byte in symbols] + [bytes([byte]) + b" " for byte in symbols]
    merges = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in islice(file, 1, 1 + START - 512):  # CLIP leaves the rest of the file unused
                first, second = line.split()
                left, right = ids[first], ids[second]
                merges[left, right] = ids[first + second] = len(table)
                table.append(table[left] + table[right])
        if len(ids) != START or (ids["in"], ids["jekyll</w>"]) != (512, START - 1):
            raise ValueError(f"{len(ids) + 2} tokens")
    except (OSError, EOFError, zlib.error, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not CLIP's merges file of 49,408 tokens ({error!r}): install "
                         f"mcl again, or `git checkout -- {path.name}` in its folder") from error
    return {byte: i for i, byte in enumerate(symbols)}, table, merges
