"""Processes of ``torch.distributed`` on this machine, over 127.0.0.1, each with one thread and for a limited time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

#: Seconds after which processes that have not ended are killed.
LIMIT = 90.0


class Died(Exception):
    """What a process said when it ended with an error."""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def run(size: int, function: Callable[..., Any], *arguments: Any, results: bool = True) -> list[Any]:
    """What a function of the rank and some arguments gives in every process of a group; its errors as they are.

    Args:
        size: Number of processes.
        function: Called in each of them, inside the group; one of a module.
        *arguments: Its further arguments.
        results: Raise :class:`Died` if a process fails; otherwise the errors are among the results, and None is that
            of a process that was killed.
    """
    # A card, and autograd's threads for it, survive no fork: there they come from a server that has computed nothing.
    context, port = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork"), free_port()
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_in_process, args=(rank, size, port, sender, function, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    until, received = time.monotonic() + LIMIT, []
    try:
        for pipe in pipes:
            if not pipe.poll(max(0.0, until - time.monotonic())):
                raise TimeoutError(f"Expected {size} processes to end within {LIMIT} s, got one that did not.")
            try:
                received.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                received.append(None)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
    if results:
        for one in received:
            if isinstance(one, Died) or one is None:
                raise one or Died("killed")
    return received


def _in_process(rank: int, size: int, port: int, sender: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )  # fmt: skip
    try:
        result = function(rank, *arguments)
    except BaseException as error:
        result = Died(f"{type(error).__name__}: {error}", traceback.format_exc())
    sender.send_bytes(pickle.dumps(result))  # tensors as they are, not by shared memory
    sender.close()
    os._exit(0)
