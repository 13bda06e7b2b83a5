"""`poisonshield poison`."""

from poisonshield.commands.base import DATA, Config, Overrides

GROUP = DATA


def poison(config: Config, overrides: Overrides = None) -> None:
    """Write the config's poison: lossless shards (or concepts' pictures) with a measured budget, or a small recipe."""
    from poisonshield import api

    api.poison(config, overrides or [])
