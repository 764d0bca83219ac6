"""Who does the work: processes of this machine, or a Ray cluster. Both take jobs and give answers as they come.

An answer is {"done": result}, {"refused": sentence} (bad input, parts that do not combine) or {"failed": sentence,
"trace": text}.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from formwright.errors import FormwrightError, require

Backend = Literal["local", "ray"]
Job = dict[str, Any]
Answer = dict[str, Any]


@runtime_checkable
class Pool(Protocol):
    """Runs jobs; `run` gives the place of a job in the list with its answer, in the order they finish."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]: ...
    def close(self) -> None: ...


def pool(backend: str, workers: int | None, log: Path) -> Pool:
    """A pool with that many workers; without a number, one a core, or all that a Ray cluster has.

    Raises:
        FormwrightError: no such backend, no positive number of workers, or Ray is not installed.
    """
    if workers is not None and workers < 1:
        raise FormwrightError(f"workers is {workers}, but at least one must do the work.")
    if backend == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return LocalPool(workers or cores, log)
    if backend == "ray":
        return RayPool(workers)
    raise FormwrightError(f"There is no backend {backend!r}: use local or ray.")


class LocalPool:
    """Persistent processes, so that torch is imported once each. One that dies costs its job alone.

    The processes are in sessions of their own: an interrupt at the keyboard reaches the parent only. They end when
    their input does, so none outlives a parent that was killed.

    Args:
        workers: how many.
        log: file for what they print.
    """

    def __init__(self, workers: int, log: Path) -> None:
        self.workers, self.log = workers, log
        self._processes: dict[int, subprocess.Popen] = {}
        self._closed = False
        self._lock = threading.Lock()  # between those who start processes and the one who ends them all

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]:
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
        for place in range(len(jobs)):
            todo.put(place)

        def serve(name: int) -> None:
            while not self._closed:
                try:
                    place = todo.get_nowait()
                except queue.Empty:
                    return
                answers.put((place, self._ask(name, jobs[place])))

        for name in range(min(self.workers, len(jobs))):
            threading.Thread(target=serve, args=(name,), daemon=True).start()
        for _ in jobs:
            yield answers.get()

    def _ask(self, name: int, job: Job) -> Answer:
        try:
            process = self._process(name)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if line.endswith(b"\n"):
                return json.loads(line)
        except (OSError, ValueError):
            pass
        dead = self._processes.pop(name, None)
        if dead is None:
            return {"failed": "The worker process could not be started.", "trace": ""}
        dead.kill()
        return {"failed": f"The worker process {_how(dead.wait())}.", "trace": ""}

    def _process(self, name: int) -> subprocess.Popen:
        """The running process of that name, a new one if there is none."""
        with self._lock:
            running = self._processes.get(name)
            if running is None or running.poll() is not None:
                running = self._processes[name] = self._start()
            return running

    def _start(self) -> subprocess.Popen:
        if self._closed:
            raise OSError("the pool is closed")
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                # -P: a file of the user's own folder, say copy.py, is not to stand in for Python's or torch's module.
                [sys.executable, "-P", "-m", "formwright.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )

    def close(self) -> None:
        """End all processes at once, whatever they do."""
        with self._lock:
            self._closed = True
            processes = list(self._processes.values())
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed ({name}); the machine may have run out of memory" if code == -9 else f"was killed ({name})"


class RayPool:
    """The same jobs as Ray tasks of one CPU each: on the cluster this process belongs to, that of $RAY_ADDRESS, or a
    local one.

    Args:
        workers: CPUs of a local cluster; on another one, how many tasks are handed out at once.
    """

    def __init__(self, workers: int | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ray = require("ray", extra="ray")
        self._ours = not self.ray.is_initialized()
        if self._ours:
            address = os.environ.get("RAY_ADDRESS")
            local = {} if address else {"num_cpus": workers, "include_dashboard": False}
            self.ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
        self.workers = workers or max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]:
        from formwright.bench.work import execute

        task = self.ray.remote(num_cpus=1, max_retries=0)(execute)
        left = iter(enumerate(jobs))
        running: dict[Any, int] = {}
        while True:
            while len(running) < self.workers:
                place, job = next(left, (None, None))
                if place is None:
                    break
                running[task.remote(job)] = place
            if not running:
                return
            ready, _ = self.ray.wait(list(running), num_returns=1)
            for one in ready:
                place = running.pop(one)
                try:
                    yield place, self.ray.get(one)
                except self.ray.exceptions.RayError as lost:
                    first = str(lost).strip().splitlines()[0]
                    yield place, {"failed": f"The Ray task was lost: {first}", "trace": str(lost)}

    def close(self) -> None:
        if self._ours:
            self.ray.shutdown()
