"""Run the Python blocks of pages as a reader would: `python runner.py PAGE...`, in one process with one thread.

The blocks of a page share a namespace and build on each other; pages do not. The outcome is one JSON object on the last
line: what went wrong, by page.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

BLOCK = re.compile(r"(?P<skip><!-- not run: .+ -->\n+)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def run(path: Path) -> str:
    """The traceback of the first block that fails; empty when all run."""
    import torch

    torch.manual_seed(0)
    text, names = path.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for found in BLOCK.finditer(text):
        if found["skip"] is None:
            above = text.count("\n", 0, found.start("code"))  # so that an error names the page's line
            try:
                exec(compile("\n" * above + found["code"], str(path), "exec"), names)
            except Exception:
                return traceback.format_exc(limit=-3)
    return ""


def main(pages: list[Path]) -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
        outcome = {str(page): run(page) for page in pages}
    print(json.dumps(outcome))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main([Path(page).resolve() for page in sys.argv[1:]])
