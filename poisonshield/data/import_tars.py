"""Tar shards of other people become a data set: two passes, one that finds labels and keys, and one that writes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from poisonshield.data.class_list import read_class_list
from poisonshield.data.fields import Choice, Sample, samples_in
from poisonshield.data.intake import Settings, write_split
from poisonshield.data.labels import NONE, Labels, Rule, Survey, find_rule
from poisonshield.data.manifest import FILE_NAME, MAX_BYTES, Manifest
from poisonshield.data.splits import (
    TAR_ENDINGS,
    choose_splits,
    find_archives,
    find_tars,
    split_folders,
    split_in,
    visible_folders,
)
from poisonshield.data.summary import Summary
from poisonshield.data.tars import read_groups
from poisonshield.data.verify import hash_file
from poisonshield.errors import DataError
from poisonshield.files import read_bounded
from poisonshield.plain import plain


@dataclass(frozen=True)
class Group:
    """The tars of one split. prefix: what their keys begin with."""

    split: str
    folder: Path
    prefix: str
    paths: list[Path]


def import_shards(
    src: Path,
    out: Path,
    settings: Settings,
    *,
    summary: Summary,
    class_list: str | Path | None = None,
    pattern: str = "*",
    choice: Choice,
) -> dict[str, Manifest]:
    """Tar shards (.tar, .tar.gz) in src, or in its folders of splits; where labels stand is found, or `choice` says.

    Shards whose names hold a split (x-train-0.tar) are told apart, and their keys begin with it. Classes: the class
    list, else `classes` of a manifest.json beside them (its hashes are checked too), else the numbers or names found.
    Keys lose a leading `./`, dots become `_`, and where two shards share a key all begin with their shard's name. A
    poisoned data set stays marked as one.
    """
    groups = _find_groups(src, pattern, summary)
    beside = {g.split: _manifest_beside(g.folder, g.paths, complete=pattern == "*") for g in groups}
    surveys = {g.split: _survey(g, choice, settings) for g in groups}
    if not any(survey.count for survey in surveys.values()):
        raise _no_image(src, groups, choice, settings)
    rule, told = find_rule(list(surveys.values()), choice)
    summary.choose(told)
    listed = read_class_list(class_list) if class_list else None
    by_shard = any(survey.repeated for survey in surveys.values())
    if by_shard:
        summary.choose("the same keys come in several shards: each key begins with the name of its shard.")
    with ExitStack() as writers:
        for group in groups:
            given = listed or _as_given(beside[group.split].classes)
            labels = Labels(rule, surveys, given=given, strict=listed is None)
            left_out: Counter[str] = Counter()
            samples = _labelled(group, choice, settings, labels, summary, left_out, by_shard=by_shard)
            write_split(
                samples,
                out / group.split,
                settings,
                writers,
                classes=labels.names,
                note=_note(src, group, beside[group.split]),
                poison=_poison(beside[group.split], settings),
                left_out=left_out,
                summary=summary,
            )
            if left_out:
                summary.choose(
                    "left out of tars: " + ", ".join(f"{n:,} {what}" for what, n in sorted(left_out.items()))
                )
    return {g.split: Manifest.load(out / g.split) for g in groups}


def _find_groups(src: Path, pattern: str, summary: Summary) -> list[Group]:
    folders = split_folders(src, summary) if not find_tars(src, pattern) else {}
    for folder in (src, *folders.values()):
        for name in find_archives(folder):
            summary.leave_out("archives that are not read (unpack them first)", name)
    groups = [Group(split, folder, "", find_tars(folder, pattern)) for split, folder in folders.items()]
    if not any(group.paths for group in groups):
        for path in visible_folders(src):
            summary.leave_out("folders beside the tars", path.name)
        named = _by_split(find_tars(src, pattern), src, summary)
        groups = [Group(split, src, split and f"{split}-", paths) for split, paths in named.items()]
    return [group for group in groups if group.paths or pattern == "*"]  # a pattern may mean one split only


def _by_split(paths: list[Path], src: Path, summary: Summary) -> dict[str, list[Path]]:
    """{"train": paths, "test": paths}, or {"": paths} where names tell no split."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(split_in(path.name, separators="-") or "", []).append(path)
    if set(groups) == {""}:  # other separators count where they tell splits apart
        wider: dict[str, list[Path]] = {}
        for path in paths:
            wider.setdefault(split_in(path.name, separators="-_. ") or "", []).append(path)
        groups = wider if len(wider) > 1 else groups
    if "" in groups and len(groups) > 1:
        raise DataError(
            f"some tars name a split and some do not, such as {groups[''][0].name}.\n"
            "  Import one kind at a time with --pattern, e.g. --pattern '*-train-*'."
        )
    if len(groups) == 1:
        return {"test" if split == "val" else split: paths for split, paths in groups.items()}
    return choose_splits(groups, src, summary)


def _samples(
    group: Group,
    choice: Choice,
    settings: Settings,
    left_out: Counter[str],
    rule: Rule,
    without: dict[str, tuple[str, ...]],
) -> Iterator[Sample]:
    """All samples of a split. left_out: counts fields that are not used. without: takes keys that have no image, and
    their fields."""
    for path in group.paths:
        for key, fields in read_groups(path, wanted=choice.wants, left_out=left_out, max_member=settings.max_member):
            samples, passed_over = samples_in(key, fields, choice, path=str(path), shard=path.name)
            unused = [f for f in fields if choice.may_label(f) and not rule.uses(f)]
            left_out.update(f".{plain(field)}" for field in (*passed_over, *unused))
            if not samples:
                without[key] = tuple(fields)
                left_out.update(["no image"] if any(map(rule.uses, fields)) else [])
            yield from samples


def _survey(group: Group, choice: Choice, settings: Settings) -> Survey:
    survey = Survey(choice)
    for sample in _samples(group, choice, settings, Counter(), Rule(NONE), survey.without_image):
        survey.note(sample, stored_key(sample, group.prefix, by_shard=False))
    for key in survey.without_image:
        stored = group.prefix + stored_form(key)
        if shard := survey.keys.get(stored):
            raise DataError(
                f"the files of sample {plain(key)} do not follow each other (its image is in {shard}): they were taken "
                "apart.\n  Write the shard again with the files of each sample together: tar --sort=name"
            )
    return survey


def _no_image(src: Path, groups: list[Group], choice: Choice, settings: Settings) -> DataError:
    counts: Counter[str] = Counter()
    for group in groups:
        for _ in _samples(group, choice, settings, counts, Rule("cls"), {}):
            pass
    found = ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "nothing"
    number = sum(len(group.paths) for group in groups)
    asked = f" Samples have no .{plain(choice.image)}, as --image says." if choice.image else ""
    return DataError(
        f"no image came from tar shards of {src.name} ({number} files): {found}.{asked}\n"
        "  Nothing was imported. Look at what the source holds, and say which field is the image: --image FIELD"
    )


def _labelled(
    group: Group,
    choice: Choice,
    settings: Settings,
    labels: Labels,
    summary: Summary,
    left_out: Counter[str],
    *,
    by_shard: bool,
) -> Iterator[tuple[str, bytes, int]]:
    """(key, image bytes, label) of what is imported."""
    without: dict[str, tuple[str, ...]] = {}
    for sample in _samples(group, choice, settings, left_out, labels.rule, without):
        if (label := labels.of(sample)) is None:
            summary.leave_out("samples of classes that the class list does not name", sample.key)
        else:
            yield stored_key(sample, group.prefix, by_shard=by_shard), sample.image, label
    for key, fields in without.items():
        if any(map(labels.rule.uses, fields)):
            summary.leave_out("samples without an image", key)


def stored_key(sample: Sample, prefix: str, *, by_shard: bool) -> str:
    """What a sample is called in the data set. by_shard: with its shard's name."""
    key = stored_form(sample.key)
    if by_shard:
        ending = next(e for e in sorted(TAR_ENDINGS, key=len, reverse=True) if sample.shard.lower().endswith(e))
        key = f"{stored_form(sample.shard[: -len(ending)])}/{key}"
    return prefix + key


def stored_form(name: str) -> str:
    """A name of a tar without a leading ./ and without dots."""
    return name.removeprefix("./").replace(".", "_")


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
    if not path.exists():
        return _ForeignManifest()
    try:
        found = _ForeignManifest.model_validate_json(read_bounded(path, max_bytes=MAX_BYTES, what="manifest"))
    except ValidationError as err:
        first = err.errors()[0]
        why = plain(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": "))
        raise DataError(f"{path} is not a manifest ({why}). Move it away and give a class list.") from err
    missing = [name for name in found.shards if not (folder / name).is_file()]
    if complete and missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(found.shards)} tars in its manifest: "
            f"{plain(', '.join(missing[:5]))}.\n  Copy them there, or say with --pattern which tars are meant."
        )
    for tar in paths:
        if tar.name in found.shards and found.shards[tar.name].sha256 not in (None, hash_file(tar)):
            raise DataError(f"{tar} does not have the sha256 that {path} gives. Copy it again from its source.")
    return found


def _as_given(names: list[str] | None) -> dict[str, str] | None:
    if not names:
        return None
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise DataError(f"class name {twice!r} comes twice in the manifest.json beside the tars. Name each class once.")
    return {name: name for name in names}


def _note(src: Path, group: Group, beside: _ForeignManifest) -> str:
    note = f"from tar shards of {src.name} ({len(group.paths)} {group.split} files)".replace("  ", " ")
    return f"{note}; they say: {beside.provenance}" if beside.provenance else note


def _poison(beside: _ForeignManifest, settings: Settings) -> dict[str, Any] | None:
    if beside.poison and settings.preparation.size is not None:
        return {**beside.poison, "altered": "resized after poisoning: the stated budget no longer holds"}
    return beside.poison
