"""Feature networks: what one that reads no text says to a text."""

import pytest
from torch import nn

from poisonshield.errors import ConfigError
from poisonshield.models.feature_networks import FeatureNetwork


def test_a_network_that_reads_no_text_refuses_texts():
    network = FeatureNetwork(nn.Identity(), None, None)
    assert not network.reads_text
    with pytest.raises(ConfigError, match="reads pictures alone. Give the folder of one that reads texts"):
        network.texts(["a red circle"])
