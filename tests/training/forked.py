"""Processes forked from this one, which has everything imported, as torchrun would start them."""

import multiprocessing
import os
import socket
import time

import torch


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def together(n: int, do, *given, first=0, port: int | None = None, hangs: int | None = None, seconds=60.0) -> list:
    """Return what `do(*given)` returns or raises, in one line, in each of n processes; None where one was killed.

    One that `hangs` is not waited for: it told nothing.
    """
    context, port = multiprocessing.get_context("fork"), port or free_port()

    def one(rank: int, pipe) -> None:
        names = {"RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        torch.set_num_threads(1)  # torch makes its pool anew after a fork, and fails where two threads do so at once
        try:
            pipe.send(do(*given))
        except (Exception, KeyboardInterrupt) as error:
            pipe.send(f"{type(error).__name__}: {error}")

    pipes = [context.Pipe(duplex=False) for _ in range(first, n)]
    children = [context.Process(target=one, args=(rank, pipe[1])) for rank, pipe in enumerate(pipes, first)]
    for child in children:
        child.start()
    found, until = [], time.monotonic() + seconds
    for rank, (receive, send) in enumerate(pipes, first):
        send.close()
        left = 0.0 if rank == hangs else max(0.0, until - time.monotonic())
        try:
            found.append(receive.recv() if receive.poll(left) else "nothing")
        except EOFError:
            found.append(None)
    for child in children:
        child.kill()
        child.join()
    return found
