"""Where masks come from when no file has them: one file each; the file's name is the provider's name."""
