"""The members of a zip file as byte ranges: PyTorch stores them uncompressed.

`zipfile` reads the directory at the end of the file and trusts most of it, so the result is checked
here. Nothing is decompressed.
Source: PKWARE's APPNOTE.TXT 6.3, sections 4.3.7 (local header) and 4.3.16 (end record).

Refused although the format allows it: a comment, several disks, bytes before the first member or
after the end record, repeated names, overlapping members, and a directory far larger than that of
any checkpoint.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile, ZipInfo

from ..files import read_at
from .strict_json import show

MAX_DIRECTORY = 16 << 20
"""Bytes; a checkpoint of 10,000 tensors needs about 1 MB."""

_LOCAL_HEADER = struct.Struct("<4s4xH16x2H")  # signature, method, length of name and extra
_END_RECORD = struct.Struct("<4s4H8xH")  # signature, 2 disks, 2 counts, length of comment
_FULL_16 = 0xFFFF  # means that a zip64 record holds the value
_UTF_8 = 0x800  # flag of an entry, whose name is in code page 437 otherwise
_ENCRYPTED = 0x1


class Truncated(ValueError):
    """The file ends before the directory does."""

    def __init__(self) -> None:
        super().__init__(
            "the directory that ends every zip file is missing: the file is truncated or damaged"
        )


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside the zip file: its entry in the directory, and its limit.

    The limit is the offset in the zip file where the next member or the directory begins.
    """

    entry: ZipInfo
    limit: int

    @property
    def size(self) -> int:
        """Size of the content in bytes."""
        return self.entry.file_size

    @property
    def is_compressed(self) -> bool:
        """Whether the content is anything but a copy of the bytes."""
        return self.entry.compress_type != 0 or self.entry.compress_size != self.size

    def data_start(self, file: BinaryIO) -> int:
        """Returns the offset of the content in the zip file.

        ValueError if it is compressed or encrypted, or its local header contradicts the directory.
        """
        entry, name = self.entry, show(self.entry.orig_filename)
        if entry.flag_bits & _ENCRYPTED or self.is_compressed:
            how = "encrypted" if entry.flag_bits & _ENCRYPTED else "compressed"
            raise ValueError(f"its member {name} is {how}")
        encoded = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF_8 else "cp437")
        raw = read_at(file, entry.header_offset, _LOCAL_HEADER.size + len(encoded))
        *found, extra = _LOCAL_HEADER.unpack_from(raw)
        start: int = entry.header_offset + len(raw) + extra
        expected = [b"PK\x03\x04", 0, len(encoded)]
        if found != expected or not raw.endswith(encoded) or start + self.size > self.limit:
            raise ValueError(f"the local header of its member {name} contradicts the directory")
        return start

    def read(self, file: BinaryIO, max_bytes: int) -> bytes:
        """Returns the content; ValueError if it exceeds `max_bytes`, or as for `data_start`."""
        if self.size > max_bytes:
            name = show(self.entry.orig_filename)
            raise ValueError(f"its member {name} has {self.size:,} bytes, more than {max_bytes:,}")
        return read_at(file, self.data_start(file), self.size)


def read_directory(file: BinaryIO, size: int) -> dict[str, Member]:
    """Returns the members of a zip file by name, in the order of their data.

    Raises:
        ValueError: the directory is damaged, contradicts itself or is too large.
    """
    if size < _END_RECORD.size:
        raise Truncated
    end = read_at(file, size - _END_RECORD.size, _END_RECORD.size)
    signature, *disks, here, count, comment = _END_RECORD.unpack(end)
    if signature != b"PK\x05\x06" or comment:
        raise Truncated
    try:
        with ZipFile(_Bounded(file)) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    except (BadZipFile, NotImplementedError, UnicodeError, OverflowError, struct.error) as error:
        raise ValueError(f"its directory is damaged: {error}") from error
    if any(disks) or here != count or not {entry.volume for entry in entries} <= {0, _FULL_16}:
        raise ValueError("it is one part of a split archive")
    if count not in (len(entries), _FULL_16):
        raise ValueError(f"its directory has {len(entries):,} entries, but claims {count:,}")
    entries.sort(key=lambda entry: entry.header_offset)
    if entries and (first := entries[0].header_offset):
        raise ValueError(f"its first member is expected at byte 0, but is at byte {first:,}")
    members: dict[str, Member] = {}
    limits = [*(entry.header_offset for entry in entries[1:]), directory]
    for entry, limit in zip(entries, limits, strict=True):
        name = entry.orig_filename  # all of it: `filename` ends at the first null character
        after = entry.header_offset + _LOCAL_HEADER.size + len(name) + entry.compress_size
        if name in members:
            raise ValueError(f"several of its members are named {show(name)}")
        if after > limit:
            what = f"its member {show(name)} of {entry.compress_size:,} bytes"
            raise ValueError(f"{what} overlaps what follows it")
        members[name] = Member(entry, limit)
    return members


class _Bounded:
    """A file that refuses large reads: `zipfile` would read a directory of any size at once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, nbytes: int = -1, /) -> bytes:
        if nbytes > MAX_DIRECTORY:
            raise ValueError(f"its directory has {nbytes:,} bytes, more than {MAX_DIRECTORY:,}")
        return self.file.read(nbytes if nbytes >= 0 else _END_RECORD.size)
