"""Concepts of the rendered world: exact masks, independent of each other."""

import torch
from made import equal_concepts

from poisonshield import world
from poisonshield.data.concepts import Concept
from poisonshield.world.rendered import rendered_concepts


def test_rendered_concepts_have_exact_masks_and_do_not_depend_on_each_other():
    ring, star, cross = rendered_concepts(3, seed=5)
    assert [c.name for c in (ring, star, cross)] == ["yellow_ring", "purple_star", "green_cross"]
    assert ring.group == "od" and star.images[0].caption == "a purple star"
    equal_concepts([star], rendered_concepts(3, seed=5, kinds=[("purple", "star")]))
    equal_concepts(
        [Concept.of(star.name, star.images[:2], "od")], rendered_concepts(2, seed=5, kinds=[("purple", "star")])
    )
    first = 1000 * (list(world.COLORS).index("purple") * len(world.SHAPES) + world.SHAPES.index("star"))
    picture = world.render(first + 1, seed=5, only=[("purple", "star")])
    assert (star.images[1].mask - picture.mask).abs().max() <= 0.501 / 255
    assert (star.images[1].pixels / 255 - picture.x).abs().max() <= 0.501 / 255
    assert not torch.equal(ring.images[0].mask, star.images[0].mask)
    assert rendered_concepts(1, seed=5, kinds=[("red", "ring")], masks=False)[0].images[0].mask is None
