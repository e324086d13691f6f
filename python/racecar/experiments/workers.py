"""Runs jobs side by side, one process each, with one progress for all of them.

A step of a small network takes a millisecond and gains nothing from a second thread; a second process doubles the
speed. Jobs do not depend on each other, and what each leaves on the disk is all that comes back.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import multiprocessing

from .jobs import Job

POLL_S = 0.1
JOBS = ".jobs.pt"  # beside the runs, while they last

_JOBS: list[Job] = []
_NEWS: Any = None


class WorkerDiedError(RuntimeError):
    """A worker process was killed from outside."""


def run_jobs(
    jobs: list[Job],
    *,
    workers: int,
    threads: int,
    stage: Callable[[str], None],
    advance: Callable[[int], None],
) -> None:
    """Runs all jobs, in this process if one worker is enough.

    Args:
        jobs: what to run; of one place, which goes to every process once, in a file beside its runs.
        workers: processes at a time.
        threads: CPU threads of each.
        stage, advance: are told what begins, and steps done.

    Raises:
        OSError: the disk is full or gone.
        WorkerDiedError: a process was killed; what was finished stays on the disk.
        KeyboardInterrupt: Ctrl-C; likewise.
    """
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            job.run(stage, advance)
        return
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    path = jobs[0].place.runs / JOBS
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=begin_worker, initargs=(path, threads, news)
    )
    try:
        hand_over(jobs, path)
        with ignored_interrupts():  # a new process begins with what its parent does about the signal
            futures = [pool.submit(run_one, i) for i in range(len(jobs))]
        follow(futures, news, stage, advance)
    except BrokenProcessPool as error:
        raise WorkerDiedError("a worker process was killed, perhaps for want of memory") from error
    finally:
        # Not terminate(): Lightning answers SIGTERM itself, and a writer of logs may wait for a full disk for ever.
        # Whatever is written is replaced whole or not at all, so that a kill leaves nothing half done.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        news.close()
        path.unlink(missing_ok=True)


def hand_over(jobs: list[Job], path: Path) -> None:
    """Writes the jobs where workers find them.

    A file, which they map, since shared memory may be small: containers are given 64 MB of it, MNIST's training images
    alone take 188.
    """
    content = io.BytesIO()
    torch.save(jobs, content)  # to memory first: of a full disk torch says no more than that its writer failed
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content.getbuffer())


@contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Ctrl-C does nothing inside; outside the main thread, where no handler can be set, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def follow(
    futures: list[Future[None]], news: Any, stage: Callable[[str], None], advance: Callable[[int], None]
) -> None:
    """Passes the workers' news on until all jobs are done; raises what one of them raised."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
        while True:
            try:
                message = news.get_nowait()
            except Empty:
                break
            (stage if isinstance(message, str) else advance)(message)
        for future in done:
            future.result()


def begin_worker(jobs: Path, threads: int, news: Any) -> None:
    """First thing in a worker."""
    global _JOBS, _NEWS
    _JOBS, _NEWS = torch.load(jobs, mmap=True, weights_only=False), news
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process answers it
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends a worker whose parent was killed, lest it write into a folder that a resumed run works in."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_one(index: int) -> None:
    """One job in a worker. Steps are reported a few at a time: a message costs as much as a small step."""
    gathered = 0

    def advance(steps: int) -> None:
        nonlocal gathered
        gathered += steps
        if gathered >= 20:
            _NEWS.put(gathered)
            gathered = 0

    _JOBS[index].run(_NEWS.put, advance)
    _NEWS.put(gathered)
