"""A learned word's file in another tool's form."""

from pathlib import Path

from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.embeddings import Form, Learned, load_embedding, save_embedding


def convert(embedding: str | Path, out: str | Path, *, form: Form, token: str | None = None) -> Learned:
    """Write the word of a file, in any form that is read, to `out` in the form asked for; the word.

    token: what to call it, by default what the file says; of several words in a file, the one to take.
    Raises ConfigError if `out` exists, or for an unknown form or an ending that is not the form's; DataError naming the
    file that cannot be read.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists already and is not overwritten. Choose another name, or remove it first.")
    learned = load_embedding(embedding, token)
    save_embedding(learned, out, form)
    return learned
