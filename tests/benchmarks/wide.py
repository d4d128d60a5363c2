"""What eight measurements more cost the consumer, beside what their wider rows cost a bare COPY."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from services.core.config import Settings, settings_type
from services.core.database import connect
from services.core.measurements import DEFAULT
from tests.benchmarks.consuming import fill_with_blocks
from tests.benchmarks.history import History
from tests.benchmarks.servers import PATIENCE_S, Bench, source_of
from tests.fix_stack import remove_measurement, upgrade

MORE = tuple(f"more{number}" for number in range(3, 11))


def measure_wide(bench: Bench) -> None:
    """Floors and drains of two and of ten measurements take turns."""
    names = (*DEFAULT, *MORE)
    history = History(bench.scale.rows)
    rows = history.rows()
    wide_rows = [(*row, *(row[2] + number for number in range(len(MORE)))) for row in rows]
    values: dict[str, Any] = dict(bench.settings) | {"measurements": names}
    wide = replace(bench, settings=settings_type(names)(**values))
    topic, wide_topic = bench.new_topic(), wide.new_topic()
    bench.fill(topic, rows)
    wide.fill(wide_topic, wide_rows)
    blocks = fill_with_blocks(bench, history)
    wide_blocks = filled(wide, bench.parquet(history))
    upgrade(wide.settings)
    floors, drains, drains_of_blocks = [], [], []
    try:
        for _ in range(bench.scale.rounds):
            floor, wide_floor = bench.copy_floor(rows), wide.copy_floor(wide_rows, names)
            bench.truncate()
            drain = bench.drain(topic).rows_s
            bench.truncate()
            floors.append(wide_floor / floor)
            drains.append(wide.drain(wide_topic).rows_s / drain)
            bench.truncate()
            drain = bench.drain(blocks).rows_s
            bench.truncate()
            drains_of_blocks.append(wide.drain(wide_blocks).rows_s / drain)
    finally:
        with connect(bench.settings) as connection:
            for name in MORE:
                remove_measurement(connection, name)
    floor, json, arrow = map(statistics.median, (floors, drains, drains_of_blocks))
    bench.note(wide_floor_ratio=floor, wide_drain_ratio=json, wide_ratio=json / floor)
    bench.note(wide_drain_blocks_ratio=arrow, wide_blocks_ratio=arrow / floor)


def filled(wide: Bench, narrow: Path) -> Settings:
    """A topic with blocks of the readings of ``narrow``, and eight more."""
    table = pq.read_table(narrow)
    for name in MORE:
        table = table.append_column(name, table["temperature"])
    path = wide.directory / "wide.parquet"
    pq.write_table(table, path)
    columns = {f"data_feature_{name}": name for name in MORE}
    topic = wide.new_topic(**source_of(path), **columns, producer_format="arrow")
    assert wide.start(topic, "produce").wait(PATIENCE_S) == 0
    return topic
