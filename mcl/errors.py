"""The two errors that the library raises on purpose, and the escaping of their messages."""
import unicodedata

# Unicode categories: controls, direction marks, surrogates, line and paragraph separators.
CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
MAX_MESSAGE = 2000                  # characters of one message; a longer one loses its middle


def escape_control_characters(text: str) -> str:
    """Return text of any origin as one line that is safe to print.

    Characters that would move the cursor, start a line or change the direction are escaped. Text
    of more than MAX_MESSAGE characters is cut.
    """
    if len(text) > MAX_MESSAGE:
        text = f"{text[:MAX_MESSAGE - 500]} ... {text[-500:]}"
    return "".join(c.encode("unicode_escape").decode()
                   if unicodedata.category(c) in CONTROL_CATEGORIES else c for c in text)


class InputError(ValueError):
    """Error in the user's input: a file, a name or a number.

    The message is one line that says what is wrong and what is possible. The command prints it
    without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        """Return the message with its control characters escaped."""
        return escape_control_characters(super().__str__())


class NumericalError(RuntimeError):
    """A result contains NaN or infinity.

    The message is one line that says where, and what may help. The command exits with code 1.
    """
