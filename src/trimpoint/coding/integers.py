"""Numbers of any size in few bytes, and reading that never goes beyond the end."""

from trimpoint.coding.entropy import DAMAGED
from trimpoint.errors import ArtifactError

_LONGEST = 10


def packed(*values: int) -> bytes:
    r"""Return non-negative integers as LEB128: seven bits a byte, the lowest first.

    Example:
        >>> packed(5, 300)
        b'\x05\xac\x02'
    """
    out = bytearray()
    for value in values:
        while value >= 128:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


class Cursor:
    """Reads integers and bytes one after another.

    Args:
        data: to read.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def integer(self, most: int = 2**63 - 1, what: str = "number") -> int:
        """Return the next integer.

        Raises:
            ArtifactError: if there is none, or it exceeds `most`.
        """
        value = 0
        for index in range(_LONGEST):
            byte = self.take(1)[0]
            value |= (byte & 127) << (7 * index)
            if byte < 128:
                break
        else:
            raise ArtifactError(f"The coded file is damaged: a {what} has no end.", DAMAGED)
        if value > most:
            raise ArtifactError(f"The coded file is damaged: a {what} must be at most {most}. Got {value}.", DAMAGED)
        return value

    def take(self, count: int) -> bytes:
        """Return the next bytes.

        Raises:
            ArtifactError: if there are fewer.
        """
        part = self.data[self.position : self.position + count]
        if len(part) != count:
            raise ArtifactError(f"The coded file is damaged: {count} more bytes must follow. Got {len(part)}.", DAMAGED)
        self.position += count
        return part

    def rest(self) -> bytes:
        """Return everything that is left."""
        return self.take(len(self.data) - self.position)
