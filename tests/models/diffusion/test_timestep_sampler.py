"""Drawing timesteps: the borders of a range, and what is missing."""

import pytest
import torch

from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.timestep_sampler import draw_timesteps


@pytest.mark.parametrize("sampler", ["uniform", "stratified", "soft"])
def test_the_largest_number_below_one_stays_in_the_range(sampler):
    u = torch.tensor([0.0, 1 - 2**-24])
    t = draw_timesteps(u, t_range=(500, 1000), sampler=sampler, stratum=torch.tensor([0, 3]), strata=4)
    assert t.dtype == torch.int64 and t[1] == 999 and t[0] == (0 if sampler == "soft" else 500)


def test_stratified_timesteps_without_a_stratum_are_refused():
    with pytest.raises(ConfigError, match="stratified timesteps need `stratum`"):
        draw_timesteps(torch.rand(2), t_range=(0, 10), sampler="stratified", strata=2)
