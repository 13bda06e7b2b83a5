"""The smallest things that still behave like real ones: a network, a batch, a separable data set."""

import torch
from torch import Tensor, nn

from poisonshield.batch import Batch


class TinyEncoder(nn.Module):
    """Two convolutions with batch norm; 8 features."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def tiny_encoder(seed: int = 0) -> TinyEncoder:
    """Fixed weights, and batch statistics that are not those of a fresh layer."""
    generator = torch.Generator().manual_seed(seed)
    encoder = TinyEncoder()
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if p.dim() == 1 else 0.0))
        for m in encoder.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.1)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
    return encoder


def tiny_batch(size: int = 6, *, views: int = 2, classes: int = 4, seed: int = 0, side: int = 8) -> Batch:
    """Random pixels and labels with keys s0, s1, ..."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 3, side, side, generator=generator)
    made = tuple((x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1) for _ in range(views))
    return Batch(tuple(f"s{i}" for i in range(size)), x, made, torch.arange(size) % classes)


def tiny_model(*, prediction: str = "epsilon", seed: int = 0, size: int = 32, channels: tuple[int, ...] = (8, 16)):
    """A LatentDiffusion with random weights: 2 pixels a latent cell (with two channels), 16-wide text, 24 tokens."""
    import tempfile
    from pathlib import Path

    from poisonshield import world
    from poisonshield.models.diffusion.pipeline import LatentDiffusion
    from poisonshield.world import small_pipeline as small

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        text = small.TextConfig(width=16, layers=2, heads=2)
        tokenizer = small.build_tokenizer(world.WORDS, Path(folder), length=text.length)
        vae = small.VAEConfig(channels=channels, groups=4)
        return LatentDiffusion(
            small.build_vae(vae, sample_size=size),
            small.build_unet(
                small.UNetConfig(channels=(16, 32), head=4),
                sample_size=size // 2 ** (len(channels) - 1),
                latent_channels=4,
                context=text.width,
            ),
            small.build_text_encoder(text, tokenizer),
            tokenizer,
            small.build_scheduler(prediction),
            name="tiny random",
        )


def tiny_folder(folder, **settings):
    """`tiny_model` written to `folder` as a diffusers pipeline; the folder."""
    from poisonshield.world import small_pipeline as small

    model = tiny_model(**settings)
    small.write_pipeline(
        folder,
        vae=model.vae,
        unet=model.unet,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        scheduler=model.scheduler,
    )
    return folder
