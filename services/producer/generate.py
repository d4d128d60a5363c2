"""Readings as sensors send them, made up: Parquet files to try the pipeline with, of any size.

Each sensor has a place of its own (its mean and its daily cycle); all have one year, spells of warm days, and noise.
The air is driest in the afternoon.
Rows are in the order of time and written one row group after the other, so memory does not grow with their
number. The same options and the same version of pyarrow give the same rows.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError, StoppedError
from services.core.measurements import HUMIDITY, TEMPERATURE
from services.core.shutdown import Shutdown
from services.producer.columns import Columns

GROUP_ROWS = 100_000
BLOCK_STEPS = 10  # gaps and late rows come in runs: a sensor is silent, or cut off and sends later
YEAR_DAYS, SPELL_DAYS = 365.25, 5.3
WARMEST_DAY, WARMEST_HOUR = 200.0, 15.0
LAST_YEAR = 9999


@dataclass(frozen=True, slots=True)
class Plan:
    """What to generate: each of ``sensors`` has a reading every ``interval_s`` seconds for ``days`` from ``start``.

    ``gaps``, ``late`` and ``duplicates`` are shares of the rows, 0 to 0.5: left out, coming after newer rows,
    coming once more.
    """

    sensors: int
    days: float
    interval_s: int
    seed: int
    start: datetime
    gaps: float = 0.0
    late: float = 0.0
    duplicates: float = 0.0

    @property
    def steps(self) -> int:
        """Readings of one sensor."""
        return int(self.days * 86_400 / self.interval_s)


@dataclass(slots=True)
class Counts:
    """What a file holds: ``rows`` in all, of which ``duplicates`` repeat a row and ``late`` come after a newer one.

    A duplicate is not counted as late. ``gaps`` rows were left out.
    """

    rows: int = 0
    duplicates: int = 0
    late: int = 0
    gaps: int = 0


def generate(settings: Settings, plan: Plan, out: Path, shutdown: Shutdown, *, force: bool = False) -> Counts:
    """Write ``plan`` to ``out``, with the columns that DATA_FEATURE_* names.

    The file has another, hidden name until it is whole. Raises ConfigurationError, one line, before anything is
    written, StoppedError where ``shutdown`` was requested, and PermanentError where the disk does not take it.
    """
    columns = Columns.of(settings)
    _check(plan, columns, out, force=force)
    part = out.with_name(f".{out.name}.part")
    counts = Counts()
    try:
        with _alone(part, out):
            _check(plan, columns, out, force=force)  # another may just have finished
            with pq.ParquetWriter(part, _schema(columns), compression="zstd") as writer:
                for table in _Generator(plan, columns, counts).tables():
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
    """Keep ``part`` to this process while the block runs, and remove it in the end unless it has another name by then.

    Raises ConfigurationError where another process keeps it, or has just given it its name.
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
    if len(columns.names) < 1 + len(columns.measurements) + bool(columns.sensor):
        raise ConfigurationError("two of the settings DATA_FEATURE_* name one column")
    if plan.steps < 1:
        raise ConfigurationError(f"--days={plan.days:g} is shorter than --interval={plan.interval_s}: no reading")
    if plan.start.year + plan.days / YEAR_DAYS >= LAST_YEAR:
        raise ConfigurationError(
            f"--start={plan.start:%Y-%m-%d} and --days={plan.days:g} go beyond the year {LAST_YEAR}"
        )
    if out.is_dir():
        raise ConfigurationError(f"{out} is a directory: name a file in it")
    if out.exists() and not force:
        raise ConfigurationError(f"{out} exists: --force replaces it")
    if not out.parent.is_dir():
        raise ConfigurationError(f"{out} cannot be written: there is no directory {out.parent}")


def _schema(columns: Columns) -> pa.Schema:
    named = [
        (columns.time, pa.timestamp("ms", "UTC")),
        (columns.sensor, pa.string()),
        *((column, pa.float64()) for _, column in columns.measurements),
    ]
    return pa.schema([(name, kind) for name, kind in named if name])


class _Generator:
    """A table at a time: some steps of all sensors, in the order of time, then what comes late and again."""

    def __init__(self, plan: Plan, columns: Columns, counts: Counts) -> None:
        self._plan, self._columns, self._counts = plan, columns, counts
        self._schema = _schema(columns)
        width = max(4, len(str(plan.sensors)))
        self._names = pa.array([f"s{number:0{width}}" for number in range(1, plan.sensors + 1)])
        self._sensors = _characters(plan)
        self._newest: pa.Scalar | None = None

    def tables(self) -> Iterator[pa.Table]:
        """All rows; late ones are held back for one table, and come at the end of the last one if need be."""
        plan, time = self._plan, self._columns.time
        max_steps = max(BLOCK_STEPS, GROUP_ROWS // plan.sensors // BLOCK_STEPS * BLOCK_STEPS)
        held = self._schema.empty_table()
        for first in range(0, plan.steps, max_steps):
            steps = min(max_steps, plan.steps - first)
            table, gap, late = self._readings(first, steps)
            self._counts.gaps += gap.true_count
            punctual = table.filter(pc.invert(pc.or_(gap, late)))
            overdue, held = held, table.filter(pc.and_not(late, gap))
            if first + steps >= plan.steps:
                overdue, held = pa.concat_tables([overdue, held]), held.slice(0, 0)
            if punctual.num_rows:
                self._newest = punctual.column(time)[-1]
            if overdue.num_rows and self._newest is not None:
                self._counts.late += pc.sum(pc.less(overdue.column(time), self._newest)).as_py()
            table = pa.concat_tables([punctual, overdue])
            again = table.filter(pc.less(self._random(first, "duplicates", table.num_rows), plan.duplicates))
            self._counts.duplicates += again.num_rows
            yield pa.concat_tables([table, again])

    def _readings(self, first: int, steps: int) -> tuple[pa.Table, pa.Array, pa.Array]:
        """Every reading of ``steps`` steps from number ``first`` on; which are left out, and which come late."""
        plan = self._plan
        rows = steps * plan.sensors
        row = pa.array(range(rows), pa.int64())
        step = pc.divide(row, plan.sensors)
        sensor = pc.subtract(row, pc.multiply(step, plan.sensors))
        seconds = pc.multiply(pc.add(step, first), plan.interval_s)
        start_ms = (plan.start - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
        times = pc.add(pc.multiply(seconds, 1000), start_ms).cast(pa.timestamp("ms")).cast(pa.timestamp("ms", "UTC"))
        weather = self._weather(first, pc.divide(seconds.cast(pa.float64()), 86_400.0), sensor)
        columns = {
            self._columns.time: times,
            self._columns.sensor: self._names.take(sensor),
        } | {
            column: weather[name] if name in weather else self._other(first, name, rows)
            for name, column in self._columns.measurements
        }
        table = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        block = pc.add(pc.multiply(pc.divide(step, BLOCK_STEPS), plan.sensors), sensor)
        blocks = math.ceil(steps / BLOCK_STEPS) * plan.sensors

        def chosen(purpose: str, share: float) -> pa.Array:
            return pc.less(self._random(first, purpose, blocks), share).take(block)

        return table, chosen("gaps", plan.gaps), chosen("late", plan.late)

    def _weather(self, first: int, day: pa.Array, sensor: pa.Array) -> dict[str, pa.Array]:
        """Degrees Celsius and per cent, with two digits; ``day``: days since the start."""
        of = {name: values.take(sensor) for name, values in self._sensors.items()}
        start = self._plan.start
        now = pc.add(day, start.timetuple().tm_yday + (start.hour * 60 + start.minute) / 1440)
        summer = pc.multiply(_cycle(now, YEAR_DAYS, WARMEST_DAY), 8.0)
        spell = pc.multiply(_cycle(day, SPELL_DAYS, 0.0), 2.0)
        afternoon = pc.multiply(_cycle(now, 1.0, WARMEST_HOUR / 24), of["daily"])
        noise = {name: self._noise(first, name, len(day)) for name in (TEMPERATURE, HUMIDITY)}
        air = reduce(pc.add, (of["mean"], summer, spell, afternoon, pc.multiply(noise[TEMPERATURE], 0.15)))
        dry = pc.add(pc.multiply(afternoon, 4.0), noise[HUMIDITY])  # when it is warm
        humidity = pc.min_element_wise(pc.max_element_wise(pc.subtract(of["humid"], dry), 1.0), 100.0)
        return {TEMPERATURE: pc.round(air, 2), HUMIDITY: pc.round(humidity, 2)}

    def _other(self, first: int, name: str, rows: int) -> pa.Array:
        """Of what we know nothing about: numbers around 500."""
        return pc.round(pc.add(pc.multiply(self._noise(first, name, rows), 50.0), 500.0), 2)

    def _noise(self, first: int, purpose: str, rows: int) -> pa.Array:
        """Nearly normal, of mean 0 and deviation 1: three uniform numbers together."""
        parts = [self._random(first, f"{purpose} {part}", rows) for part in range(3)]
        return pc.multiply(pc.subtract(reduce(pc.add, parts), 1.5), 2.0)

    def _random(self, first: int, purpose: str, rows: int) -> pa.Array:
        """Uniform in [0, 1): the same for the same seed, step and purpose."""
        text = f"{self._plan.seed} {first} {purpose}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
        return pc.random(rows, initializer=number)


def _characters(plan: Plan) -> dict[str, pa.Array]:
    """What is special about each sensor: degrees, degrees and per cent, by its number."""
    ranges = {"mean": (7.0, 15.0), "daily": (2.0, 6.0), "humid": (55.0, 75.0)}
    numbers = [random.Random(f"{plan.seed} {sensor}") for sensor in range(plan.sensors)]  # noqa: S311 - repeatable
    return {name: pa.array([number.uniform(*bounds) for number in numbers]) for name, bounds in ranges.items()}


def _cycle(day: pa.Array, period: float, peak: float) -> pa.Array:
    """Between -1 and 1 every ``period`` days, highest on day ``peak``."""
    return pc.cos(pc.multiply(pc.subtract(day, peak), 2 * math.pi / period))
