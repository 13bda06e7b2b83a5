"""What a reader took, what it left out and why, and what it decided: filled by every reader, printed by every command.

Nothing is passed over in silence: a file that is not taken is counted under its reason, with the first names.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

SHOWN = 5
"""How many names of one kind are told; the rest is a number."""


@dataclass
class Summary:
    """taken: how many of what, such as "images" or "masks". left_out: names by reason. choices: sentences on what was
    decided where a source left it open, such as which folder is the test split."""

    source: str
    taken: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)

    def take(self, what: str, number: int = 1) -> None:
        """Count what was read."""
        self.taken[what] += number

    def leave_out(self, why: str, name: str) -> None:
        """Note one thing that was not read. why: ends the phrase "left out: 3 ...", such as "hidden files"."""
        self.left_out.setdefault(why, []).append(name)

    def choose(self, sentence: str) -> None:
        """Note a decision, once."""
        if sentence not in self.choices:
            self.choices.append(sentence)

    @property
    def number_left_out(self) -> int:
        """Of all reasons together."""
        return sum(map(len, self.left_out.values()))

    def lines(self) -> Iterator[str]:
        """What there is to tell, a line each."""
        read = ", ".join(f"{number:,} {what}" for what, number in self.taken.items())
        yield f"{self.source}: read {read or 'nothing'}."
        for why, names in self.left_out.items():
            yield f"left out: {len(names):,} {why}: {_name_first(names)}."
        yield from self.choices


def _name_first(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
