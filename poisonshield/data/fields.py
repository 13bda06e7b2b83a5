"""Which files of a tar make a sample: its image, and the files that may hold its label, as different tools name them.

Files belong together by the part of their name before the first dot, as WebDataset has it: 0007.input.jpg and
0007.target.cls are two fields of the sample 0007. Names with dots are in use too: where img.v6.jpg stands beside
img.v6.cls, or with no label at all, the sample is img.v6.
"""

from dataclasses import dataclass

from poisonshield.data.pictures import ENDINGS
from poisonshield.errors import DataError
from poisonshield.plain import plain

LABEL_FIELDS = ("cls", "json", "txt")


@dataclass(frozen=True)
class Sample:
    """key: with its dots. image: the file's bytes. labels: the bytes of each field that may hold the label, by its name
    within the sample. fields: the names of all that were read, for errors. shard: the tar's file name."""

    key: str
    image: bytes
    labels: dict[str, bytes]
    fields: tuple[str, ...]
    shard: str

    def __str__(self) -> str:
        return plain(f"sample {self.key} in {self.shard}")

    @property
    def listed(self) -> str:
        """The fields, as errors tell them."""
        return plain("its fields: " + ", ".join(f".{field}" for field in self.fields))


@dataclass(frozen=True)
class Choice:
    """What the user said: the field of the image and the field of the label, without a leading dot; None finds them."""

    image: str | None = None
    label: str | None = None

    def wants(self, field: str) -> bool:
        """Whether a field is read at all."""
        return is_image(field) or self.may_label(field) or _names(self.image, field)

    def may_label(self, field: str) -> bool:
        """Whether a field may hold a label."""
        return _last(field) in LABEL_FIELDS if self.label is None else _names(self.label, field)


def is_image(field: str) -> bool:
    """Whether a field holds an image by its name."""
    return f".{_last(field)}" in ENDINGS


def samples_in(
    key: str, fields: dict[str, bytes], choice: Choice, *, path: str, shard: str
) -> tuple[list[Sample], list[str]]:
    """(samples, names of image fields that were left out) of the files whose names begin with one key.

    Raises DataError if a sample has two images and nothing says which is meant.
    """
    if choice.image is None:
        images = [field for field in fields if is_image(field)]
        images = [field for field in images if not _middle(field)] or images
    else:
        images = [field for field in fields if _names(choice.image, field)]
    passed_over = [field for field in fields if is_image(field) and field not in images]
    labels = {f: data for f, data in fields.items() if f not in images and choice.may_label(f)}
    rests = {field: _rest(field, choice.image) for field in images}
    own = {field: {f: labels[f] for f in labels if _rest(f, choice.label) == rests[field]} for field in images}
    inside_key = bool(images) and all(rests.values()) and (not labels or all(own.values()))
    if len(images) > 1 and not (inside_key and len(set(rests.values())) == len(images)):
        raise DataError(
            f"sample {plain(key)} in {path} has {len(images)} images, one was wanted. Its fields: "
            f"{', '.join('.' + plain(f) for f in fields)}.\n  Say which: --image {images[0]}"
        )
    samples = []
    for field in images:
        name = f"{key}.{rests[field]}" if inside_key else key
        samples.append(Sample(name, fields[field], own[field] if inside_key else labels, tuple(fields), shard))
    return samples, passed_over


def _names(wanted: str | None, field: str) -> bool:
    """Whether `wanted`, maybe with the path of a value behind .json, names this field, be it behind a key with dots."""
    if wanted is None:
        return False
    wanted = field_and_path(wanted)[0]
    return field == wanted or field.endswith(f".{wanted}")


def _rest(field: str, wanted: str | None) -> str:
    """What stands before the field that is wanted, or before its last part: the rest of a key with dots, maybe."""
    return _middle(field) if wanted is None else field.removesuffix(field_and_path(wanted)[0]).rstrip(".")


def field_and_path(wanted: str) -> tuple[str, tuple[str, ...]]:
    """("meta.json", ("label", "id")) of "meta.json.label.id": a field, and the way to a value in it."""
    parts = wanted.lstrip(".").split(".")
    at = [part.lower() for part in parts].index("json") + 1 if "json" in wanted.lower().split(".") else len(parts)
    return ".".join(parts[:at]).lower(), tuple(parts[at:])


def _last(field: str) -> str:
    return field.rpartition(".")[2]


def _middle(field: str) -> str:
    return field.rpartition(".")[0]
