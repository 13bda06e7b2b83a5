"""Fused ops for poisoned data, on their own: they import with torch alone and know nothing of the rest of the package.

augment, keyed_uniform: a training view in one pass, and the random numbers that it is drawn by.
jpeg, JPEG, jpeg_tables, jpeg_coefficients: differentiable JPEG, smooth or equal to libjpeg-turbo to the bit.
pgd_step_, pgd_random_start_: projected gradient descent in place, in pixel units.
q_sample, masked_diffusion_loss: noising and a masked, weighted loss with its gradient in one pass.
philox_uniform: the counter-based generator they share. use_backend, info, stats: which code runs, and why.
Every folder here is an op: what its `__all__` names is found here too. See README.md for a new one, and for examples.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from poisonshield.ops.dispatch import info, rooms, stats, use_backend
from poisonshield.random import philox_uniform

if TYPE_CHECKING:  # for editors and type checkers; an op works without a line here
    from poisonshield.ops.augment import augment, keyed_uniform  # noqa: F401
    from poisonshield.ops.diffusion import masked_diffusion_loss, q_sample  # noqa: F401
    from poisonshield.ops.jpeg import JPEG, jpeg, jpeg_coefficients, jpeg_tables  # noqa: F401
    from poisonshield.ops.pgd import pgd_random_start_, pgd_step_  # noqa: F401

__all__ = ["info", "philox_uniform", "stats", "use_backend"]
for _room in map(import_module, [f"{__name__}.{room}" for room in rooms()]):
    __all__ += _room.__all__
    globals().update({name: getattr(_room, name) for name in _room.__all__})
