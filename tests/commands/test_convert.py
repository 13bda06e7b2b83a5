"""`poisonshield convert`: every form from every form, and nothing is written over."""

import pytest
import torch
from typer.testing import CliRunner

from poisonshield.api.convert import convert
from poisonshield.cli import app
from poisonshield.errors import ConfigError, DataError
from poisonshield.models.diffusion.embeddings import Learned, load_embedding, save_embedding

FORMS = {"diffusers": ".safetensors", "a1111": ".pt", "kohya": ".safetensors"}


@pytest.fixture
def word():
    return Learned("<my-toy>", torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_every_form_becomes_every_other_without_loss(tmp_path, word, source, target):
    given, out = tmp_path / f"given{FORMS[source]}", tmp_path / f"out{FORMS[target]}"
    save_embedding(word, given, source)
    assert torch.equal(convert(given, out, form=target).vectors, word.vectors)
    back = load_embedding(out)
    assert back.token == "<my-toy>" and torch.equal(back.vectors, word.vectors)


def test_the_command_names_what_it_wrote_and_may_rename_the_word(tmp_path, word):
    save_embedding(word, tmp_path / "w.safetensors")
    out = tmp_path / "new" / "toy.pt"
    asked = ["convert", str(tmp_path / "w.safetensors"), "--form", "a1111", "--token", "toy", "--out", str(out)]
    told = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert told.exit_code == 0 and "toy, 2 vectors of 16" in told.stdout and load_embedding(out).token == "toy"


def test_what_is_there_is_not_overwritten_and_mistakes_write_nothing(tmp_path, word):
    save_embedding(word, tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="w.safetensors exists already"):
        convert(tmp_path / "w.safetensors", tmp_path / "w.safetensors", form="kohya")
    with pytest.raises(ConfigError, match="ends in .pt"):
        convert(tmp_path / "w.safetensors", tmp_path / "a.safetensors", form="a1111")
    with pytest.raises(ConfigError, match="no form"):
        convert(tmp_path / "w.safetensors", tmp_path / "a.pt", form="onnx")
    with pytest.raises(DataError, match="does not exist"):
        convert(tmp_path / "nowhere.pt", tmp_path / "a.pt", form="a1111")
    assert (tmp_path / "w.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
