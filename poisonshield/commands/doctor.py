"""`poisonshield doctor`."""

from poisonshield.commands.base import MACHINE

GROUP = MACHINE


def doctor() -> None:
    """Versions, devices, backends and why, and whether multi-process launch would work."""
    from poisonshield.api.doctor import report

    for title, facts in report().items():
        print(title)
        for name, value in facts.items():
            print(f"  {name:18s} {value}")
