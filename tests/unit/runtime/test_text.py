"""What names of files and lines look like in what we write and print."""

import csv
import io
import os
import re
import sys

import pytest

from mae.runtime.text import CLEAR_LINE, csv_row, escaped, printable, printable_output

NAMES = {  # as bytes on the disk, and as we write them
    b"plain.png": "plain.png",
    "Käse 写真\u202f3.png".encode(): "Käse 写真\u202f3.png",
    b"a\xff.png": r"a\xff.png",
    rb"a\xff.png": r"a\\xff.png",
    b"\x1b[2J\x07\r\n\t": r"\x1b[2J\x07\r\n\t",
    "\u00a0\u0085\u202e\u2028\ufeff".encode(): "\u00a0\\u0085\\u202e\\u2028\\ufeff",
    b"\xc2\x85\x85": r"\u0085\x85",
    "\U000e0001".encode(): r"\U000e0001",
    b"back\\": r"back\\",
}


def file_name(text: str) -> bytes:
    """The bytes of a name again, by the rule as docs/data.md states it."""

    def decode(match: re.Match[str]) -> str:
        word = match[0]
        if word[1] in "uU":
            return chr(int(word[2:], 16))
        code = int(word[2:], 16) if word[1] == "x" else ord({"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[word[1]])
        return chr(code) if code < 0x80 else chr(0xDC00 + code)

    return os.fsencode(re.sub(r"\\(x..|u.{4}|U.{8}|.)", decode, text))


def test_every_name_is_utf8_can_be_told_apart_and_comes_back() -> None:
    for name, text in NAMES.items():
        assert escaped(os.fsdecode(name)) == text
        assert text.encode().decode() == text
        assert file_name(text) == name
        assert printable(text) == text  # a terminal shows what the file holds
    assert len({escaped(os.fsdecode(name)) for name in NAMES}) == len(NAMES)


def test_nothing_that_is_printed_reaches_a_terminal_raw(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with printable_output():
        print("wrote \x1b]0;title\x07\udcff\tas\rb\nnext line")
        print("mae: note: \x9b31m", file=sys.stderr)
        print(CLEAR_LINE, end="")
        print("\r50 % of \x1b[31m", end="")
    out, err = capsys.readouterr()
    assert out == "wrote \\x1b]0;title\\x07\\xff\tas\\rb\nnext line\n" + CLEAR_LINE + "\r50 % of \\x1b[31m"
    assert err == "mae: note: \\u009b31m\n"

    latin = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", latin)
    with printable_output():
        print("wrote Käse")
    latin.seek(0)
    assert latin.read() == "wrote K\\xe4se\n"


def test_no_text_in_a_table_is_a_formula_and_no_number_is_changed() -> None:
    texts = {
        "=1+1": "'=1+1",
        "+cmd|' /C calc'!A0": "'+cmd|' /C calc'!A0",
        "@SUM(A1)": "'@SUM(A1)",
        "-2+3": "'-2+3",
        "＝1": "'＝1",
        "'=1": "''=1",  # not the same as the first
        "\t=1": "\\t=1",
        "\r=1": "\\r=1",
        "-inf": "'-inf",
        "cat": "cat",
        "-1": "-1",
        "+.5e-3": "+.5e-3",
    }
    assert csv_row([*texts, -0.5, 3]) == [*texts.values(), -0.5, 3]
    table = io.StringIO(newline="")
    csv.writer(table).writerow(csv_row(texts))
    (row,) = csv.reader(io.StringIO(table.getvalue()))
    assert [cell.removeprefix("'") if cell[0] == "'" else cell for cell in row] == list(map(printable, texts))
