"""Damaged and hostile PyTorch checkpoints, and what each refusal must say."""

from __future__ import annotations

import struct
import zipfile
from functools import partial

from tests.support.pickles import MARK, STOP, checkpoint, name, numbers, table, tensor, text, zipped


def lists(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


DOUBLED = b"(t" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(80))
"""The instructions that push a tuple of the same tuple twice, and so on: 2**80 objects to hash."""

PICKLES: dict[str, tuple[bytes, str]] = {
    # Sizes that are false.
    "long integer": (
        b"\x80\x02\x8b\xff\xff\xff\x7f" + STOP,
        "not enough data in stream to read long4",
    ),
    "long integer, whole": (b"\x80\x02\x8b\4\0\0\0abcd" + STOP, "LONG4 is not an instruction"),
    "text past the end": (b"\x80\x02X\xff\xff\xff\xff" + STOP, "expected 4294967295 bytes"),
    "text of 2**63": (
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + STOP,
        "expected 9223372036854775807",
    ),
    "text of 2**64": (b"\x80\x04\x8d" + b"\xff" * 8 + STOP, "unicodestring8"),
    "bytes of 2**63": (
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + STOP,
        "expected 9223372036854775807",
    ),
    "bytearray of 2**63": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f" + STOP, "expected 92233720368"),
    "frame of 2**63": (
        b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + STOP,
        "takes an object from an empty",
    ),
    "memo that is empty": (b"\x80\x02j\xff\xff\xff\xff" + STOP, "nothing was stored as number"),
    # Instructions that no checkpoint needs.
    "extension": (b"\x80\x02\x82\1" + STOP, "EXT1 is not an instruction that data need"),
    "extensions": (b"\x80\x02" + b"\x84\xff\xff\xff\x7f" * 9 + STOP, "EXT4 is not an instruction"),
    "buffer": (b"\x80\x05\x97" + STOP, "NEXT_BUFFER is not an instruction"),
    "old integer": (b"I" + b"9" * 5000 + b"\n" + STOP, "4300 digits"),
    "unknown": (b"\x80\x02\xff" + STOP, "opcode b'\\xff' unknown"),
    # Programs that are wrong.
    "empty": (b"", "pickle exhausted before seeing STOP"),
    "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
    "two ends": (b"\x80\x02}" + STOP + STOP, "1 bytes follow its end"),
    "end of nothing": (b"\x80\x02" + STOP, "byte 2: it takes an object from an empty stack"),
    "end of several": (b"\x80\x02}}" + STOP, "it ends with objects left on the stack"),
    "end within a mark": (b"\x80\x02(}" + STOP, "it ends with objects left on the stack"),
    "no mark": (b"\x80\x02}u" + STOP, "it needs a mark"),
    "memo of nothing": (b"\x80\x02q\0" + STOP, "it needs an object on an empty stack"),
    "key without value": (b"\x80\x02}(Nu" + STOP, "a key without a value"),
    "key twice": (table(a=b"N")[:-1] + MARK + text("a") + b"Nu" + STOP, "the key 'a' twice"),
    "long key": (table(**{"k" * 513: b"N"}), "a dict gets a key of 513 characters"),
    "list that is a dict": (b"\x80\x02}Na" + STOP, "it fills an object of type Table"),
    "dict that is a list": (b"\x80\x02](u" + STOP, "it fills an object of type list"),
    "set that is a list": (b"\x80\x04](\x90" + STOP, "it fills an object of type list"),
    "attributes of a class": (
        b"\x80\x02" + name("torch.FloatStorage") + b"}b" + STOP,
        "it fills an object of type Global",
    ),
    "attributes of a tensor": (
        table(a=tensor() + b"}b"),
        "it fills an object of type StridedTensor",
    ),
    "call of text": (
        b"\x80\x02" + text("os.system") + b")R" + STOP,
        "it calls something that is not a global",
    ),
    "call of nothing": (b"\x80\x02(o" + STOP, "it calls nothing"),
    "call of an object": (
        table(a=name("a.B") + b")R)R"),
        "it calls something that is not a global",
    ),
    "shape that is an object": (
        table(a=tensor(shape=name("a.B") + b")\x81")),
        "shape or strides are not sizes",
    ),
    "size that is an object": (
        table(a=tensor(shape=MARK + name("a.B") + b")\x81K\2t")),
        "shape or strides are not sizes",
    ),
    "storage that is an object": (
        table(a=name("torch._utils._rebuild_tensor_v2") + MARK + name("a.B") + b")\x81K\0))tR"),
        "a tensor has no storage",
    ),
    "call without tuple": (b"\x80\x02" + name("torch.Size") + b"]R" + STOP, "without a tuple"),
    "name that is a number": (b"\x80\x04NN\x93" + STOP, "the name of a global is not text"),
    "long name": (b"\x80\x04" + text("o" * 300) * 2 + b"\x93" + STOP, "has 601 characters"),
    "persistent text": (b"\x80\x02" + text("storage") + b"Q" + STOP, "a persistent id is not a"),
    "old persistent id": (b"\x80\x02Pstorage\n" + STOP, "PERSID is not an instruction"),
    "persistent module": (
        table(a=MARK + text("module") + name("torch.Size") + text("a") + text("b") + b"tQ"),
        "a persistent id is not that of a storage",
    ),
    "dict of pairs": (
        table(a=name("collections.OrderedDict") + b"]\x85R"),
        "a dict is made of a list",
    ),
    "parameter of nothing": (table(a=name("torch._utils._rebuild_parameter") + b")R"), "no tensor"),
    "tensor of nothing": (table(a=name("torch._utils._rebuild_tensor_v2") + b")R"), "no storage"),
    "tensor of text": (table(a=tensor(shape=text("2"))), "shape or strides are not sizes"),
    "negative shape": (table(a=tensor(shape=numbers(-2, 2))), "shape or strides are not sizes"),
    "negative offset": (table(a=tensor(offset=-1)), "shape or strides are not sizes"),
    "negative storage": (table(a=tensor(numel=-1)), "a persistent id is not that of a storage"),
    "true shape": (table(a=tensor(shape=b"\x88\x88\x86")), "shape or strides are not sizes"),
    "short strides": (table(a=tensor(stride=numbers(1))), "shape or strides are not sizes"),
    "many axes": (
        table(a=tensor(shape=numbers(*[1] * 65), stride=numbers(*[1] * 65))),
        "shape or strides are not sizes",
    ),
    "long storage": (table(a=tensor(key=text("0" * 65))), "a persistent id is not that of a"),
    "dtype that is text": (
        table(a=tensor(rebuild="torch._utils._rebuild_tensor_v3", more=text("F32"))),
        "a tensor has no dtype",
    ),
    # What grows.
    "deep lists": (b"\x80\x02" + lists(50_000) + STOP, "the file holds a list"),
    "deep marks": (b"\x80\x02" + MARK * 50_000 + STOP, "empty stack"),
    "doubled tuples": (table(a=tensor(shape=DOUBLED)), "shape or strides are not sizes"),
    "list in itself": (b"\x80\x02]q\0h\0a" + STOP, "the file holds a list"),
    # Tensors that are not in the file.
    "storage missing": (table(bad=tensor(key=text("1"))), "the member 'data/1', is missing"),
    "storage outside": (
        table(bad=tensor(key=text("../data.pkl"))),
        "'data/../data.pkl', is missing",
    ),
    "storage too small": (table(bad=tensor(numel=5)), "its storage has 16 bytes, expected 20"),
    "tensor too large": (
        table(bad=tensor(shape=numbers(2, 3), stride=numbers(3, 1))),
        "it ends at byte 24 of its storage, which has 16",
    ),
    "tensor too late": (table(bad=tensor(offset=1)), "it ends at byte 20 of its storage"),
    "tensor of 2**64": (
        table(bad=tensor(shape=numbers(2**31, 2**31), stride=numbers(2**31, 1))),
        "overflows: 2**63 bits",
    ),
    "offset of 2**62": (table(bad=tensor(offset=2**62)), "overflows: 2**63 bits or more"),
    "numel of 2**62": (table(bad=tensor(numel=2**62)), "overflows: 2**63 bits or more"),
    "storage of another kind": (
        table(bad=tensor(kind="numpy.dtype")),
        "safetensors has no dtype for numpy.dtype",
    ),
}


WHOLE = checkpoint(table(a=tensor()), _0=bytes(16))
END = b"PK\x05\x06"


FIELDS = {
    b"PK\x03\x04": {"mark": (0, 4), "method": (8, 2), "extra": (28, 2)},
    b"PK\x01\x02": {
        "version": (6, 2),
        "flags": (8, 2),
        "method": (10, 2),
        "taken": (20, 4),
        "size": (24, 4),
        "disk": (34, 2),
        "offset": (42, 4),
    },
    b"PK\x05\x06": {
        "disk": (4, 2),
        "here": (8, 2),
        "count": (10, 2),
        "nbytes": (12, 4),
        "start": (16, 4),
    },
}
"""Offset and width of fields: of a member's own header, of its entry, of the directory's end."""


def changed(signature: bytes, index: int = 0, **fields: int) -> bytes:
    """Returns WHOLE with other fields in one of its records."""
    content = bytearray(WHOLE)
    at = -1
    for _ in range(index + 1):
        at = content.index(signature, at + 1)
    for field, value in fields.items():
        start, width = FIELDS[signature][field]
        content[at + start : at + start + width] = value.to_bytes(width, "little")
    return bytes(content)


local = partial(changed, b"PK\x03\x04")
entry = partial(changed, b"PK\x01\x02")
end = partial(changed, b"PK\x05\x06")


def renamed(old: bytes, new: bytes, *, times: int) -> bytes:
    assert WHOLE.count(old) == 2
    return WHOLE.replace(old, new, times)


def with_locator(at64: int, end64: bytes = b"") -> bytes:
    """Returns WHOLE with an end of 64 bits."""
    at = WHOLE.index(END)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, at64, 1)
    return WHOLE[:at] + end64 + locator + WHOLE[at:]


TRUNCATED = "the directory that ends every zip file is missing: the file is truncated"
DAMAGED = "its directory is damaged: "
ZIPS: dict[str, tuple[bytes, str]] = {
    "beginning only": (WHOLE[:4], TRUNCATED),
    "half": (WHOLE[: len(WHOLE) // 2], TRUNCATED),
    "last byte missing": (WHOLE[:-1], TRUNCATED),
    "byte more": (WHOLE + b"\0", TRUNCATED),
    "comment": (WHOLE[:-2] + b"\3\0abc", TRUNCATED),
    "comment that is missing": (WHOLE[:-2] + b"\3\0", TRUNCATED),
    "another file before": (WHOLE[:4] + WHOLE, "expected at byte 0, but is at byte 4"),
    "two files": (WHOLE + WHOLE, f"expected at byte 0, but is at byte {len(WHOLE)}"),
    "packed": (
        zipped({"x/data.pkl": table(a=tensor()), "x/data/0": bytes(16)}, zipfile.ZIP_DEFLATED),
        "its member 'x/data.pkl' is compressed",
    ),
    "packed data": (entry(1, method=8), "tensor 'a': its member 'x/data/0' is compressed"),
    "encrypted": (entry(0, flags=1), "its member 'x/data.pkl' is encrypted"),
    "encrypted data": (entry(1, flags=1), "tensor 'a': its member 'x/data/0' is encrypted"),
    "sizes that differ": (entry(1, size=99), "tensor 'a': its member 'x/data/0' is compressed"),
    "data too short": (entry(1, size=15, taken=15), "its storage has 15 bytes, expected 16"),
    "data past the end": (entry(1, size=99, taken=99), "'x/data/0' of 99 bytes overlaps what"),
    "data of 2**32 - 2": (
        entry(1, size=2**32 - 2, taken=2**32 - 2),
        "4,294,967,294 bytes overlaps",
    ),
    "data of 64 bits": (
        entry(1, size=2**32 - 1, taken=2**32 - 1),
        "4,294,967,295 bytes overlaps what",
    ),
    "member in another": (entry(0, size=300, taken=300), "'x/data.pkl' of 300 bytes overlaps"),
    "same place": (entry(1, offset=0), "overlaps what follows it"),
    "place of no member": (entry(1, offset=1), "overlaps what follows it"),
    "place past the end": (entry(1, offset=2**31), "overlaps what follows it"),
    "place a byte early": (
        entry(1, offset=WHOLE.index(b"PK\x03\x04", 1) - 1),
        "overlaps what follows it",
    ),
    "place a byte late": (
        entry(1, offset=WHOLE.index(b"PK\x03\x04", 1) + 1, size=15, taken=15),
        "its storage has 15 bytes",
    ),
    "another name inside": (
        renamed(b"x/data/0", b"x/data/1", times=1),
        "contradicts the directory",
    ),
    "another name of the pickle": (
        renamed(b"x/data.pkl", b"y/data.pkl", times=1),
        "contradicts the directory",
    ),
    "extra field past the data": (local(1, extra=60), "contradicts the directory"),
    "packed inside": (local(1, method=8), "contradicts the directory"),
    "no header": (local(1, mark=0), "contradicts the directory"),
    "same name": (
        checkpoint(table(a=tensor()), _0=bytes(16), _1=bytes(16)).replace(b"data/1", b"data/0"),
        "several of its members are named 'x/data/0'",
    ),
    "entries in another part": (end(here=1), "it is one part of a split archive"),
    "part of several": (end(disk=1), "it is one part of a split archive"),
    "member of another part": (entry(0, disk=1), "it is one part of a split archive"),
    "format of the future": (entry(0, version=99), DAMAGED),
    "name that is not UTF-8": (
        entry(1, flags=0x800).replace(b"x/data/0", b"x/data/\xff"),
        DAMAGED,
    ),
    "more entries": (end(here=3, count=3), "its directory has 2 entries, but claims 3"),
    "directory elsewhere": (end(start=0), "expected at byte 0, but is at byte"),
    "directory of 2**32": (end(start=0, nbytes=2**32 - 1), DAMAGED),
    "locator of nothing": (with_locator(2**63), DAMAGED),
    "locator of another place": (with_locator(0), DAMAGED),
    "locator of an end that is cut": (
        with_locator(WHOLE.index(END), b"PK\x06\x06" + struct.pack("<Q", 2**64 - 1) + bytes(44)),
        "its directory ",
    ),
}
