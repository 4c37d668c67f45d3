"""Scripts in processes of their own that start at once.

A fresh interpreter spends seconds on importing torch and transformers. Here one server, which the standard library
starts at the first call, imports them once; every script then runs in a process forked from it. Use `fresh=True` in
one test per kind of script: that is a new interpreter, or the real `torchrun`.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil


PRELOADED = "torch transformers transformers.trainer datasets accelerate safetensors.torch hf_effdl".split()
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
BIN = Path(sys.executable).parent
HERE = Path(__file__).parent


class Script:
    """A Python script that runs beside the test, in one process or in several that find each other.

    Args:
        file: the script.
        arguments: of its command line.
        processes: more than one: each gets a rank, as torchrun gives it.
        env: variables on top of this process's.
        cwd: its working directory.
        fresh: start new interpreters.

    Example:
        >>> text = Script("tiny_run.py", folder).finish()  # doctest: +SKIP
    """

    def __init__(
        self,
        file: str | Path,
        *arguments: object,
        processes: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        fresh: bool = False,
    ) -> None:
        self.argv = [str(HERE / file), *map(str, arguments)]
        paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
        self.env |= dict(env or {})
        self.cwd = str(cwd or HERE)
        self._folder = tempfile.TemporaryDirectory(prefix="script-")
        self._outputs = [Path(self._folder.name) / f"{rank}.txt" for rank in range(1 if fresh else processes)]
        self._processes = [self._fresh(processes)] if fresh else [self._fork(env) for env in self._ranks(processes)]

    def finish(self, timeout: float = 300) -> str:
        """Wait for the end, and fail if it is not a good one.

        Returns:
            What the script printed; of several processes one after the other.
        """
        codes = self.wait(timeout)
        assert not any(codes), f"exit codes {codes}: {self.output[-6000:]}"
        return self.output

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit codes, once all have ended; a signal's number is negative."""
        deadline = time.monotonic() + timeout
        while (codes := self.codes) and None in codes:
            failed = any(codes)  # a process that waits for one that has failed would wait for ever
            if time.monotonic() > deadline or failed:
                time.sleep(3 if failed else 0)
                self._end()
                assert failed, f"no end after {timeout} s: {self.output[-6000:]}"
            time.sleep(0.01)
        return codes

    def wait_for(self, condition: Callable[[], object], timeout: float = 240) -> None:
        """Wait until something is there, and fail if the script ends or takes too long before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.running and time.monotonic() < deadline, self.output[-6000:]
            time.sleep(0.005)

    def kill(self) -> bool:
        """SIGKILL, for all its processes and what they have started, from outside; False if they had ended well."""
        self._end()
        assert set(self.codes) <= {0, -signal.SIGKILL}, self.output[-6000:]
        return any(self.codes)

    def _end(self) -> None:
        for process in self._processes:
            try:
                family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            except psutil.NoSuchProcess:
                continue
            for member in family:
                try:
                    os.kill(member.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        for process in self._processes:
            process.wait() if isinstance(process, subprocess.Popen) else process.join()

    @property
    def codes(self) -> list[int | None]:
        return [
            process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
            for process in self._processes
        ]

    @property
    def running(self) -> bool:
        return None in self.codes

    @property
    def output(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in self._outputs if file.exists())

    def _ranks(self, processes: int) -> list[dict[str, str]]:
        if processes == 1:
            return [self.env]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        together["LOCAL_WORLD_SIZE"] = str(processes)
        return [self.env | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]

    def _fork(self, env: Mapping[str, str]) -> multiprocessing.Process:
        output = str(self._outputs[int(env.get("RANK", 0)) if len(self._outputs) > 1 else 0])
        process = CONTEXT.Process(target=run, args=(self.argv, dict(env), self.cwd, output))
        process.start()
        return process

    def _fresh(self, processes: int) -> subprocess.Popen:
        torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
        command = [*(torchrun if processes > 1 else [sys.executable]), *self.argv]
        with open(self._outputs[0], "w") as output:
            return subprocess.Popen(
                command, cwd=self.cwd, env=self.env, stdout=output, stderr=output, start_new_session=True
            )


def run(argv: list[str], env: dict[str, str], cwd: str, output: str) -> None:
    """Become the script: its output, environment, folder and command line."""
    os.setsid()
    with open(output, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    sys.path[:0] = [str(Path(argv[0]).parent), str(HERE)]
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not by way of multiprocessing, whose clean-up at exit the script knows nothing of
