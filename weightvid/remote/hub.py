"""Models on the Hugging Face hub, through huggingface_hub: ``hf://org/model[@revision][/file]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from weightvid.errors import RemoteError
from weightvid.remote.address import HubPlace, parse_hub
from weightvid.remote.store import Store, need
from weightvid.remote.web import WebStore

T = TypeVar("T")


def open_store(url: str) -> Store:
    """One file of a model, read by ranges.

    Raises
    ------
    RemoteError
        The address names no file, or huggingface_hub is missing.
    """
    place = parse_hub(url)
    if not place.path:
        raise RemoteError(f"{url} names a whole model; name a file in it: {url}/FILE")
    return _HubStore(url, place)


class _HubStore(WebStore):
    login = "log in with `hf auth login` or set HF_TOKEN, and ask for access on the model's page"

    def __init__(self, url: str, place: HubPlace) -> None:
        hub: Any = need("huggingface_hub", "hf", url)
        utils: Any = need("huggingface_hub.utils", "hf", url)
        target = hub.hf_hub_url(place.repo, place.path, revision=place.revision)
        super().__init__(url, target, utils.build_hf_headers())


def list_files(url: str) -> tuple[tuple[str, int], ...]:
    """Paths and sizes of a model's files; those in the cache if the hub cannot be reached.

    Raises
    ------
    RemoteError
        No such model or revision, or no access.
    """
    place = parse_hub(url)
    hub: Any = need("huggingface_hub", "hf", url)
    try:
        info = hub.HfApi().model_info(place.repo, revision=place.revision, files_metadata=True)
    except Exception as error:
        if not _unreachable(error):
            raise _explain(url, error) from None
        cached = _cached(hub, url, place)
        return tuple(
            (path.relative_to(cached).as_posix(), path.stat().st_size)
            for path in sorted(cached.rglob("*"))
            if path.is_file()
        )
    return tuple((entry.rfilename, entry.size or 0) for entry in info.siblings or ())


def download(url: str, names: Iterable[str]) -> Path:
    """Bring files of a model into huggingface_hub's cache; the folder that holds them.

    Raises
    ------
    RemoteError
        No such model, no access, no connection.
    """
    place = parse_hub(url)
    hub: Any = need("huggingface_hub", "hf", url)
    wanted = [_literal(name) for name in names]

    def fetch() -> str:
        return str(
            hub.snapshot_download(place.repo, revision=place.revision, allow_patterns=wanted)
        )

    return Path(_explained(url, fetch))


def _cached(hub: Any, url: str, place: HubPlace) -> Path:
    def find() -> str:
        return str(
            hub.snapshot_download(place.repo, revision=place.revision, local_files_only=True)
        )

    return Path(_explained(url, find))


def _explained(url: str, function: Callable[[], T]) -> T:
    try:
        return function()
    except Exception as error:
        raise _explain(url, error) from None


def _literal(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _unreachable(error: Exception) -> bool:
    known = {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "TransportError"}
    return bool(_names(error) & {*known, "TimeoutError", "Timeout", "NetworkError"})


def _explain(url: str, error: Exception) -> RemoteError:
    names = _names(error)
    if "GatedRepoError" in names:
        return RemoteError(f"{url} is not open to everybody: {_HubStore.login}")
    if "RevisionNotFoundError" in names:
        return RemoteError(f"the model of {url} has no such revision")
    if names & {"RepositoryNotFoundError", "HFValidationError"}:
        return RemoteError(
            f"there is no model {url}, or it is private: check the name; {_HubStore.login}"
        )
    if names & {"EntryNotFoundError", "LocalEntryNotFoundError"} or _unreachable(error):
        return RemoteError(
            f"cannot reach the hub for {url}, and its cache lacks the model: check the connection"
        )
    said = (" ".join(str(error).split()) or type(error).__name__)[:300]
    return RemoteError(f"cannot read {url}: {said}")
