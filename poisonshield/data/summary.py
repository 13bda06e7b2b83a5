"""What a reader took, what it left out and why, and what it decided: filled by every reader, printed by every command.

Nothing is passed over in silence: a file that is not taken is counted under its reason, with the first names.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from poisonshield.plain import plain

SHOWN = 5
"""How many names of one kind are told; the rest is a number."""
SHOWN_CLASSES = 20


@dataclass
class Summary:
    """taken: how many of what, such as "images" or "masks". left_out: names by reason. choices: sentences on what was
    decided where a source left it open, such as which folder is the test split. classes: samples of each class, by
    split, "" where there are no splits."""

    source: str
    taken: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)

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
        yield plain(f"{self.source}: read {read or 'nothing'}.")
        for split, counts in self.classes.items():
            shown = [f"{name} {count:,}" for name, count in counts.items()]
            yield plain(f"{split + ': ' if split else ''}{len(counts):,} classes: {_name_first(shown, SHOWN_CLASSES)}.")
        for why, names in self.left_out.items():
            yield plain(f"left out: {len(names):,} {why}: {_name_first(names)}.")
        yield from map(plain, self.choices)


def _name_first(names: list[str], shown: int = SHOWN) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")
