"""Zip archives of stored (uncompressed) members: the part of the format that a checkpoint needs, at its own speed.

`zipfile` spends 25 us on writing a member and 20 us on opening one; an optimizer of 100,000 variables has 200,000.

    local header, name, extra, content      once per member
    directory: entry, name, extra           once per member; its sizes, offsets and CRCs are the ones that count
    zip64 end record, zip64 locator         only when a size, an offset or the number of members does not fit
    end record

`Writer` gives the bytes that `zipfile` gives for members of the year 1980. `Reader` reads what either wrote, and is
stricter than the format: no comment, no compression, no encryption, members one after the other in the directory's
order, each with a name of its own. So what all members claim together is at most the size of the file.

Reference: PKWARE, APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (end
records), 4.4.4 (flags), 4.5.3 (zip64 extra field).
"""

import math
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import BinaryIO
from zlib import crc32

MAX_NAME = 0xFFFF  # bytes: the length is a 16-bit field
# Above these, zip64 fields take over. 31 bits, as in `zipfile`, because some readers take the 32 for signed ones.
LIMIT, COUNT_LIMIT = 0x7FFFFFFF, 0xFFFF

_BITS16, _BITS32 = 0xFFFF, 0xFFFFFFFF
_VERSION64 = 45
_UNIX, _MODE = 3, 0o600 << 16
_MIDNIGHT, _NEW_YEAR_1980 = 0, 1 << 5 | 1
_DESCRIPTOR, _UTF8 = 0x8, 0x800
_KNOWN_FLAGS = _DESCRIPTOR | _UTF8

# Signature, version, reserved, flags, method, time, date, CRC, size, size again, length of name, of extra.
_LOCAL = Struct("<4sBBHHHHLLLHH")
_NAME = _LOCAL.size  # where the name begins
_MAX_HEADER = _NAME + 2 * 0xFFFF
_LOCAL_SIZES = Struct("<HHQQ")  # a zip64 extra field with both sizes
_MEMBER = _LOCAL.size + _LOCAL_SIZES.size  # what a member takes besides its name and its content
# Signature, version, system, version, reserved, flags, method, time, date, CRC, sizes, lengths of name, extra and
# comment, disk, two kinds of attributes, offset.
_ENTRY = Struct("<4sBBBBHHHHLLLHHHHHLL")
# The same two with only the fields that a reader looks at: with all of them, unpacking takes twice as long.
_LOCAL_READ = Struct("<4s2xHH16xHH")
_ENTRY_READ = Struct("<4s4xHH4xLLLHHHH6xL")
# Signature, size of the rest, versions, disks, number of members here and in all, size and offset of the directory.
_END64 = Struct("<4sQHHLLQQQQ")
_LOCATOR = Struct("<4sLQL")  # signature, disk, offset of the record above, number of disks
_END = Struct("<4sHHHHLLH")  # as the record above; at last the length of a comment

_PIECE = 4 << 20  # bytes; large contents are read and summed by pieces
_WINDOW = 1 << 18  # bytes; small members are read together
_POLYNOMIAL = 0xEDB88320  # of CRC-32, reflected, without its x^32


class Writer:
    """Writes members one after the other, then the directory.

    Args:
        file: an empty, seekable file, best with a buffer: the writer makes small writes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offset = 0
        self._directory = bytearray()
        self._count = 0

    def add(self, name: str, head: bytes, rest: memoryview | None = None, rest_crc: int = 0) -> None:
        """Write a member.

        Args:
            name: at most `MAX_NAME` bytes of UTF-8, without NUL, and not used before.
            head: the content, or its beginning.
            rest: what follows, of any size: it is neither copied nor read but to be written.
            rest_crc: the CRC of `rest`.
        """
        raw, crc, size = name.encode(), crc32(head), len(head)
        if rest is not None:
            crc, size = joined(crc, rest_crc, len(rest)), size + len(rest)
        flags, length, offset = 0 if name.isascii() else _UTF8, len(raw), self._offset
        local = _LOCAL.pack(
            b"PK\3\4", _VERSION64, 0, flags, 0, _MIDNIGHT, _NEW_YEAR_1980,
            crc, _BITS32, _BITS32, length, _LOCAL_SIZES.size,
        )  # fmt: skip
        if offset <= LIMIT and size <= LIMIT:
            size32, offset32, extra = size, offset, b""
        else:
            size32, offset32, extra = _in_32_bits(size, offset)
        entry = _ENTRY.pack(
            b"PK\1\2", _VERSION64, _UNIX, _VERSION64, 0, flags, 0, _MIDNIGHT, _NEW_YEAR_1980,
            crc, size32, size32, length, len(extra), 0, 0, 0, _MODE, offset32,
        )  # fmt: skip
        self._file.write(b"%b%b%b%b" % (local, raw, _LOCAL_SIZES.pack(1, 16, size, size), head))
        if rest is not None:
            self._file.write(rest)
        self._directory += b"%b%b%b" % (entry, raw, extra)
        self._count += 1
        self._offset = offset + _MEMBER + length + size

    def close(self) -> None:
        """Write the directory. The file stays open."""
        offset, size, count = self._offset, len(self._directory), self._count
        self._file.write(self._directory)
        if count > COUNT_LIMIT or max(offset, size) > LIMIT:
            rest = _END64.size - 12  # what follows the field itself
            self._file.write(
                _END64.pack(b"PK\6\6", rest, _VERSION64, _VERSION64, 0, 0, count, count, size, offset)
                + _LOCATOR.pack(b"PK\6\7", 0, offset + size, 1)
            )
        fits = min(count, _BITS16)
        self._file.write(_END.pack(b"PK\5\6", 0, 0, fits, fits, min(size, _BITS32), min(offset, _BITS32), 0))


class Reader:
    """Reads the directory at once, and members in any order; fastest in the directory's.

    Args:
        file: a seekable file.

    Attributes:
        numbers: the members' names, each with its number in the directory.

    Raises:
        ValueError, struct.error: no archive, a damaged one, or one outside the rules above. Also from every method.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.numbers, self._offsets, self._sizes, self._crcs = _directory(file)

    def size(self, name: str) -> int:
        """The size of a member's content in bytes.

        Raises:
            KeyError: there is no such member.
        """
        return self._sizes[self.numbers[name]]

    def read(self, name: str) -> bytes:
        """Return the content of a member, all at once.

        Raises:
            KeyError: there is no such member.
        """
        (content,) = self.contents([name])
        assert isinstance(content, bytes)
        return content

    def contents(
        self, names: Iterable[str], largest: float = math.inf, *, summed: bool = True
    ) -> "Iterator[bytes | Member]":
        """Return the contents of members in turn, each all at once; one of more than `largest` bytes as a `Member`.

        Args:
            names: of members.
            largest: in bytes.
            summed: whether the contents are compared with their CRCs; a `Member` does so when it is closed.

        Raises:
            KeyError: there is no such member.
        """
        file, numbers, offsets, sizes, crcs = self._file, self.numbers, self._offsets, self._sizes, self._crcs
        block, begin, end = b"", 0, 0  # what was read last, and where in the file it lies
        order, number = [*numbers, None], -1
        for name in names:
            number += 1
            if order[number] != name:  # which is sooner seen than found in a large dict, whose entries lie anywhere
                number = numbers[name]
            offset, limit, size = offsets[number], offsets[number + 1], sizes[number]
            if offset < begin or limit > end:  # one read for many members costs less than three for each
                wanted = min(limit - offset, _MAX_HEADER + (size if size <= largest else 0))
                file.seek(offset)
                block, begin = file.read(max(wanted, _WINDOW)), offset
                end = begin + len(block)
            place = offset - begin
            signature, flags, method, length, extra = _LOCAL_READ.unpack_from(block, place)
            place += _NAME
            start = place + length
            if signature != b"PK\3\4" or flags & ~_KNOWN_FLAGS or method or block[place:start] != name.encode():
                raise ValueError(f"{name} has a damaged header")
            start += extra
            if begin + start + size > limit:
                raise ValueError(f"{name} overlaps what follows it")
            if size > largest:
                file.seek(begin + start)
                yield Member(file, name, size, crcs[number] if summed else None)
                continue
            content = block[start : start + size]
            if len(content) != size or (summed and crc32(content) != crcs[number]):
                raise ValueError(f"Bad CRC-32 for {name}")
            yield content


class Member:
    """The content of one member, from its first byte to its last, of which `left` are still to be read.

    It ends when another member is read.
    """

    def __init__(self, file: BinaryIO, name: str, size: int, crc: int | None) -> None:
        self._file, self._name, self.left, self._expected = file, name, size, crc
        self._crc = 0

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or as many as are left."""
        content = self._file.read(min(size, self.left))
        self.left -= len(content)
        self._sum(content)
        return content

    def readinto(self, buffer: memoryview) -> None:
        """Fill a buffer of bytes.

        Raises:
            ValueError: the member has fewer bytes left.
        """
        if len(buffer) > self.left:
            raise ValueError(f"{self._name} has {self.left} bytes, not {len(buffer)}")
        for start in range(0, len(buffer), _PIECE):
            piece = buffer[start : start + _PIECE]
            got = self._file.readinto(piece)  # type: ignore[attr-defined]  # every binary file has it
            self.left -= got
            self._sum(piece[:got])

    def _sum(self, content: bytes | memoryview) -> None:
        if self._expected is not None:
            self._crc = crc32(content, self._crc)

    def close(self) -> None:
        """Compare the CRC of what was read with the directory's, where that was asked for.

        Raises:
            ValueError: they differ, or bytes are left.
        """
        if self.left:
            raise ValueError(f"{self._name} has {self.left} bytes too many, or the file became shorter")
        if self._expected not in (None, self._crc):
            raise ValueError(f"Bad CRC-32 for {self._name}")


def joined(crc: int, next_crc: int, next_size: int) -> int:
    """The CRC of two byte strings one after the other, from the CRC of each and the size of the second.

    A CRC is a polynomial over GF(2) modulo `_POLYNOMIAL`; what follows by n bytes multiplies it by x^(8n), and adds its
    own. Bits are reflected: x^0 is the highest one.
    """
    shift, power, bits = 1 << 31, 1 << 30, 8 * next_size  # x^0; x^1, then its squares
    while bits:
        if bits & 1:
            shift = _product(shift, power)
        power, bits = _product(power, power), bits >> 1
    return _product(shift, crc) ^ next_crc


def _product(a: int, b: int) -> int:
    product = 0
    for place in range(31, -1, -1):
        if a >> place & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _in_32_bits(size: int, offset: int) -> tuple[int, int, bytes]:
    """What a directory's entry says of a size and an offset in its 32 bits each, and the extra field for the others."""
    wide = [size, size] if size > LIMIT else []
    wide += [offset] if offset > LIMIT else []
    extra = Struct(f"<HH{len(wide)}Q").pack(1, 8 * len(wide), *wide)
    return size if size <= LIMIT else _BITS32, offset if offset <= LIMIT else _BITS32, extra


def _directory(file: BinaryIO) -> tuple[dict[str, int], list[int], list[int], list[int]]:
    """Return each name's number, and by number where the header begins, the content's size and its CRC.

    There is one more place: where the last member must have ended. Lists, because a tuple for each member would keep
    the garbage collector at work.
    """
    offset, size, count = _end(file)
    file.seek(offset)
    table = file.read(size)
    numbers: dict[str, int] = {}
    offsets: list[int] = []
    sizes: list[int] = []
    crcs: list[int] = []
    position = free = 0
    while position < size:
        fields = _ENTRY_READ.unpack_from(table, position)
        signature, flags, method, crc, stored, content, length, extra, comment, disk, start = fields
        begin = position + _ENTRY.size
        position = begin + length
        name = table[begin:position].decode()
        if _BITS32 in (content, stored, start):
            stored, content, start = _wide(table[position : position + extra], stored, content, start)
        position += extra + comment
        if signature != b"PK\1\2" or disk:
            raise ValueError("the directory is damaged")
        if flags & ~_KNOWN_FLAGS or method or stored != content:
            raise ValueError(f"{name} is compressed or encrypted")
        if start < free:
            raise ValueError(f"{name} overlaps the member before it")
        free = start + _LOCAL.size + length + content
        numbers[name] = len(sizes)
        offsets.append(start)
        sizes.append(content)
        crcs.append(crc)
    if free > offset:
        raise ValueError(f"{name} overlaps the directory")
    if position != size or len(sizes) != count:
        raise ValueError(f"the directory must have {count} members in {size} bytes")
    if len(numbers) != count:
        raise ValueError("two members have the same name")
    offsets.append(offset)
    return numbers, offsets, sizes, crcs


def _end(file: BinaryIO) -> tuple[int, int, int]:
    """Offset, size and number of members of the directory, from the end record or from the zip64 one before it."""
    end = file.seek(0, 2) - _END.size
    if end < 0:
        raise ValueError("File is not a zip file")
    file.seek(end)
    signature, disk, first, here, count, size, offset, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\5\6":
        raise ValueError("File is not a zip file")
    if disk or first or here != count or comment:
        raise ValueError("the end record is damaged")
    if offset + size == end:  # even where the fields are at their limits: 65,535 members need no zip64
        return offset, size, count

    end -= _LOCATOR.size + _END64.size
    if end < 0:
        raise ValueError("the end record is damaged")
    file.seek(end)
    wide = _END64.unpack(file.read(_END64.size))
    locator = _LOCATOR.unpack(file.read(_LOCATOR.size))
    signature, _, _, _, disk, first, here, count64, size64, offset64 = wide
    if (
        (signature, disk, first, here) != (b"PK\6\6", 0, 0, count64)
        or locator != (b"PK\6\7", 0, end, 1)
        or (count, size, offset) != (min(count64, _BITS16), min(size64, _BITS32), min(offset64, _BITS32))
        or offset64 + size64 != end
    ):
        raise ValueError("the end record is damaged")
    return offset64, size64, count64


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Return the fields, those at their 32-bit limit with the values that the zip64 extra field has for them."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = Struct("<HH").unpack_from(extra, position)
        position += 4
        if kind == 1:
            values = list(Struct(f"<{size // 8}Q").unpack_from(extra, position))
            stored, content, start = fields
            content, stored, start = (
                values.pop(0) if field == _BITS32 else field for field in (content, stored, start)
            )
            return [stored, content, start]
        position += size
    return list(fields)
