"""The producer as a process, against a real broker: each row once, whatever dies."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from services.core.config import Settings
from services.core.errors import STOPPED, PermanentError
from services.core.kafka import REPEAT_HEADER, REPEATED, REPEATED_IF_MOVED, client_settings, create_topics, headers_of
from services.core.murmur2 import partition_of
from services.core.reading import Decoder
from services.core.shutdown import Shutdown
from services.local.kafka import KafkaProcess
from services.producer.encoding import Readings
from services.producer.progress import Progress, progress_topic
from services.producer.publisher import Publisher
from tests.fix_services import PATIENCE_S, Service, StartService, read_topic, rows_of, run_cli, wait_until
from tests.fix_stack import ROOT, free_port
from tests.measured import ALL_SETTINGS, MEASUREMENTS

BEGIN = datetime(2024, 1, 1, tzinfo=UTC)
SENSORS = 20
MANY = 400_000


def write(path: Path, rows: int, first: int = 0) -> Path:
    """Readings number ``first`` to ``first + rows``; the temperature is the number."""
    numbers = pa.array(range(first, first + rows), pa.int64())
    start = int(BEGIN.timestamp())
    times = pa.array(range(start + first, start + first + rows), pa.int64()).cast(pa.timestamp("s"))
    sensors = pa.array([f"s{i % SENSORS}" for i in range(first, first + rows)])
    table = pa.table({"time_hour": times, "origin": sensors, "temp": numbers, "humid": pa.nulls(rows)})
    pq.write_table(table, path, row_group_size=50_000)
    return path


def enough(form: str) -> int:
    """Rows of a file that are not sent at once; blocks are sent several times as fast."""
    return MANY if form == "json" else 5 * MANY


FORMATS = pytest.mark.parametrize("form", ["json", pytest.param("arrow", marks=pytest.mark.slow)])


def source(settings: Settings, url: Path, **changes: object) -> Settings:
    """``settings`` with this source, and every commit in the log."""
    return changed(settings, parquet_url=str(url), log_level="DEBUG", **changes)


def changed(settings: Settings, **changes: object) -> Settings:
    """Settings made anew: a copy would keep derived values such as the broker's address."""
    return ALL_SETTINGS.model_validate(settings.model_dump() | changes)


def numbers(settings: Settings) -> Counter[int]:
    """How often each reading's number is in the topic, for a reader of what is committed."""
    consumer = Consumer(
        client_settings(settings, "test")
        | {
            "group.id": "reads-without-a-group",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    partitions = consumer.list_topics(settings.kafka_topic, timeout=10).topics[settings.kafka_topic].partitions
    consumer.assign([TopicPartition(settings.kafka_topic, number, OFFSET_BEGINNING) for number in partitions])
    found: Counter[int] = Counter()
    ended: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    while ended != set(partitions):
        assert time.monotonic() < deadline, "the topic cannot be read to its end"
        for message in consumer.consume(10_000, 0.2):
            error = message.error()
            if error is None:
                found.update(int(row["temperature"]) for row in rows_of(message))
            else:
                assert error.code() == KafkaError._PARTITION_EOF, error
                ended.add(message.partition() or 0)
    consumer.close()
    return found


def marks(settings: Settings) -> dict[int, list[bytes | None]]:
    """The values of REPEAT_HEADER of each reading's messages, in the order of the topic, by the reading's number."""
    found: dict[int, list[bytes | None]] = {}
    for message in read_topic(settings, settings.kafka_topic):
        for row in rows_of(message):
            found.setdefault(int(row["temperature"]), []).append(dict(headers_of(message)).get(REPEAT_HEADER))
    return found


def assert_once(settings: Settings, rows: int, times: int = 1) -> None:
    """Readings 0 to ``rows`` are in the topic ``times`` times each, and nothing else is."""
    found = numbers(settings)
    assert found.total() == rows * times
    assert len(found) == rows
    assert set(found.values()) == {times}


def last_line(service: Service) -> str:
    return service.log_path.read_text(encoding="utf-8").splitlines()[-1]


# --- what is sent ------------------------------------------------------------------------------------------


def test_every_row_becomes_one_message_and_a_second_run_sends_nothing(settings: Settings, start: StartService) -> None:
    path = ROOT / "data" / "measurements.parquet"
    rows = pq.read_table(path).to_pylist()
    settings = source(settings, path)
    first = start("produce", settings=settings)
    assert first.wait() == 0
    said = first.events("all_sent")[0]
    assert (said["rows"], said["sent"], said["skipped_no_measurement"]) == (26_115, 26_114, 1)
    assert (said["files"], said["rows_left"]) == ("1/1", 0)

    messages = read_topic(settings, settings.kafka_topic)
    decoder = Decoder(MEASUREMENTS, max_bytes=settings.max_message_bytes, max_future=timedelta(0))
    readings = [decoder.decode(message.value()) for message in messages]
    assert [message.key() for message in messages] == [reading.sensor_id.encode() for reading in readings]
    for sensor in ("EWR", "JFK", "LGA"):  # one by one in the order of the file, since a sensor has one partition
        assert [(r.time, r.temperature, r.humidity) for r in readings if r.sensor_id == sensor] == [
            (row["time_hour"], row["temp"], row["humid"])
            for row in rows
            if row["origin"] == sensor and row["temp"] is not None
        ]

    second = start("produce", settings=settings)
    assert second.wait() == 0
    assert second.events("nothing_to_send")[0]["rows"] == 26_115
    assert len(read_topic(settings, settings.kafka_topic)) == 26_114


def test_only_new_and_changed_files_are_sent(settings: Settings, start: StartService, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    settings = source(settings, data)
    write(data / "a.parquet", 1000)
    assert start("produce", settings=settings).wait() == 0

    write(data / "b.parquet", 500, first=1000)
    os.utime(data / "a.parquet", (0, 0))  # touched, not changed
    added = start("produce", settings=settings)
    assert added.wait() == 0
    assert added.events("all_sent")[0]["sent"] == 500
    assert_once(settings, 1500)

    write(data / "a.parquet", 300, first=1500)
    replaced = start("produce", settings=settings)
    assert replaced.wait() == 0
    assert replaced.events("all_sent")[0]["sent"] == 300
    assert_once(settings, 1800)


def test_a_file_is_known_by_its_contents_whatever_its_name(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.parquet", 100)
    shutil.copy(data / "a.parquet", data / "copy.parquet")
    first = start("produce", settings=source(settings, data))
    assert first.wait() == 0
    said = first.events("all_sent")[0]
    assert (said["sent"], said["files"], said["rows_left"]) == (100, "2/2", 0)

    (data / "copy.parquet").unlink()
    (data / "a.parquet").rename(data / "renamed.parquet")
    data.rename(tmp_path / "moved")
    again = start("produce", settings=source(settings, tmp_path / "moved"))
    assert again.wait() == 0
    assert again.events("nothing_to_send")
    assert_once(settings, 100)


def test_a_file_that_is_renamed_when_half_of_it_was_sent_goes_on(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", MANY)
    short = settings.model_copy(update={"producer_transaction_timeout_seconds": 5})
    first = start("produce", settings=source(short, path, producer_transaction_rows=20_000))
    first.wait_for("transaction_committed", count=2)
    first.kill()
    path.rename(tmp_path / "b.parquet")
    assert start("produce", settings=source(settings, tmp_path / "b.parquet")).wait() == 0
    # The transaction of the one that was killed is another source's: Kafka ends it by itself.
    wait_until(lambda: nothing_is_open(settings), "no transaction is open", timeout_s=60)
    assert_once(settings, MANY)


def nothing_is_open(settings: Settings) -> bool:
    """Whether all that is in the topic of readings is committed or aborted."""
    admin = AdminClient(client_settings(settings, "test"))
    places = [TopicPartition(settings.kafka_topic, number) for number in range(settings.kafka_partitions)]
    ends = [
        {
            place.partition: future.result().offset
            for place, future in admin.list_offsets(
                {place: OffsetSpec.latest() for place in places}, isolation_level=level
            ).items()
        }
        for level in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED)
    ]
    return ends[0] == ends[1]


@FORMATS
def test_of_a_file_that_grew_only_the_new_rows_are_sent(
    settings: Settings, start: StartService, tmp_path: Path, form: str
) -> None:
    """Twice, and the first time the producer was killed before; then one that grew and was changed as well."""
    path = write(tmp_path / "a.parquet", MANY)
    settings = source(settings, path, producer_transaction_rows=20_000, producer_format=form)
    first = start("produce", settings=settings)
    first.wait_for("transaction_committed", count=2)
    first.kill()
    assert start("produce", settings=settings).wait() == 0
    write(path, MANY + 30_000)
    killed = start("produce", settings=settings)
    known = killed.wait_for("rows_added")
    assert (known["known"], known["new"]) == (MANY, 30_000)
    killed.kill()
    last = start("produce", settings=settings)
    assert last.wait() == 0
    assert sum(event["sent"] for event in last.events("all_sent")) <= 30_000  # none, if all was sent before the kill
    assert_once(settings, MANY + 30_000)

    write(path, 100, first=MANY + 30_000)
    assert start("produce", settings=settings).wait() == 0
    pq.write_table(pa.concat_tables([pq.read_table(path).slice(0, 99), pq.read_table(path).slice(98)]), path)
    changed_too = start("produce", settings=settings)
    assert changed_too.wait() == 0
    assert changed_too.events("all_sent")[0]["sent"] == 101  # row 99 is another one now: all of them count as new
    assert changed_too.events("rows_added") == []


@FORMATS
def test_what_may_have_been_stored_from_another_topic_is_marked(
    settings: Settings, start: StartService, tmp_path: Path, form: str
) -> None:
    """The producer cannot know what was sent before the topic, or the record of what was sent, began."""
    data = tmp_path / "data"
    data.mkdir()
    old = write(data / "old.parquet", 1)
    settings = source(settings, data, producer_format=form)
    assert start("produce", settings=settings).wait() == 0
    write(data / "new.parquet", 1, first=1)
    late = write(data / "late.parquet", 1, first=2)
    os.utime(late, (0, 0))  # it was there before, elsewhere
    assert start("produce", settings=settings).wait() == 0
    assert marks(settings) == {0: [REPEATED_IF_MOVED], 1: [None], 2: [REPEATED_IF_MOVED]}

    admin = AdminClient(client_settings(settings, "test"))
    admin.delete_topics([settings.kafka_topic])[settings.kafka_topic].result()
    wait_until(lambda: settings.kafka_topic not in admin.list_topics(timeout=10).topics, "the topic is gone")
    future = time.time() + 3600
    os.utime(old, (future, future))  # such as a copy; its contents are known
    assert start("produce", settings=settings).wait() == 0
    assert marks(settings) == {number: [REPEATED_IF_MOVED] for number in range(3)}


def test_what_is_sent_again_is_marked_unless_it_shall_overwrite(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    write(tmp_path / "first.parquet", 1, first=5)
    assert start("produce", settings=source(settings, tmp_path / "first.parquet")).wait() == 0
    settings = source(settings, write(tmp_path / "a.parquet", 1))
    for arguments in ((), ("--resend",), ("--resend", "--overwrite")):
        assert start("produce", *arguments, settings=settings).wait() == 0
    assert marks(settings)[0] == [None, REPEATED, None]


def test_overwrite_alone_is_refused(settings: Settings) -> None:
    ended = run_cli(settings, "produce", "--overwrite")
    assert ended.returncode == 2
    assert ended.stderr == "error: --overwrite is only for --resend: it makes rows that are sent again overwrite\n"


@FORMATS
def test_each_sensor_is_where_a_java_client_would_put_it(
    settings: Settings, start: StartService, tmp_path: Path, form: str
) -> None:
    settings = source(settings, write(tmp_path / "a.parquet", SENSORS), producer_format=form)
    assert start("produce", settings=settings).wait() == 0
    messages = read_topic(settings, settings.kafka_topic)
    found = {row["sensor_id"]: message.partition() for message in messages for row in rows_of(message)}
    assert len(found) == SENSORS
    assert found == {sensor: partition_of(sensor.encode(), settings.kafka_partitions) for sensor in found}
    assert {message.key() for message in messages} == ({None} if form == "arrow" else {key.encode() for key in found})


def test_the_same_files_by_another_url_are_not_sent_again(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.parquet", 10)
    for url in (data, data / "*.parquet", data / "a.parquet", tmp_path / "*" / "a.parquet"):
        assert start("produce", settings=source(settings, url)).wait() == 0
    assert_once(settings, 10)


@pytest.mark.slow
def test_resend_sends_all_again_and_is_itself_resumed(settings: Settings, start: StartService, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.parquet", MANY // 2)
    write(data / "b.parquet", MANY // 2, first=MANY // 2)
    settings = source(settings, data, producer_transaction_rows=20_000)
    assert start("produce", settings=settings).wait() == 0
    again = start("produce", "--resend", settings=settings)
    again.wait_for("transaction_committed", count=3)
    again.kill()
    assert again.events("all_sent") == []
    assert start("produce", settings=settings).wait() == 0  # not --resend: goes on with what was begun
    assert_once(settings, MANY, times=2)
    assert {tuple(found) for found in marks(settings).values()} == {(REPEATED_IF_MOVED, REPEATED)}


def test_a_topic_that_was_created_anew_is_filled_again(settings: Settings, start: StartService, tmp_path: Path) -> None:
    settings = source(settings, write(tmp_path / "a.parquet", 10))
    assert start("produce", settings=settings).wait() == 0
    admin = AdminClient(client_settings(settings, "test"))
    admin.delete_topics([settings.kafka_topic])[settings.kafka_topic].result()
    wait_until(lambda: settings.kafka_topic not in admin.list_topics(timeout=10).topics, "the topic is gone")
    assert start("produce", settings=settings).wait() == 0
    assert_once(settings, 10)


def test_rows_that_are_no_readings_are_counted_by_reason(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    table = pa.table(
        {
            "time_hour": ["2024-01-01", "soon", None, "2024-01-01", "2024-01-01", "2024-01-02T00:00+01:00"],
            "origin": ["a", "a", "a", None, "a", "a"],
            "temp": [1.0, 1.0, 1.0, 1.0, None, 2.0],
            "humid": pa.array([None, 1.0, 1.0, 1.0, float("nan"), None], pa.float64()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    settings = source(settings, tmp_path / "a.parquet")
    producer = start("produce", settings=settings)
    assert producer.wait() == 0
    said = producer.events("all_sent")[0]
    reasons = {name: count for name, count in said.items() if name.startswith("skipped_")}
    assert reasons == {
        "skipped_bad_time": 1,
        "skipped_no_time": 1,
        "skipped_no_sensor": 1,
        "skipped_no_measurement": 1,
    }
    assert (said["rows"], said["sent"], said["skipped"]) == (6, 2, 4)
    assert numbers(settings) == Counter({1: 1, 2: 1})


def test_a_file_of_which_no_row_can_be_sent_is_no_success(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    table = pa.table(
        {"time_hour": ["01.05.2024 12:00"] * 3, "temp": [1.0] * 3, "humid": [1.0] * 3, "origin": ["s"] * 3}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    settings = source(settings, tmp_path / "a.parquet")
    producer = start("produce", settings=settings)
    assert producer.wait() == 1
    assert last_line(producer) == f"error: no row of {tmp_path}/a.parquet could be sent: 3 x bad_time"
    (said,) = producer.events("all_sent")
    assert (said["level"], said["sent"], said["url"]) == ("WARNING", 0, f"{tmp_path}/a.parquet")
    assert start("produce", settings=settings).wait() == 0  # it was said


def test_a_file_that_harms_its_reader_is_reported_and_those_after_it_are_sent(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    """One asks for more memory than there is, one is damaged in its middle, one is no Parquet file."""
    data = tmp_path / "data"
    data.mkdir()
    bomb = pq.read_table(write(data / "a.parquet", 20_000))
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 30_000_000]))
    pq.write_table(bomb.set_column(1, "origin", ids), data / "a.parquet", compression="zstd", store_schema=False)
    damaged = write(data / "b.parquet", 100_000)
    contents = bytearray(damaged.read_bytes())
    middle = pq.read_metadata(damaged).row_group(1).column(2).data_page_offset
    contents[middle : middle + 2000] = b"\xff" * 2000
    damaged.write_bytes(contents)
    (data / "c.parquet").write_bytes(b"rubbish")
    write(data / "d.parquet", 1000, first=MANY)
    settings = source(settings, data)
    for sent in (41_000, 0):
        producer = start("produce", settings=settings)
        assert producer.wait() == 1
        said = [event["error"] for event in producer.events("unreadable")]
        assert ["c.parquet is not" in error for error in said] == [True, False, False]
        assert "a.parquet cannot be read beyond row 0 of 20000: " in said[1]
        assert "b.parquet cannot be read beyond row 40000 of 100000: " in said[2]
        assert last_line(producer).startswith("error: 3 of 4 files were not sent to their end: ")
        assert [event["sent"] for event in producer.events("sent_in_part")] == [sent] * (sent > 0)
    assert sorted(numbers(settings)) == [*range(40_000), *range(MANY, MANY + 1000)]


# --- deaths ------------------------------------------------------------------------------------------------


@FORMATS
def test_killed_again_and_again_each_row_is_there_once(
    settings: Settings, start: StartService, tmp_path: Path, form: str
) -> None:
    rows = enough(form)
    path = write(tmp_path / "a.parquet", rows)
    settings = source(settings, path, producer_transaction_rows=20_000, producer_format=form)
    moments = random.Random(20240101)  # noqa: S311 - a seed, so that a failure can be had again
    kills = 0
    while True:
        producer = start("produce", settings=settings)
        commits = moments.randint(0, 3)
        wait_until(partial(has_committed, producer, commits), f"{commits} commits, or the end")
        with suppress(subprocess.TimeoutExpired):
            producer.process.wait(moments.uniform(0, 0.15))
        if producer.process.poll() is not None:
            break
        producer.kill()
        kills += 1
    assert kills >= 4
    assert producer.wait() == 0
    assert_once(settings, rows)


def has_committed(service: Service, commits: int) -> bool:
    return service.process.poll() is not None or len(service.events("transaction_committed")) >= commits


def test_readings_are_visible_with_their_progress_only(settings: Settings) -> None:
    """Kafka does not take a record that is too large; without it the reading would be sent twice."""
    create_topics(
        AdminClient(client_settings(settings, "test")), settings, progress_topic(settings), shutdown=Shutdown()
    )
    readings = Readings(
        rows=1,
        keys=[b"s1"],
        sensor=pa.array([0]),
        time=pa.array([0], pa.timestamp("us")),
        numbers={"temperature": pa.array([7.0])},
    )
    with Publisher(settings, "source", Shutdown()) as publisher:
        publisher.start()
        publisher.send(readings)
        with pytest.raises(PermanentError, match="1 readings were not delivered"):
            publisher.commit({"file": Progress(url="x" * 2_000_000)})
    assert numbers(settings) == Counter()


def test_sigterm_commits_what_is_read_and_the_next_run_goes_on(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    settings = source(settings, write(tmp_path / "a.parquet", MANY), producer_transaction_rows=20_000)
    first = start("produce", settings=settings)
    first.wait_for("transaction_committed", count=2)
    first.signal(signal.SIGTERM)
    assert first.wait(timeout_s=10) == STOPPED
    said = first.events("stopped_early")[0]
    assert 40_000 <= said["sent"] < MANY
    assert said["rows_left"] == MANY - said["rows"]
    assert numbers(settings).total() == said["sent"]
    second = start("produce", settings=settings)
    assert second.wait() == 0
    assert second.events("all_sent")[0]["sent"] == MANY - said["sent"]
    assert_once(settings, MANY)


def test_of_two_producers_on_one_source_the_older_is_fenced(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    settings = source(settings, write(tmp_path / "a.parquet", MANY), producer_transaction_rows=20_000)
    older = start("produce", settings=settings)
    older.wait_for("transaction_committed", count=2)
    older.signal(signal.SIGSTOP)
    newer = start("produce", settings=settings)
    newer.wait_for("transaction_committed")
    older.signal(signal.SIGCONT)
    assert older.wait() == 1
    assert last_line(older).startswith("error: fenced: another producer has taken over ")
    assert newer.wait() == 0
    assert_once(settings, MANY)


class Noting(Publisher):
    """Remembers why messages were not delivered."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, "source", Shutdown())
        self.codes: Counter[int] = Counter()

    def _note_failure(self, error: KafkaError | None, message: Message) -> None:
        super()._note_failure(error, message)
        self.codes[error.code() if error is not None else 0] += 1


def send_forever(publisher: Publisher, messages: Readings) -> None:
    while True:
        publisher.send(messages)


def test_a_fenced_client_ends_when_all_that_it_sent_was_answered(settings: Settings) -> None:
    """Or the answers could damage the memory of the process."""
    create_topics(
        AdminClient(client_settings(settings, "test")), settings, progress_topic(settings), shutdown=Shutdown()
    )
    rows = 20_000
    messages = Readings(
        rows=rows,
        keys=[f"s{number:0250}".encode() for number in range(rows)],
        sensor=pa.array(range(rows)),
        time=pa.array([0] * rows, pa.timestamp("us")),
        numbers={"temperature": pa.array([1.5] * rows)},
    )
    for _ in range(5):
        older = Noting(settings)
        with Publisher(settings, "source", Shutdown()) as newer, older:
            older.start()
            older.send(messages)
            newer.start()
            with pytest.raises(PermanentError, match="fenced"):
                send_forever(older, messages)
            client = older._producer
            assert client is not None
            older.__exit__(None, None, None)
            with suppress(KafkaException):
                client.poll(0)
        if older.codes[KafkaError.INVALID_PRODUCER_EPOCH]:  # else it was fenced before a message had left
            break
    assert older.codes[KafkaError.INVALID_PRODUCER_EPOCH]
    assert not older.codes[KafkaError._PURGE_INFLIGHT]


@pytest.mark.slow
def test_a_transaction_that_kafka_ended_is_sent_again_unless_another_producer_went_on(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    """Both are cut off for longer than their transactions may last, one is replaced meanwhile."""
    alone = source(
        settings,
        write(tmp_path / "a.parquet", MANY),
        producer_transaction_timeout_seconds=5,
        producer_transaction_rows=10_000_000,
    )
    replaced = changed(alone, kafka_topic=f"{settings.kafka_topic}_replaced")
    create_topics(AdminClient(client_settings(replaced, "test")), replaced, shutdown=Shutdown())
    sleeper = start("produce", settings=alone)
    sleep_in_transaction(sleeper, alone)
    zombie = start("produce", settings=replaced)
    sleep_in_transaction(zombie, replaced)
    assert start("produce", settings=replaced).wait() == 0
    wait_until(lambda: not open_transactions(alone), "Kafka ends the sleeper's transaction")
    for service in (sleeper, zombie):
        service.signal(signal.SIGCONT)
    assert zombie.wait() == 1
    assert last_line(zombie).startswith("error: fenced: another producer has taken over ")
    assert sleeper.wait() == 0
    assert len(sleeper.events("transaction_aborted")) == 1
    for each in (alone, replaced):
        assert_once(each, MANY)


@pytest.mark.slow
def test_a_machine_that_was_suspended_is_not_taken_for_a_producer_that_was_replaced(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    settings = source(
        settings,
        write(tmp_path / "a.parquet", MANY),
        producer_transaction_timeout_seconds=5,
        producer_transaction_rows=10_000_000,
    )
    sleeper = start("produce", settings=settings, module="tests.suspended")
    sleep_in_transaction(sleeper, settings)
    wait_until(lambda: not open_transactions(settings), "Kafka ends the sleeper's transaction")
    sleeper.signal(signal.SIGCONT)
    assert sleeper.wait() == 0
    assert len(sleeper.events("transaction_aborted")) == 1
    assert_once(settings, MANY)


def sleep_in_transaction(service: Service, settings: Settings) -> None:
    """Stop the process at a moment when messages of an open transaction are in the topic."""

    def asleep() -> bool:
        service.signal(signal.SIGSTOP)
        if len(open_transactions(settings)) == settings.kafka_partitions:
            return True
        service.signal(signal.SIGCONT)
        return False

    service.wait_for("source_opened")
    wait_until(asleep, "messages of an open transaction are in all partitions")


def open_transactions(settings: Settings) -> list[int]:
    """Partitions of the topic in which a transaction is open."""
    admin = AdminClient(client_settings(settings, "test"))
    partitions = [TopicPartition(settings.kafka_topic, number) for number in range(settings.kafka_partitions)]

    def ends(level: IsolationLevel) -> list[int]:
        found = admin.list_offsets({p: OffsetSpec.latest() for p in partitions}, isolation_level=level)
        return [found[partition].result().offset for partition in partitions]

    stable, last = ends(IsolationLevel.READ_COMMITTED), ends(IsolationLevel.READ_UNCOMMITTED)
    return [number for number, (a, b) in enumerate(zip(stable, last, strict=True)) if a < b]


@pytest.mark.slow
def test_progress_that_an_open_transaction_of_another_producer_hides_is_waited_for(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    settings = source(settings, write(tmp_path / "a.parquet", 100))
    topic = f"{settings.kafka_topic}.progress"
    admin = AdminClient(client_settings(settings, "test"))
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
    other = Producer(client_settings(settings, "test") | {"transactional.id": f"{topic}-other"})
    other.init_transactions(30)
    other.begin_transaction()
    other.produce(topic, b'{"url":"other"}', b"other")
    other.flush(30)
    first = start("produce", settings=settings)
    waiting = first.wait_for("waiting_for_progress")
    assert waiting["end"] == 1
    other.abort_transaction(30)
    assert first.wait() == 0

    other.begin_transaction()
    other.produce(topic, b'{"url":"other"}', b"other")
    other.flush(30)
    second = start("produce", settings=settings)
    second.wait_for("waiting_for_progress")
    other.commit_transaction(30)
    assert second.wait() == 0
    assert second.events("nothing_to_send")
    assert_once(settings, 100)


# --- faults of the broker ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaProcess]:
    """A broker that tests of this module may kill."""
    kafka = KafkaProcess(tmp_path_factory.mktemp("broker"), free_port())
    kafka.start()
    kafka.wait_ready()
    yield kafka
    kafka.stop()


@pytest.fixture
def own_settings(settings: Settings, broker: KafkaProcess) -> Settings:
    """The test's settings with that broker."""
    return changed(settings, kafka_host="127.0.0.1", kafka_port=broker.port)


@pytest.mark.slow
@FORMATS
def test_a_broker_that_dies_is_waited_for(
    own_settings: Settings, start: StartService, tmp_path: Path, broker: KafkaProcess, form: str
) -> None:
    """Away for longer than a transaction may last, so that what was open is sent again."""
    rows = enough(form)
    settings = source(
        own_settings,
        write(tmp_path / "a.parquet", rows),
        producer_transaction_rows=50_000,
        producer_transaction_timeout_seconds=5,
        producer_format=form,
    )
    producer = start("produce", settings=settings)
    producer.wait_for("transaction_committed", count=2)
    broker.kill()
    producer.wait_for("waiting_for_kafka")
    broker.start()
    broker.wait_ready()
    assert producer.wait(timeout_s=120) == 0
    assert producer.events("all_sent")[0]["sent"] == rows
    assert_once(settings, rows)


@pytest.mark.slow
@FORMATS
def test_sigterm_while_the_broker_is_away_ends_in_time(
    own_settings: Settings, start: StartService, tmp_path: Path, broker: KafkaProcess, form: str
) -> None:
    rows = enough(form)
    path = write(tmp_path / "a.parquet", rows)
    settings = source(own_settings, path, producer_transaction_rows=50_000, producer_format=form)
    producer = start("produce", settings=settings)
    producer.wait_for("transaction_committed", count=2)
    broker.kill()
    producer.signal(signal.SIGTERM)
    assert producer.wait(timeout_s=10) == STOPPED
    said = producer.events("stopped_early")[0]
    broker.start()
    broker.wait_ready()
    second = start("produce", settings=settings)
    assert second.wait() == 0
    assert second.events("all_sent")[0]["sent"] >= said["rows_left"] - 50_000
    assert_once(settings, rows)


@pytest.mark.slow
def test_a_file_may_go_on_in_the_other_format(settings: Settings, start: StartService, tmp_path: Path) -> None:
    """In the middle of it, and when it has grown."""
    path = write(tmp_path / "a.parquet", MANY)
    settings = source(settings, path, producer_transaction_rows=20_000)
    blocks = changed(settings, producer_format="arrow")
    first = start("produce", settings=settings)
    first.wait_for("transaction_committed", count=2)
    first.kill()
    assert start("produce", settings=blocks).wait() == 0
    for rows, form in ((MANY + 10, settings), (MANY + 20, blocks), (MANY + 30, settings)):
        write(path, rows)
        grown = start("produce", settings=form)
        assert grown.wait() == 0
        assert grown.events("all_sent")[0]["sent"] == 10
    assert_once(settings, MANY + 30)


def test_messages_that_kafka_refuses_are_counted_and_end_the_run(
    settings: Settings, start: StartService, tmp_path: Path
) -> None:
    settings = source(settings, write(tmp_path / "a.parquet", 1000))
    settings = changed(settings, kafka_topic=f"{settings.kafka_topic}_small")
    admin = AdminClient(client_settings(settings, "test"))
    topic = NewTopic(settings.kafka_topic, 1, 1, config={"max.message.bytes": "100"})
    admin.create_topics([topic])[settings.kafka_topic].result()
    producer = start("produce", settings=settings)
    assert producer.wait() == 1
    assert last_line(producer).startswith("error: 1000 readings were not delivered: ")
    assert numbers(settings) == Counter()


def test_no_kafka_is_one_line_and_exit_code_2(settings: Settings, tmp_path: Path) -> None:
    settings = source(settings, write(tmp_path / "a.parquet", 1), kafka_port=free_port())
    ended = run_cli(changed(settings, startup_timeout_seconds=0, log_level="WARNING"), "produce")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: Kafka does not answer at ")
    assert ended.stderr.count("\n") == 1


def test_a_missing_file_is_one_line_and_exit_code_2_before_kafka_is_asked(settings: Settings) -> None:
    settings = source(settings, Path("/no/such.parquet"), kafka_port=free_port())
    ended = run_cli(settings, "produce")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: PARQUET_URL=/no/such.parquet: there is no such file or directory")
    assert ended.stderr.count("\n") == 1
