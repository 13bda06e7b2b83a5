"""A small Stable Diffusion pipeline, trained on the rendered world in two stages and from nothing.

Both stages are ordinary runs of the engine, so an interrupted one goes on where it stopped. The result is a diffusers
folder in half precision. Beside its parts lies a judge of what pictures show, trained last, and a sheet of samples.
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from poisonshield import collectives, world
from poisonshield.config import Checker, Settings, Tree, dump
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.processes import processes
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.schedule import ScheduleConfig
from poisonshield.engine.trainer import Trainer
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

_JUDGE_SEED = 3  # of renders: 0 is what the pipeline sees, 1 what words are learned from, 2 what they are compared with


class Stage(Settings):
    """How long a part is trained, and how."""

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)


class VAEStage(Stage, small.VAEConfig):
    """kl_weight: see world/autoencoder.py."""

    kl_weight: float = Field(1e-5, ge=0)


class UNetStage(Stage, small.UNetConfig):
    """caption_dropout, ema: see world/denoiser.py."""

    caption_dropout: float = Field(0.1, ge=0, le=1)
    ema: float = Field(0.999, ge=0, lt=1)


class JudgeStage(Settings):
    """steps: of the judge's training, see world/judge_training.py."""

    steps: int = Field(4000, ge=1)


class PipelineSettings(ExperimentSettings):
    """A small pipeline, in two stages of training and a judge."""

    pictures: int = Field(20000, ge=1, description="How many of the rendered world are trained on.")
    prediction: str = Field("epsilon", pattern="^(epsilon|v_prediction)$", description="What the U-Net learns to say.")
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
        with processes(settings.engine, seed=settings.seed) as device:
            pixels, captions = rendered(settings.pictures, seed=settings.seed)
            data = {"pixels": pixels, "captions": captions}
            torch.manual_seed(settings.seed)
            parts = _untrained(settings)
            autoencoder = Autoencoder(Autoencoder.Config(kl_weight=settings.vae.kl_weight), vae=parts["vae"])
            _fit(settings, "vae", settings.vae, autoencoder, **data)
            autoencoder.eval().measure_scale(pixels[:512].to(device).float() / 255)
            model = LatentDiffusion(**parts, name=str(out)).to(device)
            u = settings.unet
            config = Denoiser.Config(caption_dropout=u.caption_dropout, ema=u.ema)
            denoiser = Denoiser(config, model=model, seed=settings.seed)
            _fit(settings, "denoiser", u, denoiser, **data)
            if collectives.rank() == 0:
                trained = {**parts, **dict(denoiser.averages.items())}
                for name in ("vae", "unet", "text_encoder"):
                    trained[name] = trained[name].cpu().half()
                small.write_pipeline(out, **trained)
                finish(settings, out)
                size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
                log.info("pipeline  %s (%.1f MB)", out, size)
            collectives.barrier()
        return out


def finish(settings: PipelineSettings, out: Path) -> None:
    """Trains the judge of a written pipeline's world, held-out combinations too, and draws samples of known ones."""
    model = LatentDiffusion.load(out)
    every = [(color, shape) for color in world.COLORS for shape in world.SHAPES]
    render = lambda i: world.render(i, seed=settings.seed + _JUDGE_SEED, only=every)
    judge = train_judge(render, model=model, seed=settings.seed, steps=settings.judge.steps)
    judge.record["vae"] = "the pipeline beside it"
    judge.save(out / JUDGE)
    rows = {}
    for color, shape in (
        ("red", "circle"),
        ("blue", "ring"),
        ("white", "star"),
        ("purple", "square"),
        ("blue", "cross"),
    ):
        prompt = f"a photo of a {color} {shape}"
        noise = start_noise([str(i) for i in range(8)], latent_shape(model), seed=settings.seed)
        rows[prompt] = sample(model, model.prompts([prompt] * 8), noise=noise, steps=25, guidance=3.0)
    draw_sheet(out.with_name("samples.png"), rows)


def _untrained(settings: PipelineSettings) -> dict[str, Any]:
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


def _fit(
    settings: PipelineSettings, name: str, stage: Stage, method: Method, *, pixels: torch.Tensor, captions: list[str]
) -> None:
    stream = CaptionedStream(
        pixels,
        captions,
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
        run_folder=RunFolder(Path(settings.run.dir) / name, overwrite=settings.run.overwrite),
        seed=settings.seed,
        fixed_record=json.loads(settings.model_dump_json()),
    ).fit()
