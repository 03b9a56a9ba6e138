"""An archive that was opened before a fork, as data loaders do, works in the children."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import samples

from weightvid.loader import open_archive


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork here"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_children_of_a_fork(tmp_path: Path) -> None:
    path = tmp_path / "m.mp4"
    path.write_bytes(samples.sample())
    expected = samples.tensors()
    with path.open("rb") as file:
        archive = open_archive(file, check_tensors=True)

        def read() -> None:
            for _ in range(10):
                for name in archive:
                    assert samples.same(archive[name], expected[name])

        children = [multiprocessing.get_context("fork").Process(target=read) for _ in range(3)]
        for child in children:
            child.start()
        read()
        for child in children:
            child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
