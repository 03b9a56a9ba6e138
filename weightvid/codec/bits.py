"""Reading headers bit by bit."""

from __future__ import annotations

from weightvid.errors import CodecError


class Bits:
    """Bits of some bytes, the highest of each byte first.

    Parameters
    ----------
    data : bytes
    """

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        """The next bits as an unsigned number.

        Raises
        ------
        CodecError
            There are fewer.

        Examples
        --------
        >>> bits = Bits(bytes([0b10110001]))
        >>> bits.take(3), bits.take(5)
        (5, 17)
        """
        if count > self._left:
            raise CodecError("a header is cut short")
        self._left -= count
        return (self._value >> self._left) & ((1 << count) - 1)

    def flag(self) -> bool:
        """The next bit."""
        return bool(self.take(1))

    def golomb(self) -> int:
        """An unsigned Exp-Golomb number (H.264 9.1).

        Examples
        --------
        >>> Bits(bytes([0b00101000])).golomb()
        4
        """
        zeros = 0
        while not self.flag():
            zeros += 1
            if zeros > 32:
                raise CodecError("a header holds an impossible number")
        return (1 << zeros) - 1 + self.take(zeros)
