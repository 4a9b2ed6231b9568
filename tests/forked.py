"""Python commands that start at once: forked from a process that has imported what training imports.

Python with torch and the rest takes 10 s of CPU time to start. A server, ``python tests/forked.py``, does
this once; each command is a fork of it, and a process like any other: signals, exit code, output, environment
and what happens at its exit are its own. The hash seed is not: it is the server's in all of them.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


class Forked:
    """What ``subprocess.Popen([sys.executable, *arguments])`` is, of a command that starts at once.

    Args:
        arguments: ``-m MODULE``, ``-c CODE`` or a file, and its own arguments.
        environment: of the process; OMP_NUM_THREADS and GOMP_SPINCOUNT are 1 and 1000 all the same.
        stderr: gets the errors.
        stdout: gets what is printed; None keeps it for ``lines``.
        own_group: of processes, with those that it starts.
        takes_down: all modules at its exit, as Python does, which takes a second. Else it is gone once the
            functions of ``atexit`` have run.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        environment: Mapping[str, str] | None = None,
        stderr: IO[str],
        stdout: IO[str] | None = None,
        own_group: bool = False,
        takes_down: bool = False,
    ) -> None:
        environment = dict(os.environ if environment is None else environment)
        request = {"arguments": arguments, "environment": environment}
        request |= {"folder": os.getcwd(), "own_group": own_group, "takes_down": takes_down}
        self._status, status = os.pipe()
        self._stdout, printed = os.pipe() if stdout is None else (None, stdout.fileno())
        self._unread = b""
        self._returncode: int | None = None
        try:
            data = json.dumps(request).encode()
            socket.send_fds(_server(), [data], [printed, stderr.fileno(), status])
        finally:
            os.close(status)
            if stdout is None:
                os.close(printed)
        self.pid = self._read_status(None)

    def lines(self, timeout: float | None = None) -> Iterator[str]:
        """What it prints, as it prints it.

        Raises:
            TimeoutExpired: after so many seconds altogether.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                yield (line + newline).decode()
                continue
            if self._stdout is None:
                return
            _await(self._stdout, None if end is None else end - time.monotonic())
            read = os.read(self._stdout, 1 << 16)
            if not read:
                os.close(self._stdout)
                self._stdout, self._unread = None, b""
                if line:
                    yield line.decode()
                return
            self._unread += read

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if one ended it; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, as from ``poll``.

        Raises:
            TimeoutExpired: it still runs after so many seconds.
        """
        if self._returncode is None:
            self._returncode = os.waitstatus_to_exitcode(self._read_status(timeout))
            os.close(self._status)
        return self._returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # its end is not told yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read_status(self, timeout: float | None) -> int:
        _await(self._status, timeout)
        told = os.read(self._status, _STATUS_BYTES)
        if not told:
            raise RuntimeError("the server of tests/forked.py has ended; it told why on stderr")
        return int(told)


_STATUS_BYTES = 20  # of each number that the server tells: one read never gets two of them


def _await(descriptor: int, timeout: float | None) -> None:
    if not select.select([descriptor], [], [], None if timeout is None else max(0.0, timeout))[0]:
        raise subprocess.TimeoutExpired("a forked command", timeout or 0)


@functools.cache
def _server() -> socket.socket:
    """Starts the server; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(descriptor: int) -> dict[str, Any] | None:
    """Forks for every request. Returns in each of the forks, with the request, and at the end with None."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait for a command end unnoticed
    gc.freeze()  # a collection would write to all pages, which the forks share
    with socket.socket(fileno=descriptor) as requests:
        while True:
            data, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 3)
            if not data:
                return None
            if _fork() == 0:
                break
            for own in descriptors:
                os.close(own)
    # The one that waits: the server could not tell two ends apart without a loop around signals.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stdout, stderr, status = descriptors
    pid = _fork()
    if pid == 0:
        request = json.loads(data)
        if request["own_group"]:
            os.setsid()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.closerange(min(descriptors), max(descriptors) + 1)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return request
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.close(stdout)
    os.close(stderr)
    os.write(status, f"{pid:{_STATUS_BYTES}}".encode())
    os.write(status, f"{os.waitpid(pid, 0)[1]:{_STATUS_BYTES}}".encode())
    os._exit(0)


def _fork() -> int:
    with warnings.catch_warnings(action="ignore"):  # of a thread, which is pyarrow's allocator's
        return os.fork()


def _run(arguments: list[str]) -> None:
    """What ``python ARGUMENTS`` does."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


# All that a run imports, but for the modules that are commands; nothing that computes.
IMPORTS = (
    "matplotlib.backends.backend_agg",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "sklearn.datasets",
    "torch._dynamo",  # by optimizers
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "pixelgen.loop",
)


def _leave() -> None:
    """Is the first to be registered at exit, so the last to run."""
    if exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


if __name__ == "__main__":
    exit_code = None
    atexit.register(_leave)
    for name in IMPORTS:
        importlib.import_module(name)
    request = _serve(int(sys.argv[1]))
    if request is not None:
        code: object = None  # an exception that Python tells at its exit
        try:
            _run(request["arguments"])
            code = 0
        except SystemExit as error:
            code = error.code or 0
            raise
        finally:
            if not request["takes_down"] and isinstance(code, int):
                exit_code = code
