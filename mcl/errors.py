"""The two ways in which a run is refused or given up."""


class InputError(ValueError):
    """What a person gave is wrong: a file, a name, a number.

    The message is one line that says what is wrong and what would be right. The command
    line prints it alone, without a traceback, and exits 2.
    """


class NumericalError(RuntimeError):
    """A run became non-finite, and its result would be meaningless.

    The message is one line that says where, and what may mend it. The command line exits 1.
    """
