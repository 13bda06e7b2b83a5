"""Concepts of the rendered world, with exact masks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poisonshield import world
from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.images import fit

if TYPE_CHECKING:
    from PIL import Image


def rendered_concepts(
    count: int = 5,
    *,
    seed: int,
    kinds: Sequence[tuple[str, str]] = world.HELD_OUT,
    size: int = world.SIZE,
    masks: bool = True,
) -> tuple[Concept, ...]:
    """`count` pictures of each (colour, shape) of the rendered world, with exact masks; named e.g. "yellow_ring".

    By default the kinds that no training picture shows (group "od"). A kind's pictures do not depend on the others.
    seed: another one than the pipeline's training pictures had.
    """
    concepts = []
    for color, shape in kinds:
        name, images = f"{color}_{shape}", []
        first = 1000 * (list(world.COLORS).index(color) * len(world.SHAPES) + world.SHAPES.index(shape))
        for i in range(count):
            picture = world.render(first + i, seed=seed, only=[(color, shape)])
            pixels, mask = (picture.x * 255).round().to(torch.uint8), (picture.mask * 255).round().to(torch.uint8)
            pixels, mask = fit(_pillow(pixels), size, "center"), fit(_pillow(mask), size, "center", nearest=True)
            images.append(
                ConceptImage.of(name, f"{i:02d}", pixels, mask.float() / 255 if masks else None, f"a {color} {shape}")
            )
        concepts.append(Concept.of(name, images, "od" if (color, shape) in world.HELD_OUT else "id"))
    return tuple(concepts)


def _pillow(pixels: Tensor) -> "Image.Image":
    from PIL import Image

    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
