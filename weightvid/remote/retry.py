"""When a broken transfer is tried again, and how long to wait before that."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass


class TransferError(Exception):
    """A transfer broke in a way that may go better next time.

    Parameters
    ----------
    reason : str
        What happened, for the message if it never goes better.
    wait_s : float or None
        How long the server asks to be left alone.
    """

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How persistent a transfer is.

    Attributes
    ----------
    attempts : int
        Tries in a row without a single new byte, after which it fails.
    first_wait_s, longest_wait_s : float
        Before the second try; doubled before each further one, up to the longest.
    connect_s, silence_s : float
        How long a server may take to answer, and to send the next byte.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    connect_s: float = 30.0
    silence_s: float = 60.0

    def wait_s(self, failures: int, asked_s: float | None = None) -> float:
        """Seconds to wait after so many failures in a row.

        A little random, so that many clients do not come back at once.

        Examples
        --------
        >>> 2.0 <= RetryPolicy().wait_s(3) <= 2.5
        True
        """
        if asked_s is not None:
            return min(asked_s, self.longest_wait_s)
        wait = min(self.first_wait_s * 2.0 ** (failures - 1), self.longest_wait_s)
        return float(wait * random.uniform(1.0, 1.25))


#: of every transfer.
POLICY = RetryPolicy()


def pause(seconds: float, stopped: threading.Event) -> None:
    """Wait before a transfer is tried again, unless it is stopped meanwhile."""
    stopped.wait(seconds)
