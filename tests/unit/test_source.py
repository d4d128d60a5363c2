"""Parquet to messages: which files, which rows, which bytes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.config import Settings
from services.core.errors import ConfigurationError, PermanentError, UnreadableFileError
from services.core.reading import EARLIEST, LATEST, MAX_VALUE, Decoder, Reading, reading_type
from services.core.shutdown import Shutdown
from services.producer.columns import Columns
from services.producer.encoding import Readings, choose, to_json
from services.producer.finding import SourceLocation
from services.producer.reader import BATCH_ROWS
from services.producer.source import Source, SourceFile, check_file, open_source
from tests.measured import MEASUREMENTS, make_settings, reading_of

COLUMNS = Columns("time", (("temperature", "temp"), ("humidity", "humid")), "sensor")
NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)
MAPPING = {"date": "time", "temp": "temp", "humid": "humid", "sensor": "sensor"}
NAMES = ["time", "temp", "humid", "sensor"]


def settings(url: Path | str, **changes: str) -> Settings:
    names = {f"data_feature_{name}": column for name, column in MAPPING.items()}
    return make_settings().model_copy(update={"parquet_url": str(url)} | names | changes)


def encode(
    time: pa.Array | None = None,
    temp: pa.Array | None = None,
    humid: pa.Array | None = None,
    sensor: pa.Array | None = None,
    columns: Columns = COLUMNS,
) -> Readings:
    """Messages of a batch; columns that are not given hold something harmless."""
    rows = max(len(column) for column in (time, temp, humid, sensor) if column is not None)
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array([NOON] * rows, pa.timestamp("us", "UTC")) if time is None else time,
            pa.array([20.5] * rows) if temp is None else temp,
            pa.array([50.25] * rows) if humid is None else humid,
            pa.array(["s1"] * rows) if sensor is None else sensor,
        ],
        NAMES,
    )
    return choose(batch, columns)


def ids(found: Readings) -> list[bytes]:
    return [found.keys[at] for at in found.sensor.to_pylist()]


def readings(messages: Readings) -> list[Reading]:
    """What a consumer makes of the messages."""
    decoder = msgspec.json.Decoder(reading_type(MEASUREMENTS))
    found = [decoder.decode(value) for value in to_json(messages)]
    assert [reading.sensor_id.encode() for reading in found] == ids(messages)
    assert messages.rows == len(found) + sum(messages.skipped.values())
    return found


def times(column: pa.Array) -> list[datetime]:
    return [reading.time for reading in readings(encode(time=column))]


# --- the message -------------------------------------------------------------------------------------------


def test_a_message_is_the_contract_s_json_keyed_by_sensor() -> None:
    messages = encode(sensor=pa.array(["s0042"]))
    assert (messages.rows, ids(messages), messages.skipped) == (1, [b"s0042"], {})
    assert to_json(messages) == [
        b'{"sensor_id":"s0042","time":"2024-03-01T12:00:00.000000Z","temperature":20.5,"humidity":50.25}'
    ]


def test_a_null_field_is_left_out() -> None:
    messages = encode(temp=pa.array([None, 1.0]), humid=pa.array([2.0, None]))
    assert [json.loads(value).keys() - {"sensor_id", "time"} for value in to_json(messages)] == [
        {"humidity"},
        {"temperature"},
    ]


# --- times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York", "+05:30"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit_and_zone_are_instants(unit: str, zone: str | None) -> None:
    """A naive one is UTC; a zone says how a time was shown, not which instant it is."""
    seconds = int(NOON.timestamp())
    numbers = pa.array([seconds * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]])
    assert times(numbers.cast(pa.timestamp(unit, zone))) == [NOON]


@given(st.integers(int(EARLIEST.timestamp()) * 10**9, 2**61) | st.integers(-3000, 3000))
def test_nanoseconds_are_rounded_as_a_consumer_rounds_a_message(nanoseconds: int) -> None:
    """The same reading from a file, as a number or as text, and from a device is one row."""
    seconds, rest = divmod(nanoseconds, 10**9)
    text = f"{datetime.fromtimestamp(0, UTC) + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S}.{rest:09}"
    from_device = Decoder(MEASUREMENTS, max_bytes=1000, max_future=timedelta(days=36_500)).decode(
        b'{"sensor_id": "s", "time": "%sZ", "temperature": 1}' % text.encode()
    )
    for column in (pa.array([nanoseconds], pa.timestamp("ns")), pa.array([text]), pa.array([f"{text}Z"])):
        assert times(column) == [from_device.time]


@pytest.mark.parametrize(("unit", "digits"), [("ms", "123000"), ("us", "123456"), ("ns", "123457")])
def test_microseconds_are_kept_and_nanoseconds_are_rounded(unit: str, digits: str) -> None:
    nanoseconds = pa.array([1_709_294_400_123_456_789], pa.timestamp("ns"))
    column = nanoseconds.cast(pa.timestamp(unit), safe=False)
    assert times(column) == [NOON.replace(microsecond=int(digits))]


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()])
def test_a_date_is_its_midnight(kind: pa.DataType) -> None:
    assert times(pa.array([date(2024, 3, 1)], kind)) == [datetime(2024, 3, 1, tzinfo=UTC)]


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2024-03-01T12:00:00Z", NOON),
        ("2024-03-01T12:00:00", NOON),
        ("2024-03-01 12:00:00", NOON),
        ("2024-03-01T14:00:00+02:00", NOON),
        ("2024-03-01T06:30:00-0530", NOON),
        ("2024-03-01T12:00:00.123456Z", NOON.replace(microsecond=123456)),
        ("2024-03-01T12:00:00.123456789Z", NOON.replace(microsecond=123457)),
        ("2024-03-01T14:00:00,1234564+02:00", NOON.replace(microsecond=123456)),
        ("2024-03-01T12:00", NOON),
        ("20240301T120000Z", NOON),
        ("2024-03-01", NOON.replace(hour=0)),
        (" 2024-03-01T12:00:00Z ", NOON),
    ],
)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_iso_text_is_read_with_or_without_an_offset(text: str, instant: datetime, kind: pa.DataType) -> None:
    assert times(pa.array([text]).cast(kind)) == [instant]
    mixed = pa.array([text, "2024-03-01T12:00:00", "2024-03-01T12:00:00Z"]).cast(kind)
    assert times(mixed) == [instant, NOON, NOON]


@pytest.mark.parametrize("text", ["", "yesterday", "2024-02-30T00:00:00Z", "2024-03-01T25:00:00Z", "1709294400"])
def test_text_that_is_no_time_is_skipped_alone(text: str) -> None:
    messages = encode(time=pa.array(["2024-03-01T12:00:00Z", text, None, "2024-03-01T12:00:00"]))
    assert [reading.time for reading in readings(messages)] == [NOON, NOON]
    assert messages.skipped == {"bad_time": 1, "no_time": 1}


def test_invalid_utf8_in_a_time_is_a_bad_time() -> None:
    damaged = pa.array([b"2024-03-01", b"\xff\xfe"]).view(pa.string())
    messages = encode(time=damaged)
    assert (messages.sent, messages.skipped) == (1, {"bad_time": 1})


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_times_outside_the_calendar_are_skipped(unit: str) -> None:
    factor = {"s": 1, "ms": 10**3, "us": 10**6}[unit]
    first, last = int(EARLIEST.timestamp()) * factor, int(LATEST.timestamp()) * factor
    numbers = [first, last, first - 1, last + 1, 2**63 - 1]
    messages = encode(time=pa.array(numbers).cast(pa.timestamp(unit)))
    assert [reading.time.year for reading in readings(messages)] == [1900, 9999]
    assert messages.skipped == {"time_out_of_range": 3}


def test_nanoseconds_before_1900_are_skipped() -> None:
    messages = encode(
        time=pa.array([-(2**63) + 1, int(EARLIEST.timestamp()) * 10**9 - 501, 2**63 - 1], pa.timestamp("ns"))
    )
    assert [reading.time.year for reading in readings(messages)] == [2262]
    assert messages.skipped == {"time_out_of_range": 2}


def test_dates_outside_the_calendar_are_skipped() -> None:
    for kind in (pa.date32(), pa.date64()):
        messages = encode(time=pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32()).cast(kind))
        assert messages.skipped == {"time_out_of_range": 1}
    messages = encode(time=pa.array(["0001-01-01", "9999-12-31T23:59:59-01:00"]))
    assert messages.skipped == {"time_out_of_range": 2}


# --- numbers -----------------------------------------------------------------------------------------------

NUMBERS = [
    pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
    pa.float16(), pa.float32(), pa.float64(), pa.decimal128(10, 2), pa.decimal256(60, 5),
]  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERS, ids=str)
def test_any_numeric_type_is_a_number(kind: pa.DataType) -> None:
    column = pa.array([21, 0, None]).cast(pa.float64()).cast(kind)
    messages = encode(temp=column, humid=column.slice(0))
    assert [(r.temperature, r.humidity) for r in readings(messages)] == [(21.0, 21.0), (0.0, 0.0)]
    assert messages.skipped == {"no_measurement": 1}


def test_dictionary_encoded_numbers_and_a_column_of_nothing() -> None:
    messages = encode(temp=pa.array([1.5, 1.5, 2.5]).dictionary_encode(), humid=pa.nulls(3))
    assert [(r.temperature, r.humidity) for r in readings(messages)] == [
        (1.5, None),
        (1.5, None),
        (2.5, None),
    ]


def test_a_float32_says_the_value_that_is_stored() -> None:
    """20.41 stored in 32 bits is another number, and that number is what PostgreSQL would make of it too."""
    column = pa.array([20.41], pa.float32())
    assert readings(encode(temp=column))[0].temperature == column[0].as_py() == 20.40999984741211


def test_a_decimal_becomes_the_nearest_double() -> None:
    column = pa.array([Decimal("-0.07"), Decimal("123456789012345678.90")], pa.decimal128(20, 2))
    assert [r.temperature for r in readings(encode(temp=column))] == [-0.07, 123456789012345678.90]


@given(st.lists(st.floats(-MAX_VALUE, MAX_VALUE), min_size=1))
def test_every_double_comes_back_as_it_was(values: list[float]) -> None:
    found = [reading.temperature for reading in readings(encode(temp=pa.array(values, pa.float64())))]
    assert found == values


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_nan_is_null_and_infinity_skips_the_row(kind: pa.DataType) -> None:
    temp = pa.array([math.nan, math.inf, -math.inf, 1.0, math.nan], pa.float64()).cast(kind)
    humid = pa.array([1.0, 1.0, 1.0, math.inf, math.nan], pa.float64()).cast(kind)
    messages = encode(temp=temp, humid=humid)
    assert [(r.temperature, r.humidity) for r in readings(messages)] == [(None, 1.0)]
    assert messages.skipped == {"value_out_of_range": 3, "no_measurement": 1}


# --- sensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.int64()],
    ids=str,
)
def test_sensor_ids_are_text_or_integers(kind: pa.DataType) -> None:
    messages = encode(sensor=pa.array(["7", "12", "7", None]).cast(kind))
    assert ids(messages) == [b"7", b"12", b"7"]
    assert messages.skipped == {"no_sensor": 1}
    assert len(readings(messages)) == 3


def test_dictionaries_of_integers_and_with_nulls_in_them_are_ids_too() -> None:
    assert ids(encode(sensor=pa.array([5, 6, 5]).dictionary_encode())) == [b"5", b"6", b"5"]
    odd = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([None, "a"]))
    assert encode(sensor=odd).skipped == {"no_sensor": 1}


def test_with_no_sensor_column_all_readings_belong_to_default() -> None:
    columns = Columns("time", COLUMNS.measurements, "")
    assert ids(encode(temp=pa.array([1.0, 2.0]), columns=columns)) == [b"default", b"default"]


def test_ids_that_no_consumer_takes_are_skipped() -> None:
    ids = pa.array([b"", b"a" * 256, b"a" * 255, "ü".encode() * 255, b"\xff", None]).view(pa.string())
    messages = encode(sensor=ids)
    assert [len(reading.sensor_id) for reading in readings(messages)] == [255, 255]
    assert messages.skipped == {"no_sensor": 2, "bad_sensor": 2}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1))
def test_any_text_that_can_be_printed_is_escaped_as_json_wants_it(ids: list[str]) -> None:
    messages = encode(sensor=pa.array(ids))
    assert [reading.sensor_id for reading in readings(messages)] == [each for each in ids if each.isprintable()]
    assert messages.skipped.get("bad_sensor", 0) == sum(not each.isprintable() for each in ids)


@pytest.mark.parametrize("text", ["\0", "a\nb", "\x1b]0;x", "\x7f", "\x85", "a\u202eb", "\u2066"])
def test_control_characters_are_no_part_of_an_id(text: str) -> None:
    messages = encode(sensor=pa.array([text, "a b", "größe"]))
    assert (len(readings(messages)), messages.skipped) == (2, {"bad_sensor": 1})


def test_what_is_older_than_allowed_is_skipped_and_still_counts_as_content() -> None:
    now = datetime.now(UTC)
    ages = [timedelta(days=days, seconds=seconds) for days, seconds in ((9, 0), (10, -60), (10, 60), (20, 0))]
    column = pa.array([None, *(now - age for age in ages)], pa.timestamp("us", "UTC"))
    limited = encode(time=column, columns=replace(COLUMNS, max_past=timedelta(days=10)))
    assert [reading.time for reading in readings(limited)] == [now - age for age in ages[:2]]
    assert limited.skipped == {"no_time": 1, "time_out_of_range": 2}
    assert limited.content == encode(time=column).content
    assert Columns.of(settings("a")).max_past == timedelta(days=7305)


# --- rows --------------------------------------------------------------------------------------------------

Row = tuple[datetime | None, float | None, float | None, str | None]


def expected(rows: Iterable[Row]) -> tuple[list[Reading], dict[str, int]]:
    """The rules of a row, one by one: what the vectorised code must equal."""
    found: list[Reading] = []
    skipped: dict[str, int] = {}
    for time, temp, humid, sensor in rows:
        temp, humid = (None if value is None or math.isnan(value) else value for value in (temp, humid))
        if time is None:
            reason = "no_time"
        elif not sensor:
            reason = "no_sensor"
        elif len(sensor) > 255 or not sensor.isprintable():
            reason = "bad_sensor"
        elif max(abs(temp or 0), abs(humid or 0)) > MAX_VALUE:
            reason = "value_out_of_range"
        elif temp is None and humid is None:
            reason = "no_measurement"
        else:
            found.append(reading_of(sensor, time, temp, humid))
            continue
        skipped[reason] = skipped.get(reason, 0) + 1
    return found, skipped


VALUES = st.none() | st.floats() | st.floats(-100, 100)
ROWS: st.SearchStrategy[list[Row]] = st.lists(
    st.tuples(
        st.none() | st.datetimes(EARLIEST.replace(tzinfo=None), LATEST.replace(tzinfo=None), timezones=st.just(UTC)),
        VALUES,
        VALUES,
        st.none() | st.sampled_from(["", "a", 'b"\\', "x" * 256]) | st.text(max_size=3),
    ),
    min_size=1,
    max_size=30,
)


@given(ROWS, st.integers(0, 29))
def test_any_mix_of_rows_equals_the_rules_row_by_row(rows: list[Row], start: int) -> None:
    kinds = [pa.timestamp("us", "UTC"), pa.float64(), pa.float64(), pa.string()]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    batch = pa.RecordBatch.from_arrays(columns, NAMES).slice(start)  # arrays with an offset, as a resume has
    messages = choose(batch, COLUMNS)
    assert (readings(messages), messages.skipped) == expected(rows[start:])


# --- files -------------------------------------------------------------------------------------------------


def table(rows: int, first: int = 0, sensor: str = "s") -> pa.Table:
    """Readings a second apart; the temperature counts them."""
    return pa.table(
        {
            "extra": pa.array(["not needed"] * rows),
            "time": pa.array([NOON + timedelta(seconds=first + i) for i in range(rows)], pa.timestamp("us")),
            "temp": pa.array(range(first, first + rows), pa.int64()),
            "humid": pa.nulls(rows, pa.float64()),
            "sensor": pa.array([sensor] * rows),
        }
    )


def write(path: Path, rows: int = 3, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows), path, **options)
    return path


def found(url: Path | str, root: Path) -> list[str]:
    return [str(Path(file.path).relative_to(root)) for file in open_source(settings(url), Shutdown()).files]


def temperatures(file: SourceFile, start: int = 0) -> list[float | None]:
    return [r.temperature for messages in file.readings(start) for r in readings(messages)]


def test_a_directory_is_its_parquet_files_in_order_and_below(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "sub/c.parquet"):
        write(tmp_path / name)
    for name in (".hidden.parquet", "_temporary/0/d.parquet", "sub/.staging/e.parquet", "_f.parquet"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not Parquet")
    assert found(tmp_path, tmp_path) == ["a.parquet", "b.parquet", "sub/c.parquet"]
    assert found(f"{tmp_path}/", tmp_path) == ["a.parquet", "b.parquet", "sub/c.parquet"]


def test_a_directory_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    write(tmp_path / ".cache" / "data" / "a.parquet")
    assert found(tmp_path / ".cache" / "data", tmp_path) == [".cache/data/a.parquet"]


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*.parquet", ["a1.parquet", "a2.parquet", "b1.parquet"]),
        ("a?.parquet", ["a1.parquet", "a2.parquet"]),
        ("[ab]1.parquet", ["a1.parquet", "b1.parquet"]),
        ("[!a]1.parquet", ["b1.parquet"]),
        ("*/*.parquet", ["2024/x.parquet"]),
        ("**/*.parquet", ["2024/03/y.parquet", "2024/x.parquet", "a1.parquet", "a2.parquet", "b1.parquet"]),
        ("2024/**", ["2024/03/y.parquet", "2024/x.parquet"]),
        ("20*/0[1-3]/y.par*", ["2024/03/y.parquet"]),
    ],
)
def test_a_glob_is_what_a_shell_with_globstar_makes_of_it(tmp_path: Path, glob: str, names: list[str]) -> None:
    for name in ("b1.parquet", "a2.parquet", "a1.parquet", "2024/x.parquet", "2024/03/y.parquet"):
        write(tmp_path / name)
    assert found(f"{tmp_path}/{glob}", tmp_path) == names


def test_a_name_with_glob_characters_is_a_name_where_there_is_such_a_file(tmp_path: Path) -> None:
    write(tmp_path / "data[1].parquet")
    write(tmp_path / "data1.parquet")
    assert found(tmp_path / "data[1].parquet", tmp_path) == ["data[1].parquet"]


def test_a_file_url_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    assert found(f"file://{tmp_path}/a.parquet", tmp_path) == ["a.parquet"]
    assert found(f"file://{tmp_path}/*.parquet", tmp_path) == ["a.parquet"]
    assert found(f"file://{tmp_path}", tmp_path) == ["a.parquet"]
    write(tmp_path / "day = 1" / "b.parquet")
    assert found(f"file://{tmp_path}/day = 1/*.parquet", tmp_path) == ["day = 1/b.parquet"]
    assert found(f"file://{tmp_path}/day = 1/", tmp_path) == ["day = 1/b.parquet"]


def test_rows_come_in_order_from_any_start_over_row_groups_and_batches(tmp_path: Path) -> None:
    rows = BATCH_ROWS * 2 + 7
    path = write(tmp_path / "a.parquet", rows, row_group_size=BATCH_ROWS - 11)
    (file,) = open_source(settings(path), Shutdown()).files
    assert file.rows == rows
    for start in (0, 1, BATCH_ROWS - 12, BATCH_ROWS - 11, BATCH_ROWS, BATCH_ROWS + 1, rows - 1, rows):
        assert temperatures(file, start) == list(map(float, range(start, rows))), start
    assert max(messages.rows for messages in file.readings()) <= BATCH_ROWS


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (file,) = open_source(settings(write(tmp_path / "a.parquet", 0)), Shutdown()).files
    assert (file.rows, list(file.readings())) == (0, [])


def test_columns_with_no_value_at_all_only_skip_rows() -> None:
    """Writers give such a column the type null: one part of a directory may have it, others not."""
    assert encode(time=pa.nulls(2)).skipped == {"no_time": 2}
    assert encode(sensor=pa.nulls(2)).skipped == {"no_sensor": 2}
    assert encode(temp=pa.nulls(2), humid=pa.nulls(2)).skipped == {"no_measurement": 2}


def test_one_column_may_serve_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 1)
    (file,) = open_source(settings(path, data_feature_humid="temp"), Shutdown()).files
    (messages,) = file.readings()
    assert [(r.temperature, r.humidity) for r in readings(messages)] == [(0.0, 0.0)]


# --- fingerprints ------------------------------------------------------------------------------------------


def fingerprints(source: Source) -> list[str]:
    return [file.fingerprint for file in source.files]


def test_an_unchanged_file_keeps_its_fingerprint_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet")
    first = fingerprints(open_source(settings(path), Shutdown()))
    os.utime(path, (0, 0))
    monkeypatch.chdir(tmp_path)
    for name in (
        path,
        tmp_path,
        f"{tmp_path}/*.parquet",
        "a.parquet",
        "./a.parquet",
        f"{tmp_path}/../{tmp_path.name}",
    ):
        assert fingerprints(open_source(settings(name), Shutdown())) == first, name


def test_another_file_of_the_same_name_size_and_time_has_another_fingerprint(tmp_path: Path) -> None:
    """The footers are equal too: plain encoding, no statistics, one value changed."""
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    path = write(tmp_path / "a.parquet", 100, **options)
    first, size = fingerprints(open_source(settings(path), Shutdown())), path.stat().st_size
    times_before = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    changed = table(100).to_pylist()
    changed[50]["temp"] = 12345
    pq.write_table(pa.Table.from_pylist(changed, table(100).schema), path, **options)
    os.utime(path, ns=times_before)
    assert path.stat().st_size == size
    assert fingerprints(open_source(settings(path), Shutdown())) != first


def test_a_copy_under_another_name_is_the_same_file_and_another_mapping_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(path.read_bytes())
    source = open_source(settings(tmp_path), Shutdown())
    first, copy = fingerprints(source)
    (mapped,) = fingerprints(open_source(settings(path, data_feature_humid="temp"), Shutdown()))
    assert first == copy != mapped
    assert source.rows == 3


def test_the_fingerprint_at_the_defaults_stays_what_it_was(tmp_path: Path) -> None:
    """Or all that was sent before an upgrade would be sent again."""
    path = write(tmp_path / "a.parquet")
    contents = hashlib.sha256(path.read_bytes()).hexdigest()
    (found,) = fingerprints(open_source(settings(path), Shutdown()))
    assert found == hashlib.sha256("\0".join((contents, "time", "temp", "humid", "sensor")).encode()).hexdigest()


@pytest.mark.parametrize(
    ("column", "zone_counts", "unit_counts"),
    [
        (pa.array([0], pa.timestamp("us")), True, False),
        (pa.array([0], pa.timestamp("us", "UTC")), False, False),
        (pa.array([0], pa.date32()), True, False),
        (pa.array(["2024-01-01"]), True, False),
        (pa.array(["2024-01-01"]).dictionary_encode(), True, False),
        (pa.array([0]), False, True),
        (pa.array([0.5]), False, True),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_a_zone_or_unit_that_makes_a_difference_makes_another_file(
    tmp_path: Path, column: pa.Array, zone_counts: bool, unit_counts: bool
) -> None:
    """So it is sent again when the setting is corrected, and not when that changes nothing."""
    path = tmp_path / "a.parquet"
    pq.write_table(table(1).set_column(1, "time", column), path)

    def fingerprint(zone: str = "UTC", unit: str = "s") -> str:
        changes = {"data_feature_timezone": zone, "data_feature_date_unit": unit}
        return fingerprints(open_source(settings(path, **changes), Shutdown()))[0]

    assert (fingerprint(zone="Europe/Berlin") != fingerprint()) == zone_counts
    assert (fingerprint(zone="Europe/Berlin") != fingerprint(zone="Asia/Kathmandu")) == zone_counts
    assert (fingerprint(unit="ms") != fingerprint()) == unit_counts


def test_an_object_is_its_name_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contents would have to be transferred to be known. (A directory stands in for a store here.)"""

    def objects() -> list[str]:
        place = SourceLocation("", "s3://", str(tmp_path), pa.fs.SubTreeFileSystem("/", pa.fs.LocalFileSystem()))
        paths = (str(tmp_path / name) for name in ("a.parquet", "b.parquet"))
        return [check_file(place, path, COLUMNS, Shutdown()).fingerprint for path in paths]

    path = write(tmp_path / "a.parquet")
    os.utime(path, (1, 1))
    (tmp_path / "b.parquet").write_bytes(path.read_bytes())
    os.utime(tmp_path / "b.parquet", (1, 1))
    first, copy = objects()
    assert first != copy
    assert objects() == [first, copy]
    os.utime(path, (2, 2))
    assert objects()[0] not in (first, copy)


def test_the_digest_of_rows_is_that_of_their_messages_however_they_lie_in_the_file(tmp_path: Path) -> None:
    rows = BATCH_ROWS + 5
    once = write(tmp_path / "a.parquet", rows)
    cut = write(tmp_path / "b.parquet", rows + 10, row_group_size=7_001, compression="zstd")
    (first,) = open_source(settings(once), Shutdown()).files
    (second,) = open_source(settings(cut), Shutdown()).files
    for end in (0, 1, BATCH_ROWS - 1, BATCH_ROWS, rows):
        assert first.digest(end).hexdigest() == second.digest(end).hexdigest()
    assert first.digest(rows).hexdigest() != second.digest(rows + 1).hexdigest()
    assert first.digest(rows).hexdigest() != first.digest(rows - 1).hexdigest()
    assert sum(messages.rows for messages in second.readings(start=3, end=BATCH_ROWS + 3)) == BATCH_ROWS


# --- errors ------------------------------------------------------------------------------------------------


def problem(url: Path | str, **changes: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        open_source(settings(url, **changes), Shutdown())
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_missing_file_names_the_setting_and_the_path(tmp_path: Path) -> None:
    text = problem(tmp_path / "no.parquet")
    assert text.startswith(f"PARQUET_URL={tmp_path}/no.parquet: there is no such file")


@pytest.mark.parametrize("url", ["*.parquet", "no-such-directory/*.parquet", "**/x[0-9].parquet"])
def test_a_glob_without_a_match_says_so(tmp_path: Path, url: str) -> None:
    assert "no file matches this glob" in problem(f"{tmp_path}/{url}")


def test_a_directory_without_parquet_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "no *.parquet file" in problem(tmp_path)


@pytest.mark.parametrize("url", ["nowhere://bucket/a.parquet", "://", "abfs://x/y.parquet"])
def test_a_url_that_cannot_be_one_says_so(url: str) -> None:
    assert problem(url).startswith(f"PARQUET_URL={url}: ")


def test_keys_in_a_url_are_not_shown() -> None:
    for url in (
        "nowhere://key:secret@bucket/a.parquet",
        "nowhere://key:sec/secret@bucket/a.parquet",
        "nowhere://key:more@secret/secret@bucket/a.parquet",
        "s3://key:secret@bucket/a^b/{c?x=[y]",
        "s3://key:secret/and@more+secret@bucket/a.parquet?region=eu",
        "s3://key:/secret/@bucket/*.parquet",
        "gs://secret@bucket/a.parquet",
    ):
        text = problem(url)
        assert "secret" not in text.lower().replace("aws_secret_access_key", "")
        assert "://***@bucket/" in text
        assert ("keys must not be in the URL" in text) == (not url.startswith("nowhere"))


def test_an_at_sign_in_a_path_is_no_secret() -> None:
    assert SourceLocation.of("gs://anonymous@bucket/b@c.parquet").path == "bucket/b@c.parquet"
    assert "/a@b.parquet" in problem("/no/such/a@b.parquet")


@pytest.mark.parametrize(
    ("setting", "column"),
    [
        ("data_feature_date", "Time"),
        ("data_feature_temp", "temperature"),
        ("data_feature_humid", "x"),
        ("data_feature_sensor", "origin"),
    ],
)
def test_a_missing_column_lists_the_columns_there_are(tmp_path: Path, setting: str, column: str) -> None:
    text = problem(write(tmp_path / "a.parquet"), **{setting: column})
    assert text.startswith(f"{setting.upper()}={column}: {tmp_path}/a.parquet has no column of this name")
    assert text.endswith("its columns are: extra, time, temp, humid, sensor")


def test_a_column_that_is_there_twice_is_not_guessed(tmp_path: Path) -> None:
    two = pa.table([[1.0], [2.0]], ["temp", "temp"])
    pq.write_table(two, tmp_path / "a.parquet")
    assert "has 2 columns of this name" in problem(tmp_path / "a.parquet", data_feature_date="temp")


@pytest.mark.parametrize(
    ("setting", "column", "kind"),
    [
        (
            "data_feature_date",
            "humid",
            "double, not a timestamp, a date or ISO 8601 text "
            "(numbers since 1970: set DATA_FEATURE_DATE_UNIT to s, ms, us or ns)",
        ),
        ("data_feature_temp", "sensor", "string, not a number"),
        ("data_feature_humid", "time", "timestamp[us], not a number"),
        ("data_feature_sensor", "humid", "double, not text or an integer"),
    ],
)
def test_a_column_of_a_type_that_does_not_fit_says_which(tmp_path: Path, setting: str, column: str, kind: str) -> None:
    text = problem(write(tmp_path / "a.parquet"), **{setting: column})
    assert text == f"{setting.upper()}={column}: this column of {tmp_path}/a.parquet is {kind}"


def test_a_file_that_cannot_be_read_keeps_the_others_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"rubbish")
    write(tmp_path / "b.parquet")
    pq.write_table(pa.table({"time": [1]}), tmp_path / "z.parquet")
    source = open_source(settings(tmp_path), Shutdown())
    assert [Path(file.path).name for file in source.files] == ["b.parquet"]
    first, last = (str(error) for error in source.unreadable)
    assert "a.parquet is not a Parquet file" in first
    assert "z.parquet is int64, not a timestamp" in last
    assert last.endswith(" (numbers since 1970: set DATA_FEATURE_DATE_UNIT to s, ms, us or ns)")
    (tmp_path / "b.parquet").unlink()
    assert problem(tmp_path) == first


def test_a_file_that_is_not_parquet_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("time,temp\n2024,1\n")
    assert problem(tmp_path).endswith("a.parquet is not a Parquet file (17 bytes, begins with b'time')")
    (tmp_path / "a.parquet").write_bytes(b"")
    assert problem(tmp_path).endswith("a.parquet is not a Parquet file (0 bytes, begins with b'')")


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_truncated_file_says_so(tmp_path: Path, part: float) -> None:
    path = write(tmp_path / "a.parquet", 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    assert "a.parquet is a truncated or damaged Parquet file" in problem(path)


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    assert "Permission denied" in problem(path)


def test_damage_in_the_middle_names_the_row(tmp_path: Path) -> None:
    rows = BATCH_ROWS + 1000
    path = write(tmp_path / "a.parquet", rows, row_group_size=BATCH_ROWS, compression="zstd")
    damaged = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(2).data_page_offset
    damaged[start : start + 200] = b"\xff" * 200
    path.write_bytes(damaged)
    (file,) = open_source(settings(path), Shutdown()).files
    with pytest.raises(PermanentError, match=rf"a\.parquet cannot be read beyond row \d+ of {rows}: "):
        list(file.readings())


def test_a_file_that_was_replaced_is_not_taken_for_the_one_that_was_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", BATCH_ROWS * 2)
    (file,) = open_source(settings(path), Shutdown()).files
    going = file.readings()
    rows = next(going).rows
    write(tmp_path / "longer", BATCH_ROWS * 3).replace(path)
    assert rows + sum(messages.rows for messages in going) == file.rows  # what was open stays what it was
    with pytest.raises(PermanentError, match=r"a\.parquet changed after it was checked"):
        next(file.readings(rows))


def test_a_file_that_is_written_over_while_it_is_read_is_not_sent_to_its_end(tmp_path: Path) -> None:
    """What was read may be of both contents."""
    path = write(tmp_path / "a.parquet", 3 * BATCH_ROWS, row_group_size=BATCH_ROWS)
    contents = path.read_bytes()
    (file,) = open_source(settings(path), Shutdown()).files
    going = file.readings()
    next(going)
    path.write_bytes(contents)
    with pytest.raises(UnreadableFileError, match="changed"):
        list(going)


def test_a_file_that_went_away_is_one_line(tmp_path: Path) -> None:
    (file,) = open_source(settings(write(tmp_path / "a.parquet")), Shutdown()).files
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(PermanentError, match="cannot be read beyond row 0 of 3"):
        list(file.readings())


def test_offsets_of_a_time_do_not_change_the_instant() -> None:
    zone = timezone(timedelta(hours=-3, minutes=-30))
    assert times(pa.array([NOON.astimezone(zone).isoformat()])) == [NOON]


@pytest.mark.parametrize(
    ("measurements", "identity"),
    [
        ((("temperature", "a"), ("humidity", "b")), ["time", "a", "b", "sensor"]),
        ((("humidity", "b"),), ["time", "", "b", "sensor"]),
        ((("temperature", "a"),), ["time", "a", "", "sensor"]),
        ((("pressure", "p"), ("humidity", "b"), ("co2", "c")), ["time", "", "b", "co2=c", "pressure=p", "sensor"]),
    ],
)
def test_a_measurement_without_a_column_and_the_order_of_the_list_leave_fingerprints_as_they_are(
    measurements: tuple[tuple[str, str], ...], identity: list[str]
) -> None:
    schema = pa.schema([("time", pa.timestamp("us"))])
    assert Columns("time", measurements, "sensor").identity(schema) == identity
