"""A small Stable Diffusion pipeline, trained on the rendered world in two stages and from nothing.

Both stages are ordinary runs of the engine, so an interrupted one goes on where it stopped. The result is a diffusers
folder in half precision. Beside its parts lies a judge of what pictures show, trained last, and a sheet of samples.
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from poisonshield import collectives, world
from poisonshield.config import Checker, Settings, Tree, dump
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.processes import processes
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.schedule import ScheduleConfig
from poisonshield.engine.trainer import Trainer
from poisonshield.files import MadeList, tell_of_disk
from poisonshield.method import Method
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sampler import latent_shape, sample, start_noise
from poisonshield.reports.sheets import draw_sheet
from poisonshield.runs.base import Experiment, ExperimentSettings
from poisonshield.runs.parts.reading import JUDGE
from poisonshield.world import small_pipeline as small
from poisonshield.world.autoencoder import Autoencoder
from poisonshield.world.captioned import CaptionedStream, rendered
from poisonshield.world.denoiser import Denoiser
from poisonshield.world.judge_training import train_judge

log = logging.getLogger(__name__)

SAMPLES = "samples.png"
_JUDGE_SEED = 3  # of renders: 0 is what the pipeline sees, 1 what words are learned from, 2 what they are compared with


class Stage(Settings):
    """How long a part is trained, and how."""

    steps: int = Field(1000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(32, ge=1, description="Pictures in a step, of all ranks together.")
    lr: float = Field(1e-3, gt=0, description="AdamW's rate at its peak, after 50 steps of warm-up.")


class VAEStage(Autoencoder.Config, Stage, small.VAEConfig):
    """The first stage: the VAE's size, its loss and its training."""


class UNetStage(Denoiser.Config, Stage, small.UNetConfig):
    """The second stage: the U-Net's size, its loss and its training, on latents of the first stage's VAE."""


class JudgeStage(Settings):
    """The judge of what pictures show, trained last."""

    steps: int = Field(4000, ge=1, description="Optimiser steps.")


class PipelineSettings(ExperimentSettings):
    """A small pipeline, in two stages of training and a judge."""

    pictures: int = Field(20000, ge=1, description="How many of the rendered world are trained on.")
    prediction: Literal["epsilon", "v_prediction"] = Field(
        "epsilon", description="What the U-Net learns to say: the noise, or its mix with the picture."
    )
    vae: VAEStage = VAEStage()
    unet: UNetStage = UNetStage()
    text: small.TextConfig = small.TextConfig()
    judge: JudgeStage = JudgeStage()


class Pipeline(Experiment):
    """A run of this kind."""

    name: ClassVar[str] = "pipeline"
    settings: PipelineSettings

    @classmethod
    def recognizes(cls, values: Mapping[str, Any]) -> bool:
        """By its stages."""
        return "vae" in values and "unet" in values

    def read(self, tree: Tree) -> None:
        """Settings alone."""
        checker = Checker(tree)
        self.settings = checker.settings(PipelineSettings, (), tree.values, owner="a pipeline")
        checker.finish()
        self.record = dump(self.settings, tree.values)

    def train(self) -> Path:
        """The folder `run.dir/pipeline` of a trained pipeline."""
        settings, out = self.settings, Path(self.settings.run.dir) / "pipeline"
        collectives.map_launcher_environment()
        _check_folders(settings, out)
        with processes(settings.engine, seed=settings.seed) as device, RunFolder(settings.run.dir).held():
            pictures = Pictures(*rendered(settings.pictures, seed=settings.seed))
            torch.manual_seed(settings.seed)
            parts = build_parts(settings)
            autoencoder = Autoencoder(Autoencoder.Config(kl_weight=settings.vae.kl_weight), vae=parts["vae"])
            _fit(settings, "vae", settings.vae, autoencoder, pictures)
            autoencoder.eval().measure_scale(pictures.pixels[:512].to(device).float() / 255)
            model = LatentDiffusion(**parts, name=str(out)).to(device)
            u = settings.unet
            config = Denoiser.Config(caption_dropout=u.caption_dropout, ema=u.ema)
            denoiser = Denoiser(config, model=model, seed=settings.seed)
            _fit(settings, "denoiser", u, denoiser, pictures)
            if collectives.rank() == 0:
                with tell_of_disk(out):
                    _write(out, {**parts, **dict(denoiser.averages.items())})
                    train_its_judge(settings, out)
                    draw_samples(settings, out)
            collectives.barrier()
        return out


@dataclass(frozen=True)
class Pictures:
    """What both stages learn from: pixels uint8 [N, 3, H, W], and N captions."""

    pixels: torch.Tensor
    captions: list[str]


def train_its_judge(settings: PipelineSettings, out: Path) -> None:
    """Train the judge of a written pipeline's world, held-out combinations too, and write it beside the parts."""
    every = [(color, shape) for color in world.COLORS for shape in world.SHAPES]
    render = lambda i: world.render(i, seed=settings.seed + _JUDGE_SEED, only=every)
    judge = train_judge(render, model=LatentDiffusion.load(out), seed=settings.seed, steps=settings.judge.steps)
    judge.record["vae"] = "the pipeline beside it"
    judge.save(out / JUDGE)


def draw_samples(settings: PipelineSettings, out: Path) -> None:
    """Write samples.png beside a written pipeline: eight pictures each of some kinds that it was trained on."""
    model, rows = LatentDiffusion.load(out), {}
    for kind in ("red circle", "blue ring", "white star", "purple square", "blue cross"):
        prompt = f"a photo of a {kind}"
        noise = start_noise([str(i) for i in range(8)], latent_shape(model), seed=settings.seed)
        rows[prompt] = sample(model, model.prompts([prompt] * 8), noise=noise, steps=25, guidance=3.0)
    draw_sheet(out.with_name(SAMPLES), rows)


def build_parts(settings: PipelineSettings) -> dict[str, Any]:
    """The pipeline's parts by name, with random weights."""
    factor = 2 ** (len(settings.vae.channels) - 1)
    with tempfile.TemporaryDirectory() as own:  # each rank builds one: none reads what another is writing
        tokenizer = small.build_tokenizer(world.WORDS, Path(own), length=settings.text.length)
    return {
        "vae": small.build_vae(settings.vae, sample_size=world.SIZE),
        "unet": small.build_unet(
            settings.unet,
            sample_size=world.SIZE // factor,
            latent_channels=settings.vae.latent_channels,
            context=settings.text.width,
        ),
        "text_encoder": small.build_text_encoder(settings.text, tokenizer),
        "tokenizer": tokenizer,
        "scheduler": small.build_scheduler(settings.prediction),
    }


def _write(out: Path, trained: dict[str, Any]) -> None:
    """The diffusers folder, in half precision."""
    for name in ("vae", "unet", "text_encoder"):
        trained[name] = trained[name].cpu().half()
    small.write_pipeline(out, **trained)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    log.info("pipeline  %s (%.1f MB)", out, size)


def _stage_folder(settings: PipelineSettings, name: str) -> RunFolder:
    return RunFolder(Path(settings.run.dir) / name, overwrite=settings.run.overwrite)


def _check_folders(settings: PipelineSettings, out: Path) -> None:
    """Raise ConfigError, before any stage is trained, for a folder that the run may not take."""
    stages = [_stage_folder(settings, name) for name in ("vae", "denoiser")]
    for stage in stages:
        stage.check(json.loads(settings.model_dump_json()), resume=settings.engine.resume)
    if not any(stage.config.is_file() for stage in stages):  # then no run of ours made these
        MadeList(out.parent).refuse_others([out.name, SAMPLES])


def _fit(settings: PipelineSettings, name: str, stage: Stage, method: Method, pictures: Pictures) -> None:
    """Train one part as a run of the engine, in the folder `run.dir/name`."""
    stream = CaptionedStream(
        pictures.pixels,
        pictures.captions,
        batch_size=stage.batch_size,
        seed=settings.seed,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
    )
    Trainer(
        method,
        stream,
        settings.engine.model_copy(update={"max_steps": stage.steps, "epochs": None}),
        optimizer=OptimConfig(name="adamw", lr=stage.lr, weight_decay=0.0, clip_norm=1.0),
        schedule=ScheduleConfig(name="cosine", warmup_steps=50),
        run_folder=_stage_folder(settings, name),
        seed=settings.seed,
        fixed_record=json.loads(settings.model_dump_json()),
    ).fit()
