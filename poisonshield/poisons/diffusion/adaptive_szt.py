"""The attack that a defense by compression, high timesteps and masked loss has to survive: AdvDM that knows all three.

    raise E over q, t >= t_lo, n of  mean m (f(z_t, t) - target)^2,   z = encode(JPEG_q(x))
The forward is the exact codec and the gradient goes straight through its rounding: without one, results would say
nothing of the defense. Qualities are several, since the defender need not tell. band limits the change to low bins of
the blocks, which compression keeps. An attack that also trains the word under the defense is aspl with inner "ti" and
`defended`. Related: Athalye et al. 2018 (obfuscated gradients).
"""

from typing import ClassVar, Literal

from poisonshield.poisons.diffusion.advdm import AdvDM


class AdaptiveSZT(AdvDM):
    """AdvDM with the defense's own settings; a mask given weighs the loss, and the change may lie anywhere."""

    class Config(AdvDM.Config):
        """As AdvDM; t_range is the defense's."""

        eot: tuple[Literal["jpeg", "blur", "flip"], ...] = ("jpeg",)
        jpeg_qualities: tuple[int, ...] = (25, 50, 75, 90)
        t_range: tuple[int, int] | None = (500, 1000)
        mask: Literal["pixels", "loss", "both"] = "loss"

    name: ClassVar[str] = "adaptive_szt"
