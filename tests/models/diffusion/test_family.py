"""Folders that are no plain Stable Diffusion pipeline: named by their family, and never allowed to fetch code."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from poisonshield.errors import ConfigError, DataError
from poisonshield.models.diffusion.pipeline import LatentDiffusion

PARTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "copy")
    return tmp_path / "copy"


def change(folder, name, **settings):
    """Other settings in a JSON of the folder."""
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("text_encoder/config.json", {"_attn_implementation": "org/kernel"}),
        ("text_encoder/config.json", {"attn_implementation": {"": "org/kernel:layer"}}),
        ("text_encoder/config.json", {"text_config": {"_attn_implementation": "org/kernel"}}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "modeling.Evil"}}),
        ("text_encoder/config.json", {"configuration_files": ["config.4.0.0.json"]}),
        ("text_encoder/config.json", {"transformers_weights": "other.safetensors"}),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "x"}}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tok.Evil", None]}}),
        ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.json"]}),
        ("unet/config.json", {"trust_remote_code": True}),
        ("model_index.json", {"custom_pipeline": "org/code"}),
    ],
)
def test_settings_that_would_fetch_code_are_refused_before_a_library_reads_them(copy, monkeypatch, name, settings):
    """Row "pipeline config with `_attn_implementation: org/kernel`"."""
    import transformers

    touched = lambda *_, **__: pytest.fail("a library read the folder")
    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", touched)
    change(copy, name, **settings)
    with pytest.raises(DataError, match=f"{name}: .* would fetch code"):
        LatentDiffusion.load(copy)


def test_an_adapter_beside_the_weights_is_refused(copy):
    """A further instance: transformers reads adapter_config.json, which may name another model."""
    (copy / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    with pytest.raises(DataError, match="text_encoder has an adapter"):
        LatentDiffusion.load(copy)


def test_plain_attention_is_read(copy):
    change(copy, "text_encoder/config.json", _attn_implementation="sdpa", quantization_config=None, auto_map=None)
    LatentDiffusion.load(copy)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline"),
        ("model_index.json", {"_class_name": ["pipeline", "Evil"]}, "Evil"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting model, whose U-Net takes 9 channels"),
        ("unet/config.json", {"in_channels": 7}, "an upscaler"),
        ("unet/config.json", {"in_channels": 6}, "an unknown one, whose U-Net takes 6"),
        ("unet/config.json", {"class_embed_type": "projection"}, "more than a text and a timestep"),
        ("unet/config.json", {"_class_name": "UNetMotionModel"}, "its unet is a UNetMotionModel"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "its vae is a AutoencoderTiny"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ("text_encoder/config.json", {"model_type": "t5"}, "its text encoder is a t5"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, "its tokenizer is a T5Tokenizer"),
        ("unet/config.json", {"cross_attention_dim": 2048}, "parts of two models.* 2048 wide, .* gives 16"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "model_max_length 1000000"),
    ],
)
def test_other_families_are_refused_by_their_name(copy, name, settings, told):
    """Row "SDXL, inpainting, width mismatch"."""
    change(copy, name, **settings)
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        LatentDiffusion.load(copy)


def test_folders_of_other_shapes_are_refused_by_their_name(copy, tmp_path):
    """Row "SDXL", known by its second text encoder, "single-file checkpoints", and a name of a hub."""
    (copy / "text_encoder_2").mkdir()
    with pytest.raises(ConfigError, match="Stable Diffusion XL, with a second text encoder"):
        LatentDiffusion.load(copy)
    shutil.rmtree(copy / "unet")
    (copy / "transformer").mkdir()
    change(copy, "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ConfigError, match="another family: FluxPipeline"):
        LatentDiffusion.load(copy)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="(?s)is a single file.*from_single_file.*save_pretrained"):
        LatentDiffusion.load(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="(?s)org/name is no folder.*Nothing is fetched"):
        LatentDiffusion.load("org/name")


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("variant", ["fp16", "ema"])
def test_weights_with_a_variant_in_their_name_are_read(pipeline, copy, variant):
    """Row "fp16-named weights"."""
    for name in PARTS.values():
        file = copy / name
        file.rename(file.with_name(f"{file.stem}.{variant}{file.suffix}"))
    assert equal(LatentDiffusion.load(copy), LatentDiffusion.load(pipeline))
    shutil.copy(pipeline / PARTS["unet"], copy / "unet" / "diffusion_pytorch_model.other.safetensors")
    with pytest.raises(DataError, match="unet has weights in the variants .*which one is meant"):
        LatentDiffusion.load(copy)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_are_read_with_and_without_a_variant(pipeline, copy, part, variant):
    """Row "sharded"."""
    file = copy / PARTS[part]
    tensors, middle = load_file(file), f".{variant}" if variant else ""
    names = [f"{file.stem}{middle}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    place = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        mine = {key: value for key, value in tensors.items() if place[key] == name}
        save_file(mine, file.with_name(name), metadata={"format": "pt"})
    index = f"{file.name}.index{middle}.json"
    file.with_name(index).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    file.unlink()
    assert equal(LatentDiffusion.load(copy), LatentDiffusion.load(pipeline))
    file.with_name(index).write_text(json.dumps({"weight_map": dict.fromkeys(place, "../x.safetensors")}))
    with pytest.raises(DataError, match="a file in its own folder is wanted"):
        LatentDiffusion.load(copy)


def test_pickled_weights_are_looked_at_before_they_are_read(pipeline, copy):
    """Row "1.6 KB `.pt`, a tensor of stride 0", for the weights of a pipeline."""
    tensors = load_file(copy / PARTS["unet"])
    (copy / PARTS["unet"]).unlink()
    file = copy / "unet" / "diffusion_pytorch_model.bin"
    torch.save(tensors, file)
    assert equal(LatentDiffusion.load(copy), LatentDiffusion.load(pipeline))
    torch.save(tensors | {"conv_in.weight": torch.ones(1).expand(10**9, 3)}, file)
    with pytest.raises(DataError, match="(?s)diffusion_pytorch_model.bin was not read.*claim larger tensors"):
        LatentDiffusion.load(copy)


def test_settings_of_any_size_or_depth_are_refused_in_words(copy):
    (copy / "unet" / "config.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="config.json is not valid JSON"):
        LatentDiffusion.load(copy)
    (copy / "unet" / "config.json").write_bytes('{"a": "ä"}'.encode("latin-1"))
    with pytest.raises(DataError, match="config.json is not valid JSON"):
        LatentDiffusion.load(copy)


def test_a_header_that_claims_more_than_its_file_is_refused(copy):
    """A further instance: the length of a safetensors header."""
    (copy / PARTS["vae"]).write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="its header claims"):
        LatentDiffusion.load(copy)


@pytest.mark.parametrize("named", [[], "x", None, {"a": ["b"]}, {"a": "../b"}], ids=str)
def test_an_index_of_weights_that_is_no_table_of_names_is_refused(copy, named):
    part = copy / "unet"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(DataError, match="weight_map|a file in its own folder"):
        LatentDiffusion.load(copy)
