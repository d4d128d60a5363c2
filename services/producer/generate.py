"""Made-up readings in Parquet files of any size, to try the pipeline with.

Each sensor has a level of its own; a year, a day and noise move all of them. Tables are written one after the other, so
memory does not grow with their number. The same options and the same version of pyarrow give the same rows.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError, StoppedError
from services.core.measurements import HUMIDITY, TEMPERATURE
from services.core.reading import EPOCH
from services.core.shutdown import Shutdown
from services.producer.columns import Columns

GROUP_ROWS = 100_000
MIN_STEPS = 10  # of one table, or no row of it could be late
DAY_S, YEAR_S = 86_400, 31_557_600
WARMEST_S = 200 * DAY_S + 15 * 3600  # since a year began: in July, in the afternoon
LAST_YEAR = 9999

# The mean, and how far a year, a day, the sensor and chance move a reading from it.
WAVES = {TEMPERATURE: (11.0, 8.0, 4.0, 4.0, 0.3), HUMIDITY: (65.0, 0.0, -12.0, 10.0, 2.0)}
OTHER = (500.0, 0.0, 0.0, 0.0, 50.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to generate: each of ``sensors`` has a reading every ``interval_s`` seconds for ``days`` from ``start``."""

    sensors: int
    days: float
    interval_s: int
    seed: int
    start: datetime
    gaps: float = 0.0  # share of the rows that are left out, 0 to 0.5
    late: float = 0.0  # that arrive after newer ones
    duplicates: float = 0.0  # that arrive twice

    @property
    def steps(self) -> int:
        """Readings of one sensor."""
        return int(self.days * DAY_S / self.interval_s)


@dataclass(slots=True)
class Counts:
    """What a file holds."""

    rows: int = 0  # in all
    duplicates: int = 0  # that repeat a row
    late: int = 0  # that arrive after a newer one, without duplicates
    gaps: int = 0  # that were left out


def generate(settings: Settings, plan: Plan, out: Path, shutdown: Shutdown, *, force: bool = False) -> Counts:
    """Write ``plan`` to ``out``, which has a hidden name until it is whole, with the columns that DATA_FEATURE_* names.

    Raises ConfigurationError before anything is written, StoppedError on shutdown, PermanentError if the disk is full.
    """
    columns = Columns.of(settings)
    _check(plan, columns, out, force=force)
    part = out.with_name(f".{out.name}.part")
    counts = Counts()
    try:
        with _alone(part, out):
            _check(plan, columns, out, force=force)  # another may just have finished
            with pq.ParquetWriter(part, pa.schema(_named(columns)), compression="zstd") as writer:
                for table in _tables(plan, columns, counts):
                    if shutdown.requested:
                        raise StoppedError(f"stopped: {out} was not written")
                    writer.write_table(table, row_group_size=GROUP_ROWS)
                    counts.rows += table.num_rows
            part.replace(out)
    except OSError as error:
        raise PermanentError(f"{out} cannot be written: {error.strerror or error}") from error
    return counts


@contextmanager
def _alone(part: Path, out: Path) -> Iterator[None]:
    """Keep ``part`` to this process during the block, then remove it unless it has another name by then.

    Raises ConfigurationError where another process keeps it, or has just renamed it.
    """
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise ConfigurationError(f"another generate is writing {out}: wait for it, or name another file")
        try:
            yield
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _check(plan: Plan, columns: Columns, out: Path, *, force: bool) -> None:
    if not columns.sensor and plan.sensors > 1:
        raise ConfigurationError("DATA_FEATURE_SENSOR is empty, so all readings belong to one sensor: use --sensors 1")
    if len(columns.names) < len(_named(columns)):
        raise ConfigurationError("two of the settings DATA_FEATURE_* name the same column")
    if plan.steps < 1:
        raise ConfigurationError(f"--days={plan.days:g} is shorter than --interval={plan.interval_s}: no reading")
    if plan.start.year + plan.days * DAY_S / YEAR_S >= LAST_YEAR:
        days = f"--start={plan.start:%Y-%m-%d} and --days={plan.days:g}"
        raise ConfigurationError(f"{days} go beyond the year {LAST_YEAR}")
    if out.is_dir():
        raise ConfigurationError(f"{out} is a directory: give the path of a file in it")
    if out.exists() and not force:
        raise ConfigurationError(f"{out} exists: --force replaces it")
    if not out.parent.is_dir():
        raise ConfigurationError(f"{out} cannot be written: there is no directory {out.parent}")


def _named(columns: Columns) -> list[tuple[str, pa.DataType]]:
    """The columns of the file."""
    times, sensors = (columns.time, pa.timestamp("ms", "UTC")), (columns.sensor, pa.string())
    numbers = [(column, pa.float64()) for _, column in columns.measurements]
    return [each for each in (times, sensors, *numbers) if each[0]]


def _tables(plan: Plan, columns: Columns, counts: Counts) -> Iterator[pa.Table]:
    """Some steps of all sensors at a time, in the order of time, then of these what comes late, and again."""
    max_steps = max(MIN_STEPS, GROUP_ROWS // plan.sensors)
    for first in range(0, plan.steps, max_steps):
        table = _readings(plan, columns, first, min(max_steps, plan.steps - first))
        gap, is_late = (
            pc.less(_random(plan, f"{first} {purpose}", table.num_rows), share)
            for purpose, share in (("gaps", plan.gaps), ("late", plan.late))
        )
        punctual = table.filter(pc.invert(pc.or_(gap, is_late)))
        late = table.filter(pc.and_not(is_late, gap))
        counts.gaps += gap.true_count
        if punctual.num_rows:
            newest = punctual.column(columns.time)[-1]
            counts.late += pc.sum(pc.less(late.column(columns.time), newest), min_count=0).as_py()
        table = pa.concat_tables([punctual, late])
        again = table.filter(pc.less(_random(plan, f"{first} duplicates", table.num_rows), plan.duplicates))
        counts.duplicates += again.num_rows
        yield pa.concat_tables([table, again])


def _readings(plan: Plan, columns: Columns, first: int, steps: int) -> pa.Table:
    """Every reading of ``steps`` steps from number ``first`` on."""
    row = pa.array(range(steps * plan.sensors), pa.int64())
    step = pc.divide(row, plan.sensors)
    sensor = pc.subtract(row, pc.multiply(step, plan.sensors))
    seconds = pc.add(pc.multiply(pc.add(step, first), plan.interval_s), int((plan.start - EPOCH).total_seconds()))
    width = max(4, len(str(plan.sensors)))
    names = pa.array([f"s{number:0{width}}" for number in range(1, plan.sensors + 1)])
    found = {
        columns.time: pc.multiply(seconds, 1000).cast(pa.timestamp("ms", "UTC")),
        columns.sensor: names.take(sensor),
    } | {column: _numbers(plan, name, first, seconds, sensor) for name, column in columns.measurements}
    schema = pa.schema(_named(columns))
    return pa.table([found[name] for name in schema.names], schema=schema)


def _numbers(plan: Plan, name: str, first: int, seconds: pa.Array, sensor: pa.Array) -> pa.Array:
    """A measurement of each row, with two digits."""

    def cycle(period_s: float, peak_s: float) -> pa.Array:
        return pc.cos(pc.multiply(pc.subtract(seconds, peak_s), 2 * math.pi / period_s))

    mean, *amplitudes = WAVES.get(name, OTHER)
    parts = (
        cycle(YEAR_S, WARMEST_S),
        cycle(DAY_S, WARMEST_S),
        _around_zero(plan, name, plan.sensors).take(sensor),
        _around_zero(plan, f"{first} {name}", len(seconds)),
    )
    return pc.round(reduce(pc.add, map(pc.multiply, parts, amplitudes), pa.scalar(mean)), 2)


def _around_zero(plan: Plan, purpose: str, rows: int) -> pa.Array:
    """Uniform in [-1, 1)."""
    return pc.subtract(pc.multiply(_random(plan, purpose, rows), 2.0), 1.0)


def _random(plan: Plan, purpose: str, rows: int) -> pa.Array:
    """Uniform in [0, 1): the same for the same seed and purpose."""
    digest = hashlib.sha256(f"{plan.seed} {purpose}".encode()).digest()
    return pc.random(rows, initializer=int.from_bytes(digest[:8]) >> 1)
