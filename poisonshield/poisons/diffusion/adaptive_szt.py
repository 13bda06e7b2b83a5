"""The attack that a defense by compression, high timesteps and masked loss has to survive: AdvDM that knows all three.

    raise E over q, t >= t_lo, n of  mean m (f(z_t, t) - target)^2,   z = encode(JPEG_q(x))
The forward is the exact codec and the gradient goes straight through its rounding: without one, results would say
nothing of the defense. Qualities are several, since the defender need not tell. band limits the change to low bins of
the blocks, which compression keeps. An attack that also trains the word under the defense is aspl with inner "ti" and
`defended`. Related: Athalye et al. 2018 (obfuscated gradients).
"""

from typing import Literal

from pydantic import Field

from poisonshield.poisons.diffusion.advdm import AdvDM


class AdaptiveSZT(AdvDM):
    """Raises the masked denoising loss at high timesteps through JPEG, as one who knows Safe-Zone Training would.

    A mask weighs the loss, and the change may lie anywhere.
    """

    class Config(AdvDM.Config):
        """As AdvDM's, with what the defense does for defaults."""

        eot: tuple[Literal["jpeg", "blur", "flip"], ...] = Field(
            ("jpeg",), description="random changes of pixels before the VAE, in this order"
        )
        jpeg_qualities: tuple[int, ...] = Field((25, 50, 75, 90), description="of which jpeg takes one a picture")
        t_range: tuple[int, int] | None = Field((500, 1000), description="[first, end) of timesteps, the defense's")
        mask: Literal["pixels", "loss", "both"] = Field(
            "loss", description='what given masks do: keep the change to their "pixels", weigh the "loss", or both'
        )

    name = "adaptive_szt"
    source = "this project"
