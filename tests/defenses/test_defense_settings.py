"""Settings of defenses and masks: each says what it is, where help and tables look."""

import pytest

from poisonshield.registry import Registry

FOLDERS = [
    Registry("poisonshield.defenses", kind="defense"),
    Registry("poisonshield.defenses.diffusion", kind="defense"),
    Registry("poisonshield.defenses.diffusion.masks", kind="mask"),
]


@pytest.mark.parametrize("folder, name", [(folder, name) for folder in FOLDERS for name in folder.names()])
def test_every_setting_is_described(folder, name):
    fields = folder.get(name).Config.model_fields
    assert [setting for setting, field in fields.items() if not field.description] == []
