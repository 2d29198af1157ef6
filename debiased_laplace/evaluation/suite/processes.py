"""Independent pieces of work in separate processes, a few at a time, with what they tell on the way.

The processes are forked from a server that has imported the suite and done nothing else: they start in no time, and
no thread, lock or accelerator of the caller is copied. Where a system cannot fork, each imports for itself. One that
is killed is noticed, and all end with the caller.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")
Tell = Callable[[str], None]


def available() -> int:
    """CPUs that this process may use, quotas of containers considered."""
    import joblib

    return int(joblib.cpu_count())


def prepare() -> None:
    """Start the server now, so that it imports while the caller does something else."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        multiprocessing.set_forkserver_preload(["debiased_laplace.evaluation.suite.preloaded"])
        forkserver.ensure_running()


def in_processes(
    work: Callable[[Item, Tell], Result],
    items: Sequence[Item],
    n_processes: int,
    told: Callable[[Item, str], None] = lambda item, step: None,
) -> list[Result]:
    """``[work(item, tell) for item in items]`` in several processes, each with one thread.

    Args:
        work: A function that can be pickled; it may call ``tell`` with a word about what begins.
        items: Its arguments, one process for each.
        n_processes: How many run at a time.
        told: Called here with the item and the word.

    Raises:
        Exception: The first that ``work`` raises; the other processes are ended.
        RuntimeError: If a process ends without a result.
    """
    prepare()
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    waiting: list[int] = list(range(len(items)))
    results: dict[int, Any] = {}
    running: dict[Any, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < n_processes:
                index = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, items[index], sender))
                running[receiver] = index, process
                process.start()
                sender.close()
            for receiver in cast("list[Any]", wait(list(running))):
                index, process = running[receiver]
                try:
                    kind, value = receiver.recv()
                except (EOFError, OSError):  # it has ended, in the middle of a message perhaps
                    process.join()
                    del running[receiver]
                    if index not in results:
                        raise RuntimeError(
                            f"Expected a result for {items[index]!r}, got none: its process ended with exit code "
                            f"{process.exitcode}. Was it killed for want of memory? Use fewer processes and run again: "
                            "what is finished is kept."
                        ) from None
                    continue
                if kind == "told":
                    told(items[index], value)
                elif kind == "done":
                    results[index] = value
                else:
                    raise value
    finally:
        for _, process in running.values():
            if process.pid is not None:
                process.terminate()
                process.join()
    return [results[index] for index in range(len(items))]


def _child(work: Callable[[Item, Tell], Any], item: Item, sender: Connection) -> None:
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller is interrupted as well, and ends this process
    try:
        with threadpool_limits(1):
            sender.send(("done", work(item, lambda step: sender.send(("told", step)))))
    except BrokenPipeError:  # the caller is gone
        return
    except Exception as error:
        try:
            sender.send(("failed", error))
        except Exception:  # one that cannot be pickled
            sender.send(("failed", RuntimeError(f"{type(error).__name__}: {error}")))
