"""Addresses: what is one, what it names, and how messages show it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeGuard
from urllib.parse import unquote

from weightvid.errors import RemoteError

#: two letters at least: one is a drive of Windows.
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")
_HUB: Final = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<path>.*))?"
)
#: what a hub address may begin with instead of the name of a model.
_OTHER_REPOS: Final = ("datasets/", "spaces/", "buckets/")


def is_url(source: object) -> TypeGuard[str]:
    """Whether a source is an address rather than a path.

    Examples
    --------
    >>> is_url("https://example.org/m.mp4"), is_url("C://m.mp4"), is_url("models/m.mp4")
    (True, False, False)
    """
    return isinstance(source, str) and _URL.match(source) is not None


def scheme(url: str) -> str:
    """Scheme of an address, in lower case."""
    return url.partition("://")[0].lower()


def shown(url: str) -> str:
    """An address as messages may show it: without password and query, which may hold secrets.

    Examples
    --------
    >>> shown("https://me:secret@example.org/m.mp4?signature=1")
    'https://example.org/m.mp4'
    """
    if scheme(url) == "hf":
        return url
    rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")[2]
    host, slash, path = rest.partition("/")
    return f"{scheme(url)}://{host.rpartition('@')[2]}{slash}{path}"


def file_name(url: str) -> str:
    """Last part of an address's path; for the hub, the file's or else the model's name.

    Examples
    --------
    >>> file_name("s3://bucket/m.mp4"), file_name("hf://org/model@main"), file_name("https://a.b")
    ('m.mp4', 'model', '')
    """
    if scheme(url) == "hf":
        place = parse_hub(url)
        return (place.path or place.repo).rstrip("/").rpartition("/")[2]
    rest = url.partition("://")[2]
    if scheme(url) in ("http", "https"):
        rest = unquote(re.split(r"[?#]", rest, maxsplit=1)[0])
    return rest.rstrip("/").rpartition("/")[2] if "/" in rest.rstrip("/") else ""


@dataclass(frozen=True, slots=True)
class HubPlace:
    """What a hub address names.

    Attributes
    ----------
    repo : str
        ``org/model``, or a name alone for the few models without an owner.
    revision : str or None
        Branch, tag or commit.
    path : str
        File in the repository; empty: all of it.
    """

    repo: str
    revision: str | None
    path: str


def parse_hub(url: str) -> HubPlace:
    """Parts of ``hf://org/model[@revision][/path]``.

    Raises
    ------
    RemoteError
        Not of that form.

    Examples
    --------
    >>> parse_hub("hf://org/model@v1.0/onnx/model.onnx")
    HubPlace(repo='org/model', revision='v1.0', path='onnx/model.onnx')
    """
    rest = url.partition("://")[2].removeprefix("models/").rstrip("/")
    match = _HUB.fullmatch(rest)
    if match is None or rest.startswith(_OTHER_REPOS):
        raise RemoteError(f"{url} names no model: write hf://org/model[@revision][/file]")
    revision = match["revision"]
    return HubPlace(
        match["repo"], None if revision is None else unquote(revision), match["path"] or ""
    )
