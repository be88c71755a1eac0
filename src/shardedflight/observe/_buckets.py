"""How times are sorted into histograms, by whichever adapter."""

__all__ = ["BUCKETS"]

#: The upper bounds of the histograms' buckets, in seconds. What is worth sharing takes from a
#: fraction of a millisecond to a minute.
BUCKETS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    60.0,
)
