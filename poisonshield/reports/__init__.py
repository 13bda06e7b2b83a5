"""Drawing and tables of results, without a display and without a command."""
