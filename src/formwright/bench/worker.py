"""A worker process, `python -m formwright.bench.worker`: jobs in, answers out, one a line of JSON."""

import json
import os
import queue
import sys
import threading


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints goes to the log, not among the answers
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            jobs.put(line)
        os._exit(0)  # the parent is gone: nobody waits for what is being done

    threading.Thread(target=listen, daemon=True).start()
    from formwright.bench.work import execute

    while True:
        answer = json.dumps(execute(json.loads(jobs.get()))).encode() + b"\n"
        answers.write(answer)


if __name__ == "__main__":
    main()
