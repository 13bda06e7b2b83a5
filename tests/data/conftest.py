"""A small data set made with plain tarfile and Pillow, so that what is read can be judged without our own code."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from made import array, disc, save
from PIL import Image


class HandMade:
    """A data set folder and the pixels that went into it: `pixels[key]` uint8 [H, W, 3], `labels[key]` int."""

    def __init__(self, folder, *, counts=(5, 4), size=(6, 5), classes=3, kind="png", seed=0):
        self.folder, self.pixels, self.labels, self.members = folder, {}, {}, []
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        number = 0
        for count in counts:
            members = []
            for _ in range(count):
                key = f"img/{number:04d}"
                array = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(array).save(file, "PNG" if kind == "png" else "JPEG")
                self.pixels[key], self.labels[key] = array, number % classes
                members += [(f"{key}.{kind}", file.getvalue()), (f"{key}.cls", str(number % classes).encode())]
                number += 1
            self.members.append(members)
        self.manifest = {
            "format": "poisonshield/1",
            "classes": [f"class {c}" for c in range(classes)],
            "image_size": list(size),
            "samples": number,
        }
        self.write()

    def write(self):
        """Write tars from `members` and a manifest that fits them."""
        shards = {}
        for number, members in enumerate(self.members):
            path = self.folder / f"s-{number}.tar"
            with tarfile.open(path, "w") as tar:
                for name, data in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            data = path.read_bytes()
            samples = sum(1 for name, _ in members if name.endswith(".cls"))
            shards[path.name] = {"samples": samples, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.manifest |= {"shards": shards, "samples": sum(s["samples"] for s in shards.values())}
        self.save()

    def save(self):
        (self.folder / "manifest.json").write_text(json.dumps(self.manifest))

    def replace(self, shard, position, name=None, data=None):
        """Change one member's name or bytes and write everything again, hashes included."""
        old_name, old_data = self.members[shard][position]
        self.members[shard][position] = (name or old_name, old_data if data is None else data)
        self.write()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What is kept of verified data sets goes into a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def hand_made(tmp_path):
    """`hand_made(counts=(5, 4), ...)` -> HandMade in a fresh folder."""

    def make(name="set", **settings):
        return HandMade(tmp_path / name, **settings)

    return make


@pytest.fixture
def concept_folders(tmp_path):
    """Two concepts of two pictures, with masks beside one and in a folder for the other."""
    for i in range(2):
        save(tmp_path / "set" / "cup" / f"{i}.png", array(seed=i))
        save(tmp_path / "set" / "cup" / f"{i}.mask.png", disc())
        save(tmp_path / "set" / "hat" / f"a_red hat {i}.png", array(seed=10 + i))
        save(tmp_path / "set" / "hat" / "masks" / f"a_red hat {i}.png", disc())
    return tmp_path / "set"
