"""Files on web servers, through the session of fsspec's HTTP file system.

fsspec brings the event loop, the connections and the user's own settings (headers, proxies,
certificates: https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration). What it
cannot do is done here: a range is checked to be the one that was asked for, and the bytes that came
before a cut are kept.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Generator, Mapping
from concurrent.futures import wait
from contextlib import suppress
from typing import Any, Final

from weightvid.errors import RemoteError
from weightvid.remote import retry
from weightvid.remote.address import scheme
from weightvid.remote.retry import TransferError
from weightvid.remote.store import Answer, Store, need

_CHUNK_BYTES: Final = 1 << 20
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
#: what a server says when it has trouble that may pass.
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED: Final = frozenset({401, 402, 403, 407, 451})
_GONE: Final = frozenset({404, 410})
_UNSATISFIABLE: Final = 416
_PARTIAL: Final = 206
#: how long bytes are gathered before they are handed on.
_GATHER_S: Final = 0.5
#: what a connection takes to close after an interruption.
_SETTLE_S: Final = 0.02
_LEAST_REFUSAL: Final = 400


def open_store(url: str) -> Store:
    """A file on a web server.

    Raises
    ------
    RemoteError
        fsspec or aiohttp is missing.
    """
    return WebStore(url)


class WebStore(Store):
    """A file that HTTP can reach.

    Parameters
    ----------
    url : str
        What messages show.
    target : str or None
        Where it really lies, if elsewhere.
    headers : mapping of str to str
        Sent along; not to another host that the server sends us to.
    """

    #: what to do about a refusal, in words.
    login = (
        "put user:password@ before the host, use a signed link, or set headers for this scheme in "
        "fsspec's configuration"
    )

    def __init__(
        self, url: str, target: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(url)
        self._target = target or url
        self._headers = dict(headers or {})
        self._aiohttp: Any = need("aiohttp", "remote", url)
        fsspec: Any = need("fsspec", "remote", url)
        kind = scheme(self._target)
        # Proxies and passwords of the environment, unless fsspec's configuration says otherwise.
        settings = fsspec.config.conf.get(kind, {}).get("client_kwargs", {})
        self._files = fsspec.filesystem(kind, client_kwargs={"trust_env": True, **settings})
        # What is quoted already stays as it is: signatures are of the very characters.
        quoted = self._target.isascii() and " " not in self._target
        try:
            self._address: Any = need("yarl", "remote", url).URL(self._target, encoded=quoted)
            self._host = f"{self._address.host}:{self._address.port}"
        except ValueError as error:
            raise RemoteError(f"{self.shown} is no valid address: {error}") from None
        self._without_ranges = False

    def request(self, begin: int, end: int | None) -> Answer:
        """Ask once for a range."""
        wanted = f"bytes={begin}-{'' if end is None else end - 1}"
        if self._without_ranges:
            wanted = ""
        parts: list[bytes] = []
        response = self._call(self._get, wanted, parts)
        try:
            return self._answer(response, begin, parts)
        except BaseException:
            response.close()
            raise

    async def _get(self, wanted: str, parts: list[bytes]) -> Any:
        session = await self._files.set_session()
        options = dict(self._files.kwargs)
        headers = {
            **options.pop("headers", {}),
            **self._headers,
            **({"Range": wanted} if wanted else {}),
            # Ranges are of the bytes as they lie there.
            "Accept-Encoding": "identity",
        }
        policy = retry.POLICY
        patience = self._aiohttp.ClientTimeout(
            total=None, sock_connect=policy.connect_s, sock_read=policy.silence_s
        )
        response = await session.get(self._address, headers=headers, timeout=patience, **options)
        try:
            if response.status < _LEAST_REFUSAL:
                # At once: aiohttp forgets what has come when the connection breaks before it is
                # read. The error, if there is one, comes again with the next piece.
                with suppress(self._aiohttp.ClientError, OSError):
                    await _gather(response.content, parts)
        except BaseException:
            response.close()
            raise
        return response

    def _answer(self, response: Any, begin: int, parts: list[bytes]) -> Answer:
        if response.status == _UNSATISFIABLE:
            return self._beyond(response, begin)
        if response.status >= _LEAST_REFUSAL:
            raise self._refusal(response)
        chunks = self._chunks(response, parts)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if response.status != _PARTIAL:
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            total = None if encoded else response.content_length
            return Answer(0, total, False, tag, chunks)
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if match is None or match[1] is None or int(match[1]) != begin:
            raise RemoteError(
                f"the server of {self.shown} answers with another range of bytes than it was asked "
                "for; download the file by other means"
            )
        if match[3] == "*":
            self._without_ranges = True
            raise TransferError("the server does not tell the size", 0.0)
        return Answer(begin, int(match[3]), True, tag, chunks)

    def _beyond(self, response: Any, begin: int) -> Answer:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        response.close()
        total = 0 if match is None or match[3] == "*" else int(match[3])
        if begin > total:
            raise RemoteError(f"{self.shown} was changed, or ends before byte {begin}")
        return Answer(begin, total, True, "", _none())

    def _refusal(self, response: Any) -> Exception:
        said = f"HTTP {response.status} {response.reason or ''}".strip()
        if response.status in _PASSING:
            asked = response.headers.get("Retry-After", "")
            return TransferError(
                f"the server says {said}", float(asked) if asked.isdecimal() else None
            )
        if response.status in _GONE:
            return RemoteError(f"there is no {self.shown} ({said}); check the address")
        if response.status in _REFUSED:
            return RemoteError(f"cannot read {self.shown} ({said}): {self.login}")
        return RemoteError(f"cannot read {self.shown}: the server says {said}")

    def _chunks(self, response: Any, first: list[bytes]) -> Generator[bytes]:
        try:
            if first:
                yield b"".join(first)
            while True:
                parts: list[bytes] = []
                broken: TransferError | None = None
                try:
                    self._call(_gather, response.content, parts)
                except TransferError as error:
                    broken = error
                if parts:
                    yield b"".join(parts)
                if broken is not None:
                    raise broken
                if not parts:
                    return
        finally:
            # Not ``release``: what is left of the answer is not wanted.
            response.close()

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Run a coroutine on fsspec's loop; aiohttp's errors become ours."""
        errors = self._aiohttp
        try:
            return _run(self._files.loop, function(*arguments))
        except errors.ClientSSLError as error:
            raise RemoteError(_certificate(self.shown, error)) from None
        except errors.InvalidURL:
            raise RemoteError(f"{self.shown} is no valid address") from None
        except errors.ClientConnectorDNSError:
            raise RemoteError(
                f"cannot find the server {self._host}: check the address and the connection"
            ) from None
        except errors.TooManyRedirects:
            raise RemoteError(f"{self.shown} leads round in circles (redirects)") from None
        except (TimeoutError, errors.ServerTimeoutError):
            raise TransferError("the server does not answer in time") from None
        except (errors.ClientPayloadError, errors.ServerDisconnectedError):
            raise TransferError("the connection was cut") from None
        except (errors.ClientError, OSError) as error:
            raise TransferError(_plain(error)) from None


def _run(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Wait for a coroutine on fsspec's loop; an interruption (Ctrl-C) ends it, too."""
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        # In steps, because not every system can interrupt a wait without an end.
        while not wait((future,), timeout=1.0).done:
            pass
    except BaseException:
        future.cancel()
        settled = asyncio.run_coroutine_threadsafe(asyncio.sleep(_SETTLE_S), loop)
        wait((settled,), timeout=1.0)
        raise
    return future.result()


async def _gather(content: Any, parts: list[bytes]) -> None:
    """Bytes that come next: about a megabyte, less on a slow line.

    What came before an error is in ``parts``.
    """
    left = _CHUNK_BYTES
    patience = asyncio.get_running_loop().time() + _GATHER_S
    while left > 0:
        data = await content.read(left)
        if not data:
            return
        parts.append(data)
        left -= len(data)
        if asyncio.get_running_loop().time() > patience:
            return


def _none() -> Generator[bytes]:
    yield from ()


def _certificate(where: str, error: Exception) -> str:
    reason = re.search(r"certificate verify failed: ([^(]+)", str(error))
    said = reason[1].strip() if reason else "no secure connection"
    return (
        f"cannot trust the server of {where} ({said}): check the address and this machine's clock; "
        "a certificate authority of your own goes into the file that SSL_CERT_FILE names"
    )


def _plain(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
