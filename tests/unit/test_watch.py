"""A file is whole when it can be opened and did not change between two polls."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.core.errors import ConfigurationError, StoppedError, UnreadableFileError
from services.core.shutdown import Shutdown
from services.producer.watch import Watch
from tests.measured import make_settings


def write(path: Path, rows: int = 3) -> Path:
    """A file of ``rows`` readings."""
    numbers = pa.array([float(row) for row in range(rows)])
    times = pa.array(range(rows), pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"time_hour": times, "origin": ["a"] * rows, "temp": numbers, "humid": numbers}), path)
    return path


def watch(url: Path | str) -> Watch:
    return Watch(make_settings(parquet_url=str(url)), Shutdown())


def names(watch: Watch) -> list[str]:
    return [Path(file.path).name for file in watch.poll().files]


def test_a_file_is_found_at_the_second_poll_until_it_is_noted_as_sent(tmp_path: Path) -> None:
    watching = watch(tmp_path)
    assert names(watching) == []
    write(tmp_path / "b.parquet")
    write(tmp_path / "a.parquet")
    assert names(watching) == []
    (first, second) = watching.poll().files
    assert [Path(file.path).name for file in (first, second)] == ["a.parquet", "b.parquet"]
    watching.settle([first])
    assert names(watching) == ["b.parquet"]


def test_a_whole_file_that_still_changes_is_left_alone(tmp_path: Path) -> None:
    """Such as one that is being copied over an old one of the same length."""
    path = write(tmp_path / "a.parquet")
    watching = watch(tmp_path)
    for second in range(5):
        os.utime(path, (second, second))
        assert names(watching) == []
    assert names(watching) == ["a.parquet"]


def test_a_file_that_is_sent_is_found_again_when_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    watching = watch(path)
    watching.poll()
    (first,) = watching.poll().files
    watching.settle([first])
    write(path, 5)
    assert (names(watching), names(watching)) == ([], ["a.parquet"])
    (second,) = watching.poll().files
    assert second.fingerprint != first.fingerprint
    with pytest.raises(UnreadableFileError, match="changed after it was checked"):
        next(first.readings())


def test_what_cannot_be_read_is_said_once_and_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    write(tmp_path / "b.parquet")
    watching = watch(tmp_path)
    watching.poll()
    with caplog.at_level(logging.WARNING, "producer"):
        for _ in range(3):
            assert names(watching) == ["b.parquet"]
        assert len(caplog.records) == 1
        path.write_bytes(whole[:-50])
        for _ in range(3):
            watching.poll()
        assert len(caplog.records) == 2
    path.write_bytes(whole)
    assert (names(watching), names(watching)) == (["b.parquet"], ["a.parquet", "b.parquet"])


def test_a_file_or_a_directory_that_goes_is_no_error(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    path = write(data / "a.parquet")
    watching = watch(data)
    watching.poll()
    (file,) = watching.poll().files
    path.unlink()
    with pytest.raises(UnreadableFileError):
        next(file.readings())
    assert names(watching) == []
    data.rmdir()
    assert names(watching) == []
    data.mkdir()
    write(data / "a.parquet")
    assert (names(watching), names(watching)) == ([], ["a.parquet"])


def test_hidden_files_and_what_no_glob_matches_are_left_alone(tmp_path: Path) -> None:
    for name in (".a.parquet", "_b.parquet", "c.parquet.part", "d.parquet"):
        write(tmp_path / name)
    for url in (tmp_path, tmp_path / "[!x].parquet"):
        watching = watch(url)
        watching.poll()
        assert names(watching) == ["d.parquet"]
    assert names(watch(tmp_path / "none-*.parquet")) == []


def test_a_url_that_names_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no such file or directory"):
        watch(tmp_path / "nothing")


def test_the_contents_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet")
    watching = watch(tmp_path)
    watching.poll()
    (first,) = watching.poll().files
    monkeypatch.setattr("services.producer.source._contents", None)
    assert watching.poll().files == (first,)


def test_the_end_of_the_service_ends_the_hashing(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    shutdown = Shutdown()
    watching = Watch(make_settings(parquet_url=str(tmp_path)), shutdown)
    watching.poll()
    shutdown.request()
    with pytest.raises(StoppedError, match="nothing was sent"):
        watching.poll()
