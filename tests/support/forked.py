"""The command `mae` in a process of its own, forked from one that has imported torch and Lightning already.

A fresh interpreter takes some ten seconds of CPU time for its imports. A server process, one for each process of
pytest, imports them once and forks: the child gets its own arguments, environment, folder, output files and signal
handlers, so that exit codes, signals and what is printed are those of the real command. Where it starts the command
again, for the second rank of two or a stage of a report, that process is forked from it.
"""

import atexit
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

Result = TypeVar("Result")

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forked", *(f"mae.{name}" for name in ("launch.stages", "launch.demo"))])


@functools.cache
def start_server() -> None:
    """Its own environment must not depend on the test that happens to be the first."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def run_command(args: Sequence[str], environ: Mapping[str, str], folder: str, outputs: Sequence[str]) -> None:
    """In the child: become `python -m mae.cli ARGS`, and end as it would."""
    for descriptor, path in zip((1, 2), outputs, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    # This process was told to start its own by the server, too; a fresh interpreter starts them in the usual way.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    mock.patch.object(subprocess, "Popen", ForkingPopen).start()
    become(args, environ, folder)


def become(args: Sequence[str], environ: Mapping[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.path[:0] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    tempfile.tempdir = None
    torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", 1)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = find_spec("mae.cli")
    assert spec is not None
    assert spec.origin is not None
    sys.modules["__main__"].__spec__ = spec  # the way by which a run starts its other ranks
    sys.argv = [spec.origin, *args]

    from mae.cli import main

    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # a forked process ends without them


class ForkingPopen(subprocess.Popen[Any]):
    """Forks for `python -m mae.cli ARGS`, instead of starting an interpreter; all else is started as ever."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        command = [sys.executable, "-m", "mae.cli"]
        if list(args[:3]) != command:
            super()._execute_child(args, *more)  # type: ignore[misc]
            return
        preexec, folder, environ, pipes, new_session = more[1], more[4], more[5], more[9:15], more[20]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
            return
        code = 1
        try:
            # What a new program would not have: others' open files, their locks and pipes, and what waits for an end.
            for descriptor, pipe in zip((0, 1, 2), (pipes[0], pipes[3], pipes[5]), strict=True):
                if pipe != -1:
                    os.dup2(pipe, descriptor)
            os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 10_000 else 10_000)
            resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]
            multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
            multiprocessing.process._children.clear()  # type: ignore[attr-defined]
            atexit._clear()
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
                if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None):
                    signal.signal(number, signal.SIG_DFL)
            if new_session:
                os.setsid()
            if preexec:
                preexec()
            environ = dict(os.environ if environ is None else environ)
            rank_zero_only.rank = int(environ.get("LOCAL_RANK", 0))
            become(args[3:], environ, folder or os.getcwd())
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


class ForkedCommand:
    """A running command, with what the tests use of `subprocess.Popen`; its output goes to files in `folder`."""

    def __init__(self, args: Sequence[object], folder: Path, **environ: str):
        self.args = [str(arg) for arg in args]
        self.outputs = [folder / name for name in ("stdout", "stderr")]
        for path in self.outputs:
            path.touch()
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
        outputs = [str(path) for path in self.outputs]
        start_server()
        self.process = CONTEXT.Process(target=run_command, args=(self.args, environ, os.getcwd(), outputs))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns what was printed to standard output and to standard error."""
        self.wait(timeout)
        stdout, stderr = (path.read_text() for path in self.outputs)
        return stdout, stderr


def in_process(function: Callable[..., Result], *args: Any, timeout: float = 200) -> Result:
    """What a function of a module returns in a process of its own."""
    start_server()
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(function, *args).result(timeout)


def run_forked(args: Sequence[object], timeout: float, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = ForkedCommand(args, Path(folder), **environ)
        try:
            stdout, stderr = command.communicate(timeout)
        finally:
            command.kill()
        assert command.returncode is not None
        return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)
