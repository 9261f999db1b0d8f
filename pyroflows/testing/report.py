"""What a run of the laws found: one line a law, and each violation with what it takes to see it again."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Report", "Tally"]

_SHOWN = 3
"""How many violations of one law are kept; a broken layer tends to break it everywhere."""


@dataclass
class Tally:
    """How one law fared.

    Attributes:
        checked: how many numbers or facts were compared.
        skipped: how many were left out because rounding alone leaves them no digit.
        worst: the largest error, as a share of what was allowed.
        broken: how often the law was broken.
    """

    checked: int = 0
    skipped: int = 0
    worst: float = 0.0
    broken: int = 0


@dataclass
class Report:
    """What a run of the laws found; ``str()`` is a short table.

    Attributes:
        subject: what was checked.
        seed: the seed of the run.
        draws: at how many parameter values.
        tallies: how each law fared, by name.
        violations: the violations, a text each.
        understated: claims that say no where the answer is yes.
        declined: what the factory refused to build, with its typed error.
        exempt: why a law was left out, by name.
    """

    subject: str
    seed: int = 0
    draws: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    understated: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    exempt: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every law held."""
        return not self.violations

    def tally(self, law: str) -> Tally:
        """The tally of a law, new at first use."""
        return self.tallies.setdefault(law, Tally())

    def violate(self, law: str, text: str) -> None:
        """Puts down a violation; beyond the first few of a law only the count grows."""
        tally = self.tally(law)
        tally.broken += 1
        if tally.broken <= _SHOWN:
            self.violations.append(text)

    def note(self, notes: list[str], text: str) -> None:
        """Puts down a remark once."""
        if text not in notes:
            notes.append(text)

    @property
    def complaint(self) -> str:
        """All violations in one text."""
        laws = [f"{name} ({tally.broken}x)" for name, tally in self.tallies.items() if tally.broken]
        return "\n".join([f"{self.subject} breaks {', '.join(laws)}:", *self.violations])

    def __str__(self) -> str:
        draws = "1 draw" if self.draws == 1 else f"{self.draws} draws"
        lines = [f"{self.subject}: {draws}, seed {self.seed}"]
        lines.append(f"{'law':<20}{'checked':>9}{'skipped':>9}{'worst':>9}  verdict")
        for name, tally in self.tallies.items():
            verdict = f"BROKEN {tally.broken}x" if tally.broken else "holds"
            lines.append(f"{name:<20}{tally.checked:>9}{tally.skipped:>9}{tally.worst:>9.2g}  {verdict}")
        lines += [f"{name:<20}left out: {reason}" for name, reason in self.exempt.items()]
        lines += [f"understated: {text}" for text in self.understated]
        lines += [f"declined: {text}" for text in self.declined]
        return "\n".join([*lines, *self.violations])
