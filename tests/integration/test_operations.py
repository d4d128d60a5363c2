"""What docs/operations.md has to be typed into psql does what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.errors import UndefinedColumn

from services.consumer.sink import Sink
from services.core.config import Settings
from services.core.database import connect
from services.core.reading import reading_type
from services.core.shutdown import Shutdown
from services.etl.reconcile import reconcile
from services.etl.rollup import OF_MINUTES
from services.etl.worker import Leader
from tests.fix_services import NOWHERE, minutes
from tests.fix_stack import ROOT, remove_measurement, upgrade
from tests.measured import with_measurement, write_to

pytestmark = pytest.mark.without_topics

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def removal(name: str, others: tuple[str, ...]) -> bytes:
    """The statements that remove the data of a measurement, with a line for each that stays."""
    (text,) = re.findall(r"^### Remove its data\n.*?^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = text.splitlines()
    (line,) = [line for line in lines if "humidity" in line]
    shown = [line.replace("humidity", other) for other in others]
    kept = [line.replace("co2", name) for line in lines if not re.search("humidity|temperature", line)]
    return "\n".join([kept[0], *shown, *kept[1:]]).encode()


@pytest.fixture
def clean(settings: Settings) -> Iterator[None]:
    """Leaves the schema as it was."""
    yield
    with connect(settings) as connection:
        remove_measurement(connection, "radon")


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("of", ["", OF_MINUTES])
def test_the_data_of_a_measurement_is_removed_and_nothing_else(
    settings: Settings, connection: psycopg.Connection, request: pytest.FixtureRequest, of: str
) -> None:
    """Also where its minutes are in one aggregate with those of the others."""
    if of:
        request.getfixturevalue("in_minutes")
    added = with_measurement(settings, "radon")
    make: Any = reading_type(added.measurements)
    upgrade(added)
    sink = Sink(added)
    write_to(sink, [make("attic", minutes(at), temperature=20.0 + at, radon=5.0) for at in range(60)], NOWHERE)
    sink.close()
    Leader(connection, added).run_once()
    assert connection.execute("SELECT count(*) FROM radon_summary").fetchone() == (6,)
    Leader(connection, settings).run_once()  # it is off the list
    before = connection.execute("SELECT * FROM temperature_summary").fetchall()

    connection.execute(removal("radon", settings.measurements))
    with pytest.raises(UndefinedColumn):
        connection.execute("SELECT radon FROM sensor_data")
    left = "SELECT FROM pg_class WHERE relname ~ 'radon'"
    assert connection.execute(left).fetchall() == []
    known = connection.execute("SELECT measurement FROM summary_state UNION SELECT measurement FROM summary_check")
    assert sorted(name for (name,) in known) == sorted(settings.measurements)
    leader = Leader(connection, settings)
    leader.take_over()
    leader.run_once()
    differing = reconcile(connection, settings.measurements, lambda: leader.summaries, Shutdown())
    assert differing == dict.fromkeys(settings.measurements, 0)
    assert connection.execute("SELECT * FROM temperature_summary").fetchall() == before
    with connection.transaction():
        connection.execute("SET LOCAL ROLE sensor_reader")
        assert connection.execute("SELECT * FROM temperature_summary_live").fetchall() == before

    upgrade(added)  # and it can be added again
    assert connection.execute("SELECT count(radon) FROM sensor_data").fetchone() == (0,)
