"""A site for each test, and transfers that do not wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Site, serve

from weightvid.remote import retry


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as made:
        yield made


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that transfers would have waited."""
    seconds: list[float] = []
    monkeypatch.setattr(retry, "pause", lambda wait_s, _: seconds.append(wait_s))
    return seconds
