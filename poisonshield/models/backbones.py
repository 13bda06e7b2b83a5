"""Encoders: pixels [B, 3, H, W] in [0, 1] -> features [B, D]. Networks come from timm; ours is the CIFAR stem.

ViTs start as in MoCo v3 (timm's `moco`, and the same rule for the patch projection, which timm leaves out) and take any
size that their patches divide: position embeddings are interpolated from the grid of `image_size`.

`resnet_mini` is timm's ResNet with one narrow block per stage (300,000 parameters), small enough for two CPU cores.
Every backbone is exported under timm's own parameter names: with its own stem, timm loads it strictly.
"""

from itertools import groupby
from typing import Any, ClassVar, Literal

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

TimmNetwork = Any
"""An nn.Module of timm: `num_features`, and the parts of its kind, which only the running network declares."""


class BackboneConfig(Settings):
    """Which network reads the pixels."""

    name: str = Field("resnet18", description="The network: any name that timm knows, or resnet_mini.")
    stem: Literal["cifar", "imagenet"] = Field(
        "cifar",
        description="The first layers: cifar is one 3x3 convolution without max-pooling, for images up to about 64 px; "
        "imagenet is the network's own.",
    )
    stem_padding: int = Field(
        1, ge=0, le=3, description="Padding of the cifar stem, in px: 1, or 2 as in the VESPR authors' CIFAR models."
    )
    stem_stride: Literal[1, 2] = Field(
        1, description="Stride of the cifar stem: 2 halves an image first, at a quarter of the cost."
    )
    widths: tuple[int, int, int, int] = Field(
        (16, 32, 64, 128), description="Channels of resnet_mini's four stages; other networks have their own."
    )
    batch_norm: Literal["synced", "local"] = Field(
        "synced",
        description="Whose batch statistics count: synced takes those of all ranks, so that losses do not depend on "
        "their number; local saves the communication.",
    )
    views_together: bool = Field(
        False, description="Run views of one size as one long batch, with batch statistics still view by view."
    )
    image_size: int | None = Field(
        None,
        ge=1,
        description="ViTs only: side of the images in px, a multiple of the patch; null is the network's own.",
    )
    freeze_patch: bool = Field(False, description="ViTs only: the patch projection stays as drawn.")
    position: Literal["learned", "sincos"] | None = Field(
        None,
        description="ViTs only: the position embedding is learned, or sincos (2-D, fixed); null is sincos with "
        "freeze_patch, else learned.",
    )

    @model_validator(mode="after")
    def _stem_settings_have_a_stem(self) -> "BackboneConfig":
        if self.stem == "imagenet" and (self.stem_padding != 1 or self.stem_stride != 1):
            raise ValueError("stem_padding and stem_stride belong to stem: cifar; stem: imagenet is the network's own.")
        return self


class Encoder(nn.Module):
    """Normalization and backbone. `feature_dim` is D; `config` says how the backbone was made."""

    feature_dim: int

    def __init__(self, backbone: TimmNetwork, config: BackboneConfig) -> None:
        super().__init__()
        self.normalize, self.backbone, self.config = Normalize(), backbone, config
        self.feature_dim = backbone.num_features

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D] of x [B, 3, H, W] in [0, 1]."""
        return self.backbone(self.normalize(x))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As every module's. Raises ConfigError with views_together, which changes batch norm from call to call."""
        if self.config.views_together:
            raise ConfigError(
                "a compiled encoder stays as it is, and model.views_together changes its batch norm in every step.\n"
                "  Set model.views_together: false, or engine.compile: false."
            )
        super().compile(*args, **kwargs)

    def views(self, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Features of each view, [B, D] each; batch statistics are those of each view alone, together or not."""
        if not self.config.views_together:
            return tuple(self(v) for v in views)
        features: list[Tensor] = []
        # Neighbours only, so that the features come in the order of the views.
        for _, group in groupby(views, key=lambda v: v.shape):
            alike = tuple(group)
            with per_view_statistics(self, len(alike)):
                features += self(torch.cat(alike)).chunk(len(alike))
        return tuple(features)


def build_encoder(config: BackboneConfig) -> Encoder:
    """The encoder with freshly drawn weights.

    Raises ConfigError for a name timm does not know, no stem to change, or settings of a ViT for another network.
    """
    backbone = _build_backbone(config)
    if config.stem == "cifar":
        _shrink_stem(backbone, config)
    _take_strides_first(backbone)
    return Encoder(backbone, config)


def _build_backbone(config: BackboneConfig) -> TimmNetwork:
    """The network with its own stem."""
    import timm

    if timm.models.is_model_in_modules(config.name, ("vision_transformer", "deit")):
        return _build_vit(config)
    if config.image_size is not None or config.freeze_patch or config.position is not None:
        raise ConfigError(
            f"model: image_size, freeze_patch and position are for ViTs, and {config.name} is none. Leave them out, or "
            "set model.name: vit_small_patch16_224 and model.stem: imagenet."
        )
    if config.name == "resnet_mini":
        return _build_resnet_mini(config)
    refuse_unknown(config)
    return timm.create_model(config.name, num_classes=0)


def refuse_unknown(config: BackboneConfig) -> None:
    """Raise ConfigError with the nearest name for a network that neither timm nor we have. Imports timm for its own."""
    if config.name == "resnet_mini":
        return
    import timm

    if not timm.is_model(config.name):
        raise ConfigError(f"model.name: {config.name!r} is not a timm model.{suggest(config.name, timm.list_models())}")


def _build_resnet_mini(config: BackboneConfig) -> TimmNetwork:
    from timm.models.resnet import BasicBlock, ResNet

    resnet: Any = ResNet  # its annotations ask for an instance of a block where its code takes the class
    # A deep stem, because the usual one has 64 channels and would cost more than all that follows.
    stem: dict[str, Any] = {"stem_type": "deep", "stem_width": config.widths[0] // 2}
    return resnet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=config.widths, **stem)


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


def _take_strides_first(backbone: TimmNetwork) -> None:
    """Puts StridedPointwise in the place of narrow strided 1x1 convolutions; parameters and names stay the same."""
    for path, old in list(backbone.named_modules()):
        if not isinstance(old, nn.Conv2d) or old.kernel_size != (1, 1) or old.padding != (0, 0):
            continue
        if max(old.stride) > 1 and old.in_channels < StridedPointwise.BELOW:
            down, across = old.stride
            with torch.device("meta"):  # draws nothing: what is drawn after it stays what it was
                new = StridedPointwise(old.in_channels, old.out_channels, 1, (down, across), groups=old.groups)
            new.weight, new.bias = old.weight, old.bias
            backbone.set_submodule(path, new)


def _shrink_stem(backbone: TimmNetwork, config: BackboneConfig) -> None:
    """Puts a 3x3 convolution in the place of the first layer, and nothing in that of the pooling after it."""
    first = getattr(backbone, "conv1", None)
    if not isinstance(first, (nn.Conv2d, nn.Sequential)) or not hasattr(backbone, "maxpool"):
        raise ConfigError(f"model.stem: {config.name} has no stem to replace. Set model.stem: imagenet.")
    deep = first if isinstance(first, nn.Sequential) else None  # a deep stem: several layers in a row
    old: Any = first if deep is None else deep[0]
    new = nn.Conv2d(3, old.out_channels, 3, config.stem_stride, config.stem_padding, bias=False)
    # As timm draws its convolutions: a new layer comes with torch's own draw.
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if deep is None:
        backbone.conv1 = new
    else:
        deep[0] = new
    backbone.maxpool = nn.Identity()


def _build_vit(config: BackboneConfig) -> TimmNetwork:
    import timm

    vit: TimmNetwork = timm.create_model(
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
