"""Others' noise: every form gives the same pixels, whatever its order, and what does not fit is told in words."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from poisonshield.batch import Batch
from poisonshield.errors import DataError
from poisonshield.poisons.given import Given

COUNT, SIDE = 12, 6
KEYS = tuple(f"train/{i}" for i in range(COUNT))


def levels(low, high, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (COUNT, 3, SIDE, SIDE), generator=draw)


CLEAN, NOISE, Y = levels(0, 256, 0), levels(-8, 9, 1), torch.arange(COUNT) % 5
POISONED = (CLEAN + NOISE).clamp(0, 255)
BATCH = Batch(KEYS, CLEAN / 255, y=Y)
MIXED = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))


def take(path, **settings):
    poison = Given(Given.Config(path=str(path), **settings), num_classes=5, image_size=(SIDE, SIDE), seed=0)
    parts = [Batch(BATCH.keys[:5], BATCH.x[:5], y=Y[:5]), Batch(BATCH.keys[5:], BATCH.x[5:], y=Y[5:])]
    poison.fit(parts)
    return poison.apply(BATCH).x * 255


def write(tmp_path, form):
    path = tmp_path / f"poison{form}"
    if form == ".npy":  # pictures, channels last, as the field ships them
        np.save(path, POISONED.permute(0, 2, 3, 1).numpy().astype(np.uint8))
        return path, {"holds": "pictures"}
    if form == ".npz":  # by key, in another order
        np.savez(path, noise=NOISE[MIXED].numpy().astype(np.int8), keys=np.array([KEYS[i] for i in MIXED]))
        return path, {}
    if form == ".pt":  # with labels, pixels in [-1, 1]
        torch.save({"delta": NOISE / 255, "labels": Y}, path)
        return path, {}
    if form == ".safetensors":
        save_file({"a": NOISE.float(), "b": NOISE.float() * 0, "targets": Y}, path)
        return path, {"entry": "a", "unit": "levels"}
    (path / "train").mkdir(parents=True)
    for key, pixels in zip(KEYS, POISONED, strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy().astype(np.uint8)).save(path / f"{key}.png")
    return path, {"holds": "pictures"}


@pytest.mark.parametrize("form", [".npy", ".npz", ".pt", ".safetensors", ""])
def test_every_form_gives_the_poisoned_pictures(form, tmp_path):
    path, settings = write(tmp_path, form)
    torch.testing.assert_close(take(path, **settings), POISONED.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "array, settings, words",
    [
        (NOISE.numpy(), {}, "trust_order"),
        (NOISE.numpy()[:-1], {"trust_order": True}, "11 rows and no keys"),
        (POISONED.numpy()[MIXED], {"holds": "pictures"}, "by more than eps"),
        (NOISE.transpose(2, 3).numpy()[:, :2], {}, "needs \\[N, 3, 6, 6\\]"),
        (NOISE.numpy() / 255.0, {"unit": "levels", "trust_order": True}, None),
        (NOISE.numpy().astype(np.float32), {"trust_order": True}, "Set data.poison.unit"),
        (np.full((COUNT, 3, SIDE, SIDE), np.nan, np.float32), {"trust_order": True}, "Set data.poison.unit"),
        (2 * NOISE.numpy(), {"trust_order": True}, "allows 8"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(array, settings, words, tmp_path):
    np.save(tmp_path / "a.npy", array)
    if words is None:  # rounds to nothing: not an error, and no change
        assert torch.allclose(take(tmp_path / "a.npy", **settings), CLEAN.float(), atol=1e-3)
        return
    with pytest.raises(DataError, match=words):
        take(tmp_path / "a.npy", **settings)


def test_labels_of_another_order_are_refused(tmp_path):
    torch.save({"delta": NOISE[MIXED], "labels": Y[MIXED]}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="in another order"):
        take(tmp_path / "a.pt")


def test_missing_keys_files_and_pictures_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", noise=NOISE.numpy(), keys=np.array(("x", *KEYS[1:])))
    with pytest.raises(DataError, match="no row for train/0 and 0 more"):
        take(tmp_path / "a.npz")
    with pytest.raises(DataError, match="there is no"):
        take(tmp_path / "none.npy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no picture for train/0"):
        take(tmp_path / "folder")
    (tmp_path / "folder/0.jpg").touch()
    with pytest.raises(DataError, match="Give PNG"):
        take(tmp_path / "folder")
    with pytest.raises(DataError, match="set data.poison.path"):
        Given(Given.Config(), num_classes=5, image_size=(SIDE, SIDE), seed=0).fit([BATCH])


class Harm:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a file was run')",)


def test_a_file_runs_no_code(tmp_path):
    torch.save({"delta": Harm()}, tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", np.array([Harm()], dtype=object), allow_pickle=True)
    (tmp_path / "c.pkl").write_bytes(b"")
    for name, words in (("a.pt", "cannot be read"), ("b.npy", "cannot be read"), ("c.pkl", "are read, not .pkl")):
        with pytest.raises(DataError, match=words):
            take(tmp_path / name)
