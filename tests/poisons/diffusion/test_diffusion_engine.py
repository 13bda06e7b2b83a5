"""What every diffusion poison keeps, found by scanning, and what the engine promises whatever the method."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from poisons.diffusion.photos import POISONS, make, picture, pictures

from poisonshield.batch import Batch
from poisonshield.errors import CheckpointError, DataError
from poisonshield.poisons.base import Radius
from poisonshield.poisons.diffusion.attack.manifest import manifest

SETS = {
    "mist-sem": ("mist", {"mode": "sem"}),
    "advdm-": ("advdm", {"direction": "-"}),
    **{n: (n, {}) for n in POISONS.names()},
}


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()


def reread(data):
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def sha(pixels):
    return hashlib.sha256(png(pixels)).hexdigest()


@pytest.mark.parametrize("case", SETS)
@pytest.mark.parametrize("levels", [4, 8, 16])
def test_the_budget_holds_on_the_png(model, case, levels):
    name, settings = SETS[case]
    source = picture(0, (22, 30))  # neither side fits the pipeline
    poison = make(name, model, steps=3, eps_levels=levels, step_levels=levels / 2, **settings)
    found = reread(png(poison.perturb({"a": source})["a"]))
    change = (found.int() - source.int()).abs()
    assert found.dtype == torch.uint8 and found.shape == source.shape
    assert 0 < change.max() <= levels
    record = manifest(poison, "a", source, found)
    assert record["measured"]["max"] == change.max() and record["budget"]["eps_levels"] == levels


@pytest.mark.parametrize("name", POISONS.names())
def test_equal_seeds_give_equal_bytes_and_the_callers_weights_stay(model, name):
    before, images = model.digest(), pictures(1)
    vocabulary = dict(model.tokenizer.get_vocab())
    first, again, other = (make(name, model, steps=2, seed=s).perturb(images)["k0"] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert model.digest() == before and model.tokenizer.get_vocab() == vocabulary and not model.placeholders
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", POISONS.names())
def test_the_change_stays_within_a_mask_of_pixels(model, name):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 10:28] = 1
    images = pictures(1)
    out = make(name, model, steps=2, mask="pixels").perturb(images, masks={"k0": mask})["k0"]
    change = (out.int() - images["k0"].int()).abs().amax(0)
    assert change[mask[0] == 0].max() == 0 and change[mask[0] > 0].max() > 0


@pytest.mark.parametrize("use", ["pixels", "loss", "both"])
def test_an_empty_mask_is_refused_by_key_whatever_it_is_for(model, use):
    with pytest.raises(DataError, match="mask of k0 is empty"):
        make("advdm", model, steps=1, mask=use).perturb(pictures(1), masks={"k0": torch.zeros(1, 32, 32)})


def test_a_batch_becomes_what_its_pictures_become(model):
    images, mask = pictures(2), torch.zeros(2, 1, 32, 32)
    mask[:, :, 8:20] = 1
    poison = make("advdm", model, steps=2)
    batch = Batch(tuple(images), torch.stack([*images.values()]).float() / 255, mask=mask)
    released = poison.apply(batch)
    made = make("advdm", model, steps=2).perturb(images, masks=dict(zip(images, mask, strict=True)))
    assert torch.equal((released.x * 255).round().to(torch.uint8), torch.stack([*made.values()]))
    assert released.keys == batch.keys and released.mask is mask
    with pytest.raises(DataError, match="one key twice"):
        poison.apply(batch.replace(keys=("k0", "k0")))


def test_a_radius_in_levels_is_told_in_pixel_units(model):
    assert make("advdm", model, eps_levels=16).budget() == Radius("linf", 16 / 255)
    assert make("advdm", model, norm="l2", eps_levels=2.55).budget() == Radius("rms", 2.55 / 255)


@pytest.mark.parametrize("name", POISONS.names())
def test_no_pictures_give_no_pictures(model, name):
    assert make(name, model).perturb({}) == {}


@pytest.mark.parametrize("name", ["advdm", "vae"])
def test_order_shards_and_company_change_no_byte(model, name):
    images = pictures(3)
    whole = make(name, model, steps=3).perturb(images)
    turned = make(name, model, steps=3).perturb(dict(reversed(images.items())))
    assert [*turned] == [*reversed(images)]
    shards = {}
    for keys in (("k2",), ("k0", "k1")):
        shards |= make(name, model, steps=3).perturb({k: images[k] for k in keys})
    assert (
        {k: sha(v) for k, v in whole.items()}
        == {k: sha(turned[k]) for k in whole}
        == {k: sha(shards[k]) for k in whole}
    )


def test_a_micro_batch_changes_last_bits_only(model):
    images = pictures(3)
    single, together = (make("advdm", model, steps=5).perturb(images, micro_batch=b) for b in (1, 3))
    equal = torch.stack([single[k] == together[k] for k in images]).float().mean()
    print(f"equal values: {float(equal):.4f}")
    assert equal >= 0.99


class Killed(Exception):
    pass


@pytest.mark.parametrize(("name", "settings"), [("advdm", {"momentum": 0.9}), ("sds", {}), ("fsmg", {}), ("aspl", {})])
def test_a_killed_run_goes_on_to_the_same_bytes(model, tmp_path, name, settings):
    images, folder = pictures(2), tmp_path / "state"

    def attacked(progress=None, state_folder=None):
        run = make(name, model, steps=8, **settings).run(
            images, state_folder=state_folder, save_every=2, progress=progress
        )
        return {key: sha(pixels) for key, pixels in run}

    def kill(done, total):
        assert total == 16
        if done == 5:
            raise Killed

    whole = attacked()
    with pytest.raises(Killed):
        attacked(kill, folder)
    assert any(folder.iterdir())
    steps = []
    assert attacked(lambda done, total: steps.append(done), folder) == whole
    assert 1 < steps[0] <= 5 and steps[-1] == 16  # it did go on, and did not begin again
    assert not folder.exists()


def test_another_runs_state_is_refused(model, tmp_path):
    images = pictures(1)

    def kill(done, total):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        [*make("vae", model, steps=8).run(images, state_folder=tmp_path / "s", save_every=2, progress=kill)]
    with pytest.raises(CheckpointError, match="other settings"):
        make("vae", model, steps=9).perturb(images, state_folder=tmp_path / "s")


def test_a_finished_picture_is_forgotten_only_when_the_next_is_asked_for(model, tmp_path):
    run = make("vae", model, steps=2).run(pictures(2), state_folder=tmp_path / "s")
    next(run)
    assert len([*(tmp_path / "s").iterdir()]) == 1
    next(run)
    assert len([*(tmp_path / "s").iterdir()]) == 1
    assert next(run, None) is None and not (tmp_path / "s").exists()


def test_a_set_stopped_in_its_second_picture_keeps_the_first(model, tmp_path):
    """Nothing of a finished picture is lost before all are given, and nothing stays behind afterwards."""
    images, settings = pictures(2), {"steps": 4}

    def stop(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("advdm", model, **settings).perturb(images, state_folder=tmp_path, progress=stop)
    made = []
    resumed = make("advdm", model, **settings).perturb(
        images, state_folder=tmp_path, progress=lambda done, total: made.append(done)
    )
    assert made == [5, 6, 7, 8]
    whole = make("advdm", model, **settings).perturb(images)
    assert all(torch.equal(resumed[key], whole[key]) for key in images)
    assert not list(tmp_path.glob("*"))
