"""Other people's images become data sets: class-folder trees, CIFAR-10, tar shards. `import_data` tells them apart.

Every image is decoded once on the way in, so that a broken one is named now and not in the middle of a run.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from poisonshield.data.images import Encoded, Preparation
from poisonshield.data.index import parse_label
from poisonshield.data.manifest import FILE_NAME, Manifest, refuse_address
from poisonshield.data.tars import read_tar
from poisonshield.data.tree import list_tree, read_class_list, split_folders
from poisonshield.data.verify import hash_file
from poisonshield.data.writer import ShardWriter
from poisonshield.errors import DataError

SPLIT_MARKS = {"-train-": "train", "-test-": "test", "-val-": "test"}
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_COUNTED_CLASSES = 100_000  # a label beyond it is not a class, and naming all below it would fill the memory


@dataclass(frozen=True)
class Settings:
    """How images are stored. skip_broken: leave out what cannot be decoded and list it in the provenance, instead of
    refusing the import."""

    preparation: Preparation = field(default_factory=Preparation)
    skip_broken: bool = False
    overwrite: bool = False
    samples_per_shard: int = 5000


def import_data(
    src: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    jpeg_quality: int | None = None,
    class_list: str | Path | None = None,
    pattern: str = "*",
    skip_broken: bool = False,
    overwrite: bool = False,
    samples_per_shard: int = 5000,
) -> dict[str, Manifest]:
    """Import whatever `src` is; returns the manifest of each folder written ("train", "test", or "" for `out` itself).

    size, jpeg_quality: see Preparation. class_list: a file that gives order and subset of the classes. pattern: which
    tars. Raises DataError if nothing importable is found, an image is broken (all of its split are named, up to 20),
    keys collide, or `out` already holds a data set. Then no split is written at all.
    """
    refuse_address(src, role="source")
    src, out = Path(src), Path(out)
    settings = Settings(Preparation(size, jpeg_quality), skip_broken, overwrite, samples_per_shard)
    if not src.is_dir():
        raise DataError(f"source {src} is not a folder. Give the folder that holds the images, the tars or CIFAR-10.")
    if out.resolve().is_relative_to(src.resolve()):
        raise DataError(f"output {out} lies in the source {src}. Choose a folder outside it.")
    if src.name == "cifar-10-batches-py":
        src = src.parent
    if (src / "cifar-10-batches-py").is_dir():
        if class_list:
            raise DataError(f"{src} is CIFAR-10, which has its own ten classes. Leave the class list {class_list} out.")
        return import_cifar10(src, out, settings)
    tar_folders = split_folders(src) or {"": src}
    if any(_tars(folder, pattern) for folder in tar_folders.values()):
        return import_shards(src, out, settings, class_list=class_list, pattern=pattern)
    if pattern != "*":
        raise DataError(f"no tar in {src} matches the pattern {pattern!r}. Correct it, or leave it out.")
    return import_folder_tree(src, out, settings, class_list=class_list)


def import_folder_tree(
    src: Path, out: Path, settings: Settings = Settings(), *, class_list: str | Path | None = None
) -> dict[str, Manifest]:
    """One folder per class, maybe under train/ and test/ or val/. Keys: path within src, no extension, dots as `_`."""
    classes = read_class_list(class_list) if class_list else None
    splits = split_folders(src) or {"": src}
    with ExitStack() as writers:
        for split, folder in splits.items():
            tree = list_tree(folder, root=src, classes=classes, exact=class_list is None)
            classes = classes or dict(
                zip(tree.folders, tree.names, strict=True)
            )  # both splits have the classes of the first
            samples = ((key, path.read_bytes(), label) for key, path, label in tree.samples)
            note = f"from the class-folder tree {src.name}/{split}".rstrip("/")
            if tree.left_out:
                note += f"; {tree.left_out} files that are no images were left out"
            _write(samples, out / split, settings, writers, classes=tree.names, note=note)
    return {split: Manifest.load(out / split) for split in splits}


def import_cifar10(src: Path, out: Path, settings: Settings = Settings()) -> dict[str, Manifest]:
    """The official python version, extracted to `src/cifar-10-batches-py`.

    These files are pickles. torchvision unpickles them only after their MD5 sums match the official ones, which is the
    one reason they are read at all. Keys: train-00000 to train-49999, test-00000 to test-09999, in file order.
    """
    import torch
    from torchvision.datasets import CIFAR10

    splits = ("train", "test")
    with ExitStack() as writers:
        for split in splits:
            try:
                data = CIFAR10(str(src), train=split == "train", download=False)
            except RuntimeError as err:
                raise DataError(
                    f"{src}/cifar-10-batches-py is not the official CIFAR-10: {err}\n  Extract cifar-10-python.tar.gz "
                    "(md5 c58f30108f718f92721af3b95e74349a) again; no other pickle is opened."
                ) from err
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)  # [N, 3, 32, 32]
            samples = ((f"{split}-{i:05d}", pixels[i], int(label)) for i, label in enumerate(data.targets))
            note = "from the official CIFAR-10 python files (Krizhevsky 2009), MD5 checked by torchvision"
            _write(samples, out / split, settings, writers, classes=data.classes, note=note)
    return {split: Manifest.load(out / split) for split in splits}


def import_shards(
    src: Path, out: Path, settings: Settings = Settings(), *, class_list: str | Path | None = None, pattern: str = "*"
) -> dict[str, Manifest]:
    """Tar shards (.tar, .tar.gz) with images and `.cls` integers, in src, or in its train/ and test/ or val/.

    Shards whose names hold -train-, -test- or -val-, or begin so, are told apart, and their keys begin with the split.
    Classes: the class list, else `classes` of a manifest.json beside them (its hashes are checked too), else as many as
    labels need in all splits. Keys lose a leading `./`, and dots become `_`. A poisoned data set stays marked as one.
    """
    groups = [(split, f, "", _tars(f, pattern)) for split, f in (split_folders(src) or {}).items()]
    if not any(paths for *_, paths in groups):
        groups = [(s, src, s and f"{s}-", paths) for s, paths in _by_split(_tars(src, pattern)).items()]
    groups = [group for group in groups if group[3] or pattern == "*"]  # a pattern may mean one split only
    counted: list[str] = []
    with ExitStack() as writers:
        for split, folder, prefix, paths in groups:
            beside = _manifest_beside(folder, paths, complete=pattern == "*")
            names = list(read_class_list(class_list).values()) if class_list else beside.classes
            if not names:
                names = counted = counted or _counted_classes([path for *_, paths in groups for path in paths])
            left_out: Counter[str] = Counter()
            samples = _tar_samples(paths, prefix, len(names), left_out)
            note = f"from tar shards of {src.name} ({len(paths)} {split} files)".replace("  ", " ")
            if beside.provenance:
                note += f"; they say: {beside.provenance}"
            poison = beside.poison
            if poison and settings.preparation.size is not None:
                poison = {**poison, "altered": "resized after poisoning: the stated budget no longer holds"}
            _write(samples, out / split, settings, writers, classes=names, note=note, poison=poison, left_out=left_out)
    return {split: Manifest.load(out / split) for split, *_ in groups}


def _write(
    samples: Iterable[tuple[str, bytes | Tensor, int]],
    out: Path,
    settings: Settings,
    writers: ExitStack,
    *,
    classes: Iterable[str],
    note: str,
    poison: dict[str, Any] | None = None,
    left_out: Counter[str] | None = None,
) -> None:
    """Prepare all samples, in threads and in order, and write them. They appear when `writers` closes without error."""
    prepare, broken, sizes = settings.preparation, [], set()

    def ready(sample: tuple[str, bytes | Tensor, int]) -> Encoded | DataError:
        key, image, _ = sample
        name = f"sample {key}"
        try:
            return prepare(image, name=name) if isinstance(image, bytes) else prepare.pixels(image, name=name)
        except DataError as err:
            return err

    writer = writers.enter_context(
        ShardWriter(
            out,
            classes=tuple(classes),
            image_size=None,
            samples_per_shard=settings.samples_per_shard,
            poison=poison,
            overwrite=settings.overwrite,
        )
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk in _chunks(samples, 64):
            for (key, _, label), image in zip(chunk, pool.map(ready, chunk), strict=True):
                if isinstance(image, DataError):
                    broken.append((key, str(image).splitlines()[0]))
                else:
                    sizes.add(image.size)
                    writer.write_encoded(key, image.data, image.extension, label)
    if broken and not settings.skip_broken:
        raise _broken(broken)
    if not sizes:
        what = "; ".join([f"no image came {note}", *_omissions(broken, left_out)])
        raise DataError(f"{what}.\n  Nothing was imported. Look at what the source holds.")
    writer.image_size = next(iter(sizes)) if len(sizes) == 1 else None
    writer.provenance = "; ".join([note, prepare.describe(), *_omissions(broken, left_out)])


def _omissions(broken: list[tuple[str, str]], left_out: Counter[str] | None) -> Iterator[str]:
    if left_out:
        yield "left out: " + ", ".join(f"{n} {what}" for what, n in sorted(left_out.items()))
    if broken:
        yield f"{len(broken)} broken images left out: " + ", ".join(key for key, _ in broken)


def _broken(broken: list[tuple[str, str]]) -> DataError:
    lines = [f"  {line}" for _, line in broken[:20]]
    if len(broken) > 20:
        lines.append(f"  ... and {len(broken) - 20} more")
    return DataError(
        "\n".join([f"{len(broken)} images cannot be decoded, so nothing was imported:", *lines])
        + "\n  Restore them, or import with --skip-broken to go on without them."
    )


def _chunks(samples: Iterable[Any], length: int) -> Iterator[list[Any]]:
    iterator = iter(samples)
    while chunk := list(islice(iterator, length)):
        yield chunk


def _tars(folder: Path, pattern: str) -> list[Path]:
    return sorted(p for p in folder.glob(pattern) if p.name.endswith(TAR_ENDINGS) and not p.name.startswith("."))


def _by_split(paths: list[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in paths:
        split = next((s for mark, s in SPLIT_MARKS.items() if mark in f"-{path.name}"), "")
        groups.setdefault(split, []).append(path)
    if "" in groups and len(groups) > 1:
        raise DataError(
            f"some tars name a split and some do not, such as {groups[''][0].name}.\n"
            "  Import one kind at a time with --pattern, e.g. --pattern '*-train-*'."
        )
    return groups


class _ForeignShard(BaseModel):
    """What such a manifest may tell of a tar."""

    sha256: str | None = Field(None, description="Of the file; compared where it is given.")


class _ForeignManifest(BaseModel):
    """What a manifest.json beside tars may tell; everything else in it is passed over."""

    classes: list[str] | None = Field(None, description="Names, label 0 first.")
    provenance: str | None = Field(None, description="Where the images come from.")
    poison: dict[str, Any] | None = Field(None, description="How the pixels were changed, if they were.")
    shards: dict[str, _ForeignShard] = Field({}, description="By file name.")


def _manifest_beside(folder: Path, paths: list[Path], *, complete: bool) -> _ForeignManifest:
    """The manifest.json next to foreign tars, its hashes compared where it has any. complete: none may be missing."""
    path = folder / FILE_NAME
    if not path.is_file():
        return _ForeignManifest()
    try:
        found = _ForeignManifest.model_validate_json(path.read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise DataError(f"{path} is not a manifest ({why}). Move it away and give a class list.") from err
    missing = [name for name in found.shards if not (folder / name).is_file()]
    if complete and missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(found.shards)} tars in its manifest: {', '.join(missing[:5])}.\n"
            "  Copy them there, or say with --pattern which tars are meant."
        )
    for tar in paths:
        if tar.name in found.shards and found.shards[tar.name].sha256 not in (None, hash_file(tar)):
            raise DataError(f"{tar} does not have the sha256 that {path} gives. Copy it again from its source.")
    return found


def _tar_samples(
    paths: list[Path], prefix: str, classes: int, left_out: Counter[str]
) -> Iterator[tuple[str, bytes, int]]:
    for path in paths:
        for key, _, data, text in read_tar(path, left_out=left_out):
            label = parse_label(text or b"", classes=classes, key=key, shard=path.name)
            yield prefix + key.removeprefix("./").replace(".", "_"), data, label


def _counted_classes(paths: list[Path]) -> list[str]:
    """'0' to the largest label. One extra pass over the tars, without decoding."""
    labels = (label for _, _, label in _tar_samples(paths, "", MAX_COUNTED_CLASSES, Counter()))
    return [str(c) for c in range(max(labels, default=0) + 1)]
