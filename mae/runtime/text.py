"""Names in files that we write and in lines that we print: file names may hold any byte but NUL and the slash."""

import re
import sys
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

CLEAR_LINE = "\r\x1b[K"  # before a line that is drawn anew

DRAWING_THREAD = "wandb-recorder"  # W&B draws on the terminal by itself, and in this thread only

FORMULA = re.compile("['=+@＝＋－＠-]")  # at the start of a cell; the wide forms count in some programs

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)

JOINERS = "\u200c\u200d"  # zero-width: parts of words in Persian and Hindi, and of emoji


def printable(text: str) -> str:
    r"""Text with all escaped that a terminal would obey or that UTF-8 cannot hold; what is escaped already stays.

    Controls of ASCII become `\n`, `\x1b`, ...; bytes of a name that are not UTF-8 `\xff`; line separators, marks of
    direction and other unprintable characters `\u202e`. Spaces of all kinds stay.
    """
    return text if text.isprintable() else "".join(map(_escape, text))


def printable_lines(text: str) -> str:
    """As `printable`, for text of several lines, with tabs."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def escaped(name: str) -> str:
    r"""A name for a file that we write: `printable` with backslashes doubled, so that no two names look the same."""
    return printable(name.replace("\\", "\\\\"))


def csv_row(cells: Iterable[object]) -> list[object]:
    """A row for `csv.writer`: texts as `printable`, and none that a spreadsheet would take for a formula.

    A text that begins with = + - @ gets an apostrophe before it, by the advice of OWASP, and so does one that begins
    with an apostrophe: without the first one it is the text again. Numbers stay, as text, too.
    """
    return [_cell(cell) if isinstance(cell, str) else cell for cell in cells]


def _cell(text: str) -> str:
    text = printable(text)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def _escape(char: str) -> str:
    if char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs":
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return repr(char)[1:-1]
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class PrintableStream:
    """Standard output or error, on which names in the lines that are printed can neither do harm nor fail."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if text != CLEAR_LINE and threading.current_thread().name != DRAWING_THREAD:
            start = "\r" if text.startswith("\r") else ""  # bars draw over their line
            text = start + printable_lines(text.removeprefix(start))
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # a terminal that does not take UTF-8
            encoding = self.stream.encoding or "ascii"
            return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Escape what is printed inside, on standard output and error."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is not None and not isinstance(stream, PrintableStream):
                stack.enter_context(redirect(PrintableStream(stream)))  # type: ignore[type-var]
        yield
