"""Which methods a defense may take the loss of, and put one of its own in the place."""

from poisonshield.errors import ConfigError
from poisonshield.method import SSLMethod


def plain_classifier(method: SSLMethod, defense: str) -> SSLMethod:
    """The method itself, if its step is a classifier's loss on its views and no more.

    Raises ConfigError for a method without a classifier, or with more in its step: another defense around it, or a
    self-supervised loss, either of which would silently be lost.
    """
    if not method.has_classifier:
        raise ConfigError(
            f"{defense} needs labels and a classifier, and {method.name} has none. Use method.name: supervised."
        )
    if type(method).forward is not SSLMethod.forward or method.projection() is not None:
        raise ConfigError(
            f"{defense} trains the classifier by a loss of its own, and a step of {method.name} with the defenses "
            f"before it has more in it, which would be lost.\n  List {defense} first, before other defenses of the "
            "method, and use method.name: supervised."
        )
    return method
