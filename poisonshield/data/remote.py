"""Files from afar: web servers by Python's own client, every other store by fsspec and what the user installed for it.

A file is taken whole, and taken up again in its middle: what came stays on the disk until all of it is there. Servers
that fail for a moment are asked again, later each time. Whether it is the right file is for a hash to say.
"""

import http.client
import logging
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poisonshield.errors import DataError
from poisonshield.files import tell_of_disk
from poisonshield.plain import plain

log = logging.getLogger(__name__)

SCHEMES = frozenset(
    "http https s3 s3a gs gcs az abfs abfss hf oss oci hdfs webhdfs sftp ssh ftp".split()  # none runs or unpacks
)
TRIES = 8
"""How often in a row a server may give nothing before it counts as gone; that takes about a minute."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between two tries: twice as long each time."""
PATIENCE = 60.0
"""Seconds without a byte, after which a connection is given up."""

_BLOCK = 2**20
_PASSING = frozenset({408, 425, 429})  # of HTTP; so is everything from 500 on
_dice = random.Random()  # noqa: S311  # of its own: a run's numbers must not depend on a server's mood


class Passing(Exception):
    """A fault that may be over when the file is asked for again."""


class Absent(DataError):
    """There is no such file."""


def is_address(place: str | Path) -> bool:
    """Whether a data set lies behind an address that is read from afar, such as https://... or s3://..."""
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+)://", str(place))
    return match is not None and match[1].lower() in SCHEMES


def join_address(address: str, name: str) -> str:
    """The address of a file or folder in a folder. What follows a question mark (a signature, say) stays at the end."""
    if not _is_web(address):
        return f"{address.rstrip('/')}/{name}"
    base, mark, query = address.partition("?")
    return f"{base.rstrip('/')}/{urllib.parse.quote(name)}{mark}{query}"


def show_address(address: str) -> str:
    """An address for people, without password, user and signature."""
    parts = urllib.parse.urlsplit(address)
    return plain(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def read_small(address: str, *, max_bytes: int) -> bytes | None:
    """A whole file in memory, None if there is none. Raises DataError for one that is larger or cannot be read."""
    for failures in range(1, TRIES + 1):
        found = bytearray()
        try:
            for block in read_blocks(address, 0):
                found += block
                if len(found) > max_bytes:
                    raise DataError(f"{show_address(address)} is larger than {max_bytes:,} bytes, the most for it.")
            return bytes(found)
        except Absent:
            return None
        except Passing as err:
            _wait(address, failures, err)
    raise AssertionError("the last wait raises")


def download(address: str, part: Path, *, size: int) -> None:
    """Append to `part` what it lacks of a file of `size` bytes.

    Raises DataError if there is no such file, it ends early, or its server stays away; StorageError for a full disk.
    """
    failures = 0
    with tell_of_disk(part), open(part, "ab") as file:
        while (have := file.tell()) < size:
            fault: Exception | None = None
            try:
                for block in read_blocks(address, have):
                    file.write(block[: size - file.tell()])
                    if file.tell() == size:
                        break
            except Passing as err:
                fault = err
            failures = 0 if file.tell() > have else failures + 1
            if file.tell() < size:
                _wait(address, failures, fault or Passing(f"it ended after {file.tell():,} of {size:,} bytes"))


def _wait(address: str, failures: int, fault: Exception) -> None:
    """Before the next try. Raises DataError after the last one."""
    if failures >= TRIES:
        raise DataError(
            f"{show_address(address)} could not be read, {TRIES} times in a row: {fault}.\n"
            "  See whether it can be reached from this machine, and start again: what came already is kept."
        ) from fault
    log.log(logging.WARNING if failures > 2 else logging.INFO, "%s: %s; asking again", show_address(address), fault)
    time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2.0**failures) * _dice.uniform(0.5, 1))


def read_blocks(address: str, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start` on, as they come; they may end early. Raises Passing, Absent or DataError."""
    opened = _open_web if _is_web(address) else _open_store
    with opened(address, start) as stream:
        while block := stream.read(_BLOCK):
            yield block


def _is_web(address: str) -> bool:
    return re.match("https?://", address, re.IGNORECASE) is not None


@contextmanager
def _open_web(address: str, start: int) -> Iterator[Any]:
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as stream:
            if start and stream.status != 206:  # it knows no ranges: what is here already comes again
                _skip(stream, start)
            yield stream
    except urllib.error.HTTPError as err:
        if err.code in _PASSING or err.code >= 500:
            raise Passing(f"the server answered {err.code} {err.reason}") from err
        kind = Absent if err.code in (404, 410) else DataError
        raise kind(
            f"{show_address(address)} cannot be read: the server answered {err.code} {err.reason}.\n"
            "  See whether the address is right and open to you."
        ) from err
    except (OSError, http.client.HTTPException) as err:
        raise Passing(plain(str(getattr(err, "reason", "") or err or type(err).__name__))) from err


def _skip(stream: Any, count: int) -> None:
    while count > 0 and (block := stream.read(min(count, _BLOCK))):
        count -= len(block)


@contextmanager
def _open_store(address: str, start: int) -> Iterator[Any]:
    system, path = _file_system(address)
    try:
        with system.open(path, "rb") as stream:
            stream.seek(start)
            yield stream
    except FileNotFoundError as err:
        raise Absent(f"{show_address(address)} is not there.") from err
    except PermissionError as err:
        raise DataError(
            f"{show_address(address)} is not open to you: {plain(str(err))}\n"
            "  Give the rights or keys that its store asks for, in the way that its own tools have it."
        ) from err
    except Exception as err:  # each store has errors of its own, and no common name for them
        raise Passing(plain(f"{type(err).__name__}: {err}")) from err


def _file_system(address: str) -> tuple[Any, str]:
    scheme = address.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(address)
    except (ImportError, ValueError) as err:
        known = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
        known |= dict.fromkeys(("az", "abfs", "abfss"), "adlfs") | dict.fromkeys(("sftp", "ssh"), "paramiko")
        known |= {"oss": "ossfs", "oci": "ocifs", "hdfs": "pyarrow"}
        package = known.get(scheme.lower(), "fsspec") if "fsspec" not in str(err) else "fsspec"
        raise DataError(
            f"{show_address(address)}: nothing that is installed reads {scheme}:// ({plain(str(err))}).\n"
            f"  Install the package for it: pip install {package}"
        ) from err
