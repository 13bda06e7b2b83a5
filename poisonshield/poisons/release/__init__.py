"""How a poison leaves the house: as a recipe file, and with a budget that was measured."""
