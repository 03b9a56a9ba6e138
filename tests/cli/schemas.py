"""What ``--json`` prints: the keys of each object and the types of their values.

A type, a tuple of types, a list of one schema (any number of such items), or a dict (an object with
exactly these keys).
"""

from __future__ import annotations

from types import NoneType
from typing import Any

NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, NoneType)

PACK = {
    "archive": str,
    "source": str,
    "file_bytes": int,
    "source_bytes": int,
    "weights": int,
    "coded_weights": int,
    "stream_bytes": int,
    "bits_per_weight": NUMBER,
    "stream_bits_per_weight": NUMBER,
    "sqnr_db": OPTIONAL_NUMBER,
    "frames": int,
    "width": int,
    "height": int,
    "skipped": [str],
    "unused_keeps": [str],
    "seconds": NUMBER,
    "side_files": [str],
    "step_factor": NUMBER,
    "encodings": int,
    "warnings": [str],
    "loss": OPTIONAL_NUMBER,
    "metric_before": OPTIONAL_NUMBER,
    "metric": OPTIONAL_NUMBER,
    "evaluations": int,
    "calibration": str,
}
DEFECT = {"code": str, "message": str, "offset": (int, NoneType)}
UNPACK = {
    "ok": bool,
    "archive": str,
    "output": str,
    "tensors": int,
    "weights": int,
    "file_bytes": int,
    "aliases": [str],
    "converted": [str],
    "notes": [str],
    "missing": [str],
    "defect": (NoneType, DEFECT),
    "seconds": NUMBER,
    "side_files": [str],
}
COMPARISON = {
    "tensors": [
        {
            "name": str,
            "dtype": str,
            "weights": int,
            "exact": bool,
            "sqnr_db": OPTIONAL_NUMBER,
            "max_abs_error": OPTIONAL_NUMBER,
        }
    ],
    "missing": [str],
    "extra": [str],
    "mismatched": [str],
    "sqnr_db": OPTIONAL_NUMBER,
    "max_abs_error": NUMBER,
}
VERIFY = {
    "ok": bool,
    "archive": str,
    "against": (str, NoneType),
    "tensors": int,
    "tensors_whole": int,
    "weights": int,
    "frames": (int, NoneType),
    "file_bytes": int,
    "defect": (NoneType, DEFECT),
    "affected": [str],
    "comparison": (NoneType, COMPARISON),
    "seconds": NUMBER,
}
INSPECT = {
    "archive": str,
    "file_bytes": int,
    "complete": bool,
    "format_version": str,
    "weights": int,
    "coded_weights": int,
    "bits_per_weight": NUMBER,
    "stream_bits_per_weight": NUMBER,
    "video": {
        "codec": str,
        "profile": str,
        "tier": str,
        "level": str,
        "width": int,
        "height": int,
        "frames": int,
    },
    "tensors": [
        {
            "name": str,
            "dtype": str,
            "shape": [int],
            "weights": int,
            "coding": str,
            "alias_of": (str, NoneType),
            "quantizer": (str, NoneType),
            "step": OPTIONAL_NUMBER,
            "escapes": int,
            "frames": (NoneType, [int]),
            "sqnr_db": OPTIONAL_NUMBER,
            "bits_per_weight": OPTIONAL_NUMBER,
            "slope": OPTIONAL_NUMBER,
        }
    ],
    "account": dict,
    "about": dict,
    "metadata": dict,
    "files": [{"path": str, "role": str, "size": int, "codec": str, "box_bytes": int}],
}
PREVIEW = {"archive": str, "pictures": [str]}
COMPARE_ROW = {
    "label": str,
    "series": str,
    "kind": str,
    "setting": dict,
    "status": str,
    "message": str,
    "command": str,
    "file_bytes": (int, NoneType),
    "items": dict,
    "bits_per_weight": OPTIONAL_NUMBER,
    "exact": bool,
    "sqnr_db": OPTIONAL_NUMBER,
    "worst_sqnr_db": OPTIONAL_NUMBER,
    "worst_tensor": (str, NoneType),
    "encode_s": OPTIONAL_NUMBER,
    "decode_s": OPTIONAL_NUMBER,
    "encode_all_s": OPTIONAL_NUMBER,
    "decode_all_s": OPTIONAL_NUMBER,
    "encode_weights_per_s": OPTIONAL_NUMBER,
    "decode_weights_per_s": OPTIONAL_NUMBER,
    "encode_all_weights_per_s": OPTIONAL_NUMBER,
    "decode_all_weights_per_s": OPTIONAL_NUMBER,
    "codec_encode_s": OPTIONAL_NUMBER,
    "codec_decode_s": OPTIONAL_NUMBER,
    "encode_peak_bytes": (int, NoneType),
    "decode_peak_bytes": (int, NoneType),
    "timing": str,
    "weights": int,
    "metric": OPTIONAL_NUMBER,
    "metric_change": OPTIONAL_NUMBER,
    "kl": OPTIONAL_NUMBER,
    "cosine_loss": OPTIONAL_NUMBER,
    "agreement": OPTIONAL_NUMBER,
    "restored_sha256": str,
    "options": dict,
    "about": dict,
    "versions": dict,
}
DEMO = {
    "rows": [
        {
            "name": str,
            "file_bytes": int,
            "bits_per_weight": NUMBER,
            "correct": int,
            "agreement": NUMBER,
        }
    ],
    "images": int,
    "weights": int,
    "exact_tensors": int,
    "tensors": int,
    "pack_s": NUMBER,
    "unpack_s": NUMBER,
    "archive": str,
    "restored": str,
}


def check(value: Any, schema: Any, where: str = "$") -> None:
    """Fail with the place at which a value breaks its schema."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert value.keys() == schema.keys(), f"{where}: {value.keys() ^ schema.keys()}"
        for key, inner in schema.items():
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            check(item, schema[0], f"{where}[{number}]")
    elif isinstance(schema, tuple) and not all(isinstance(s, type) for s in schema):
        simple = tuple(s for s in schema if isinstance(s, type))
        if not isinstance(value, simple):
            check(value, next(s for s in schema if not isinstance(s, type)), where)
    else:
        assert isinstance(value, schema), f"{where}: {value!r}"
        assert not isinstance(value, bool) or schema is bool, f"{where}: {value!r}"
