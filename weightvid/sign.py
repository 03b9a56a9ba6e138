"""Signatures: an archive that is what the owner of a key made, checked while it is read.

Signed is the list of units of an archive, each with its size and SHA-256: the head, each frame,
each box of exact tensors, the index. `open_signed` gives out bytes of a unit once its hash matches,
so a decoder never sees what was not signed. Ed25519 by the package cryptography; FORMAT.md
describes the box.
"""

import hashlib
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

from weightvid.archives import Location, find_tail, open_file, walk_boxes
from weightvid.atomic import atomic_output, is_source
from weightvid.checkpoint import is_url
from weightvid.container import box, close_body, mfra, record, tail_box, uint
from weightvid.errors import FormatError, KeyFileError, OutputError, SignatureError
from weightvid.loader import EXACT_UUID, FRAME_UUID, INDEX_UUID, Fields, open_body, read_records
from weightvid.remote import Pieces
from weightvid.repair import MAX_SHARE, MIN_SHARE, PARITY_UUID, add_parity

SIGN_UUID: Final = b"weightvid-sign\0\0"
KEY, UNITS, SIGNATURE = 112, 114, 116

#: a stretch of an archive that is checked as one: its bytes, and their SHA-256.
Unit = tuple[int, bytes]


class Signature(NamedTuple):
    """Public key, units, and the signature of their list, as they stand in a signature box."""

    key: bytes
    units: bytes
    signature: bytes

    def body(self) -> bytes:
        """Payload of the box."""
        return close_body(*(record(kind, data) for kind, data in zip(_KINDS, self, strict=True)))


_KINDS: Final = (KEY, UNITS, SIGNATURE)


class SignReport(NamedTuple):
    """What was signed, the file that holds the signature, the key, and how many units."""

    archive: str
    output: str
    fingerprint: str
    units: int


def sign_archive(
    archive: str | os.PathLike[str],
    key: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    *,
    detached: bool = False,
    force: bool = False,
) -> SignReport:
    """Sign an archive.

    Parameters
    ----------
    archive : path
    key : path
        Ed25519 private key: PEM or OpenSSH, without a password.
    destination : path, optional
        The signed archive; None: it replaces the archive. Of a detached signature: its file; None:
        the archive's name with ``.wvsig``.
    detached : bool
        Leave the archive as it is, and write the signature into a file of its own.
    force : bool
        Replace a destination that exists.

    Raises
    ------
    SignatureError
        The package cryptography is missing; KeyFileError: there is no such key in the file.
    FormatError, OutputError, OSError
    """
    path, private = Path(archive), read_key(key, "private")
    public = private.public_key().public_bytes_raw()
    target = destination or (path.with_name(f"{path.name}.wvsig") if detached else path)
    if is_source(target, key, *[path] * detached):
        raise OutputError(f"{target} is the archive or the key itself")
    with atomic_output(target, force=force or target == path) as output, path.open("rb") as file:
        units = [uint(size) + sha256 for size, sha256 in _units_of(file)]
        listed = uint(len(units)) + b"".join(units)
        made = Signature(public, listed, private.sign(_message(listed)))
        if detached:
            output.write(box(SIGN_UUID, made.body()))
        else:
            _embed(file, output, made)
    return SignReport(os.fspath(archive), os.fspath(target), fingerprint(public), len(units))


def sign_for_openssf(
    archive: str | os.PathLike[str],
    key: str | os.PathLike[str],
    destination: str = "",
    *,
    force: bool = False,
) -> SignReport:
    """Sign an archive by OpenSSF's model-signing, as one file; the report has no fingerprint.

    Parameters
    ----------
    archive : path
    key : path
        Private key on an elliptic curve (P-256, P-384, P-521), PEM.
    destination : str
        Empty: the archive's name with ``.sig``.
    force : bool
        Replace an existing file.

    Raises
    ------
    SignatureError, OutputError
    """
    target = destination or f"{os.fspath(archive)}.sig"
    if is_source(target, archive, key):
        raise OutputError(f"{target} is the archive or the key itself")
    with atomic_output(target, force=force) as output, _openssf("signing") as config:
        signer = config.use_elliptic_key_signer(private_key=Path(key))
        signer.sign(Path(archive), Path(output.name))
    return SignReport(os.fspath(archive), target, "", 1)


@contextmanager
def _openssf(part: str) -> Iterator[Any]:
    """A configuration of model-signing, whose errors become ours."""
    try:
        yield import_module(f"model_signing.{part}").Config()
    except ImportError as error:
        why = f"OpenSSF signatures need model-signing ({error}): pip install 'weightvid[openssf]'"
        raise SignatureError(why) from None
    except (ValueError, TypeError) as error:
        raise SignatureError(f"model-signing: {' '.join(str(error).split())[:300]}") from None


def _embed(file: BinaryIO, target: BinaryIO, made: Signature) -> None:
    """Copy an archive with one more signature; one of the same key goes, parity is made anew."""
    tail = find_tail(file)
    end = min((at for _, at, _ in tail.boxes), default=tail.mfra)
    file.seek(0)
    shutil.copyfileobj(file, target)
    target.truncate(target.seek(end))
    for signature in (*(s for s in signatures_in(file) if s.key != made.key), made):
        target.write(tail_box(SIGN_UUID, signature.body(), target.tell() - tail.start))
    file.seek(tail.mfra)
    shutil.copyfileobj(file, target)
    parity = sum(size for kind, _, size in tail.boxes if kind == PARITY_UUID)
    if parity:
        add_parity(target, min(max(parity / end, MIN_SHARE), MAX_SHARE))


def _units_of(file: BinaryIO) -> Iterator[Unit]:
    starts = [0]
    for kind, at, size in walk_boxes(file):
        if kind in (FRAME_UUID, EXACT_UUID, INDEX_UUID):
            starts.append(at)
        if kind == INDEX_UUID:
            starts.append(at + size)
            break
    file.seek(0)
    for first, last in pairwise(starts):
        yield last - first, hashlib.sha256(file.read(last - first)).digest()


def signatures_in(file: BinaryIO) -> list[Signature]:
    """Signatures that an archive holds, unchecked.

    Raises
    ------
    FormatError
        A signature box, or the archive, is damaged.
    """
    found = []
    for kind, at, size in find_tail(file).boxes:
        if kind == SIGN_UUID:
            file.seek(at + 24)
            found.append(_parse(file.read(size - 24)[:-4]))
    return found


def _parse(payload: bytes) -> Signature:
    kinds = read_records(open_body(payload, "the signature"), "the signature", _KINDS)
    if [len(records) for records in kinds] != [1, 1, 1]:
        raise FormatError("the signature lacks its key, units or signature", "record")
    return Signature(*(records[0].data for records in kinds))


def _message(units: bytes) -> bytes:
    return b"weightvid signature 1\0" + hashlib.sha256(units).digest()


def fingerprint(key: bytes) -> str:
    """How a public key is called in messages: the start of its SHA-256.

    >>> fingerprint(bytes(32))
    '66687aadf862bd776c8fc18b8e9f8e20'
    """
    return hashlib.sha256(key).hexdigest()[:32]


@contextmanager
def open_signed(
    archive: Location, key: str | os.PathLike[str], signature: str | os.PathLike[str] | None = None
) -> Iterator[BinaryIO]:
    """An archive whose bytes are given out only once they are known to be what was signed.

    Parameters
    ----------
    archive : path, address or binary file object
        A pipe needs a detached signature.
    key : path
        Ed25519 public key, PEM or OpenSSH; for a bundle of OpenSSF one on an elliptic curve.
    signature : path, optional
        A detached signature, or a bundle of OpenSSF, for which the whole file is read first; None:
        the archive holds the signature.

    Yields
    ------
    binary file object
        For `weightvid.open_archive`, `verify_archive`, `unpack_archive`. Reading what was not
        signed raises SignatureError.

    Raises
    ------
    SignatureError
        No signature, or one by another key, or the signature itself was changed.
    """
    bundled = signature is not None and Path(signature).read_bytes()[:1] == b"{"
    if bundled and isinstance(archive, (str, os.PathLike)) and not is_url(archive):
        with _openssf("verifying") as config:
            verifier = config.use_elliptic_key_verifier(public_key=Path(key))
            verifier.verify(Path(archive), Path(cast(str, signature)))
        with Path(archive).open("rb") as whole:
            yield whole
        return
    public = read_key(key, "public")
    with ExitStack() as stack:
        file = open_file(archive, stack)
        try:
            if signature is not None:
                data = Path(signature).read_bytes()
                if data[4:24] != b"uuid" + SIGN_UUID:
                    raise SignatureError(f"{os.fspath(signature)} is no signature of weightvid")
                found = [_parse(data[24:])]
            elif file.seekable():
                found = signatures_in(file)
            else:
                raise SignatureError("a pipe needs a detached signature: its own comes last")
        except FormatError as error:
            raise SignatureError(f"the signature cannot be read: {error}") from None
        yield cast(BinaryIO, _Checked(file, _accept(found, public)))


def _accept(found: Sequence[Signature], public: Any) -> list[Unit]:
    """Units that the owner of a key signed."""
    wanted = public.public_bytes_raw()
    if not found:
        raise SignatureError("the archive is not signed")
    for signature in found:
        if signature.key == wanted:
            try:
                public.verify(signature.signature, _message(signature.units))
            except import_module("cryptography.exceptions").InvalidSignature:
                raise SignatureError("the signature is not of this archive's units") from None
            fields = Fields(signature.units, "the signature")
            return [(fields.uint(1 << 32), fields.take(32)) for _ in fields.items(1 << 25)]
    others = ", ".join(fingerprint(signature.key) for signature in found)
    raise SignatureError(
        f"the archive is signed by another key: {others}, where {fingerprint(wanted)} is wanted"
    )


class _Checked(Pieces):
    """The signed units of a file, one behind the other, and an empty ``mfra``.

    What else the file holds does not exist here: a forged end could point anywhere.
    """

    def __init__(self, file: BinaryIO, units: Sequence[Unit]) -> None:
        self._file, self._units, self._number, self._unit = file, units, -1, b""
        self._starts = list(accumulate((size for size, _ in units), initial=0))
        super().__init__(self._starts[-1] + len(_END), self._some)

    def seekable(self) -> bool:
        return self._file.seekable()

    def _some(self, at: int, most: int) -> bytes:
        number = bisect_right(self._starts, at) - 1
        data = self._load(number) if number < len(self._units) else _END
        return data[at - self._starts[number] :][:most]

    def _load(self, number: int) -> bytes:
        if number == self._number:
            return self._unit
        at = self._starts[number]
        if self._file.seekable():
            self._file.seek(at)
        parts, (left, sha256) = list[bytes](), self._units[number]
        while left and (part := self._file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
        data = b"".join(parts)
        if hashlib.sha256(data).digest() != sha256:
            what = "the head" if not number else f"unit {number} of {len(self._units) - 1}"
            short = ": the archive ends early" if left else ""
            raise SignatureError(f"{what}, at byte {at}, is not what was signed{short}")
        self._number, self._unit = number, data
        return data


_END: Final = mfra(())


def read_key(path: str | os.PathLike[str], kind: str) -> Any:
    """Ed25519 key of a file, ``private`` or ``public``; else a KeyFileError."""
    try:
        keys: Any = import_module("cryptography.hazmat.primitives.serialization")
        ed25519: Any = import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
        unsupported = import_module("cryptography.exceptions").UnsupportedAlgorithm
    except ImportError:
        why = "signatures need the package cryptography: pip install 'weightvid[sign]'"
        raise SignatureError(why) from None
    data = Path(path).read_bytes()
    more = (None,) if kind == "private" else ()
    wanted = ed25519.Ed25519PrivateKey if more else ed25519.Ed25519PublicKey
    for form in ("pem", "ssh"):
        try:
            key = getattr(keys, f"load_{form}_{kind}_key")(data, *more)
        except (ValueError, TypeError, unsupported):
            continue
        if isinstance(key, wanted):
            return key
    raise KeyFileError(f"{os.fspath(path)} holds no {kind} Ed25519 key without a password")
