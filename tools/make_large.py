#!/usr/bin/env python3
"""A synthetic sharded checkpoint of any size, to see what packing takes.

    python tools/make_large.py /tmp/large --gigabytes 8

Writes a Hugging Face folder of float32 shards with an index: an embedding of a quarter of the
weights, and layers of a language model. Values are random, with rows and columns of different
spread, as in real weights; the same arguments give the same bytes. At most a few megabytes are in
memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.checkpoint import Contents, create_checkpoint
from weightvid.spec import TensorSpec

GIGABYTE: Final = 10**9
#: bytes of all tensors from which the layers have this width.
WIDTHS: Final = ((4 * GIGABYTE, 4096), (GIGABYTE // 2, 2048), (0, 512))
BLOCK_WEIGHTS: Final = 1 << 20
SHARD_BYTES: Final = GIGABYTE


def plan(total_bytes: int) -> list[TensorSpec]:
    """Tensors of a language model of about so many bytes."""
    width = next(width for least, width in WIDTHS if total_bytes >= least)
    hidden = 11 * width // 4
    inner = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, width),
        "self_attn.v_proj": (width, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    layer = sum(rows * columns for rows, columns in inner.values()) + 2 * width
    weights = total_bytes // 4
    rows = weights // 4 // width
    specs = [TensorSpec("model.embed_tokens.weight", "F32", (rows, width))]
    for number in range(max(1, round((weights - rows * width) / layer))):
        head = f"model.layers.{number}"
        specs.append(TensorSpec(f"{head}.input_layernorm.weight", "F32", (width,)))
        specs += [TensorSpec(f"{head}.{n}.weight", "F32", shape) for n, shape in inner.items()]
        specs.append(TensorSpec(f"{head}.post_attention_layernorm.weight", "F32", (width,)))
    return [*specs, TensorSpec("model.norm.weight", "F32", (width,))]


def shards(specs: list[TensorSpec], limit_bytes: int) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors of at most so many bytes together, or one larger tensor."""
    open_shard: list[TensorSpec] = []
    for spec in specs:
        if open_shard and sum(s.stored_bytes for s in open_shard) + spec.stored_bytes > limit_bytes:
            yield open_shard
            open_shard = []
        open_shard.append(spec)
    yield open_shard


def values(spec: TensorSpec, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Blocks of rows of a tensor."""
    random = np.random.default_rng((seed, *spec.name.encode()))
    if len(spec.shape) == 1:
        yield (1 + 0.1 * random.standard_normal(spec.size)).astype(np.float32)
        return
    rows, columns = spec.shape
    across = np.exp(0.2 * random.standard_normal(columns)).astype(np.float32) / columns**0.5
    step = max(1, BLOCK_WEIGHTS // columns)
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        block = random.standard_normal((count, columns), np.float32)
        block *= np.exp(0.2 * random.standard_normal((count, 1))).astype(np.float32)
        block *= across
        yield block


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    specs = plan(round(options.gigabytes * GIGABYTE))
    options.folder.mkdir(parents=True)
    groups = list(shards(specs, SHARD_BYTES))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        contents = Contents(tuple(group), metadata={"format": "pt"})
        with create_checkpoint(options.folder / name, contents) as writer:
            for spec in group:
                writer.write_parts(spec.name, values(spec, options.seed))
                weight_map[spec.name] = name
        print(f"{name}: {sum(spec.stored_bytes for spec in group):,} bytes", flush=True)
    total = sum(spec.stored_bytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    largest = max(specs, key=lambda spec: spec.size)
    print(f"{total:,} bytes in all; the largest tensor, {largest.name}: {largest.stored_bytes:,}")


if __name__ == "__main__":
    main()
