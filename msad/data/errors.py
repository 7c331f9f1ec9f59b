"""What the user gave and cannot be used: one line that names the file and the mend."""

import contextlib

# What values from a damaged or foreign file raise where they are used.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError)


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that names it and the mend."""


@contextlib.contextmanager
def input_errors(path, fault, mend="", errors=OSError):
    """A context in which `errors` become an InputError, "PATH: FAULT (the reason); MEND"."""
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{path}: {fault} ({reason})" + (f"; {mend}" if mend else "")) from None


def write_errors(path, mend="choose another place"):
    """The same for a file or folder that is to be written."""
    return input_errors(path, "cannot be written", mend)


def checkpoint_errors(path, fault="a damaged checkpoint"):
    """The same for values that were read from a checkpoint."""
    return input_errors(path, fault, errors=MALFORMED)
