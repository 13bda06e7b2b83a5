"""Methods: one way to train an encoder per file; the file's name is the method's name."""
