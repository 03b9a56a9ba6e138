"""Reversible variable-length codes: what they and their tables cost, on the levels of a model.

For the levels of each tensor of ``reversible_codes.py MODEL [STEP_FACTOR]``: the mean length of
Huffman's code, of a symmetric and of an asymmetric reversible code (Takishima, Wada and Murakami,
1995), and of Girod's construction (1999: Huffman's words and the same stream, each word reversed,
delayed by the longest word and added), which costs one longest word a packet and no more. And the
size of a table: code lengths, as canonical codes need them, or the words themselves.
"""

from __future__ import annotations

import heapq
import sys
import tempfile
from pathlib import Path

import numpy as np
from cifar import table, write_results

from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint

LENGTH_BITS = 4
LONGEST = 20


def huffman_lengths(counts: list[int]) -> list[int]:
    """Length of the word of each symbol, from the most frequent one on."""
    if len(counts) == 1:
        return [1]
    heap: list[tuple[int, int, tuple[int, ...]]] = [(c, n, (n,)) for n, c in enumerate(counts)]
    lengths = [0] * len(counts)
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        both = first[2] + second[2]
        for number in both:
            lengths[number] += 1
        heapq.heappush(heap, (first[0] + second[0], min(both), both))
    return sorted(lengths)


def symmetric_words(count: int, shortest: int) -> list[str]:
    """Palindromes none of which begins another: read alike from both ends; none if that fails."""
    found: dict[str, None] = {}
    size = shortest
    while True:
        if size > LONGEST:
            return []
        for half in range(1 << (size + 1) // 2):
            left = f"{half:0{(size + 1) // 2}b}"
            word = left + left[: size // 2][::-1]
            # What begins a palindrome also ends it, reversed; so one test serves both directions.
            if not any(word[:n] in found for n in range(1, size)):
                found[word] = None
                if len(found) == count:
                    return list(found)
        size += 1


def asymmetric_words(lengths: list[int]) -> list[str]:
    """Words that neither begin nor end another, as near to the lengths as a greedy search comes.

    None if it finds no words of at most `LONGEST` bits.
    """
    found: dict[str, None] = {}
    size = number = 0
    for wanted in lengths:
        if wanted > size:
            size, number = wanted, 0
        while True:
            if number == 1 << size:
                size, number = size + 1, 0
            if size > LONGEST:
                return []
            word = f"{number:0{size}b}"
            # A word that was refused once stays refused.
            number += 1
            if not any(word[:n] in found or word[-n:] in found for n in range(1, size)):
                found[word] = None
                break
    return list(found)


def mean_length(counts: list[int], lengths: list[int]) -> float:
    return sum(c * n for c, n in zip(counts, lengths, strict=True)) / sum(counts)


def girod(words: list[str]) -> str:
    """A stream that is decodable from both ends."""
    longest = "0" * max(map(len, words))
    forward = "".join(words) + longest
    backward = longest + "".join(word[::-1] for word in words)
    return "".join("01"[a != b] for a, b in zip(forward, backward, strict=True))


def decode_girod(stream: str, book: set[str]) -> list[str]:
    """The words, read from the front."""
    longest = max(map(len, book))
    delayed, found, word = "0" * longest, [], ""
    for place in range(len(stream) - longest):
        bit = "01"[stream[place] != delayed[place]]
        word += bit
        if word in book:
            found.append(word)
            delayed, word = delayed + word[::-1], ""
    return found


def canonical(lengths: list[int]) -> list[str]:
    words, code = [], 0
    for place, length in enumerate(lengths):
        code <<= length - lengths[place - 1] if place else 0
        words.append(f"{code:0{length}b}")
        code += 1
    return words


def main(model: str, factor: float) -> None:
    sums = dict.fromkeys(
        ("levels", "entropy", "huffman", "symmetric", "asymmetric", "girod", "tables_of_lengths",
         "tables_of_words", "tables_symmetric_halves", "tables_asymmetric_words"), 0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mp4"
        pack_checkpoint(model, path, PackOptions(step_factor=factor, fidelity="integers"))
        with open_archive(path) as archive:
            names = [name for name in archive if archive.info(name).parts]
            levels = [archive.levels(name).values.reshape(-1) for name in names]
    for values in levels:
        found = sorted(np.unique(values, return_counts=True)[1].tolist(), reverse=True)
        lengths = huffman_lengths(found)
        # Several shortest lengths are tried, as the literature does.
        symmetric = min(
            filter(None, ([len(w) for w in symmetric_words(len(found), n)] for n in range(2, 7))),
            key=lambda sizes: mean_length(found, sizes),
        )
        asymmetric = min(
            filter(
                None,
                (
                    [len(w) for w in asymmetric_words([max(n, x) for x in lengths])]
                    for n in range(2, 6)
                ),
            ),
            key=lambda sizes: mean_length(found, sizes),
        )
        total = sum(found)
        shares = np.array(found) / total
        words = canonical(lengths)
        chance = np.random.default_rng(0).integers(0, len(words), 200)
        sample = [words[i] for i in chance]
        if decode_girod(girod(sample), set(words)) != sample:
            raise SystemExit("Girod's stream does not decode")
        for name, bits in (
            ("levels", total), ("entropy", -total * float((shares * np.log2(shares)).sum())),
            ("huffman", total * mean_length(found, lengths)),
            ("symmetric", total * mean_length(found, symmetric)),
            ("asymmetric", total * mean_length(found, asymmetric)),
            ("girod", total * mean_length(found, lengths) + lengths[-1]),
            ("tables_of_lengths", LENGTH_BITS * len(found)),
            ("tables_of_words", sum(LENGTH_BITS + n for n in lengths)),
            ("tables_symmetric_halves", sum(LENGTH_BITS + (n + 1) // 2 for n in symmetric)),
            ("tables_asymmetric_words", sum(LENGTH_BITS + n for n in asymmetric)),
        ):  # fmt: skip
            sums[name] += bits
    count = sums.pop("levels")
    lines = [f"{count:,.0f} levels of {len(levels)} tensors, step factor {factor}", ""]
    rows = [(name, f"{bits / count:.4f}", f"{bits / 8:,.0f}") for name, bits in sums.items()]
    lines += table(("what", "bits a level", "bytes"), rows)
    write_results("reversible_codes", lines, {"levels": count, **sums})


if __name__ == "__main__":
    main(sys.argv[1], float((sys.argv[2:] or ["0.36"])[0]))
