"""Signatures: what was signed is read, and nothing else is ever given out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_archives import join_boxes, split_boxes
from samples import Pipe, all_same

from weightvid.archives import find_tail
from weightvid.container import close_body, tail_box
from weightvid.errors import OutputError, SignatureError
from weightvid.loader import FRAME_UUID, INDEX_UUID, open_archive
from weightvid.sign import SIGN_UUID, fingerprint, open_signed, sign_archive, sign_for_openssf
from weightvid.unpack import unpack_archive
from weightvid.verify import verify_archive

serialization = pytest.importorskip(
    "cryptography.hazmat.primitives.serialization", reason="signatures need cryptography"
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402


def new_key(folder: Path, name: str, ssh: bool = False) -> Path:
    """Write a pair of keys; the public one ends in .pub."""
    key, form = Ed25519PrivateKey.generate(), serialization
    kinds = (
        (form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.Encoding.OpenSSH)
        if ssh
        else (form.Encoding.PEM, form.PrivateFormat.PKCS8, form.Encoding.PEM)
    )
    public = form.PublicFormat.OpenSSH if ssh else form.PublicFormat.SubjectPublicKeyInfo
    path = folder / name
    path.write_bytes(key.private_bytes(kinds[0], kinds[1], form.NoEncryption()))
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(kinds[2], public))
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    new_key(folder, "owner", ssh=True)
    new_key(folder, "other")
    return folder


@pytest.fixture(scope="module")
def signed(long_archive: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("signed") / "s.mp4"
    report = sign_archive(long_archive, keys / "owner", path)
    assert report.units == 1 + 3 + 1 + 1  # head, frames, exact tensors, index
    return path


def read(data: bytes, key: Path, signature: Path | None = None, pipe: bool = False) -> dict:
    with open_signed(Pipe(data) if pipe else io.BytesIO(data), key, signature) as file:
        return dict(open_archive(file, check_tensors=True).items())


def test_signed_archives_are_read(signed: Path, long_archive: Path, keys: Path) -> None:
    expected = dict(open_archive(long_archive.read_bytes()).items())
    assert all_same(read(signed.read_bytes(), keys / "owner.pub"), expected)
    assert all_same(dict(open_archive(signed.read_bytes()).items()), expected)
    assert all_same(dict(open_archive(Pipe(signed.read_bytes())).items()), expected)
    with open_signed(signed, keys / "owner.pub") as file:
        assert verify_archive(file).ok


def test_wrong_key_and_no_signature(signed: Path, long_archive: Path, keys: Path) -> None:
    with pytest.raises(SignatureError, match=r"signed by another key: [0-9a-f]{32}, where"):
        read(signed.read_bytes(), keys / "other.pub")
    with pytest.raises(SignatureError, match="the archive is not signed"):
        read(long_archive.read_bytes(), keys / "owner.pub")
    with pytest.raises(SignatureError, match="no public Ed25519 key"):
        read(signed.read_bytes(), keys / "owner")
    with pytest.raises(SignatureError, match="no private Ed25519 key"):
        sign_archive(signed, keys / "owner.pub")


def test_a_changed_byte_anywhere_is_found(signed: Path, keys: Path, tmp_path: Path) -> None:
    data, end = signed.read_bytes(), find_tail(io.BytesIO(signed.read_bytes())).boxes[0][1]
    at = 0
    for box in split_boxes(data)[:-2]:
        places = {at + 3, at + 10, at + len(box.payload) // 2, at + len(box.payload) + 4}
        for place in places:
            hurt = bytearray(data)
            hurt[place] ^= 1
            with pytest.raises(SignatureError, match=r"is not what was signed|cannot be read"):
                read(bytes(hurt), keys / "owner.pub")
        at += 8 + len(box.payload) + (16 if len(box.kind) == 16 else 0)
    assert at <= end
    with (
        pytest.raises(SignatureError, match="unit 1 of"),
        open_signed(io.BytesIO(data[:9000] + b"x" + data[9001:]), keys / "owner.pub") as file,
    ):
        unpack_archive(file, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_changed_signature_is_found(signed: Path, keys: Path) -> None:
    data = signed.read_bytes()
    (_, at, size), *_ = find_tail(io.BytesIO(data)).boxes
    for place in range(at + 24, at + size - 4, 7):
        hurt = data[:place] + bytes((data[place] ^ 16,)) + data[place + 1 :]
        with pytest.raises(SignatureError):
            read(hurt, keys / "owner.pub")


def swapped(data: bytes) -> bytes:
    boxes = split_boxes(data)
    places = [n for n, box in enumerate(boxes) if box.kind == FRAME_UUID]
    for n in range(3):
        one, two = places[0] + n, places[1] + n
        boxes[one], boxes[two] = boxes[two], boxes[one]
    return join_boxes(boxes)


FORGERIES: dict[str, Callable[[bytes], bytes]] = {
    "frames change places": swapped,
    "cut": lambda data: data[: len(data) // 2],
    "a frame is missing": lambda data: join_boxes(
        [box for n, box in enumerate(split_boxes(data)) if n not in (6, 7, 8)]
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("pipe", [False, True])
def test_forgeries(name: str, pipe: bool, long_archive: Path, keys: Path, tmp_path: Path) -> None:
    signature = tmp_path / "s.wvsig"
    sign_archive(long_archive, keys / "owner", signature, detached=True)
    data = long_archive.read_bytes()
    expected = dict(open_archive(data).items())
    assert all_same(read(data, keys / "owner.pub", signature, pipe), expected)
    with pytest.raises(SignatureError, match="is not what was signed"):
        read(FORGERIES[name](data), keys / "owner.pub", signature, pipe)


def test_a_forged_end_is_not_looked_at(long_archive: Path, keys: Path, tmp_path: Path) -> None:
    """An index behind the signed units, to which mfra would lead, does not exist for a reader."""
    signature, data = tmp_path / "s.wvsig", long_archive.read_bytes()
    sign_archive(long_archive, keys / "owner", signature, detached=True)
    mfra, expected = find_tail(io.BytesIO(data)).mfra, dict(open_archive(data).items())
    forged = data[:mfra] + tail_box(INDEX_UUID, close_body()) + data[mfra:]
    assert not open_archive(forged).index.frames
    assert all_same(read(forged, keys / "owner.pub", signature), expected)


def test_a_pipe_needs_a_detached_signature(signed: Path, keys: Path) -> None:
    with pytest.raises(SignatureError, match="a pipe needs a detached signature"):
        read(signed.read_bytes(), keys / "owner.pub", pipe=True)
    with pytest.raises(SignatureError, match="is no signature of weightvid"):
        read(signed.read_bytes(), keys / "owner.pub", keys / "owner.pub")


def test_two_owners(signed: Path, keys: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.mp4"
    path.write_bytes(signed.read_bytes())
    sign_archive(path, keys / "other")
    twice = path.read_bytes()
    for key in ("owner.pub", "other.pub"):
        read(twice, keys / key)
    sign_archive(path, keys / "other")
    assert path.read_bytes() == twice
    assert [kind for kind, _, _ in find_tail(io.BytesIO(twice)).boxes] == [SIGN_UUID] * 2


def test_parity_covers_the_signature(signed: Path, keys: Path, tmp_path: Path) -> None:
    repair = pytest.importorskip("weightvid.repair")
    pytest.importorskip("zfec")
    path = tmp_path / "both.mp4"
    path.write_bytes(signed.read_bytes())
    with path.open("r+b") as file:
        repair.add_parity(file, 0.05)
    sign_archive(path, keys / "other")
    whole = path.read_bytes()
    read(whole, keys / "other.pub")
    at = find_tail(io.BytesIO(whole)).boxes[0][1]
    path.write_bytes(whole[:at] + bytes(300) + whole[at + 300 :])
    repair.repair_archive(path)
    assert path.read_bytes() == whole


def test_what_is_signed_is_not_replaced_by_its_signature(
    long_archive: Path, keys: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(long_archive.read_bytes())
    with pytest.raises(OutputError, match="is the archive or the key itself"):
        sign_archive(path, keys / "owner", path, detached=True, force=True)
    with pytest.raises(OutputError, match="is the archive or the key itself"):
        sign_for_openssf(path, keys / "owner", str(path))
    assert path.read_bytes() == long_archive.read_bytes()


def test_fingerprints_name_keys() -> None:
    assert fingerprint(b"a" * 32) != fingerprint(b"b" * 32)


def test_bundles_of_openssf(long_archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="needs model-signing, extra openssf")
    from cryptography.hazmat.primitives.asymmetric import ec

    key, form = ec.generate_private_key(ec.SECP256R1()), serialization
    private, public = tmp_path / "ec", tmp_path / "ec.pub"
    kinds = form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
    private.write_bytes(key.private_bytes(*kinds))
    kind = form.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, kind))
    bundle = sign_for_openssf(long_archive, private, str(tmp_path / "b.sig")).output
    with open_signed(long_archive, public, bundle) as file:
        assert verify_archive(file).ok
    with pytest.raises(OutputError, match="exists already"):
        sign_for_openssf(long_archive, private, bundle)
    hurt = tmp_path / long_archive.name
    hurt.write_bytes(long_archive.read_bytes()[:-1] + b"x")
    with pytest.raises(SignatureError, match="model-signing: "), open_signed(hurt, public, bundle):
        pass
