"""Models on the Hugging Face hub, through huggingface_hub: ``hf://org/model[@revision][/file]``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightvid.errors import RemoteError
from weightvid.remote.address import HubPlace, parse_hub
from weightvid.remote.store import Store, need
from weightvid.remote.web import WebStore


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


@dataclass(frozen=True, slots=True)
class Listing:
    """What a model holds.

    Attributes
    ----------
    commit : str
        Whole hash, so that all files are of one version.
    files : tuple of (str, int)
        Paths and sizes.
    """

    commit: str
    files: tuple[tuple[str, int], ...]


def list_files(url: str) -> Listing:
    """A model's files; those in the cache if the hub cannot be reached.

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
        cached = _cached(hub, place) if _unreachable(error) else None
        if cached is None:
            raise _explain(url, error) from None
        return cached
    files = tuple((entry.rfilename, entry.size or 0) for entry in info.siblings or ())
    return Listing(info.sha, files)


def download(url: str, commit: str, name: str) -> Path:
    """Bring a file into huggingface_hub's cache, if it is not there yet; where it lies.

    Raises
    ------
    RemoteError
        No access, no connection, or the model was changed meanwhile.
    """
    place = parse_hub(url)
    hub: Any = need("huggingface_hub", "hf", url)
    try:
        # By the name of the revision, so that the cache learns what it stands for.
        path = Path(hub.hf_hub_download(place.repo, name, revision=place.revision))
    except Exception as error:
        raise _explain(url, error) from None
    if commit not in path.parts:
        raise RemoteError(f"{url} was changed while it was read; try again")
    return path


def _cached(hub: Any, place: HubPlace) -> Listing | None:
    try:
        repos = hub.scan_cache_dir().repos
    except Exception:
        return None  # there is no cache yet
    for repo in repos:
        if repo.repo_type == "model" and repo.repo_id == place.repo:
            for found in repo.revisions:
                if (place.revision or "main") in (found.commit_hash, *found.refs):
                    paths = sorted(p for p in found.snapshot_path.rglob("*") if p.is_file())
                    files = [
                        (p.relative_to(found.snapshot_path).as_posix(), p.stat().st_size)
                        for p in paths
                    ]
                    return Listing(found.commit_hash, tuple(files))
    return None


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
