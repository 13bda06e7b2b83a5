"""Is the pixel data of a JPEG whole? Decoders only warn where it is not, and torchvision and Pillow pass no warning on.

A JPEG has no checksum. What can be known is whether the compressed data ends where the pixels end: half a file with an
end mark has too little of it, and random bytes have too little or too much. So the file is decoded again with small
changes near the ends of its data. Bytes added behind whole data are read by nobody: pixels that change for them were
missing. The last bytes of whole data matter: pixels that stay the same without them were complete long before. That
costs two further decodes of an ordinary file, and is done once, on import.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = hashlib.sha512(b"poisonshield").digest().replace(b"\xff", b"\x7f")  # 64 bytes; 0xff would begin a marker
TAIL = 32
"""How many of the last bytes of a scan are tried at once. Less than that of surplus is let pass."""

MOST_PIXELS_PER_BYTE = 1024
"""A block of 8x8 pixels takes a bit at least, even where a progressive file says "nothing more" for many."""

_SOF, _SOS, _EOI, _RST = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}, 0xDA, 0xD9, range(0xD0, 0xD8)
_ARITHMETIC = range(0xC9, 0xD0)
_BETWEEN = {0xC4, 0xDB, 0xDC, 0xDD, 0xFE, 0xCC, *range(0xE0, 0xF0)}  # tables, notes and parameters: all have a length
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_RESTART = re.compile(rb"\xff+[\xd0-\xd7]")


@dataclass(frozen=True)
class Scan:
    """Where the compressed data of one scan lies: from `start` to `end`. parameters: what its header says."""

    start: int
    end: int
    parameters: bytes


def check_scans(data: bytes, decode: Callable[[bytes], Tensor]) -> None:
    """Raise ValueError, saying why, if the compressed data of a JPEG is not whole.

    decode: gives pixels and raises ValueError for what it refuses. Files with arithmetic coding pass unchecked: no
    common encoder writes them.
    """
    frame, scans = _walk(data)
    if frame in _ARITHMETIC:
        return
    pixels = decode(data)
    if not torch.equal(decode(_lengthen(data, scans)), pixels):
        raise ValueError("its compressed data ends before its pixels do")
    for scan in scans:
        if _is_surplus(data, scan, pixels, decode):
            raise ValueError("its pixels end before its compressed data does")


def refuse_claim(data: bytes, pixels: int) -> None:
    """Raise ValueError for more pixels than a JPEG of so many bytes can hold."""
    if pixels > MOST_PIXELS_PER_BYTE * len(data):
        raise ValueError(f"it claims {pixels:,} pixels, more than so few bytes can hold")


def _walk(data: bytes) -> tuple[int, list[Scan]]:
    """The frame's marker and all scans, up to the end mark or the end of the file."""
    frame, components, scans = 0, b"", []
    for marker, start, end in _segments(data):
        if marker in _SOF:
            frame, components = marker, data[start + 6 : end][::3]
        elif marker == _SOS:
            close = _end_of_scan(data, end)
            scans.append(Scan(end, close, data[start:end]))
    if not scans:
        raise ValueError("it has no compressed data")
    if missing := _missing(components, scans, progressive=frame in (0xC2, 0xC6)):
        raise ValueError(missing)
    return frame, scans


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the content of each segment; the compressed data behind a scan's header is passed by."""
    at = 2
    while found := _MARKER.match(data, at):
        marker, at = found[1][0], found.end()
        if marker == _EOI:
            return
        if marker == 0x01 or marker == 0xD8:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if marker not in _SOF | _BETWEEN | {_SOS} or length < 2 or at + length > len(data):
            raise ValueError(f"a mark 0xff{marker:02x} stands where none may be")
        yield marker, at + 2, at + length
        at = _end_of_scan(data, at + length) if marker == _SOS else at + length
    if at < len(data):
        raise ValueError("what follows a segment is no mark")


def _end_of_scan(data: bytes, start: int) -> int:
    """Where compressed data ends: at the first mark that is no restart. Raises ValueError for restarts out of order."""
    restarts = 0
    for found in _MARKER.finditer(data, start):
        marker = found[1][0]
        if marker not in _RST:
            return found.start()
        if marker != _RST[restarts % 8]:
            raise ValueError("its restart marks are not in order")
        restarts += 1
    return len(data)


def _missing(components: bytes, scans: list[Scan], *, progressive: bool) -> str:
    """Which part of the picture no scan holds, in words, or ""."""
    seen: dict[tuple[int, int], int] = {}  # (component, coefficient) to the lowest bit that was sent
    for scan in scans:
        count = scan.parameters[0] if scan.parameters else 0
        named, spectrum = scan.parameters[1 : 1 + 2 * count : 2], scan.parameters[1 + 2 * count :]
        if len(spectrum) < 3:
            return "the header of a scan is cut"
        first, last, low = (spectrum[0], spectrum[1], spectrum[2] & 15) if progressive else (0, 63, 0)
        seen |= {(c, k): low for c in named for k in range(first, min(last, 63) + 1)}
    if any(seen.get((c, 0)) is None for c in components):
        return "a colour has no scan"
    if progressive and any(seen.get((c, k)) != 0 for c in components for k in range(64)):
        return "the last of its scans are missing"
    return ""


def _lengthen(data: bytes, scans: list[Scan]) -> bytes:
    """The file with noise behind the compressed data of each scan, and before each restart."""
    parts, at = [], 0
    for scan in scans:
        content = _RESTART.sub(lambda mark: NOISE + mark[0], data[scan.start : scan.end])
        parts += [data[at : scan.start], content, NOISE]
        at = scan.end
    return b"".join(parts) + (data[at:] or b"\xff\xd9")


def _is_surplus(data: bytes, scan: Scan, pixels: Tensor, decode: Callable[[bytes], Tensor]) -> bool:
    """Whether the last bytes of a scan may be anything. Zeros at the end do not count: some cameras pad with them."""
    end = scan.start + len(data[scan.start : scan.end].rstrip(b"\0"))
    if end - scan.start < 2 * TAIL:
        return False
    cut = end - TAIL - (data[end - TAIL - 1] == 0xFF)  # not in the middle of a mark

    def matters(start: int, stop: int) -> bool:
        try:
            changed = (decode(data[:start] + noise + data[stop:]) for noise in (NOISE[:TAIL], NOISE[TAIL:]))
            return not all(torch.equal(pixels, other) for other in changed)
        except ValueError:  # so much did they matter
            return True

    # the code of an even grey has one word, and whatever is read means that: nothing of such a scan matters
    return not matters(cut, end) and matters(scan.start, scan.start + TAIL)
