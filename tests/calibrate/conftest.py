"""One thread: for models as small as these, more would only get in each other's way."""

import os
from importlib.util import find_spec

for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
if find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)
