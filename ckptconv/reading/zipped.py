"""Where the members of a zip file lie, for zip files as PyTorch writes them: stored, not packed.

A member that is stored as it is, is a range of bytes of the file. The directory at the end of the
file says where each one lies; it is checked before it is believed, and nothing is unpacked.
Source: PKWARE's APPNOTE.TXT 6.3, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to
4.3.16 (its end) and 4.5.3 (sizes and offsets of 64 bits).

Refused here although the format allows it: a comment, several disks, bytes that belong to nothing
before the directory or after its end, members that repeat a name or overlap, and a directory that
is larger than that of any checkpoint.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from .strict_json import show

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Member", "data_start", "read_directory", "read_member"]

MAX_DIRECTORY = 16 << 20
"""Bytes: a checkpoint of 10,000 tensors has about 1 MB."""

_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_IN_64_BITS = 0x0001  # number of the extra field that holds what does not fit 32 bits
_FULL_32, _FULL_16 = 0xFFFF_FFFF, 0xFFFF  # stand for such a value
_TRUNCATED = "its directory, which ends a zip file, is not there: the file is truncated or damaged"


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside the zip file.

    Attributes:
        name: as it stands in the directory.
        offset: of its local header, in bytes from the beginning of the zip file.
        size: of its content in bytes.
        limit: offset that its content does not pass: the next member, or the directory.
        packed: why its content is not a range of bytes of the zip file; empty if it is one.
    """

    name: str
    offset: int
    size: int
    limit: int
    packed: str


def read_directory(file: BinaryIO, size: int) -> dict[str, Member]:
    """Reads the directory of a zip file.

    Args:
        file: to read.
        size: of the file in bytes.

    Returns:
        The members by name, in the order of their place in the file.

    Raises:
        ValueError: the directory is damaged, or says what cannot be.
        OSError: from the system.
    """
    start, nbytes, count = _end(file, size)
    if nbytes > MAX_DIRECTORY:
        raise ValueError(f"its directory has {nbytes:,} bytes, more than {MAX_DIRECTORY:,}")
    raw = _at(file, start, nbytes)
    entries = sorted(_entries(raw), key=lambda entry: entry[1])
    if len(entries) != count:
        raise ValueError(f"its directory has {len(entries):,} entries where it says {count:,}")
    members: dict[str, Member] = {}
    limits = [*(entry[1] for entry in entries[1:]), start]
    for (encoded, offset, content, taken, packed), limit in zip(entries, limits, strict=True):
        name = encoded.decode(errors="backslashreplace")
        if name in members:
            raise ValueError(f"it has several members {show(name)}")
        if offset + _LOCAL.size + len(encoded) + taken > limit:
            raise ValueError(f"its member {show(name)} of {taken:,} bytes overlaps what follows it")
        members[name] = Member(name, offset, content, limit, packed)
    return members


def data_start(file: BinaryIO, member: Member) -> int:
    """Returns where the content of a member begins, in bytes from the beginning of the file.

    Raises:
        ValueError: the content is packed, or the member's own header does not fit the directory.
        OSError: from the system.
    """
    if member.packed:
        raise ValueError(f"its member {show(member.name)} is {member.packed}")
    raw = _at(file, member.offset, _LOCAL.size)
    signature, _, _, method, _, _, _, _, _, length, extra = _LOCAL.unpack(raw)
    start: int = member.offset + _LOCAL.size + length + extra
    name = _at(file, member.offset + _LOCAL.size, length)
    if (
        signature != b"PK\x03\x04"
        or method != 0
        or name.decode(errors="backslashreplace") != member.name
        or start + member.size > member.limit
    ):
        raise ValueError(
            f"the header of its member {show(member.name)} is not as the directory says"
        )
    return start


def read_member(file: BinaryIO, member: Member, most: int) -> bytes:
    """Returns the content of a member.

    Args:
        file: to read.
        member: of the file.
        most: bytes that it may have.

    Raises:
        ValueError: it is larger, or as for `data_start`.
        OSError: from the system.
    """
    if member.size > most:
        raise ValueError(
            f"its member {show(member.name)} has {member.size:,} bytes, more than {most:,}"
        )
    return _at(file, data_start(file, member), member.size)


def _end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Returns offset, bytes and number of entries of the directory."""
    at = size - _END.size
    if at < 0:
        raise ValueError(_TRUNCATED)
    signature, *fields, comment = _END.unpack(_at(file, at, _END.size))
    if signature != b"PK\x05\x06" or comment:
        raise ValueError(_TRUNCATED)
    disks = fields[:2]
    here, count, nbytes, start = fields[2:]
    if at >= _LOCATOR64.size:
        before = _at(file, at - _LOCATOR64.size, _LOCATOR64.size)
        signature, disk, at64, total = _LOCATOR64.unpack(before)
        if signature == b"PK\x06\x07":
            at -= _LOCATOR64.size
            if at64 + _END64.size > at or disk or total > 1:
                raise ValueError(_TRUNCATED)
            raw = _at(file, at64, _END64.size)
            signature, rest, _, _, *disks, here, count, nbytes, start = _END64.unpack(raw)
            if signature != b"PK\x06\x06" or at64 + 12 + rest != at:
                raise ValueError(_TRUNCATED)
            at = at64
    if any(disks) or here != count:
        raise ValueError("it is one part of several")
    if start + nbytes != at:
        raise ValueError(
            f"its directory would be {nbytes:,} bytes from byte {start:,} on, but ends at {at:,}"
        )
    return start, nbytes, count


def _entries(raw: bytes) -> Iterator[tuple[bytes, int, int, int, str]]:
    """Yields name, offset, size, size in the file, and how it is packed, of each member."""
    at = 0
    while at < len(raw):
        if len(raw) - at < _ENTRY.size:
            raise ValueError("its directory is damaged")
        fields = _ENTRY.unpack_from(raw, at)
        signature, flags, method, taken, size = fields[0], fields[3], fields[4], *fields[8:10]
        name_bytes, extra_bytes, comment_bytes, disk = fields[10:14]
        offset = fields[16]
        at += _ENTRY.size
        name, extra = raw[at : at + name_bytes], raw[at + name_bytes :][:extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        if signature != b"PK\x01\x02" or at > len(raw):
            raise ValueError("its directory is damaged")
        values = {"size": size, "taken": taken, "offset": offset}
        wide = [key for key, value in values.items() if value == _FULL_32]
        if wide:
            values |= zip(wide, _in_64_bits(extra, len(wide)), strict=True)
        size, taken, offset = values.values()
        packed = "encrypted" if flags & 1 else "compressed" if method or size != taken else ""
        if disk not in (0, _FULL_16):
            raise ValueError("it is one part of several")
        yield name, offset, size, taken, packed


def _in_64_bits(extra: bytes, count: int) -> tuple[int, ...]:
    """Returns the first values of 64 bits that an extra field holds."""
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        if kind == _IN_64_BITS and 8 * count <= nbytes <= len(extra) - at - 4:
            return struct.unpack_from(f"<{count}Q", extra, at + 4)
        at += 4 + nbytes
    raise ValueError("its directory lacks a size of 64 bits")


def _at(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    """Returns bytes of the file, all of them."""
    raw = os.pread(file.fileno(), nbytes, offset)
    if len(raw) != nbytes:
        raise ValueError("the file became shorter while it was read")
    return raw
