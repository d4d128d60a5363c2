"""Times in every form that files have them in: which instants they are."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from zoneinfo import ZoneInfo

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.config import load_settings
from services.core.errors import ConfigurationError
from services.core.reading import EARLIEST, EPOCH, LATEST, Reading
from services.local.check import instants
from services.producer.columns import Columns
from services.producer.encoding import Readings, choose, event_times, to_json
from services.producer.times import TimeFormat
from tests.measured import make_settings

ZONES = (
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",  # half an hour
    "Asia/Kathmandu",  # no summer time, and 5:45
    "Europe/Dublin",  # the winter time is the odd one
    "Africa/Casablanca",  # back and forth around Ramadan
    "Pacific/Apia",  # a day that never was
    "America/Sao_Paulo",  # changes at midnight, until 2019
    "America/St_Johns",  # a minute past midnight, until 2011, so that an hour before it came twice
    "Africa/Monrovia",  # seconds, until 1972
)
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
MICROSECOND = timedelta(microseconds=1)
WINTER, SUMMER = datetime(2024, 10, 27), datetime(2024, 3, 31)  # noqa: DTZ001 - the days of the changes in Berlin

moments = st.datetimes(datetime(1900, 1, 3), datetime(9999, 12, 27))  # noqa: DTZ001 - of any zone


def near_a_change(zone: str) -> st.SearchStrategy[datetime]:
    """Times around the changes of the clocks in some years, which others hardly ever hit."""
    info, hour = ZoneInfo(zone), timedelta(hours=1)
    days = (datetime(year, 1, 1) + timedelta(days=n) for year in (1947, 1995, 2011, 2024, 2050) for n in range(366))  # noqa: DTZ001
    changing = [day for day in days if info.utcoffset(day) != info.utcoffset(day + timedelta(days=1))]
    hours = (day + n * hour for day in changing for n in range(1, 25))
    changes = [time for time in hours if info.utcoffset(time) != info.utcoffset(time - hour)]
    return st.builds(
        lambda hour, us: hour + us * MICROSECOND,
        st.sampled_from(changes or [WINTER]),
        st.integers(-9 * 10**9, 9 * 10**9),
    )


def batch(column: pa.Array) -> pa.RecordBatch:
    rows = len(column)
    return pa.record_batch({"time": column, "temp": pa.array(range(rows), pa.float64()), "sensor": ["s"] * rows})


def columns(zone: str = "UTC", unit: str = "") -> Columns:
    return Columns("time", (("temperature", "temp"),), "sensor", times=TimeFormat(zone, unit))


def sent(messages: Readings) -> list[datetime]:
    """The times that a consumer finds in the messages."""
    decoder = msgspec.json.Decoder(Reading)
    return [decoder.decode(value).time for value in to_json(messages)]


def read(column: pa.Array, zone: str = "UTC", unit: str = "") -> tuple[list[datetime], Readings]:
    """What is sent of these times; the same for a replay."""
    messages = choose(batch(column), columns(zone, unit))
    found = sent(messages)
    replayed = [number for number in event_times(batch(column), columns(zone, unit)).to_pylist() if number is not None]
    assert replayed == [(time - EPOCH) // MICROSECOND for time in found]
    return found, messages


def instant(shown: datetime, zone: str) -> datetime:
    """The rule, one time after the other."""
    return shown.replace(tzinfo=ZoneInfo(zone), fold=0).astimezone(UTC)


def doubt(shown: datetime, zone: str) -> str:
    """Whether the time came twice or never."""
    first, second = (shown.replace(tzinfo=ZoneInfo(zone), fold=fold).utcoffset() for fold in (0, 1))
    assert first is not None
    assert second is not None
    return "" if first == second else "ambiguous" if first > second else "nonexistent"


def counts(shown: list[datetime], zone: str) -> dict[str, int]:
    doubts = [doubt(each, zone) for each in shown]
    return {kind: doubts.count(kind) for kind in ("ambiguous", "nonexistent") if kind in doubts}


# --- zones -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ZONES)
def test_local_times_are_those_of_python_s_zone(zone: str) -> None:
    @given(st.lists(moments | near_a_change(zone), min_size=1, max_size=8))
    def check(shown: list[datetime]) -> None:
        found, messages = read(pa.array(shown, pa.timestamp("us")), zone)
        assert found == [instant(each, zone) for each in shown]
        assert messages.doubtful == counts(shown, zone)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("zone", ZONES)
def test_every_hour_of_many_years_is_right(zone: str) -> None:
    """Far from the changes and at them, one after the other and across batches of any length."""
    shown = [datetime(1970, 1, 1) + timedelta(minutes=30 * n) for n in range(0, 130 * 365 * 48, 23)]  # noqa: DTZ001
    length = 20_000
    for first in range(0, len(shown), length):
        part = shown[first : first + length]
        times = TimeFormat(zone).read(pa.array(part, pa.timestamp("us")))
        wanted = [(instant(each, zone) - EPOCH) // MICROSECOND for each in part]
        assert times.instants.cast(pa.int64()).to_pylist() == wanted
        assert {kind: mask.true_count for kind, mask in times.doubtful.items()} == counts(part, zone)


@pytest.mark.parametrize("unit", UNITS)
def test_a_time_without_a_zone_is_local_in_every_form(unit: str) -> None:
    noon = datetime(2024, 7, 1, 12)  # noqa: DTZ001 - local
    for column in (
        pa.array([noon], pa.timestamp(unit)),
        pa.array(["2024-07-01T12:00:00"]),
        pa.array(["2024-07-01T12:00:00", "2024-07-01T10:00:00Z"]),  # not all with an offset
        pa.array(["2024-07-01T12:00:00.000000000"]).dictionary_encode(),
    ):
        found, _ = read(column, "Europe/Berlin")
        assert found == [datetime(2024, 7, 1, 10, tzinfo=UTC)] * len(column)


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64(), pa.string()])
def test_a_date_is_its_midnight_there(kind: pa.DataType) -> None:
    days = pa.array([date(2024, 7, 1), date(2024, 1, 1), None], pa.date32()).cast(kind)
    found, messages = read(days, "Asia/Kathmandu")
    assert found == [datetime(2024, 6, 30, 18, 15, tzinfo=UTC), datetime(2023, 12, 31, 18, 15, tzinfo=UTC)]
    assert messages.skipped == {"no_time": 1}


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("unit", UNITS)
def test_instants_are_not_affected_by_the_zone(zone: str, unit: str) -> None:
    noon = datetime(2024, 7, 1, 12, tzinfo=UTC)
    for column in (
        pa.array([noon], pa.timestamp(unit, "America/New_York")),
        pa.array(["2024-07-01T12:00:00Z", "2024-07-01T14:00:00+02:00"]),
        pa.array([int(noon.timestamp()) * UNITS[unit]]),
    ):
        found, messages = read(column, zone, unit)
        assert set(found) == {noon}
        assert messages.doubtful == {}


def test_a_time_that_came_twice_is_the_earlier_and_one_that_never_came_is_moved_forward() -> None:
    half = timedelta(hours=2, minutes=30)
    found, messages = read(pa.array([WINTER + half, SUMMER + half], pa.timestamp("us")), "Europe/Berlin")
    assert found == [datetime(2024, 10, 27, 0, 30, tzinfo=UTC), datetime(2024, 3, 31, 1, 30, tzinfo=UTC)]
    assert messages.doubtful == {"ambiguous": 1, "nonexistent": 1}


@pytest.mark.parametrize(
    ("zone", "first", "last"),
    [
        ("Europe/Berlin", WINTER + timedelta(hours=2), WINTER + timedelta(hours=3)),
        ("Europe/Berlin", SUMMER + timedelta(hours=2), SUMMER + timedelta(hours=3)),
        ("America/St_Johns", datetime(1995, 10, 28, 23, 1), datetime(1995, 10, 29, 0, 1)),  # noqa: DTZ001 - local
        ("America/Sao_Paulo", datetime(2018, 11, 4), datetime(2018, 11, 4, 1)),  # noqa: DTZ001 - local
        ("America/Sao_Paulo", datetime(2018, 2, 17, 23), datetime(2018, 2, 18)),  # noqa: DTZ001 - local
        ("Pacific/Apia", datetime(2011, 12, 30), datetime(2011, 12, 31)),  # noqa: DTZ001 - local
    ],
)
def test_the_edges_of_a_change_are_where_python_has_them(zone: str, first: datetime, last: datetime) -> None:
    """The first and the last time that comes twice, or never, and their neighbours; each alone, and together."""
    edges = [first - MICROSECOND, first, last - MICROSECOND, last]
    assert [bool(doubt(each, zone)) for each in edges] == [False, True, True, False]
    for shown in (*([each] for each in edges), edges):
        found, messages = read(pa.array(shown, pa.timestamp("us")), zone)
        assert found == [instant(each, zone) for each in shown]
        assert messages.doubtful == counts(shown, zone)


def test_distinct_times_that_never_came_stay_distinct() -> None:
    shown = [SUMMER + timedelta(hours=2, minutes=minute) for minute in range(60)]
    found, _ = read(pa.array(shown, pa.timestamp("s")), "Europe/Berlin")
    assert len(set(found)) == 60


def test_only_what_is_sent_counts_as_doubtful() -> None:
    half = WINTER + timedelta(hours=2, minutes=30)
    old = half.replace(year=1996)
    table = batch(pa.array([half, half, old, None], pa.timestamp("us"))).set_column(
        1, "temp", pa.array([1.0, None, 1.0, 1.0])
    )
    limited = Columns(
        "time", (("temperature", "temp"),), "sensor", timedelta(days=7305), times=TimeFormat("Europe/Berlin")
    )
    messages = choose(table, limited)
    assert messages.skipped == {"no_measurement": 1, "no_time": 1, "time_out_of_range": 1}
    assert messages.doubtful == {"ambiguous": 1}


def test_local_times_at_the_ends_of_the_calendar() -> None:
    """What counts is the instant."""
    hour = timedelta(hours=1)
    for zone, sign in (("America/New_York", -1), ("Asia/Kathmandu", 1)):
        for edge, within in ((EARLIEST, 1), (LATEST, -1)):
            local = edge.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
            found, messages = read(pa.array([local + within * hour, local - within * hour], pa.timestamp("us")), zone)
            assert found == [edge + within * hour], sign
            assert messages.skipped == {"time_out_of_range": 1}
    far = pa.array([-(2**63) + 1, 2**63 - 1, None]).cast(pa.timestamp("s"))
    assert read(far, "Europe/Berlin")[1].skipped == {"time_out_of_range": 2, "no_time": 1}


@given(st.lists(near_a_change("Europe/Berlin"), min_size=1, max_size=8), st.sampled_from(sorted(UNITS)))
def test_the_demo_s_check_reads_times_alike(shown: list[datetime], unit: str) -> None:
    """It has code of its own."""
    local = pa.array(shown, pa.timestamp("us"))
    seconds = [(each - EPOCH.replace(tzinfo=None)) / timedelta(seconds=1) for each in shown]
    for column in (
        local,
        local.cast(pa.timestamp("ns")),
        local.cast(pa.timestamp("us", "America/New_York")),
        local.cast(pa.string()),
        pc.binary_join_element_wise(local.cast(pa.string()), pa.array(["+02:00"] * len(shown)), ""),
        local.cast(pa.date32(), safe=False),
        local.cast(pa.int64()),
        pa.array([float("nan"), *(second * UNITS[unit] for second in seconds)]),
    ):
        each = unit if pa.types.is_floating(column.type) else "us"
        checked = instants(pa.chunked_array([column]), "Europe/Berlin", each)
        assert [time for time in checked if time is not None] == read(column, "Europe/Berlin", each)[0]


# --- numbers -----------------------------------------------------------------------------------------------


def nearest(number: Fraction, unit: str) -> datetime:
    """The nearest microsecond, the later one of two."""
    return EPOCH + int((number * 10**6 / UNITS[unit] + Fraction(1, 2)) // 1) * MICROSECOND


LOW, HIGH = int(EARLIEST.timestamp()), int(LATEST.timestamp())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.decimal128(38, 9), pa.decimal256(60, 9)], ids=str)
def test_numbers_are_units_since_1970(kind: pa.DataType, unit: str) -> None:
    most = HIGH if pa.types.is_floating(kind) else min(HIGH * UNITS[unit], 2**63 - 1024) // UNITS[unit]

    @given(st.lists(st.integers(LOW, most - 1) | st.integers(-3, 3), min_size=1), st.integers(0, 10**9 - 1))
    def check(seconds: list[int], nanoseconds: int) -> None:
        exact = [Fraction(each * 10**9 + nanoseconds, 10**9) * UNITS[unit] for each in seconds]
        if pa.types.is_integer(kind):
            numbers = pa.array([int(each // 1) for each in exact], kind)
        elif pa.types.is_floating(kind):
            numbers = pa.array([float(each) for each in exact], kind)
        else:
            numbers = pa.array([Decimal(each.numerator) / each.denominator for each in exact], kind)
        found, messages = read(numbers, "Europe/Berlin", unit)
        assert found == [nearest(Fraction(number), unit) for number in numbers.to_pylist()]
        assert messages.skipped == {}

    check()


@pytest.mark.parametrize("number", [0.0365, 0.0735, -0.0365, 1719792000123.0005, -67108863999.99999])
def test_a_double_near_the_middle_of_two_microseconds_is_exactly_what_it_is(number: float) -> None:
    """What its shortest text says is another number."""
    assert read(pa.array([number]), unit="ms")[0] == [nearest(Fraction(number), "ms")]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint32(), pa.uint64()], ids=str)
def test_integers_of_any_width_are_read(kind: pa.DataType) -> None:
    found, _ = read(pa.array([0, 100, None], kind), unit="s")
    assert found == [EPOCH, EPOCH + timedelta(seconds=100)]
    (found, _) = read(pa.array([100], kind).dictionary_encode(), unit="s")
    assert found == [EPOCH + timedelta(seconds=100)]


def test_integers_beyond_63_bits_are_read_as_nanoseconds() -> None:
    found, messages = read(pa.array([2**63 + 500, 2**64 - 1], pa.uint64()), unit="ns")
    assert found == [nearest(Fraction(number), "ns") for number in (2**63 + 500, 2**64 - 1)]
    assert messages.skipped == {}
    found, _ = read(pa.array([2.0**63, 1e19]), unit="ns")
    assert found == [nearest(Fraction(number), "ns") for number in (2**63, 10**19)]
    assert read(pa.array([-1e19]), unit="ns")[1].skipped == {"time_out_of_range": 1}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "column",
    [
        pa.array([-(2**63), -(2**63) + 1]),
        pa.array([float("inf"), float("-inf"), 1e300, -1e300, 1e21]),
        pa.array([Decimal(10) ** 37, -(Decimal(10) ** 37)], pa.decimal128(38, 0)),
        pa.array([Decimal(10) ** 75, -(Decimal(10) ** 75)], pa.decimal256(76, 0)),
    ],
    ids=["int64", "float64", "decimal128", "decimal256"],
)
def test_numbers_that_are_no_time_of_ours_are_out_of_range(column: pa.Array, unit: str) -> None:
    found, messages = read(column, unit=unit)
    assert (found, messages.skipped) == ([], {"time_out_of_range": len(column)})


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.float64(), pa.decimal128(30, 6)], ids=str)
@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_the_first_and_the_last_number_are_read_and_their_neighbours_are_not(kind: pa.DataType, unit: str) -> None:
    first, last = LOW * UNITS[unit], HIGH * UNITS[unit]
    low = [] if pa.types.is_unsigned_integer(kind) else [first, first - 1]
    step = 1
    if pa.types.is_floating(kind) and unit == "us":  # a double has not all these digits
        step, low = 1000, [first, first - 1000]
    numbers = pa.array([last, last + step, *low], pa.int64()).cast(pa.decimal128(38, 0)).cast(kind)
    found, messages = read(numbers, unit=unit)
    assert found == [LATEST, *([EARLIEST] if low else [])]
    assert messages.skipped == {"time_out_of_range": 1 + bool(low)}


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_nan_is_no_time(kind: pa.DataType) -> None:
    numbers = pa.array([float("nan"), 1.5, None, float("inf")], pa.float64()).cast(kind)
    found, messages = read(numbers, unit="s")
    assert found == [EPOCH + timedelta(seconds=1.5)]
    assert messages.skipped == {"no_time": 2, "time_out_of_range": 1}


def test_the_unit_says_nothing_about_other_columns() -> None:
    for column in (pa.array(["2024-03-01T12:00:00Z"]), pa.array([1_709_294_400_000], pa.timestamp("ms"))):
        assert read(column, unit="s")[0] == [datetime(2024, 3, 1, 12, tzinfo=UTC)]
    assert read(pa.array(["1709294400"]), unit="s")[1].skipped == {"bad_time": 1}


# --- finer than a microsecond ------------------------------------------------------------------------------


@given(st.integers(LOW * 10**9, 2**61) | st.integers(-3000, 3000))
def test_the_same_time_is_the_same_reading_in_every_form(nanoseconds: int) -> None:
    """Timestamps, texts, and numbers; and the messages of a device."""
    seconds, rest = divmod(nanoseconds, 10**9)
    text = f"{EPOCH.replace(tzinfo=None) + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S}.{rest:09}"
    device = msgspec.json.decode(f'{{"sensor_id": "s", "time": "{text}Z"}}', type=Reading).time
    exact = Decimal(nanoseconds).scaleb(-9)
    assert device == nearest(Fraction(exact), "s")
    for column, unit in (
        (pa.array([nanoseconds], pa.timestamp("ns")), ""),
        (pa.array([nanoseconds], pa.timestamp("ns", "UTC")), ""),
        (pa.array([text]), ""),
        (pa.array([f"{text}Z"]), ""),
        (pa.array([text, f"{text}+00:00"]), ""),
        (pa.array([nanoseconds]), "ns"),
        (pa.array([exact], pa.decimal128(30, 9)), "s"),
        (pa.array([exact.scaleb(3)], pa.decimal128(30, 6)), "ms"),
    ):
        assert set(read(column, unit=unit)[0]) == {device}


# --- examples ----------------------------------------------------------------------------------------------


def test_the_first_row_of_each_reason_is_an_example() -> None:
    table = pa.record_batch(
        {
            "time": ["2024-07-01", "soon", "later", None, "2024-07-01", "2024-07-01", "2024-07-01", "1896-01-01"],
            "temp": pa.array([None, 1.0, 1.0, 1.0, 1.0, 1.0, float("inf"), 1.0]),
            "sensor": ["s", "s", "s", "s", "", "a\nb", "s", "s"],
        }
    )
    assert choose(table, columns()).examples == {
        "no_measurement": (0, "temp=null"),
        "bad_time": (1, "time=soon"),
        "no_time": (3, "time=null"),
        "no_sensor": (4, "sensor="),
        "bad_sensor": (5, "sensor=a\nb"),
        "value_out_of_range": (6, "temp=inf"),
        "time_out_of_range": (7, "time=1896-01-01"),
    }


def test_an_example_of_what_is_too_old_says_how_it_was_read() -> None:
    """Seconds that are taken for milliseconds."""
    limited = replace(columns(unit="ms"), max_past=timedelta(days=7305))
    table = batch(pa.array([None, 1_709_294_400, 1_709_294_401]))
    found = choose(table, limited)
    assert found.skipped == {"no_time": 1, "time_out_of_range": 2}
    assert found.examples["time_out_of_range"] == (1, "time=1709294400 (read as 1970-01-20 18:48:14.400000 UTC)")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**62]).cast(pa.timestamp("s", "Europe/Berlin")),
        pa.array([2**62]).cast(pa.timestamp("s")),
        pa.array([2**62]),
        pa.array([1e300]),
        pa.array([float("inf")]).cast(pa.float16()),
        pa.array([Decimal(10) ** 30]),
        pa.array([b"\xff" * 1000]).view(pa.string()),
        pa.array(["x"]).dictionary_encode(),
        pa.array(["x"], pa.string_view()),
        pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),
    ],
    ids=lambda column: str(column.type),
)
def test_whatever_is_no_time_is_shown(column: pa.Array) -> None:
    ((row, text),) = choose(batch(column), columns(unit="s")).examples.values()
    assert row == 0
    assert text.startswith("time=")
    assert len(text) < 120


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["Europe/Berlin", "UTC", "Etc/GMT-3", "America/Argentina/Buenos_Aires"])
def test_a_zone_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("DATA_FEATURE_TIMEZONE", zone)
    assert Columns.of(load_settings()).times == TimeFormat(zone)


@pytest.mark.parametrize(
    "zone",
    ["", "Berlin", "europe/berlin", "+02:00", "CET-1CEST", "Europe", "../UTC", "/etc/passwd", "right/UTC", "localtime"],
)
def test_what_is_no_zone_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("DATA_FEATURE_TIMEZONE", zone)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    text = str(caught.value)
    assert text.startswith(f"DATA_FEATURE_TIMEZONE={zone}: there is no such time zone (")
    assert "\n" not in text


def test_a_zone_that_is_misspelt_says_which_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_FEATURE_TIMEZONE", "Europe/Berln")
    with pytest.raises(ConfigurationError, match=r"no such time zone \(did you mean Europe/Berlin\?\)$"):
        load_settings()


def test_without_a_database_of_zones_only_utc_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.core.config.available_timezones", lambda: set[str]())
    assert load_settings().data_feature_timezone == "UTC"
    monkeypatch.setenv("DATA_FEATURE_TIMEZONE", "Europe/Berlin")
    with pytest.raises(ConfigurationError, match="there is no time zone database: install tzdata"):
        load_settings()


def test_a_unit_is_one_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_FEATURE_DATE_UNIT", "min")
    with pytest.raises(ConfigurationError, match=r"DATA_FEATURE_DATE_UNIT=min is not allowed .* s, ms, us or ns"):
        load_settings()
    monkeypatch.setenv("DATA_FEATURE_DATE_UNIT", "ms")
    assert Columns.of(load_settings()).times == TimeFormat(unit="ms")
    assert Columns.of(make_settings(data_feature_date_unit="")).times == TimeFormat()
