"""Processes of one Gloo group that call functions of the tests together, and stay for the next call."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
from torch import distributed

TIMEOUT = timedelta(seconds=60)
IMPORTED = ["torch.distributed.tensor", "transformers.models.gpt_oss.modeling_gpt_oss", "accelerate", "gptoss_opt"]
PROCESSES = multiprocessing.get_context("forkserver")
"""Every rank is a fork of one process that has imported these and done nothing else: each would take seconds for it."""
PROCESSES.set_forkserver_preload(IMPORTED)


class RankError(AssertionError):
    """What went wrong on a rank, with its traceback."""


class Ranks:
    """`num_ranks` processes. The store that brings them together takes a free port by itself.

    A call runs one function on all ranks and returns what each returned. If it fails on one, the first error is raised
    here, and the processes are started anew for the next call: those that wait for the failed one are stopped.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.started: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank, by rank. The function is one of a module; results are pickled."""
        if not self.started:
            self._start()
        for _, connection in self.started:
            connection.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + 2 * TIMEOUT.total_seconds()
        while len(results) < self.num_ranks:
            for rank, (process, connection) in enumerate(self.started):
                if rank in results:
                    continue
                if connection.poll(0.01):
                    try:
                        done, results[rank] = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        done, results[rank] = False, "the process died"
                    if not done:
                        self.stop()
                        raise RankError(f"rank {rank} of {self.num_ranks}:\n{results[rank]}")
                elif not process.is_alive() or time.monotonic() > deadline:
                    self.stop()
                    raise RankError(f"rank {rank} of {self.num_ranks}: died, or did not answer")
        return [results[rank] for rank in range(self.num_ranks)]

    def _start(self) -> None:
        store = distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.store = store
        for rank in range(self.num_ranks):
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(target=_serve, args=(rank, self.num_ranks, store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.started.append((process, ours))

    def stop(self) -> None:
        """End the processes."""
        for process, connection in self.started:
            process.kill()
            process.join()
            connection.close()
        self.started = []


def _serve(rank: int, num_ranks: int, port: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, None, False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = pickle.dumps((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def leave() -> NoReturn:
    """End the process of a rank, when all ranks have come here.

    Nothing is torn down: Gloo's threads that are alive then would now and then abort the process.
    """
    if distributed.is_initialized():
        distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
