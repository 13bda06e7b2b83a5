"""Every reader of what others wrote: sound files that it takes, the shells of its format, and how it is fed.

`feed(data, place)` writes the bytes into a folder of its own and reads them the way a command does.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mutate
import torch
from PIL import Image
from safetensors.torch import save

from poisonshield.data import open_dataset
from poisonshield.data.check import problems
from poisonshield.data.images import Preparation
from poisonshield.data.importer import import_data
from poisonshield.data.manifest import Manifest
from poisonshield.data.pictures import read_picture
from poisonshield.data.writer import ShardWriter
from poisonshield.engine.checkpoint import Checkpoints, load_plain, read_index, verify
from poisonshield.models.diffusion.embeddings import Learned, load_embedding, save_embedding
from poisonshield.models.weights import load_encoder
from poisonshield.poisons.release.recipe import load_recipe, read_recipe, save_recipe
from poisonshield.runs import read_experiment

CLASSES = ("cat", "dog", "猫")


@dataclass(frozen=True)
class Reader:
    """seeds(place): sound files, made there. feed(data, place): reads them; raises only errors of ours."""

    seeds: Callable[[Path], Sequence[bytes]]
    feed: Callable[[bytes, Path], object]
    shells: Sequence[mutate.Shell] = ()


def pixels(side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# Data sets


def write_set(place: Path, per_shard: int = 4) -> Path:
    folder = place / "set"
    with ShardWriter(folder, classes=CLASSES, image_size=(8, 8), samples_per_shard=per_shard, overwrite=True) as writer:
        for i in range(6):
            writer.write(f"s{i}", pixels(seed=i), i % 3)
    return folder


def manifests(place: Path) -> list[bytes]:
    return [(write_set(place) / "manifest.json").read_bytes()]


def feed_manifest(data: bytes, place: Path) -> None:
    folder = kept_set(place)
    (folder / "manifest.json").write_bytes(data)
    Manifest.load(folder)
    problems(folder)
    open_dataset(folder, "train").read(torch.arange(2))


@cache
def kept_set(place: Path) -> Path:
    return write_set(place)


def shards(place: Path) -> list[bytes]:
    return [p.read_bytes() for p in write_set(place, per_shard=6).glob("*.tar")]


def zipped_shards(place: Path) -> list[bytes]:
    import gzip

    return [gzip.compress(data, 1) for data in shards(place)]


def feed_shard(data: bytes, place: Path, ending: str = ".tar") -> None:
    folder = place / "one"
    folder.mkdir(exist_ok=True)
    name = f"shard-00000{ending}"
    (folder / name).write_bytes(data)
    info = {"samples": 6, "bytes": max(1, len(data)), "sha256": hashlib.sha256(data).hexdigest()}
    about = {"format": "poisonshield/1", "classes": CLASSES, "image_size": [8, 8], "samples": 6, "shards": {name: info}}
    (folder / "manifest.json").write_text(json.dumps(about))
    problems(folder)
    found = open_dataset(folder, "train")
    found.read(torch.arange(len(found)))


def feed_foreign_tar(data: bytes, place: Path, ending: str = ".tar") -> None:
    source = place / "foreign"
    source.mkdir(exist_ok=True)
    (source / f"a{ending}").write_bytes(data)
    import_data(source, place / "imported", overwrite=True, skip_broken=True)


def foreign_tars(place: Path) -> list[bytes]:
    out = []
    for fields in (("jpg", "cls"), ("png", "txt", "cls")):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in range(3):
                for field in fields:
                    content = {"cls": b"%d" % i, "txt": b"a dog"}.get(field) or encoded(field)
                    member = tarfile.TarInfo(f"img{i}.{field}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        out.append(file.getvalue())
    return out


# Pictures


def encoded(ending: str, mode: str = "RGB", side: int = 12, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels(side).permute(1, 2, 0).numpy()).convert(mode)
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **options)
    return file.getvalue()


def pictures(ending: str, *variants: dict) -> Callable[[Path], list[bytes]]:
    return lambda _: [encoded(ending, **variant) for variant in ({}, *variants)]


def feed_picture(ending: str) -> Callable[[bytes, Path], None]:
    def feed(data: bytes, place: Path) -> None:
        path = place / f"picture.{ending}"
        path.write_bytes(data)
        read_picture(path).pixels  # noqa: B018
        Preparation(size=8)(data, name=path.name)

    return feed


EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


# Words, weights, recipes, checkpoints


def words(form: str, ending: str) -> Callable[[Path], list[bytes]]:
    def make(place: Path) -> list[bytes]:
        save_embedding(Learned("toy", torch.randn(2, 16)), place / f"word{ending}", form)
        return [(place / f"word{ending}").read_bytes()]

    return make


def safetensors_words(place: Path) -> list[bytes]:
    return words("diffusers", ".safetensors")(place) + words("kohya", ".safetensors")(place)


def old_words(_: Path) -> list[bytes]:
    out = []
    for content in ({"toy": torch.randn(16)}, {"toy": torch.randn(2, 16).half()}):
        file = io.BytesIO()
        torch.save(content, file)
        out.append(file.getvalue())
    legacy = io.BytesIO()
    torch.save({"toy": torch.randn(16)}, legacy, _use_new_zipfile_serialization=False)
    return [*out, legacy.getvalue()]


def feed_word(ending: str) -> Callable[[bytes, Path], None]:
    def feed(data: bytes, place: Path) -> None:
        path = place / f"word{ending}"
        path.write_bytes(data)
        load_embedding(path, width=16)

    return feed


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(3))


def weights(_: Path) -> list[bytes]:
    whole = {f"encoder.{k}": v.clone() for k, v in Encoder().state_dict().items()}
    about = {"format": "pt", "model": '{"name": "resnet_mini"}'}
    return [save(whole, metadata=about), save({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, metadata=about)]


def feed_weights(data: bytes, place: Path) -> None:
    path = place / "method.safetensors"
    path.write_bytes(data)
    load_encoder(Encoder(), path)


def recipes(place: Path) -> list[bytes]:
    from poisonshield.poisons.lsp import LSP
    from poisonshield.poisons.regions import Regions

    out = []
    for cls in (LSP, Regions):
        poison = cls(cls.Config(), num_classes=3, image_size=(8, 8), seed=1)
        poison.fit(())
        path = save_recipe(poison, place / "x.poison.safetensors", classes=CLASSES, data="0" * 64)
        out.append(path.read_bytes())
    return out


def feed_recipe(data: bytes, place: Path) -> None:
    path = place / "y.poison.safetensors"
    path.write_bytes(data)
    read_recipe(path)
    load_recipe(path, classes=CLASSES, image_size=(8, 8))


def checkpoint(place: Path) -> Path:
    folder = Checkpoints(place / "checkpoints", keep=2)
    folder.save(4, {"run": "x"}, lambda draft: torch.save({"w": torch.ones(3), "n": 1}, draft / "rank-0.pt"))
    return folder.path(4)


def indices(place: Path) -> list[bytes]:
    return [(kept_checkpoint(place) / "index.json").read_bytes()]


@cache
def kept_checkpoint(place: Path) -> Path:
    return checkpoint(place)


def feed_index(data: bytes, place: Path) -> None:
    path = kept_checkpoint(place)
    (path / "index.json").write_bytes(data)
    read_index(path)
    verify(path)


def states(place: Path) -> list[bytes]:
    return [(kept_checkpoint(place) / "rank-0.pt").read_bytes()]


def feed_state(data: bytes, place: Path) -> None:
    (place / "state.pt").write_bytes(data)
    load_plain(place / "state.pt")


# Configs


def configs(_: Path) -> list[bytes]:
    root = Path(__file__).resolve().parents[2] / "configs"
    names = ("defend/vespr_own", "invert/rendered", "pretrain/rendered")
    return [(root / f"{name}.yaml").read_bytes() for name in names]


def feed_config(data: bytes, place: Path) -> None:
    (place / "config.yaml").write_bytes(data)
    read_experiment(place / "config.yaml")


TAR, ZIP, HEADER = (mutate.tar_headers,), (mutate.zip_member,), (mutate.safetensors_header, mutate.safetensors_text)

READERS = {
    "manifest": Reader(manifests, feed_manifest),
    "shard": Reader(shards, feed_shard, TAR),
    "shard_gz": Reader(zipped_shards, lambda d, p: feed_shard(d, p, ".tar.gz"), (mutate.gzipped(mutate.tar_headers),)),
    "foreign_tar": Reader(foreign_tars, feed_foreign_tar, TAR),
    "config": Reader(configs, feed_config),
    "recipe": Reader(recipes, feed_recipe, HEADER),
    "weights": Reader(weights, feed_weights, HEADER),
    "word_safetensors": Reader(safetensors_words, feed_word(".safetensors"), HEADER),
    "word_pt": Reader(words("a1111", ".pt"), feed_word(".pt"), ZIP),
    "word_bin": Reader(old_words, feed_word(".bin")),
    "checkpoint_index": Reader(indices, feed_index),
    "checkpoint_state": Reader(states, feed_state, ZIP),
    "jpeg": Reader(pictures("jpg", {"mode": "L"}, {"progressive": True}, {"exif": EXIF}), feed_picture("jpg")),
    "png": Reader(pictures("png", {"mode": "P"}, {"mode": "RGBA"}), feed_picture("png"), (mutate.png_chunks,)),
    "webp": Reader(pictures("webp", {"lossless": True}, {"mode": "RGBA"}), feed_picture("webp")),
    "bmp": Reader(pictures("bmp", {"mode": "P"}), feed_picture("bmp")),
    "gif": Reader(pictures("gif", {"mode": "L"}), feed_picture("gif")),
    "tiff": Reader(pictures("tif", {"compression": "tiff_lzw"}, {"compression": "jpeg"}), feed_picture("tif")),
    "ppm": Reader(pictures("ppm", {"mode": "L"}), feed_picture("ppm")),
}
