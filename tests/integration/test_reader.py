"""Files that harm whoever reads them: a process of its own does, and the next file is read by another one."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.core.errors import ConfigurationError, UnreadableFileError
from services.core.shutdown import Shutdown
from services.producer.reader import BATCH_ROWS, READER
from services.producer.source import open_source
from tests.unit.test_source import settings, table, temperatures, write


@pytest.mark.parametrize(("rows", "length"), [(BATCH_ROWS, 30_000_000), (100, 10_000_000)])
def test_a_small_file_that_asks_for_terabytes_is_one_line_and_the_next_is_read(
    tmp_path: Path, rows: int, length: int
) -> None:
    """One long text, which each of many rows refers to: more than there is, and a gigabyte."""
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * length]))
    bomb = table(rows).set_column(4, "sensor", ids)
    pq.write_table(bomb, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    write(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    bomb, good = open_source(settings(tmp_path), Shutdown()).files
    before = peak_mb()
    with pytest.raises(UnreadableFileError, match=r"a.parquet cannot be read beyond row 0 of \d+: "):
        list(bomb.readings())
    assert temperatures(good) == [0, 1, 2]
    assert peak_mb() - before < 50
    reader = READER._process
    assert reader is not None
    status = Path(f"/proc/{reader.pid}/status").read_text(encoding="utf-8")
    assert int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) < 400_000


def test_rows_of_megabytes_are_not_taken(tmp_path: Path) -> None:
    long = table(40).set_column(4, "sensor", pa.array(["x" * 1_000_000] * 40))
    pq.write_table(long, tmp_path / "a.parquet", use_dictionary=False, compression="none")
    (file,) = open_source(settings(tmp_path), Shutdown()).files
    with pytest.raises(UnreadableFileError, match="40 rows need 4000"):
        list(file.readings())


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_longest_ids_that_are_valid_are_read(tmp_path: Path, compression: str) -> None:
    """A kilobyte each, and no two are equal."""
    rows = 2 * BATCH_ROWS
    ids = pa.array(
        [f"{row:05}".translate({48 + digit: 0x1F600 + digit for digit in range(10)}) * 51 for row in range(rows)]
    )
    pq.write_table(table(rows).set_column(4, "sensor", ids), tmp_path / "a.parquet", compression=compression)
    (file,) = open_source(settings(tmp_path), Shutdown()).files
    assert sum(messages.sent for messages in file.readings()) == rows


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(("where", "rows"), [("footer", 0), ("row 40000", 2 * BATCH_ROWS)])
def test_a_file_that_crashes_the_reader_is_one_line_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, rows: int
) -> None:
    """No file is known that does, so the reader is made to abort where the file's name says."""
    READER.close()
    monkeypatch.setattr("services.producer.reader.COMMAND", [sys.executable, "-m", "tests.crash_reader"])
    crash = write(tmp_path / f"crash {where}.parquet", 3 * BATCH_ROWS)
    good = write(tmp_path / "good.parquet")
    try:
        if where == "footer":
            with pytest.raises(ConfigurationError, match=r"reading it ended the reader process \(Aborted\)"):
                open_source(settings(crash), Shutdown())
        else:
            (file,) = open_source(settings(crash), Shutdown()).files
            reading = file.readings()
            assert [next(reading).rows for _ in range(2)] == [BATCH_ROWS] * 2
            with pytest.raises(UnreadableFileError, match=rf"cannot be read beyond row {rows} .*\(Aborted\)"):
                next(reading)
        (file,) = open_source(settings(good), Shutdown()).files
        assert temperatures(file) == [0, 1, 2]
    finally:
        READER.close()


def test_a_reader_that_somebody_ended_is_started_again(tmp_path: Path) -> None:
    (file,) = open_source(settings(write(tmp_path / "a.parquet")), Shutdown()).files
    assert READER._process is not None
    READER._process.kill()
    READER._process.wait()
    assert temperatures(file) == [0, 1, 2]
