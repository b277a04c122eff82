"""Terminal output: tables on stdout, progress on stderr, plain text in pipes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# rich assumes 80 columns when there is no terminal, and would cut the tables.
PIPE_WIDTH = 150


class UsageError(Exception):
    """A wrong argument or a missing package; printed without a traceback, exit code 2."""


def make_console(*, stderr: bool = False) -> Console:
    try:
        from rich.console import Console
    except ImportError as error:
        raise UsageError(
            "the command line needs the package rich, got none; run: pip install rich"
        ) from error
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Says on stderr what is going on: a spinner in a terminal, a line in a log."""
    console = make_console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(f"{text} ...", markup=False)
        yield


def require_writable(option: str, path: Path) -> None:
    """Complains before minutes of work, not after them."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{option}: expected a file in a writable directory, got {path}")
