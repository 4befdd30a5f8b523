"""What a command does with an error: one message on stderr, an exit code, and no traceback unless it is asked for."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import click

from halfbyte.errors import NO_TORCH, HalfbyteError, MissingExtraError

#: The answer is no: nothing can run, a check failed.
NO: Final = 1
#: Wrong usage or bad input.
BAD_INPUT: Final = 2
#: Ctrl-C, as shells report it.
INTERRUPTED: Final = 130


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """End the process with a message and an exit code if the block fails; flush what it printed."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (click.ClickException, click.exceptions.Exit):
        raise
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED, debug=debug)
    except BrokenPipeError:
        _close_stdout()  # somebody like `head` has read enough
        sys.exit(NO)
    except HalfbyteError as error:
        bad_input = isinstance(error, (ValueError, MissingExtraError))
        _end(str(error), BAD_INPUT if bad_input else NO, debug=debug)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            _end_unexpected(error, debug=debug)
        _end(NO_TORCH, BAD_INPUT, debug=debug)
    except Exception as error:  # the last resort
        _end_unexpected(error, debug=debug)


def _end_unexpected(error: Exception, *, debug: bool) -> NoReturn:
    if isinstance(error, OSError) and error.filename is None:
        _close_stdout()  # what cannot be written now cannot be flushed at the end either
    _end(f"unexpected {type(error).__name__}: {error}; --debug has the traceback", NO, debug=debug)


def _end(message: str, code: int, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    click.echo(f"halfbyte: {message}", err=True)
    sys.exit(code)


def _close_stdout() -> None:
    """Send what is still buffered nowhere: Python would fail to flush it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
