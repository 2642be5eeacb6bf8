"""The command `mae` in a process of its own, forked from one that has imported torch and Lightning already.

A fresh interpreter takes some ten seconds of CPU time for its imports. A server process, one for each process of
pytest, imports them once and forks: the child gets its own arguments, environment, folder, output files and signal
handlers, so that exit codes, signals and what is printed are those of the real command. Processes that a run itself
starts, such as the second rank of two, are fresh interpreters as ever.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from mae.runtime.memory import status

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


@contextlib.contextmanager
def little_memory(mib: int) -> Iterator[None]:
    """So many MiB of address space beyond what this process takes now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + mib * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


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
