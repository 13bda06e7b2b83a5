"""What the labels of other people's samples are: numbers or names, in a field of their own, in JSON, or as folders.

All samples are surveyed before one is written, as a convention is only seen in many: a text that many share names a
class, a text of each sample's own is a caption. What was found is told; what may be meant in two ways is asked.
"""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from poisonshield.data.fields import Choice, Sample, field_and_path
from poisonshield.data.tree import UNLABELLED
from poisonshield.errors import DataError
from poisonshield.plain import plain

JSON_KEYS = ("label", "cls", "class", "target", "class_id", "class_index", "class_name", "category")
"""Where a label may stand in a .json, in this order."""

MAX_CLASSES = 100_000
"""A number beyond it is no class, and so many different texts are captions."""

NONE, FOLDER = "none", "folder"
"""What --label may be besides a field: no label, and the folders that samples lie in."""

_CLASS_WORDS, _CLASS_LETTERS = 5, 60  # what is longer is a sentence about one image


@dataclass
class Source:
    """Texts that may be labels, from one place in all samples: how often each came, and where first; who has none."""

    texts: Counter[str] = field(default_factory=Counter)
    first: dict[str, Sample] = field(default_factory=dict)
    lacking: Sample | None = None

    def note(self, text: str | None, sample: Sample) -> None:
        if text is None:
            self.lacking = self.lacking or sample
        elif text in self.first or len(self.first) <= MAX_CLASSES:
            self.texts[text] += 1
            self.first.setdefault(text, sample)


@dataclass(frozen=True)
class Rule:
    """Where labels stand. field: "cls", "txt", "json", one that the user named, NONE or FOLDER. path: within JSON.
    depth: how many folders above that of the class all samples share."""

    field: str
    path: tuple[str, ...] = ()
    depth: int = 0

    def text(self, sample: Sample) -> str | None:
        """The label of a sample as a text, or None if it has none. Raises DataError for two, and for damaged JSON."""
        if self.field == NONE:
            return UNLABELLED
        if self.field == FOLDER:
            folders = sample.key.removeprefix("./").split("/")[:-1]
            return folders[self.depth] if len(folders) > self.depth else None
        found = list(filter(self.uses, sample.labels))
        if len(found) > 1:
            raise DataError(
                f"{sample} has {len(found)} fields that may be its label; {sample.listed}.\n"
                f"  Say which: --label {plain(found[0])}"
            )
        if not found:
            return None
        data = sample.labels[found[0]]
        return _value(_parse(data, sample), self.path) if self.path else data.decode("utf-8-sig", "replace").strip()

    def uses(self, field: str) -> bool:
        """Whether a field of a sample is where its label stands."""
        return field == self.field or field.endswith(f".{self.field}")

    def __str__(self) -> str:
        return ".".join((self.field, *self.path))


class Survey:
    """What one split holds: how many samples, the texts of each place where labels may stand, the folders they lie in,
    the shard of each key, and the fields of keys without an image."""

    def __init__(self, choice: Choice) -> None:
        self.count, self.repeated, self.keys = 0, False, dict[str, str]()
        self.sources: dict[str, Source] = {"cls": Source(), "txt": Source()}
        self.folders: dict[str, tuple[int, Sample]] = {}
        self.without_image: dict[str, tuple[str, ...]] = {}
        self.damaged_json: DataError | None = None
        self._rules = [_chosen_rule(choice.label)] if choice.label else [Rule("cls"), Rule("txt")]

    def note(self, sample: Sample, key: str) -> None:
        """Count a sample. key: as it will be stored."""
        self.count += 1
        self.repeated |= self.keys.setdefault(key, sample.shard) != sample.shard
        sample = replace(sample, image=b"")
        folder = sample.key.removeprefix("./").rpartition("/")[0]
        self.folders[folder] = (
            (self.folders[folder][0] + 1, self.folders[folder][1]) if folder in self.folders else (1, sample)
        )
        for rule in self._rules:
            if rule.field not in (NONE, FOLDER):
                self.sources.setdefault(str(rule), Source()).note(rule.text(sample), sample)
        self._note_json(sample)

    def source(self, rule: Rule) -> Source:
        """The texts of all samples by a rule."""
        if rule.field not in (NONE, FOLDER):
            return self.sources.get(str(rule), Source())
        found = Source()
        for count, sample in self.folders.values():
            found.note(rule.text(sample), sample)
            if (text := rule.text(sample)) is not None:
                found.texts[text] += count - 1
        return found

    def _note_json(self, sample: Sample) -> None:
        files = [data for name, data in sample.labels.items() if name.rpartition(".")[2] == "json"]
        try:
            content = _parse(files[0], sample) if len(files) == 1 else None
        except DataError as err:  # it matters only where no other field is the label
            self.damaged_json = self.damaged_json or err
            return
        for key in content if isinstance(content, dict) else ():
            if key in JSON_KEYS or key == "caption":
                self.sources.setdefault(f"json.{key}", Source()).note(_value(content, (key,)), sample)


def find_rule(surveys: list[Survey], choice: Choice) -> tuple[Rule, str]:
    """(where the labels stand, a sentence that tells it). surveys: of each split, train first.

    Raises DataError where it may be meant in two ways.
    """
    if choice.label == NONE:
        return Rule(NONE), f"labels are not read, as --label says: all images are one class, {UNLABELLED!r}."
    if choice.label == FOLDER:
        return _folder_rule(surveys[0]), "labels are the folders of the samples, as --label says."
    found = surveys[0].sources
    path = next(((key,) for key in JSON_KEYS if f"json.{key}" in found), ())
    if choice.label is not None:
        rule = _chosen_rule(choice.label)
        if not rule.path and rule.field.rpartition(".")[2] == "json":
            raise DataError(f"--label {choice.label} names no value in the .json. Say which: --label {rule.field}.KEY")
        return rule, f"labels are {rule} of each sample, as --label says."
    if any(survey.sources["cls"].texts for survey in surveys):
        return Rule("cls"), "labels are the .cls of each sample."
    if damaged := next((s.damaged_json for s in surveys if s.damaged_json), None):
        raise damaged
    if path:
        return Rule("json", path), f"labels are {path[0]!r} in the .json of each sample."
    texts = found["txt"]
    if texts.texts and not _are_captions(texts, described="json.caption" in found):
        return Rule("txt"), "labels are the .txt of each sample."
    if len(surveys[0].folders) > 1:
        return _folder_rule(surveys[0]), "labels are the folders of the samples."
    for survey in surveys:
        if lonely := next(
            (k for k, fields in survey.without_image.items() if any(_ends_in_cls(f) for f in fields)), None
        ):
            raise DataError(
                f"no image has a label, and there are labels without an image, such as of {plain(lonely)}.\n"
                "  Give image and label one key, or read no labels (--label none)."
            )
    why = "the .txt of each sample is a caption" if texts.texts else "no sample has a label"
    return Rule(NONE), (
        f"{why}: all images are one class, {UNLABELLED!r}. If a field holds labels: --label FIELD, or --label json.KEY."
    )


def _ends_in_cls(field: str) -> bool:
    return field.rpartition(".")[2] == "cls"


def _chosen_rule(label: str) -> Rule:
    return Rule(*field_and_path(label))


def _folder_rule(survey: Survey) -> Rule:
    parts = [folder.split("/") for folder in survey.folders]
    depth = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), 0)
    return Rule(FOLDER, depth=depth)


def _parse(data: bytes, sample: Sample) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as err:
        raise DataError(
            f"the .json of {sample} is not readable JSON ({err}). Leave it out, or choose --label."
        ) from err


def _value(content: Any, path: tuple[str, ...]) -> str | None:
    """A text or a whole number within JSON, as a text; None if it is not there, or anything else."""
    for step in path:
        content = content.get(step) if isinstance(content, dict) else None
    if isinstance(content, str) or (isinstance(content, int) and not isinstance(content, bool)):
        return str(content).strip()
    return None


def _are_captions(source: Source, *, described: bool) -> bool:
    """Whether the .txt of samples are sentences about them, not names of classes. Raises DataError if that is open.

    described: .json files beside them have captions too, as img2dataset writes them.
    """
    texts, number = list(source.texts), sum(source.texts.values())
    if described or len(texts) > MAX_CLASSES:
        return True
    if any(len(t) > _CLASS_LETTERS or len(t.split()) > _CLASS_WORDS or "\n" in t for t in texts):
        return True
    if len(texts) == number > 10 and not all(map(is_number, texts)):
        raise DataError(
            f"the .txt of all {number:,} samples differ, such as {texts[0][:60]!r}: are they captions or classes?\n"
            "  Say it: --label none for images without labels, --label txt for classes."
        )
    return False


def is_number(text: str) -> bool:
    """Whether a text is the number of a class."""
    return text.isascii() and text.isdigit() and len(text) <= 9


class Labels:
    """From samples to label numbers, by one rule.

    surveys: by split, train first. given: {text: class name} in label order, or None; strict: whether a name that is
    not among them is an error, or a sample to leave out. Raises DataError for a text that is no class, naming the first
    sample that has it.
    """

    def __init__(
        self, rule: Rule, surveys: dict[str, Survey], *, given: dict[str, str] | None = None, strict: bool = True
    ) -> None:
        self.rule, self._strict = rule, strict
        sources = {split: survey.source(rule) for split, survey in surveys.items()}
        texts = {text: sample for source in sources.values() for text, sample in source.first.items()}
        self.are_numbers = (
            rule.field != NONE
            and any(map(is_number, texts))
            and (rule.field.rpartition(".")[2] == "cls" or all(map(is_number, texts)))
        )
        if rule.field == NONE:
            self.names = [UNLABELLED]
        elif given is not None:
            self.names = list(given.values())
        elif self.are_numbers:
            self.names = [str(n) for n in range(1 + max(int(t) for t in texts if is_number(t)))][:MAX_CLASSES]
        else:
            self.names = sorted(next(iter(sources.values())).texts)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._numbers |= {text: number for number, text in enumerate(given or ())}
        for source in sources.values():
            if source.lacking is not None:
                raise self._error(source.lacking, "")
            for text, sample in source.first.items():
                self._number(text, sample)

    def of(self, sample: Sample) -> int | None:
        """The label of a sample; None if it is to be left out."""
        return self._number(self.rule.text(sample) or "", sample)

    def _number(self, text: str, sample: Sample) -> int | None:
        if self.are_numbers:
            if not is_number(text) or int(text) >= len(self.names):
                raise self._error(sample, text)
            return int(text)
        if text not in self._numbers and (self._strict or not text):
            raise self._error(sample, text)
        return self._numbers.get(text)

    def _error(self, sample: Sample, text: str) -> DataError:
        wanted = "one of the classes"
        if self.are_numbers:
            wanted = f"a number from 0 to {len(self.names) - 1}"
        elif self.names:
            wanted += f" {', '.join(map(plain, self.names[:5]))}{' ...' if len(self.names) > 5 else ''}"
        shown = ", ".join(f".{field}" for field in sample.fields)
        return DataError(
            f"{sample} has label {text[:40]!r}, {wanted} was wanted "
            f"({self.rule} holds labels; its fields: {plain(shown)}).\n"
            "  Correct it or the class list, name another field (--label FIELD), or read no labels (--label none)."
        )
