"""Set before torch is imported: no network, one thread (the suite runs in several processes)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
