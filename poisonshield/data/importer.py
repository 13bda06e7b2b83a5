"""Other people's images become data sets: class-folder trees, CIFAR, tar shards. `import_data` tells them apart.

Every image is decoded once on the way in, so that a broken one is named now and not in the middle of a run. What was
read, left out and decided stands in a Summary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from poisonshield.data.class_list import read_class_list
from poisonshield.data.fields import Choice
from poisonshield.data.images import Preparation
from poisonshield.data.import_tars import import_shards
from poisonshield.data.intake import MAX_MEMBER_MIB, Item, Settings, write_split
from poisonshield.data.labels import NONE
from poisonshield.data.manifest import Manifest, refuse_address
from poisonshield.data.pictures import MAX_PIXELS
from poisonshield.data.splits import find_tars, split_folders, visible_folders
from poisonshield.data.summary import Summary
from poisonshield.data.tree import Tree, is_flat, list_tree, list_unlabelled
from poisonshield.data.writer import new_folders, remove_empty
from poisonshield.errors import ConfigError, DataError
from poisonshield.files import Lock, read_bounded

CIFAR = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
"""The official folders, and torchvision's classes for them."""


def import_data(
    src: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    jpeg_quality: int | None = None,
    class_list: str | Path | None = None,
    pattern: str = "*",
    image: str | None = None,
    label: str | None = None,
    skip_broken: bool = False,
    overwrite: bool = False,
    samples_per_shard: int = 5000,
    max_member_mib: int = MAX_MEMBER_MIB,
    max_pixels: int = MAX_PIXELS,
    summary: Summary | None = None,
) -> dict[str, Manifest]:
    """Import whatever `src` is; returns the manifest of each folder written ("train", "test", or "" for `out` itself).

    size, jpeg_quality, max_pixels: see Preparation. class_list: a file that gives order and subset of the classes.
    pattern: which tars. image, label: which fields of tars, as data/fields.py and data/labels.py have them; label
    "none" reads no labels, of folders too. max_member_mib: of one file. summary: takes what there is to tell.

    Raises DataError if nothing importable is found, what is found can be meant in two ways, an image is broken (all of
    its split are named, up to 20), keys collide, or `out` already holds a data set; BusyError if another import writes
    to `out`; StorageError if the disk does not take it. Then no split is written at all.
    """
    refuse_address(src, role="source")
    refuse_address(out, role="output folder")
    src, out = Path(src), Path(out)
    if max_member_mib < 1:
        raise ConfigError(f"max_member_mib is {max_member_mib}, at least 1 was wanted.")
    preparation = Preparation(size, jpeg_quality, max_pixels)
    settings = Settings(preparation, skip_broken, overwrite, samples_per_shard, max_member_mib * 2**20)
    if not src.is_dir():
        raise DataError(f"source {src} is not a folder. Give the folder that holds the images, the tars or CIFAR-10.")
    if out.resolve().is_relative_to(src.resolve()):
        raise DataError(f"output {out} lies in the source {src}. Choose a folder outside it.")
    choice = Choice(image and image.lstrip(".").lower(), label and (label if label == NONE else label.lstrip(".")))
    with _claimed(out):
        return _import(src, out, settings, summary or Summary(str(src)), choice, class_list, pattern)


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """`out` for this process alone; where nothing is written to it, it goes again."""
    if not (there := next(p for p in (out, *out.absolute().parents) if p.exists())).is_dir():
        raise DataError(f"output {out} cannot be made: {there} is not a folder. Choose another name.")
    made = new_folders(out)
    try:
        with Lock(out, what="data set"):
            yield
    finally:
        remove_empty(made)


def _import(
    src: Path,
    out: Path,
    settings: Settings,
    summary: Summary,
    choice: Choice,
    class_list: str | Path | None,
    pattern: str,
) -> dict[str, Manifest]:
    if src.name in CIFAR:
        src, only = src.parent, [src.name]
    else:
        only = [name for name in CIFAR if (src / name).is_dir()]
    if only:
        return import_cifar(src, only, out, settings, summary=summary, class_list=class_list)
    classes = read_class_list(class_list) if class_list else None
    folders = [src] if find_tars(src, pattern) else [src, *split_folders(src, Summary(""), classes=classes).values()]
    if any(find_tars(folder, pattern) for folder in folders):
        return import_shards(src, out, settings, summary=summary, class_list=class_list, pattern=pattern, choice=choice)
    if pattern != "*":
        raise DataError(f"no tar in {src} matches the pattern {pattern!r}. Correct it, or leave it out.")
    if choice.image or choice.label not in (None, NONE, "folder"):
        raise DataError(f"{src} holds no tars, and --image and --label name fields of tars. Leave them out.")
    return import_folder_tree(src, out, settings, summary=summary, classes=classes, labelled=choice.label != NONE)


def import_folder_tree(
    src: Path,
    out: Path,
    settings: Settings,
    *,
    summary: Summary,
    classes: dict[str, str] | None = None,
    labelled: bool = True,
) -> dict[str, Manifest]:
    """One folder per class, maybe under folders of splits. Keys: path within src, no extension, dots as `_`.

    classes: {folder: name} of a class list. labelled: False takes all images as one class, as does a folder that holds
    images and no folders. The test split may lack classes of the train split, and have no others.
    """
    splits = split_folders(src, summary, classes=classes) or {"": src}
    trees: dict[str, Tree] = {}
    for split, folder in splits.items():
        if not labelled or is_flat(folder):
            _refuse_classes_of_another(trees, folder, classes if labelled else None)
            trees[split] = list_unlabelled(folder, root=src, summary=summary)
        else:
            first = next(iter(trees.values()), None)
            wanted = classes or (dict(zip(first.folders, first.names, strict=True)) if first else None)
            trees[split] = list_tree(
                folder, root=src, summary=summary, classes=wanted, exact=classes is None, may_lack=first is not None
            )
    with ExitStack() as writers:
        for split, tree in trees.items():
            note = f"from the class-folder tree {src.name}/{split}".rstrip("/")
            if tree.left_out:
                note += f"; {tree.left_out} files that are no images were left out"
            samples = _read(tree, settings)
            write_split(samples, out / split, settings, writers, classes=tree.names, note=note, summary=summary)
    return {split: Manifest.load(out / split) for split in splits}


def _refuse_classes_of_another(trees: dict[str, Tree], folder: Path, classes: dict[str, str] | None) -> None:
    if classes or any(len(tree.names) > 1 for tree in trees.values()):
        raise DataError(
            f"{folder} holds images and no class folders, so it has no labels, while classes are given or train has "
            "some.\n  Import the train folder alone, or read no labels at all: --label none."
        )


def _read(tree: Tree, settings: Settings) -> Iterator[Item]:
    for key, path, label in tree.samples:
        yield key, read_bounded(path, max_bytes=settings.max_member, what="image"), label


def import_cifar(
    src: Path,
    folders: list[str],
    out: Path,
    settings: Settings,
    *,
    summary: Summary,
    class_list: str | Path | None = None,
) -> dict[str, Manifest]:
    """CIFAR-10 or CIFAR-100, the official python version, extracted to a folder of src.

    These files are pickles. torchvision unpickles them only after their MD5 sums match the official ones, which is the
    one reason they are read at all. Keys: train-00000 to train-49999, test-00000 to test-09999, in file order.
    """
    import torch
    from torchvision import datasets

    if len(folders) > 1:
        raise DataError(f"{src} holds {' and '.join(folders)}. Give the path of the one that is meant.")
    kind = CIFAR[folders[0]]
    dataset = getattr(datasets, kind)
    called = kind.replace("CIFAR", "CIFAR-")
    count = {"CIFAR-10": "ten", "CIFAR-100": "hundred"}[called]
    if class_list:
        raise DataError(f"{src} is {called}, which has its own {count} classes. Leave the class list {class_list} out.")
    for path in visible_folders(src):
        if path.name != folders[0]:
            summary.leave_out(f"folders beside {called}", path.name)
    with ExitStack() as writers:
        for split in ("train", "test"):
            try:
                data = dataset(str(src), train=split == "train", download=False)
            except RuntimeError as err:
                raise DataError(
                    f"{src}/{folders[0]} is not the official {called}: {err}\n  Extract {dataset.filename} "
                    f"(md5 {dataset.tgz_md5}) again; no other pickle is opened."
                ) from err
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)  # [N, 3, 32, 32]
            samples = ((f"{split}-{i:05d}", pixels[i], int(label)) for i, label in enumerate(data.targets))
            note = f"from the official {called} python files (Krizhevsky 2009), MD5 checked by torchvision"
            write_split(samples, out / split, settings, writers, classes=data.classes, note=note, summary=summary)
    return {split: Manifest.load(out / split) for split in ("train", "test")}
