"""What two processes check of a short run of `benchmarks.soak`."""

from __future__ import annotations

from benchmarks import soak


def soaks() -> None:
    """Sixty steps, with every kind of event."""
    models = ("alone", "synchronised")
    record = soak.run(60, seed=3, models=models)
    assert soak.faults(record) == []
    assert record.events == {event: 3 * count for event, count in soak.DECK.items()}
    assert record.sites == dict.fromkeys(models, soak.SITES)
    for kinds in record.differences.values():
        assert {"parameters", "buffers", "optimiser", "average", "outputs"} < kinds.keys()
