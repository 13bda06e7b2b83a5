"""Encoders: pixels [B, 3, H, W] in [0, 1] -> features [B, D]. Networks come from timm; ours is the CIFAR stem.

ViTs start as in MoCo v3 (timm's `moco`, and the same rule for the patch projection, which timm leaves out) and take any
size that their patches divide: position embeddings are interpolated from the grid of `image_size`.

`resnet_mini` is timm's ResNet with one narrow block per stage (300,000 parameters), small enough for two CPU cores.
Every backbone is exported under timm's own parameter names: with its own stem, timm loads it strictly.
"""

from itertools import groupby
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from poisonshield.config import Settings
from poisonshield.errors import ConfigError
from poisonshield.models.batchnorm import per_view_statistics
from poisonshield.models.normalize import Normalize
from poisonshield.models.position import fix_position
from poisonshield.registry import suggest


class BackboneConfig(Settings):
    """Which network reads the pixels.

    name: any timm name, or resnet_mini. stem: "cifar" is a 3x3 convolution of stride 1 without max-pooling, for images
    up to about 64 px; "imagenet" is the network's own. stem_padding: 1, or 2 as in the VESPR authors' CIFAR models.
    widths: channels of resnet_mini's four stages. stem_stride: 2 halves a CIFAR image first, at a quarter of the cost.
    batch_norm: "synced" over ranks, so that losses do not depend on their number; "local" saves the communication.
    views_together: run views of one size as one long batch, with batch statistics still view by view.
    For ViTs only: image_size, null for the network's own; freeze_patch keeps the patch projection as drawn; position is
    learned, or sincos (2-D, fixed); null is sincos with freeze_patch, else learned.
    """

    name: str = "resnet18"
    stem: Literal["cifar", "imagenet"] = "cifar"
    stem_padding: int = Field(1, ge=0, le=3)
    stem_stride: Literal[1, 2] = 1
    widths: tuple[int, int, int, int] = (16, 32, 64, 128)
    batch_norm: Literal["synced", "local"] = "synced"
    views_together: bool = False
    image_size: int | None = Field(None, ge=1)
    freeze_patch: bool = False
    position: Literal["learned", "sincos"] | None = None

    @model_validator(mode="after")
    def _stem_settings_have_a_stem(self) -> "BackboneConfig":
        if self.stem == "imagenet" and (self.stem_padding != 1 or self.stem_stride != 1):
            raise ValueError("stem_padding and stem_stride belong to stem: cifar; stem: imagenet is the network's own.")
        return self


class Encoder(nn.Module):
    """Normalisation and backbone. `feature_dim` is D; `config` says how the backbone was made."""

    def __init__(self, backbone: nn.Module, config: BackboneConfig) -> None:
        super().__init__()
        self.normalize, self.backbone, self.config = Normalize(), backbone, config
        self.feature_dim = backbone.num_features

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D] of x [B, 3, H, W] in [0, 1]."""
        return self.backbone(self.normalize(x))

    def views(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Features of each view, [B, D] each; batch statistics are those of each view alone, together or not."""
        if not self.config.views_together:
            return tuple(self(v) for v in views)
        features: list[Tensor] = []
        for _, group in groupby(views, key=lambda v: v.shape):
            alike = tuple(group)
            with per_view_statistics(self, len(alike)):
                features += self(torch.cat(alike)).chunk(len(alike))
        return tuple(features)


def build_encoder(config: BackboneConfig) -> Encoder:
    """The encoder with freshly drawn weights.

    Raises ConfigError for a name timm does not know, no stem to change, or settings of a ViT for another network.
    """
    import timm

    if timm.models.is_model_in_modules(config.name, ("vision_transformer", "deit")):
        backbone = _vit(config)
    elif config.image_size is not None or config.freeze_patch or config.position is not None:
        raise ConfigError(
            f"model: image_size, freeze_patch and position are for ViTs, and {config.name} is none. Leave them out, or "
            "set model.name: vit_small_patch16_224 and model.stem: imagenet."
        )
    elif config.name == "resnet_mini":
        from timm.models.resnet import BasicBlock, ResNet

        # The usual stem has 64 channels, which would cost more than all that follows.
        stem = {"stem_type": "deep", "stem_width": config.widths[0] // 2}
        backbone = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=config.widths, **stem)
    elif timm.is_model(config.name):
        backbone = timm.create_model(config.name, num_classes=0)
    else:
        known = timm.list_models()
        raise ConfigError(f"model.name: {config.name!r} is not a timm model.{suggest(config.name, known)}")
    if config.stem == "cifar":
        _shrink_stem(backbone, config)
    _take_strides_first(backbone)
    return Encoder(backbone, config)


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution with a stride that drops the unread pixels itself: the same numbers, without a fault of oneDNN.

    oneDNN 3.12 on a processor with AVX2 only corrupts memory in the backward pass of a strided 1x1 convolution of fewer
    than 8 input channels in channels-last layout ("double free or corruption", in about every third run).
    """

    BELOW: ClassVar[int] = 8
    """Input channels from which on oneDNN's own stride is sound."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, D, ceil(H / stride), ceil(W / stride)]."""
        down, across = self.stride
        return F.conv2d(x[:, :, ::down, ::across], self.weight, self.bias, groups=self.groups)


def _take_strides_first(backbone: nn.Module) -> None:
    """Narrow strided 1x1 convolutions become StridedPointwise, with the same parameters under the same names."""
    for parent in list(backbone.modules()):
        for name, old in list(parent.named_children()):
            if not isinstance(old, nn.Conv2d) or old.kernel_size != (1, 1) or old.padding != (0, 0):
                continue
            if max(old.stride) > 1 and old.in_channels < StridedPointwise.BELOW:
                with torch.device("meta"):  # draws nothing: what is drawn after it stays what it was
                    new = StridedPointwise(old.in_channels, old.out_channels, 1, old.stride, groups=old.groups)
                new.weight, new.bias = old.weight, old.bias
                setattr(parent, name, new)


def _shrink_stem(backbone: nn.Module, config: BackboneConfig) -> None:
    """A 3x3 convolution as the first layer, and no pooling after it."""
    first = getattr(backbone, "conv1", None)
    if not isinstance(first, (nn.Conv2d, nn.Sequential)) or not hasattr(backbone, "maxpool"):
        raise ConfigError(f"model.stem: {config.name} has no stem to replace. Set model.stem: imagenet.")
    old = first if isinstance(first, nn.Conv2d) else first[0]
    new = nn.Conv2d(3, old.out_channels, 3, config.stem_stride, config.stem_padding, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if old is first:
        backbone.conv1 = new
    else:
        first[0] = new
    backbone.maxpool = nn.Identity()


def _vit(config: BackboneConfig) -> nn.Module:
    import timm

    vit = timm.create_model(
        config.name, num_classes=0, img_size=config.image_size, dynamic_img_size=True, weight_init="moco"
    )
    patch, projection = vit.patch_embed.patch_size[0], vit.patch_embed.proj
    if config.image_size is not None and config.image_size % patch:
        raise ConfigError(
            f"model.image_size: {config.image_size} is not a multiple of {config.name}'s patch of {patch} px. "
            f"Set it to {max(patch, config.image_size // patch * patch)}, or leave it out."
        )
    nn.init.xavier_uniform_(projection.weight.flatten(1))  # a view: the weight itself is drawn
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    projection.requires_grad_(not config.freeze_patch)
    if config.position == "sincos" or (config.freeze_patch and config.position is None):
        fix_position(vit, config.name)
    return vit
