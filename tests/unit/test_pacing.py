"""How batches are cut, and when their parts are due."""

from __future__ import annotations

import math
import time
from datetime import datetime

import pyarrow as pa
import pytest

from services.core.errors import ConfigurationError
from services.producer.columns import Columns
from services.producer.pacing import FixedRate, Pacing, Replay, choose_pacing, parse_speed
from tests.measured import make_settings


def batch(*seconds: float | None) -> pa.RecordBatch:
    """A row for each time."""
    microseconds = [None if second is None else int(second * 1e6) for second in seconds]
    return pa.record_batch({"time": pa.array(microseconds, pa.int64()).cast(pa.timestamp("us"))})


@pytest.mark.parametrize(("rate", "rows"), [(0.1, 1), (99, 1), (1000, 10), (10_000_000, 20_000)])
def test_a_part_of_a_fixed_rate_is_a_hundredth_of_a_second(rate: float, rows: int) -> None:
    parts = list(FixedRate(rate).parts(batch(*[0.0] * 25_000)))
    assert {part.num_rows for part in parts[:-1]} == {rows}
    assert sum(part.num_rows for part in parts) == 25_000


def test_parts_of_a_fixed_rate_are_due_one_after_the_other() -> None:
    pacing = FixedRate(100)
    pacing.begin()
    first = pacing.due(50)
    assert first == pytest.approx(time.monotonic(), abs=0.1)
    assert pacing.due(0) - first == pytest.approx(0.5)  # skipped rows take no time
    assert pacing.due(1) - first == pytest.approx(0.5)
    pacing.begin()  # goes on: between two files there is no burst
    assert pacing.due(1) - first == pytest.approx(0.51)


def test_after_a_long_hold_up_a_fixed_rate_makes_up_for_a_second_at_most() -> None:
    pacing = FixedRate(100)
    assert pacing.due(1) == pytest.approx(time.monotonic() - 1, abs=0.1)
    pacing.begin()
    assert pacing.due(1) == pytest.approx(time.monotonic(), abs=0.1)


def test_the_clock_of_a_replay_never_goes_back() -> None:
    pacing = Replay(60, Columns("time", (), ""))
    due = []
    for rows in (batch(None, 100, 100.5, 160, 130, None), batch(150, 220, 100)):
        for part in pacing.parts(rows):
            due.append((part.num_rows, pacing.due(0)))
    assert due[0] == (1, -math.inf)
    began = due[1][1]
    assert began == pytest.approx(time.monotonic(), abs=0.1)
    # 130 and 150 are older than 160: they are due with it, as is what has no time.
    assert [(rows, round(moment - began, 6)) for rows, moment in due[1:]] == [(2, 0), (3, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize(("text", "speed"), [("60x", 60), ("1x", 1), ("0.5x", 0.5), ("1000000x", 1e6)])
def test_a_speed_is_a_number_of_times_faster(text: str, speed: float) -> None:
    assert parse_speed(text) == speed


@pytest.mark.parametrize("text", ["60", "x", "0x", "-1x", "infx", "nanx", "1e3x", "2000000x", "60x\n", "", "\uff160x"])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--speed=.* is not allowed [^\n]*$"):
        parse_speed(text)


def test_the_pace_is_chosen_by_rate_or_speed() -> None:
    default, slow = make_settings(), make_settings(producer_rate=2.5)
    assert type(choose_pacing(default, None)) is Pacing
    assert isinstance(choose_pacing(default, 60), Replay)
    assert isinstance(choose_pacing(slow, None), FixedRate)
    with pytest.raises(ConfigurationError, match=r"^PRODUCER_RATE=2\.5 and --speed cannot be combined"):
        choose_pacing(slow, 60)


def test_a_replay_reads_times_as_the_settings_say() -> None:
    """Ten seconds in the unit that is set; an hour that is skipped takes no time."""
    local = [datetime(2024, 3, 31, 1, 59, 59), datetime(2024, 3, 31, 3, 0, 1)]  # noqa: DTZ001 - of Berlin
    for column, seconds, changes in (
        (pa.array([1_709_294_400, 1_709_294_410]), 10, {"data_feature_date_unit": "s"}),
        (pa.array([1_709_294_400_000, 1_709_294_410_000]), 10, {"data_feature_date_unit": "ms"}),
        (pa.array(local, pa.timestamp("us")), 2, {"data_feature_timezone": "Europe/Berlin"}),
    ):
        pacing = choose_pacing(make_settings(data_feature_date="time", **changes), 1.0)
        first, last = [pacing.due(0) for _ in pacing.parts(pa.record_batch({"time": column}))]
        assert last - first == pytest.approx(seconds)
