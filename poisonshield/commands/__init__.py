"""One thin file a command: it parses, calls poisonshield.api, and prints. cli.py finds them by scanning."""
