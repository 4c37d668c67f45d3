"""Runs in processes of their own, to be killed by tests; forked from one that has imported the stack already.

As a script it is that process: each line names a module of this folder and the arguments of its `main`.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(process: subprocess.Popen, condition: Callable[[], Any], seconds: float = 120) -> None:
    """Wait until something has happened, as long as a process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


class Forks:
    """One run at a time."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid: int | None = None

    def start(self, module: str, *arguments: Any) -> None:
        print(module, *arguments, file=self.server.stdin, flush=True)
        self.pid = int(self.server.stdout.readline())

    def wait_for(self, condition: Callable[[], Any]) -> None:
        wait_for(self.server, condition)

    def kill(self) -> bool:
        """Kill the run; False if it had ended by itself, without an error."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = self.end()
        assert status in (0, signal.SIGKILL), status
        return status == signal.SIGKILL

    def end(self) -> int:
        """Wait for the run; its status, 0 where all went well."""
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def serve() -> None:
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            print(os.waitpid(pid, 0)[1], flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            module, *arguments = line.split()
            importlib.import_module(module).main(arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import tiny_run  # noqa: F401 - what takes long to import

    serve()
