"""`JPEG` as a torchvision v2 transform: what v2.Compose and data loaders give it, and what it gives back."""

from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from made import array_of
from PIL import Image

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.ops import JPEG, jpeg

tv_tensors = pytest.importorskip("torchvision.tv_tensors")
v2 = pytest.importorskip("torchvision.transforms.v2")

ARRAY = array_of(0, (17, 12))
LEVELS = torch.from_numpy(ARRAY.copy()).permute(2, 0, 1)  # uint8 [3, 17, 12]
X = LEVELS / 255
PICTURE = Image.fromarray(ARRAY)
CODED = jpeg(X[None], 30)[0]


def levels_of(x):
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def test_compose_takes_an_image_with_its_label_as_a_pair_and_as_two_arguments():
    """D: `JPEG` in v2.Compose on (image, label)."""
    transform = v2.Compose([JPEG(30), v2.Identity()])
    for label in (3, torch.tensor(3), "cat"):
        for image, y in (transform((X, label)), transform(X, label)):
            assert torch.equal(image, CODED) and y is label


def test_compose_takes_dictionaries_and_nested_samples():
    """D: dicts. Kinds and order of mappings stay, and so do named tuples."""
    Pair = namedtuple("Pair", "image label")
    out = v2.Compose([JPEG(30)])({"image": X, "meta": {"id": 7, "box": [1, 2]}})
    assert (
        list(out) == ["image", "meta"] and torch.equal(out["image"], CODED) and out["meta"] == {"id": 7, "box": [1, 2]}
    )
    pair = JPEG(30)(Pair(X, 1))
    assert isinstance(pair, Pair) and torch.equal(pair.image, CODED) and pair.label == 1
    ordered = JPEG(30)(OrderedDict(y=1, x=X))
    assert type(ordered) is OrderedDict and list(ordered) == ["y", "x"]
    kept = defaultdict(list, image=X)
    assert JPEG(30)(kept).default_factory is list and torch.equal(kept["image"], X)


def test_pictures_of_pillow_stay_pictures():
    """D: PIL. RGB and gray; the pixels are those of the 8-bit tensor."""
    out, y = JPEG(30)(PICTURE, 5)
    assert isinstance(out, Image.Image) and (out.mode, out.size, y) == ("RGB", PICTURE.size, 5)
    assert torch.equal(torch.from_numpy(np.array(out)).permute(2, 0, 1), JPEG(30)(LEVELS))
    gray = PICTURE.convert("L")
    coded = JPEG(30, mode="exact")(gray)
    three = torch.from_numpy(np.array(gray).copy()).expand(3, -1, -1)
    assert coded.mode == "L"
    assert torch.equal(torch.from_numpy(np.array(coded)), jpeg(three[None], 30, mode="exact")[0, 0])


def test_eight_bit_images_equal_pillows_codec_in_exact_mode():
    import io

    file = io.BytesIO()
    PICTURE.save(file, "JPEG", quality=60, subsampling="4:2:0")
    theirs = np.array(Image.open(io.BytesIO(file.getvalue())))
    assert np.array_equal(np.array(JPEG(60, mode="exact")(PICTURE)), theirs)


def test_eight_bit_tensors_are_read_as_levels_and_stay_eight_bit():
    assert torch.equal(JPEG(30)(LEVELS), levels_of(CODED))
    batch = LEVELS.expand(2, -1, -1, -1)
    assert torch.equal(JPEG(30)(batch), levels_of(CODED).expand(2, -1, -1, -1))
    some = JPEG(5, p=0.5, generator=torch.Generator().manual_seed(0))(LEVELS.expand(8, -1, -1, -1))
    same = (some == LEVELS).flatten(1).all(1)
    assert 0 < same.sum() < 8


@pytest.mark.parametrize("x", [X, LEVELS])
def test_images_of_torchvision_stay_such(x):
    """D: tv_tensors.Image; masks and boxes stay as they are, and so do plain tensors beside a marked image."""
    image, mask = tv_tensors.Image(x), tv_tensors.Mask(torch.ones(1, 17, 12))
    out = JPEG(30)({"other": torch.rand(3, 8, 8), "image": image, "mask": mask})
    assert type(out["image"]) is tv_tensors.Image and out["image"].dtype == x.dtype
    assert torch.equal(out["image"].as_subclass(torch.Tensor), JPEG(30)(x))
    assert out["mask"] is mask
    other = torch.rand(3, 8, 8)
    assert JPEG(30)(other, image)[0] is other
    video = JPEG(30)(tv_tensors.Video(x.expand(2, -1, -1, -1)))
    assert type(video) is tv_tensors.Video and torch.equal(video[0].as_subclass(torch.Tensor), JPEG(30)(x))


@pytest.mark.parametrize("shape", [(3, 16, 8), (5, 3, 16, 8), (2, 4, 3, 9, 7), (2, 2, 2, 3, 8, 8), (0, 2, 3, 8, 8)])
def test_leading_dimensions_are_images(shape):
    """D: leading dimensions [B, V, 3, H, W]; each image draws its own quality."""
    x = torch.rand(shape)
    out = JPEG(30)(x)
    assert out.shape == x.shape and torch.equal(
        out.flatten(0, -4) if x.dim() > 3 else out[None], jpeg(x.flatten(0, -4) if x.dim() > 3 else x[None], 30)
    )
    if x.dim() > 4 and len(x):
        first, again = (JPEG((5, 95), generator=torch.Generator().manual_seed(0))(v) for v in (x, x.flatten(0, -4)))
        assert torch.equal(first.flatten(0, -4), again)


def test_layout_and_gradient_pass_through():
    x = torch.rand(2, 3, 16, 8).to(memory_format=torch.channels_last).requires_grad_()
    out, _ = JPEG(50)((x, 1))
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_data_loader_with_workers_uses_it():
    data = [(X, i) for i in range(4)]

    class Coded(torch.utils.data.Dataset):
        transform = v2.Compose([JPEG((30, 60))])

        def __len__(self):
            return len(data)

        def __getitem__(self, i):
            return self.transform(data[i])

    batches = list(torch.utils.data.DataLoader(Coded(), batch_size=2))
    assert [len(b[0]) for b in batches] == [2, 2] and batches[1][1].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: JPEG(50)(PICTURE.convert("RGBA")), TypeError, "mode RGBA.*convert"),
        (lambda: JPEG(50)(PICTURE.convert("P")), TypeError, "mode P"),
        (lambda: JPEG(50)({"label": 3}), TypeError, r"no image in what was given \(int\)"),
        (lambda: JPEG(50)(), TypeError, r"no image in what was given \(nothing\)"),
        (lambda: JPEG(50)(tv_tensors.Mask(torch.ones(3, 8, 8))), TypeError, "no image"),
        (lambda: JPEG(50)((LEVELS.int(), 1)), TypeError, "int32"),
        (lambda: JPEG(50)(X[:1]), ShapeError, "RGB"),
        (lambda: JPEG(50, mean=torch.zeros(3), std=torch.ones(3))(LEVELS), ConfigError, "leave mean, std alone"),
        (lambda: JPEG(50, quallity=3), TypeError, "quallity: no setting of JPEG. Known: p, generator, subsampling"),
        (lambda: JPEG(50, x=3), TypeError, "x: no setting"),
        (lambda: JPEG(50, subsampling="411"), ConfigError, "Known: 420, 444"),
        (lambda: JPEG(50, mode="exact", upsample="box"), ConfigError, "needs mode='smooth'"),
        (lambda: JPEG(50.5, mode="exact"), ConfigError, "not whole"),
        (lambda: JPEG((30.5, 60)), TypeError, "whole number"),
        (lambda: JPEG((30, 60, 90)), TypeError, "as two whole numbers"),
        (lambda: JPEG([30, 60]), TypeError, "as two whole numbers"),
        (lambda: JPEG(True), TypeError, "quality is True"),
        (lambda: JPEG("75"), TypeError, "quality is '75'"),
        (lambda: JPEG(float("nan")), ConfigError, "not within"),
        (lambda: JPEG(50, p=float("nan")), ConfigError, "not a probability"),
        (lambda: JPEG(50, p="x"), ConfigError, "not a probability"),
        (lambda: JPEG(50, value_range=(1, 0)), ConfigError, "empty"),
        (lambda: JPEG((1, 9), generator=5), TypeError, "generator is a int. Give a torch.Generator"),
        (lambda: JPEG(50, clamp_grad=2), ConfigError, "clamp_grad 2"),
    ],
)
def test_what_it_cannot_take_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_nothing_is_imported_for_it():
    import subprocess
    import sys

    code = (
        "import sys, torch; from poisonshield.ops import JPEG; JPEG(50)((torch.rand(3, 8, 8), 1)); "
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'torchvision', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
