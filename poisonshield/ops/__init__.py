"""Fused ops for poisoned data, on their own: they import with torch alone and know nothing of the rest of the package.

jpeg, JPEG, jpeg_tables, jpeg_coefficients: differentiable JPEG, smooth or equal to libjpeg-turbo to the bit.
pgd_step_, pgd_random_start_: projected gradient descent in place, in pixel units.
q_sample, masked_diffusion_loss: noising and a masked, weighted loss with its gradient in one pass.
philox_uniform: the counter-based generator they share. use_backend, info, stats: which code runs, and why.
See README.md in this folder for three examples to copy.
"""

from poisonshield.ops.diffusion import masked_diffusion_loss, q_sample
from poisonshield.ops.dispatch import info, stats, use_backend
from poisonshield.ops.jpeg import jpeg, jpeg_coefficients, jpeg_tables
from poisonshield.ops.jpeg.module import JPEG
from poisonshield.ops.pgd import pgd_random_start_, pgd_step_
from poisonshield.random import philox_uniform

__all__ = [
    "JPEG",
    "info",
    "jpeg",
    "jpeg_coefficients",
    "jpeg_tables",
    "masked_diffusion_loss",
    "pgd_random_start_",
    "pgd_step_",
    "philox_uniform",
    "q_sample",
    "stats",
    "use_backend",
]
