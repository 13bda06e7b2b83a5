"""Pictures from a pipeline and learned words, one PNG each, a sheet, and a record of how.

The starting noise belongs to (seed, prompt as it was written, number of the picture). A prompt with {} is drawn once
for every word, so all words share its noise, and pictures of one number differ by the word alone.
"""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield import __version__
from poisonshield.api.photos import refuse_file, write_drawn, write_png
from poisonshield.engine.checkpoint import sha256
from poisonshield.engine.processes import choose_device
from poisonshield.errors import ConfigError, DataError
from poisonshield.files import read_bounded, write_whole, writing
from poisonshield.models.diffusion.embeddings import load_embedding
from poisonshield.models.diffusion.pipeline import DTYPES, LatentDiffusion
from poisonshield.models.diffusion.sampler import check_sampling, latent_shape, sample, start_noise
from poisonshield.reports.sheets import draw_sheet, to_image

log = logging.getLogger(__name__)

RECORD = "generate.json"
SHEET = "sheet.png"
_OTHERS = (SHEET, RECORD)

_MAX_RECORD = 2**26  # bytes


@dataclass(frozen=True)
class PromptRow:
    """What a row of pictures is drawn from."""

    written: str
    """The prompt as it was given, with {} where a word belongs. The noise goes by it."""
    text: str
    """The prompt with the word in its place."""
    below_switch: str | None
    """The prompt at timesteps below the switch, with another word there; None without a switch."""

    @property
    def folder(self) -> str:
        """A name for its folder, not unique by itself."""
        return "".join(c if c.isalnum() else "_" for c in self.text).strip("_")[:60]


def generate(
    pipeline: str | Path,
    out: str | Path,
    *,
    embeddings: Sequence[str | Path] = (),
    prompts: Sequence[str] = ("a photo of a {}",),
    count: int = 8,
    steps: int = 50,
    guidance: float = 7.5,
    seed: int = 42,
    switch: int | None = None,
    switch_word: str | None = None,
    size: int | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    micro_batch: int = 16,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `count` pictures of every prompt into `out`; the record, which generate.json holds too.

    pipeline: a Stable Diffusion folder, or tiny.
    embeddings: files of learned words, each FILE or WORD=FILE to call it otherwise.
    prompts: {} stands for each word in turn; others are drawn once, and may name a word.
    switch: below this timestep, switch_word stands in place of every learned word.
    size: pixels a side, by default the pipeline's. dtype: fp32, bf16 or fp16, of the networks.
    Raises ConfigError, DataError; nothing is written if anything is wrong. StorageError for a disk that does not take
    it, BusyError while another process writes into the folder.
    """
    start, out = time.perf_counter(), Path(out)
    refuse_file(out)
    if (out / RECORD).is_file() and not overwrite:
        raise ConfigError(f"{out} holds pictures already. Give another folder, or --overwrite to write over them.")
    if count < 1 or dtype not in DTYPES:
        raise ConfigError(f"count {count} and dtype {dtype!r}: at least 1, and one of {', '.join(DTYPES)} are wanted.")
    model = LatentDiffusion.load(pipeline, dtype=DTYPES[dtype]).to(choose_device(device))
    words, vectors = add_words(model, embeddings)
    rows = fill_prompts(prompts, [w["token"] for w in words], switch=switch, switch_word=switch_word)
    # Every prompt is read before the first picture, so that a mistake in the last one costs no work.
    contexts = [model.prompts([row.text], vectors) for row in rows]
    below = [None if row.below_switch is None else model.prompts([row.below_switch]) for row in rows]
    old, shape = _list_recorded(out), latent_shape(model, size)
    check_sampling(model, steps=steps, guidance=guidance, switch=switch, micro_batch=micro_batch)
    made: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    names = [file for number, row in enumerate(rows) for file in _name_files(number, row.folder, count)]
    ours = [*(str(file.relative_to(out)) for file in old), *(_OTHERS if (out / RECORD).is_file() else ())]
    with writing(out, what="set of pictures", names=[*names, *_OTHERS], ours=ours):
        for number, (row, context, other) in enumerate(zip(rows, contexts, below, strict=True)):
            keys = [f"{row.written}/{i}" for i in range(count)]
            x = sample(
                model,
                context.expand(count, -1, -1),
                noise=start_noise(keys, shape, seed=seed, device=context.device),
                steps=steps,
                guidance=guidance,
                switch=None if switch is None or other is None else (switch, other.expand(count, -1, -1)),
                micro_batch=micro_batch,
            )
            made[f"{number}: {row.text}"] = x
            files = _name_files(number, row.folder, count)
            _write(out, files, x)
            entry = {"written": row.written, "spoken": row.text, "below_switch": row.below_switch, "files": files}
            entries.append(entry)
            log.info("%3d/%d  %s", number + 1, len(rows), row.text)
        for file in old - {out / f for e in entries for f in e["files"]}:
            file.unlink(missing_ok=True)
        write_drawn(out / SHEET, lambda at: draw_sheet(at, made))
        settings = {
            "count": count,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "switch": switch,
            "dtype": dtype,
        }
        settings |= {"switch_word": switch_word, "size": x.shape[-1], "device": str(context.device)}
        record = {
            "version": __version__,
            "pipeline": str(pipeline),
            "pipeline_digest": model.digest(),
            "words": words,
            "prompts": entries,
            "settings": settings,
            "seconds": round(time.perf_counter() - start, 1),
        }
        write_whole(out / RECORD, json.dumps(record, indent=1))
    return record


def add_words(model: LatentDiffusion, embeddings: Sequence[str | Path]) -> tuple[list[dict[str, Any]], Tensor | None]:
    """Make each file's word known to the model: what was read, in order, and all vectors [R, d], None without files."""
    words: list[dict[str, Any]] = []
    vectors: list[Tensor] = []
    for given in embeddings:
        token, path = None, Path(given)
        if "=" in str(given) and not path.is_file():
            token, _, name = str(given).partition("=")
            path = Path(name)
        learned = load_embedding(path, token, width=model.width)
        placeholder = model.add_placeholder(learned.token, len(learned.vectors))
        words.append(
            {"token": placeholder.token, "file": str(path), "sha256": sha256(path), "vectors": placeholder.count}
        )
        vectors.append(learned.vectors)
    return words, torch.cat(vectors).to(model.alphas_cumprod.device) if vectors else None


def fill_prompts(
    prompts: Sequence[str], words: Sequence[str], *, switch: int | None = None, switch_word: str | None = None
) -> list[PromptRow]:
    """The rows of pictures that prompts and words make together, prompt by prompt.

    Raises ConfigError for no prompt, a prompt for words where there are none, or one of the switch's two halves alone.
    """
    if (switch is None) != (switch_word is None):
        raise ConfigError("switch and switch_word belong together: below the timestep `switch`, `switch_word` speaks.")
    if not prompts:
        raise ConfigError("no prompt was given; {} stands for each learned word, as in 'a photo of a {}'.")
    rows = []
    for prompt in prompts:
        if "{}" in prompt and not words:
            raise ConfigError(f"{prompt!r} has a place for a learned word, and no embedding was given.")
        for word in words if "{}" in prompt else (None,):
            text = prompt if word is None else prompt.replace("{}", word)
            below = None if switch_word is None else _replace_words(text, words, switch_word)
            rows.append(PromptRow(prompt, text, below))
    return rows


def _replace_words(text: str, words: Sequence[str], other: str) -> str:
    """The text with the other word in place of each of these."""
    # In one pass, the longest first: a word may lie within another, or within the one that takes its place.
    known = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.sub(known, lambda _: other, text) if known else text


def _list_recorded(out: Path) -> set[Path]:
    """The pictures that the record in `out` names, so that none of an older run stays among the new ones."""
    if not (out / RECORD).is_file():
        return set()
    try:
        record = json.loads(read_bounded(out / RECORD, max_bytes=_MAX_RECORD, what="record"))
        files = {out / file for entry in record["prompts"] for file in entry["files"]}
    except (ValueError, LookupError, TypeError, RecursionError) as err:
        raise DataError(f"{out / RECORD} is no record of pictures ({err}). Choose another folder.") from err
    return {file for file in files if file.resolve().is_relative_to(out.resolve())}


def _name_files(number: int, folder: str, count: int) -> list[str]:
    """The files of a row's pictures, by their paths from the folder of all."""
    return [f"{number:02d}-{folder}/{i:03d}.png" for i in range(count)]


def _write(out: Path, files: Sequence[str], x: Tensor) -> None:
    for file, picture in zip(files, x, strict=True):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        write_png(out / file, to_image(picture))
