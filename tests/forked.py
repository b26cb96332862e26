"""Functions run in processes of their own, forked from one that has imported everything: no seconds of imports.

Such a process can be killed, may share gloo with others, and leaves pytest's own process as it was.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.source_tree import ROOT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["__main__", "tests.preloaded"])


@contextmanager
def _path_of_the_server():
    """The server finds the repository by the environment: it does not inherit `sys.path`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start(log: Path, function: Callable[..., Any], *args: Any, environ: dict[str, str] | None = None, **kwargs: Any):
    """Start a function in a process of its own; what it prints goes to a file."""
    process = _context.Process(target=_call, args=(str(log), environ or {}, function, args, kwargs))
    with _path_of_the_server():
        process.start()
    return process


def wait(process: ForkServerProcess, log: Path, *, timeout: float = 240.0) -> int:
    """Exit code of a process, negative where a signal ended it."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"no end after {timeout} s:\n{log.read_text()[-3000:]}")
    return process.exitcode


def finish(process: ForkServerProcess, log: Path) -> str:
    """Wait for an end without error; what was printed."""
    code = wait(process, log)
    assert code == 0, f"exit code {code}:\n{log.read_text()[-5000:]}"
    return log.read_text()


def run(log: Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Start and finish."""
    return finish(start(log, function, *args, **kwargs), log)


def run_group(folder: Path, function: Callable[..., Any], *args: Any, processes: int = 2, **kwargs: Any) -> list[str]:
    """Run a function in several processes that are connected as a launcher would connect them."""
    started = start_group(folder, function, *args, processes=processes, **kwargs)
    try:
        return [finish(process, log) for process, log in started]
    finally:
        for process, _ in started:
            process.kill()


def start_group(
    folder: Path, function: Callable[..., Any], *args: Any, processes: int = 2, **kwargs: Any
) -> list[tuple[ForkServerProcess, Path]]:
    """Start a function in connected processes, each with its own log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        log, environ = folder / f"log-{rank}.txt", shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append((start(log, function, *args, environ=environ, **kwargs), log))
    return started


def _call(log: str, environ: dict[str, str], function: Callable[..., Any], args: tuple, kwargs: dict) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environ)
    function(*args, **kwargs)
