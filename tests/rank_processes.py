"""The command in two processes with ranks: started here as a launcher does, or by `accelerate launch` itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from fresh_python import COMMAND, FreshPython
from label_command import HANGS, PACKAGE


def free_address() -> dict[str, str]:
    """Return the environment variables by which processes on this machine find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def as_a_launcher_does(fresh_python: FreshPython, arguments: list[object], statuses: tuple[int, ...] = (0,)) -> str:
    """Run the command twice with the variables that `accelerate launch` and `torchrun` set, and return what it printed.

    Args:
        fresh_python: The fixture.
        arguments: The command's arguments.
        statuses: How a process may end; 1 stands for pictures that could not be read.
    """
    common = {**free_address(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [fresh_python.start(COMMAND, *arguments, environment=rank) for rank in ranks]
    ended = [process.wait() for process in processes]
    assert all(done.returncode in statuses and "Traceback" not in done.stderr for done in ended), ended
    return "".join(done.stdout for done in ended)


def accelerate_launch(_: FreshPython, arguments: list[object], statuses: tuple[int, ...] = (0,)) -> str:
    """Do the same with `accelerate launch`, which starts Python three times."""
    address = free_address()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines"]
    command += ["1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", address["MASTER_PORT"]]
    done = subprocess.run(
        [*command, "-m", "gdino_hf", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
        env={**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in statuses, done.stderr
    return done.stdout
