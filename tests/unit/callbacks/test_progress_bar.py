"""The progress bar as a terminal shows it, and its lines in a log file."""

import logging
import os
import re
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import DIGITS, TINY
from lightning.pytorch import Callback, Trainer

from mae.callbacks.progress_bar import Progress
from mae.errors import Stopped
from mae.launch.stages import PretrainCLI

MESSAGES = ("a message", "begun and ended", "on standard error", "of a logger")


class Chatter(Callback):
    """Prints in all ways while the bar is drawn; at step 6 of 8 comes Ctrl-C, which a terminal echoes."""

    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == 3:
            print("a message")
            print("begun", end=" ")
            print("and ended")
            print("on standard error", file=sys.stderr)
            logging.getLogger("chatter").warning("of a logger")
        if trainer.global_step == 6:
            os.write(sys.stderr.fileno(), b"^C")
            os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Standard output and error are a terminal; what it gets is in the list when it is closed."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    got: list[bytes] = []

    def read() -> None:
        while True:
            try:
                got.append(os.read(master, 65536))
            except OSError:  # closed at the other end
                return

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, open(slave, "w") as file:
        patch.setattr(sys, "stdout", file)
        patch.setattr(sys, "stderr", file)
        handler = logging.StreamHandler(file)
        logging.getLogger("chatter").addHandler(handler)
        yield got
        logging.getLogger("chatter").removeHandler(handler)
    reader.join()
    os.close(master)


def screen(text: str, columns: int) -> list[str]:
    """The lines that a terminal shows in the end, of what is written to it."""
    rows: list[list[str]] = [[]]
    column = 0
    for part in re.findall(r"\x1b\[K|\x1b\[A|.|\n", text, re.DOTALL):
        if part == "\r":
            column = 0
        elif part == "\x1b[K":
            del rows[-1][column:]
        elif part == "\n" or column == columns:
            rows.append([])
        if part == "\n" or len(part) > 1 or part == "\r":
            continue
        column = 0 if column == columns else column
        rows[-1] += " " * (column + 1 - len(rows[-1]))
        rows[-1][column] = part
        column += 1
    return ["".join(row).rstrip() for row in rows]


@pytest.mark.parametrize(
    "columns", [pytest.param(40, marks=pytest.mark.slow), 80, pytest.param(120, marks=pytest.mark.slow)]
)
def test_messages_have_lines_of_their_own_and_nothing_is_cut(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*DIGITS, *TINY, "--data.batch_size_per_device=1000", "--trainer.max_steps=8", f"--run_dir={tmp_path}"]
    with terminal(columns, monkeypatch) as got:
        cli = PretrainCLI([*settings, "--trainer.log_every_n_steps=1"])
        cli.trainer.callbacks.append(Chatter())  # type: ignore[attr-defined]
        with pytest.raises(Stopped):
            cli.fit()
        assert sys.stdout is sys.stderr  # as before
    text = b"".join(got).decode()
    bars = [part for part in re.split(r"[\r\n]", text) if part.startswith("pretrain") and "|" in part]
    assert all(len(bar.replace("^C", "")) <= columns - 2 for bar in bars)
    assert all(re.search(r"\| \d/8( \| .*)?$", bar.rstrip().replace("^C", "")) for bar in bars[1:])
    assert ("loss" in bars[-1], "held-out" in bars[-1], "images/s" in bars[-1], "lr" in bars[-1]) == (
        columns > 40, columns > 40, columns > 80, columns > 80
    )  # fmt: skip
    shown = screen(text.replace("\r\n", "\n\r"), columns)
    for message in MESSAGES:
        assert message in shown
    assert any(line.startswith("stopped at step ") for line in shown)
    assert sum("|█" in line or ("| " in line and "/8" in line) for line in shown) == 1  # the last bar


def test_every_line_of_a_log_file_has_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "LINE_SECONDS", 0.0)
    settings = [*DIGITS, *TINY, "--data.batch_size_per_device=1000", "--trainer.max_steps=3", f"--run_dir={tmp_path}"]
    PretrainCLI(settings).fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [re.match(r"step (\d)/3 \| loss \d\.\d{4} \| \d\d:\d\d left", line)[1] for line in lines] == ["1", "2", "3"]  # type: ignore[index]
