"""A measured value with its interval."""

from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval over documents, prompts or items."""

    value: float
    ci95: Interval

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.ci95[0]

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.ci95[1]
