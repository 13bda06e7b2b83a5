"""What stands around an attack: budgets to stay in, guards for the model, a memory of earlier attacks, settings."""
