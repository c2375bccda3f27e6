"""Works on several files at once, each in a process of its own.

A worker takes one file after another. If it dies (killed, or out of memory), only its file fails,
and another worker takes its place. Only the parent heeds the signals of a terminal, such as Ctrl-C:
it ends its workers, which remove what they have begun. A worker whose parent died ends, too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from ..errors import CkptconvError
from ..libraries import quieten
from ..signals import ENDING, PATIENCE, blocked, ignore_signals, raise_signals
from .work import Outcome, Pair, Work, attempt

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as Connection
else:
    from multiprocessing.connection import Connection

FROM_TERMINAL = set(ENDING) - {signal.SIGTERM}
"""Signals that a terminal sends to every process: the parent alone heeds them."""


def each(
    work: Work, pairs: Sequence[Pair], processes: int, moved: Callable[[int, int, int], None]
) -> Generator[tuple[int, Outcome]]:
    """Yields the index and the outcome of each file as it ends.

    `moved` is called with the index of a file, its bytes that were moved so far, and all of them.
    """
    waiting = deque(enumerate(pairs))
    busy: dict[Connection, tuple[SpawnProcess, int]] = {}
    workers: list[SpawnProcess] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                connection, worker = _started(work)
                workers.append(worker)
                busy[connection] = worker, _hand_over(connection, waiting)
            ready = wait(list(busy))
            for connection in [one for one in busy if one in ready]:
                worker, index = busy[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    message = _dead(worker, pairs[index])
                if not isinstance(message, Outcome):
                    moved(index, *message)
                    continue
                if waiting and worker.is_alive():
                    busy[connection] = worker, _hand_over(connection, waiting)
                else:
                    del busy[connection]
                    connection.close()  # tells the worker to end
                yield index, message
    finally:
        for worker, _ in busy.values():
            worker.terminate()
        for worker in workers:
            worker.join(PATIENCE)
            worker.kill()


def _started(work: Work) -> tuple[Connection, SpawnProcess]:
    """Starts a worker that ignores the signals of a terminal from its first moment on."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs, work))
    if sys.platform != "win32":  # where there is none
        multiprocessing.resource_tracker.ensure_running()  # it would unblock the signal
    with blocked(FROM_TERMINAL):
        worker.start()
    theirs.close()
    return ours, worker


def _hand_over(connection: Connection, waiting: deque[tuple[int, Pair]]) -> int:
    """Sends the next file to a worker; returns the index of the file."""
    index, pair = waiting.popleft()
    with contextlib.suppress(OSError):  # if the worker is dead, `recv` will notice
        connection.send(pair)
    return index


def _dead(worker: SpawnProcess, pair: Pair) -> Outcome:
    worker.join(PATIENCE)
    code = worker.exitcode
    how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
    how += ", as when the memory is full" if how == "SIGKILL" else ""
    what = f"{pair.source}: the process that worked on it died: {how}"
    return Outcome(pair, error=CkptconvError(what, code="worker-lost"))


def _serve(connection: Connection, work: Work) -> None:
    """Runs in a worker: works on the files that it is sent, until the connection is closed."""
    ignore_signals(FROM_TERMINAL)
    raise_signals()
    quieten()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pair = connection.recv()
            outcome = attempt(work, pair, lambda done, total: connection.send((done, total)))
            connection.send(outcome)
