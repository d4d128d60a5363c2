"""What eight measurements more cost the consumer, beside what their wider rows cost a bare COPY."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from services.core.config import settings_type
from services.core.database import connect
from services.core.measurements import DEFAULT
from tests.benchmarks.history import History
from tests.benchmarks.servers import Bench
from tests.fix_stack import remove_measurement, upgrade

MORE = tuple(f"more{number}" for number in range(3, 11))


def measure_wide(bench: Bench) -> None:
    """Floors and drains of two and of ten measurements take turns."""
    names = (*DEFAULT, *MORE)
    rows = History(bench.scale.rows).rows()
    wide_rows = [(*row, *(row[2] + number for number in range(len(MORE)))) for row in rows]
    values: dict[str, Any] = dict(bench.settings) | {"measurements": names}
    wide = replace(bench, settings=settings_type(names)(_env_file=None, **values))
    topic, wide_topic = bench.new_topic(), wide.new_topic()
    bench.fill(topic, rows)
    wide.fill(wide_topic, wide_rows)
    upgrade(wide.settings)
    floors, drains = [], []
    try:
        for _ in range(bench.scale.rounds):
            floor, wide_floor = bench.copy_floor(rows), wide.copy_floor(wide_rows, names)
            bench.truncate()
            drain = bench.drain(topic).rows_s
            bench.truncate()
            floors.append(wide_floor / floor)
            drains.append(wide.drain(wide_topic).rows_s / drain)
    finally:
        with connect(bench.settings) as connection:
            for name in MORE:
                remove_measurement(connection, name)
    floor_ratio, drain_ratio = statistics.median(floors), statistics.median(drains)
    bench.note(wide_floor_ratio=floor_ratio, wide_drain_ratio=drain_ratio, wide_ratio=drain_ratio / floor_ratio)
