"""The two ways in which a run is refused or given up, and how foreign text is printed."""
import unicodedata


def escape_control_characters(text: str) -> str:
    """Text of a file or its name, for a terminal: nothing in it moves the cursor or starts a line.

    Control characters, marks of direction, line separators and halves of surrogates are escaped.
    """
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in UNPRINTABLE
                   else c for c in text)


UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


class InputError(ValueError):
    """What a person gave is wrong: a file, a name, a number.

    The message is one line that says what is wrong and what would be right. The command
    line prints it alone, without a traceback, and exits 2.
    """

    def __str__(self) -> str:
        return escape_control_characters(super().__str__())


class NumericalError(RuntimeError):
    """A run became non-finite, and its result would be meaningless.

    The message is one line that says where, and what may mend it. The command line exits 1.
    """
