"""What ``--json`` prints: the keys of each object and the types of their values.

``name:type ...``, where a type is ``s`` (string), ``i`` (integer), ``n`` (number), ``b`` (boolean)
or ``d`` (any object), with ``?`` where null is allowed, in ``[]`` if it is a list of such; or it is
the name of a schema.
"""

from __future__ import annotations

from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "s": (str,), "i": (int,), "n": (int, float), "b": (bool,), "d": (dict,),
}  # fmt: skip
SCHEMAS = {
    "pack": (
        "archive:s source:s file_bytes:i source_bytes:i packet_bytes:i weights:i coded_weights:i "
        "bits_per_weight:n sqnr_db:n? tensors:[packed] frames:i width:i height:i skipped:[s] "
        "unused_keeps:[s] side_files:[s] step_factor:n encodings:i seconds:n notes:[s]"
    ),
    "packed": "name:s sqnr_db:n? worst_row:i worst_row_db:n? escapes:i outliers:i",
    "unpack": (
        "ok:b archive:s output:s tensors:i weights:i file_bytes:i aliases:[s] converted:[s] "
        "notes:[s] missing:[s] defect:defect? side_files:[s] seconds:n"
    ),
    "defect": "code:s message:s offset:i?",
    "verify": (
        "ok:b archive:s against:s? tensors:i tensors_intact:i weights:i frames:i? file_bytes:i? "
        "defect:defect? affected:[s] comparison:comparison? seconds:n"
    ),
    "comparison": (
        "tensors:[compared] missing:[s] extra:[s] mismatched:[s] below:[s] sqnr_db:n? "
        "max_abs_error:n"
    ),
    "compared": "name:s dtype:s weights:i exact:b sqnr_db:n? claimed_db:n? max_abs_error:n?",
    "inspect": (
        "archive:s file_bytes:i complete:b detailed:b weights:i coded_weights:i bits_per_weight:n "
        "packet_share:n video:video tensors:[tensor] account:d about:d metadata:d files:[file]"
    ),
    "video": (
        "codec:s profile:s tier:s level:s full_range:b? width:i height:i frames:i first_packet:i "
        "largest_packet:i"
    ),
    "tensor": (
        "name:s dtype:s shape:[i] weights:i coding:s alias_of:s? method:s? step:n? kernel:[i] "
        "escapes:i frames:[i]? sqnr_db:n? bits_per_weight:n?"
    ),
    "file": "path:s role:s size:i offset:i",
    "preview": "archive:s pictures:[s]",
    "calibrate": "stats:s samples:i model_sha256:s tensors:[moments] notes:[s]",
    "moments": "name:s gain_db:n? used:b",
    "demo": (
        "rows:[row] images:i weights:i pack_s:n unpack_s:n source:s archive:s restored:s"
    ),
    "row": "name:s file_bytes:i bits_per_weight:n correct:i agreement:n",
}  # fmt: skip


def check(value: Any, schema: str, where: str = "$") -> None:
    """Fail with the place at which a value breaks its schema."""
    if schema.endswith("?"):
        if value is not None:
            check(value, schema[:-1], where)
    elif schema.startswith("["):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            check(item, schema[1:-1], f"{where}[{number}]")
    elif schema in TYPES:
        allowed = TYPES[schema]
        assert isinstance(value, allowed), f"{where}: {value!r}"
        assert not isinstance(value, bool) or bool in allowed, f"{where}: {value!r}"
    else:
        fields = dict(field.split(":") for field in SCHEMAS[schema].split())
        assert value.keys() == fields.keys(), f"{where}: {value.keys() ^ fields.keys()}"
        for key, inner in fields.items():
            check(value[key], inner, f"{where}.{key}")
