"""The door to webdataset: writing one tar, and reading tars that others made. Nothing else imports it."""

import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from poisonshield.data.decode import IMAGE_EXTENSIONS
from poisonshield.data.index import split_name
from poisonshield.errors import DataError


def tar_writer(file: Any) -> Any:
    """webdataset's TarWriter with everything fixed that would make equal samples differ in bytes (time, owner)."""
    from webdataset import TarWriter

    # pax headers appear only for names that plain ustar cannot hold: long ones, and letters beyond ASCII
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False, format="PAX_FORMAT")


def read_tar(path: Path, *, left_out: Counter[str]) -> Iterator[tuple[str, str, bytes, bytes | None]]:
    """(key, extension, image bytes, .cls bytes or None) of each sample of a .tar or .tar.gz.

    Other fields are never read, only counted in `left_out`. Raises DataError naming the tar if it is damaged or a
    sample has two images; samples without an image are counted under "no image".
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def wanted(name: str) -> bool:
        field = split_name(name)[1]
        if field != "cls" and field not in IMAGE_EXTENSIONS:
            left_out["." + field] += 1
            return False
        return True

    opener = gzip.open if path.name.endswith(("gz",)) else open
    key = ""
    try:
        with opener(path, "rb") as stream:
            files = tar_file_expander([{"url": str(path), "stream": stream}], select_files=wanted)
            for sample in group_by_keys(files):
                key = sample["__key__"]
                images = [e for e in IMAGE_EXTENSIONS if e in sample]
                if len(images) > 1:
                    raise DataError(f"sample {key} in {path} has {len(images)} images, one was wanted. Split it.")
                if not images:
                    left_out["no image"] += 1
                    continue
                yield key, images[0], sample[images[0]], sample.get("cls")
    except DataError:
        raise
    except Exception as err:  # webdataset re-raises tarfile, gzip and its own errors in several types
        where = f" after sample {key}" if key else ""
        raise DataError(f"{path} cannot be read as a tar{where}: {err}\n  Copy it again from its source.") from err
