"""Python commands that start at once: forked from a process that has imported what training imports.

Python with torch and the rest takes 10 s of CPU time to start. Multiprocessing's fork server does this once
in each test process that needs it; each command is a fork of it, and a process like any other: signals, exit
code, output, environment and what happens at its exit are its own. The hash seed is not: it is the server's.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

# All that a run imports, but for the modules that are commands; nothing that computes.
IMPORTS = [
    "matplotlib.backends.backend_agg",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "sklearn.datasets",
    "torch._dynamo",  # by optimizers
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "pixelgen.training.start",
]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(IMPORTS)


def allow_interrupts() -> None:
    """Lets this process and those that it starts be interrupted.

    In the background of a script SIGINT is ignored by inheritance: tests that interrupt would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Forked:
    """What ``subprocess.Popen([sys.executable, *arguments])`` is, of a command that starts at once.

    Args:
        arguments: ``-m MODULE``, ``-c CODE`` or a file, and its own arguments.
        environment: of the process.
        stderr: gets the errors.
        stdout: gets what is printed; None keeps it for ``lines``.
        own_group: of processes, with those that it starts.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        environment: Mapping[str, str] | None = None,
        stderr: IO[str],
        stdout: IO[str] | None = None,
        own_group: bool = False,
    ) -> None:
        self._stdout, printed = os.pipe() if stdout is None else (None, os.dup(stdout.fileno()))
        self._unread = b""
        environment = dict(os.environ if environment is None else environment)
        with Connection(printed) as out, Connection(os.dup(stderr.fileno())) as errors:
            run = (arguments, environment, os.getcwd(), own_group, out, errors)
            self._process = _server.Process(target=_run, args=run)
            self._process.start()
        self.pid: int = self._process.pid

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
            if not select.select([self._stdout], [], [], end and max(0.0, end - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired("a forked command", timeout or 0)
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
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, as from ``poll``.

        Raises:
            TimeoutExpired: it still runs after so many seconds.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # its end is not told yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    own_group: bool,
    stdout: Connection,
    stderr: Connection,
) -> None:
    """What ``python ARGUMENTS`` does, in the fork."""
    gc.freeze()  # a collection would write to all pages, which the forks share
    if own_group:
        os.setsid()
    for stream, number in ((stdout, 1), (stderr, 2)):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = arguments
    try:
        if kind == "-m":
            sys.argv, sys.path[0] = rest, folder
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = arguments, str(Path(kind).parent)
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
