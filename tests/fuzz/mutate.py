"""Sound bytes made unsound: what a bad disk, a bad program and a bad person do to a file, drawn from one seed.

Formats that carry lengths and checksums would stop most changes at the door. A shell goes around that: it opens a file
to what is inside, and closes what became of it with lengths and checksums that fit.
"""

import gzip
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

Shell = Callable[[bytes], tuple[bytes, Callable[[bytes], bytes]]]
"""From a file: what is inside, and how to close it again."""

NUMBERS = (
    b"0", b"-1", b"1", b"255", b"65536", b"2147483647", b"4294967296", b"9223372036854775807", b"18446744073709551616",
    b"9" * 400, b"1e999", b"-1e999", b"NaN", b"Infinity", b"0.5", b"1e-320", b"null", b"true",
)  # fmt: skip
FIELDS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
WORDS = (
    b"\0", b"\x1b[2J", b"\r", b"\n", b"\x7f", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"\xed\xa0\x80", b"../",
    b"/etc/passwd", b"pipe:id", b"[" * 3000, b"{" * 300, b'"', b"\\u0000", b"\\ud800", b"&a [*a]",
    b"!!python/name:os.system ", b"cos\nsystem\n(S'id'\ntR.", b"%!PS\n", b"A" * 5000, b"null", b"[]", b"{}",
)  # fmt: skip


def flip_bits(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut_off(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def remove_chunk(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    start, end = _span(data, rng)
    del data[start:end]


def repeat_chunk(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    start, end = _span(data, rng)
    data[end:end] = bytes(data[start:end]) * rng.choice((1, 2, 20))


def splice(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    start, end = _span(other, rng)
    at, until = _span(data, rng)
    data[at : until if rng.random() < 0.5 else at] = other[start:end]


def insert_word(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(WORDS)


def edit_number(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    found = [match.span() for match in re.finditer(rb"-?\d+(\.\d+)?", bytes(data[: 2**16]))]
    if found:
        start, end = rng.choice(found)
        data[start:end] = rng.choice(NUMBERS)


def edit_field(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("<", ">"))
    at = rng.randrange(min(len(data), 200) if rng.random() < 0.7 else len(data))
    packed = (rng.choice(FIELDS) & (256**size - 1)).to_bytes(size, "little" if order == "<" else "big")
    data[at : at + size] = packed


MOVES = (flip_bits, cut_off, remove_chunk, repeat_chunk, splice, insert_word, edit_number, edit_field)


def mutate(seeds: Sequence[bytes], shells: Sequence[Shell], rng: random.Random, *, largest: int = 2**20) -> bytes:
    """One of the seeds, changed one to four times, from outside or within a shell."""
    seed = rng.choice(seeds)
    inner, close = rng.choice([*shells, bare])(seed)
    data = bytearray(inner)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if data:
            rng.choice(MOVES)(data, rng, seeds)
    return close(bytes(data[:largest]))


def _span(data: Sequence[int], rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 4, 16, 64, 512)))


# Shells


def bare(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """The file as it stands."""
    return data, lambda changed: changed


def safetensors_header(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """The JSON before the tensors; its length fits what it becomes."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], lambda changed: struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def safetensors_text(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """The longest text among the metadata, itself JSON in files of ours."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    about = header.get("__metadata__") or {"none": ""}
    name = max(about, key=lambda key: len(about[key]))

    def close(changed: bytes) -> bytes:
        header["__metadata__"] = about | {name: changed.decode("utf-8", "replace")}
        packed = json.dumps(header).encode()
        return struct.pack("<Q", len(packed)) + packed + data[8 + length :]

    return about[name].encode(), close


def zip_member(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """data.pkl of a torch file; the others stay."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))

    def close(changed: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            for name, content in members.items():
                file.writestr(name, changed if name == pickled else content)
        return out.getvalue()

    return members[pickled], close


def png_chunks(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Chunks with checksums that fit."""

    def close(changed: bytes) -> bytes:
        out, at = bytearray(changed), 8
        while at + 12 <= len(out):
            end = at + 8 + int.from_bytes(out[at : at + 4], "big")
            if end + 4 > len(out):
                break
            out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
            at = end + 4
        return bytes(out)

    return data, close


def tar_headers(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Members with checksums that fit."""

    def close(changed: bytes) -> bytes:
        out = bytearray(changed)
        for at in range(0, len(out) - 511, 512):
            if out[at + 257 : at + 262] == b"ustar":
                out[at + 148 : at + 156] = b" " * 8
                out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
        return bytes(out)

    return data, close


def gzipped(shell: Shell) -> Shell:
    """What is inside a gzip file, within another shell."""

    def opened(data: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
        inner, close = shell(gzip.decompress(data))
        return inner, lambda changed: gzip.compress(close(changed), 1)

    return opened
