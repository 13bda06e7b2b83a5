"""Learned words as files: read back equal, read by diffusers, and nothing in a file is ever executed."""

import errno
import os
import pickle
import pickletools
import re
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from poisonshield.errors import ConfigError, DataError, ShapeError, StorageError
from poisonshield.models.diffusion.embeddings import Learned, load_embedding, save_embedding
from poisonshield.world.small_pipeline import write_pipeline

FILES = {"diffusers": "w.safetensors", "a1111": "w.pt", "kohya": "w.safetensors"}


def learned(k=2, width=16, token="<sks>"):
    return Learned(token, torch.randn(k, width, generator=torch.Generator().manual_seed(k)))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A function that reads a random pipeline from a folder, as others would: without our hooks on its text encoder."""
    from diffusers import StableDiffusionPipeline

    model, folder = tiny_model(), tmp_path_factory.mktemp("pipeline")
    parts = {k: getattr(model, k) for k in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}
    write_pipeline(folder, **parts)
    return lambda: StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def encoded(pipe, prompt):
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("k", [1, 3])
def test_each_form_reads_back_equal(tmp_path, form, k):
    word = learned(k)
    save_embedding(word, tmp_path / FILES[form], form)
    back = load_embedding(tmp_path / FILES[form], width=16)
    assert back.token == "<sks>"
    assert back.vectors.dtype == torch.float32
    assert torch.equal(back.vectors, word.vectors)
    assert load_embedding(tmp_path / FILES[form], token="<other>").token == "<other>"
    assert [p.name for p in tmp_path.iterdir()] == [FILES[form]]


def test_the_files_have_the_layouts_that_others_expect(tmp_path):
    for form, name in {"diffusers": "d.safetensors", "a1111": "a.pt", "kohya": "k.safetensors"}.items():
        save_embedding(learned(2), tmp_path / name, form)
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path / "d.safetensors").items()} == {"<sks>": (2, 16)}
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path / "k.safetensors").items()} == {"emb_params": (2, 16)}
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(content["string_to_param"]["*"], learned(2).vectors)
    assert content["string_to_token"] == {"*": 265} and content["name"] == "<sks>" and content["step"] == 0
    save_embedding(learned(1), tmp_path / "d.safetensors")
    assert load_file(tmp_path / "d.safetensors")["<sks>"].shape == (16,)


@pytest.mark.parametrize("form", ["diffusers", "a1111"])
@pytest.mark.parametrize("k", [1, 2])
def test_diffusers_loads_the_file_offline_and_the_prompt_changes(tmp_path, pipeline, form, k):
    word = learned(k)
    save_embedding(word, tmp_path / FILES[form], form)
    pipe = pipeline()
    other = encoded(pipe, "a photo of a ring")
    pipe.load_textual_inversion(tmp_path, weight_name=FILES[form], local_files_only=True)
    changed = encoded(pipe, "a photo of a <sks>")
    assert not torch.allclose(other, changed, atol=1e-3)
    # the same context as our own pipeline gives for these rows
    model = tiny_model()
    model.add_placeholder("<sks>", k)
    torch.testing.assert_close(changed, model.prompts(["a photo of a <sks>"], word.vectors), rtol=0, atol=1e-6)


def test_the_generated_picture_changes_too(tmp_path, pipeline):
    save_embedding(Learned("<sks>", 5 * learned(1).vectors), tmp_path / "w.safetensors")
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(tmp_path, weight_name="w.safetensors", local_files_only=True)

    def draw(prompt):
        return pipe(
            prompt,
            num_inference_steps=2,
            output_type="pt",
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(0),
        ).images

    assert (draw("a photo of a <sks>") - draw("a photo of a ring")).abs().max() > 1e-6


def test_older_diffusers_bin_files_and_half_precision_are_read(tmp_path):
    torch.save({"<cat-toy>": torch.ones(16, dtype=torch.float16)}, tmp_path / "learned_embeds.bin")
    back = load_embedding(tmp_path / "learned_embeds.bin")
    assert back.token == "<cat-toy>" and torch.equal(back.vectors, torch.ones(1, 16))


def test_a_kohya_file_of_others_is_called_by_its_name(tmp_path):
    save_file({"emb_params": torch.ones(2, 16)}, tmp_path / "mycat.safetensors")
    assert load_embedding(tmp_path / "mycat.safetensors").token == "mycat"


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "plain pickle"])
def test_a_pickle_payload_is_refused_in_words_and_never_executed(tmp_path, by_torch):
    mark, file = tmp_path / "executed", tmp_path / "evil.pt"
    content = {"string_to_param": {"*": torch.zeros(1, 16)}, "name": Payload(mark)}
    if by_torch:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match="evil.pt was not read.*can run code") as caught:
        load_embedding(file)
    assert not mark.exists()
    assert ".safetensors" in str(caught.value)
    # the payload is real: the unrestricted loader would have run it
    if by_torch:
        torch.load(file, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize(
    "content, told",
    [
        ({"<s>": torch.zeros(1, 2, 16)}, "shape \\[1, 2, 16\\]"),
        ({"<s>": torch.zeros(0, 16)}, "shape \\[0, 16\\]"),
        ({"<s>": torch.zeros(16, dtype=torch.int64)}, "floats is wanted"),
        ({"<s>": "words"}, "str"),
        ({"<s>": torch.full((16,), float("nan"))}, "not finite"),
        ({"clip_g": torch.zeros(1, 16), "clip_l": torch.zeros(1, 16)}, "2 entries.*two text encoders"),
        ({"string_to_param": {}}, "one tensor"),
        ([torch.zeros(16)], "holds a list"),
        ({}, "0 entries"),
    ],
)
def test_what_is_no_embedding_is_refused_by_file_name(tmp_path, content, told):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(DataError, match=f"(?s)odd.pt.*{told}"):
        load_embedding(tmp_path / "odd.pt")


def test_another_width_is_refused(tmp_path):
    save_embedding(learned(1, 16), tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="16 wide and 768 .Stable Diffusion 1. is wanted"):
        load_embedding(tmp_path / "w.safetensors", width=768)


def test_of_several_words_the_one_asked_for_is_taken(tmp_path):
    save_file({"<a>": torch.zeros(16), "<b>": torch.ones(16)}, tmp_path / "two.safetensors")
    assert torch.equal(load_embedding(tmp_path / "two.safetensors", "<b>").vectors, torch.ones(1, 16))
    with pytest.raises(DataError, match="'<a>', '<b>'"):
        load_embedding(tmp_path / "two.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_and_missing_files_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="does not exist"):
        load_embedding(tmp_path / name)
    save_embedding(learned(), tmp_path / name, "a1111" if name.endswith("pt") else "diffusers")
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=name):
        load_embedding(tmp_path / name)


def test_wrong_forms_endings_and_shapes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="no form"):
        save_embedding(learned(), tmp_path / "w.safetensors", "onnx")
    with pytest.raises(ConfigError, match="ends in .pt"):
        save_embedding(learned(), tmp_path / "w.bin", "a1111")
    with pytest.raises(ShapeError, match="\\[k, d\\]"):
        Learned("<s>", torch.zeros(16))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_embedding(learned(1), tmp_path / "w.safetensors")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_embedding(learned(3), tmp_path / "w.safetensors")
    assert len(load_embedding(tmp_path / "w.safetensors").vectors) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


OLD_RULE = re.compile(r"^([^/]+)/(data/\d+|data\.pkl|version)$")
NEW_RULE = re.compile(r"^([^/]+)/((data/\d+)|version|byteorder|.data/serialization_id|data\.pkl)$")


@pytest.mark.parametrize("rule", [OLD_RULE, NEW_RULE], ids=["older", "newer"])
def test_the_web_ui_finds_only_members_that_its_check_allows(tmp_path, rule):
    """Row "`convert --form a1111`": names of members as the check of either version wants them, one tensor, one pickle.

    The pickle names only what its list of globals has.
    """
    save_embedding(learned(2), tmp_path / "w.pt", "a1111")
    with zipfile.ZipFile(tmp_path / "w.pt") as members:
        names = members.namelist()
        pickled = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        assert all(map(rule.match, names)) and len(pickled) == 1 and not members.testzip()
        named = {a for code, a, _ in pickletools.genops(members.read(pickled[0])) if code.name == "GLOBAL"}
    assert named == {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
    # what torch itself writes is what the older check refuses
    torch.save({}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as members:
        assert not all(map(OLD_RULE.match, members.namelist()))


@pytest.mark.parametrize("ending", [".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older torch"])
def test_a_small_file_with_a_large_tensor_is_refused_before_it_is_made(tmp_path, ending, zipped):
    """Row "1.6 KB `.pt`, a tensor of stride 0": 12 GB if it were made whole."""
    file = tmp_path / f"w{ending}"
    torch.save({"<s>": torch.ones(1).expand(10**9, 3)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match="(?s)w.*claim larger tensors than they hold, one of them .1000000000, 3"):
        load_embedding(file)


def test_compressed_and_doubled_members_are_refused(tmp_path):
    """A further instance: torch would unpack a compressed member to whatever it becomes."""
    torch.save({"<s>": torch.zeros(1, 2**16)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as given:
        members = {name: given.read(name) for name in given.namelist()}
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in members.items():
            out.writestr(name, data)
    with pytest.raises(DataError, match="(?s)packed.pt.*members are compressed or overlap"):
        load_embedding(tmp_path / "packed.pt")


def test_values_that_only_cost_memory_are_refused(tmp_path):
    """A further instance: torch's restricted loader makes bytearray(n) for any n, and enters lists within lists."""
    torch.save({"<s>": bytearray(8)}, tmp_path / "bytes.pt")
    with pytest.raises(DataError, match="it names '.*bytearray'"):
        load_embedding(tmp_path / "bytes.pt")
    deep = [torch.zeros(1)]
    for _ in range(60):
        deep = [deep, deep]
    torch.save({"<s>": deep}, tmp_path / "deep.pt")
    with pytest.raises(DataError, match="deep.pt .*vectors are list"):
        load_embedding(tmp_path / "deep.pt")


def test_files_beyond_bounds_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(DataError, match="no plain file"):
        load_embedding(tmp_path / "pipe.pt")
    (tmp_path / "w.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="header claims 1,099,511,627,776 bytes"):
        load_embedding(tmp_path / "w.safetensors")
    monkeypatch.setattr("poisonshield.models.diffusion.embeddings.MAX_BYTES", 100)
    save_embedding(learned(), tmp_path / "large.safetensors")
    with pytest.raises(DataError, match="larger than 100 bytes"):
        load_embedding(tmp_path / "large.safetensors")


def test_a_word_with_control_characters_is_refused(tmp_path):
    """Row "escape sequences reach the terminal", for the word that a file names."""
    torch.save({"<s>\x1b[31m": torch.zeros(16)}, tmp_path / "w.bin")
    with pytest.raises(DataError, match="no text to print") as caught:
        load_embedding(tmp_path / "w.bin")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("form", FILES)
def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch, form):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageError, match="the disk is full"):
        save_embedding(learned(), tmp_path / FILES[form], form)
    assert not list(tmp_path.iterdir())
