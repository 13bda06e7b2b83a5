"""Images and tars made with Pillow and tarfile only, so that our own code is judged by others'."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image


def array_of(seed=0, size=(6, 5)):
    """uint8 [H, W, 3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def chw(array):
    """The same pixels as a tensor, uint8 [3, H, W]."""
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)


def encoded(array, kind="PNG", **settings):
    """An image file of an array, by Pillow."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **settings)
    return file.getvalue()


def picture(seed=0, size=(6, 5), kind="PNG"):
    """An image file of noise."""
    return encoded(array_of(seed, size), kind)


def pixels_of(data):
    """uint8 [H, W, 3] of an image file, by Pillow."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def write_tar(path, members, mode="w"):
    """A tar of (name, bytes) pairs; a TarInfo in place of a pair is added without data. Returns the path."""
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def link(name, kind=tarfile.SYMTYPE, target="/etc/passwd"):
    """A member that points elsewhere."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def contents(path):
    """{name: bytes} of every file in a tar."""
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}


def plant(root, files):
    """Write {path: bytes} below root; an integer stands for a PNG of noise with that seed. Returns root."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(data) if isinstance(data, int) else data)
    return root


def tree_of(folder):
    """{path within folder: bytes} of every file below it, to tell whether anything changed; {} if it is not there."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def array(height=20, width=30, seed=0):
    """uint8 [H, W, 3] of noise, by default as large as `disc`."""
    return array_of(seed, (height, width))


def save(path, pixels, **options):
    """Writes an array as a picture file; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def disc(height=20, width=30, value=255):
    """A mask uint8 [H, W]: a disc of radius 6 in the middle."""
    y, x = np.mgrid[:height, :width]
    return (((y - height / 2) ** 2 + (x - width / 2) ** 2) < 36).astype(np.uint8) * value


def equal_concepts(a, b):
    """Asserts that two sequences of concepts are the same to the bit."""
    assert [(c.name, c.group, c.digest) for c in a] == [(c.name, c.group, c.digest) for c in b]
    for one, other in zip(a, b, strict=True):
        for p, q in zip(one.images, other.images, strict=True):
            assert (p.key, p.caption) == (q.key, q.caption)
            assert torch.equal(p.pixels, q.pixels)
            assert (p.mask is None) == (q.mask is None) and (p.mask is None or torch.equal(p.mask, q.mask))
