"""What is wrong with hand-written norms, read from their formulas on a canonical graph.

Neither source text nor names are looked at: a pathology is a property of a formula, of what a
buffer's new value is made of, or of a value that a buffer has.
"""

from .averages import Average, averages
from .everything import notice
from .noticed import BatchStatistics, Noticed, StoredStatistics

__all__ = ["Average", "BatchStatistics", "Noticed", "StoredStatistics", "averages", "notice"]
