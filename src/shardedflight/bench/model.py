"""The universal scalability law, fitted to measured points: a model, not a measurement.

Neil J. Gunther's law gives the speed-up of N threads as

    C(N) = N / (1 + sigma (N - 1) + kappa N (N - 1))

where sigma is the share of the work that goes one after another, and kappa what it costs each pair
of threads to agree on what is in memory ("Guerrilla Capacity Planning", Springer, 2007). With
sigma and kappa on one side it is a straight line, which least squares fit:

    (N / C(N) - 1) / (N - 1) = sigma + kappa N

One number of threads beside 1 cannot tell the two apart. Then there are two fits, one that puts all
loss down to sigma and one that puts it all down to kappa; the law runs between them.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """A fitted law, with neither of its coefficients below 0."""

    sigma: float
    kappa: float

    def speed_up(self, threads: float) -> float:
        """Returns how many times as fast `threads` threads are as one, by this law."""
        others = threads - 1
        return threads / (1 + self.sigma * others + self.kappa * threads * others)


@dataclass(frozen=True)
class Fit:
    """The laws between which the truth lies, as far as the points tell: they may be the same."""

    contention: Law
    coherency: Law

    @property
    def decided(self) -> bool:
        """Whether the points tell sigma and kappa apart."""
        return self.contention == self.coherency


def fit(rates: Mapping[int, Sequence[float]]) -> Fit:
    """Fits the law.

    Args:
        rates: Calls per second of so many threads, one for each round. 1 thread is among them, and
            at least one other number.
    """
    points = [
        (threads, (threads * alone / rate - 1) / (threads - 1))
        for threads, of_rounds in rates.items()
        if threads > 1
        for alone, rate in zip(rates[1], of_rounds, strict=True)
    ]
    threads = [point[0] for point in points]
    losses = [point[1] for point in points]
    # The best fit with one of the two being 0.
    contention = Law(max(0.0, statistics.fmean(losses)), 0.0)
    weights = sum(count * count for count in threads)
    of_kappa = sum(count * loss for count, loss in points) / weights
    coherency = Law(0.0, max(0.0, of_kappa))
    if len(set(threads)) == 1:
        return Fit(contention, coherency)
    line = statistics.linear_regression(threads, losses)
    if line.intercept >= 0 and line.slope >= 0:
        law = Law(line.intercept, line.slope)
    elif line.slope < 0:
        law = contention
    else:
        law = coherency
    return Fit(law, law)
