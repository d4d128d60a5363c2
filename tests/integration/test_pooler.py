"""A pooler between us and PostgreSQL drops what we set for our sessions: it is refused with one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.core.config import Settings
from tests.fix_services import run_cli, wait_until
from tests.fix_stack import answers, free_port


@pytest.fixture
def pooled(settings: Settings, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """The database behind PgBouncer in transaction mode, with a setting of the test's."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed here")
    port = free_port()
    password = settings.postgre_password.get_secret_value()
    (tmp_path / "pgbouncer.ini").write_text(
        f"""[databases]
{settings.postgre_dbname} = host={settings.postgre_host} port={settings.postgre_port} user={settings.postgre_user} \
password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
{request.param}
""",
        encoding="utf-8",
    )
    command = [program, str(tmp_path / "pgbouncer.ini")]
    if os.geteuid() == 0:  # which it refuses
        for path in (tmp_path, *tmp_path.parents[:2]):
            path.chmod(0o755)
        command[1:1] = ["-u", "nobody"]
    with (tmp_path / "log").open("wb") as log:
        pooler = subprocess.Popen(command, stdout=log, stderr=log)
    behind = settings.model_copy(update={"postgre_host": "127.0.0.1", "postgre_port": port})
    try:
        wait_until(lambda: answers(behind, settings.postgre_dbname), "PgBouncer answers")
        yield behind
    finally:
        pooler.kill()
        pooler.wait()


@pytest.mark.parametrize("pooled", ["", "ignore_startup_parameters = options"], indirect=True)
@pytest.mark.parametrize("command", [["consume", "--until-caught-up"], ["etl", "--once"]])
def test_a_pooler_is_refused_with_one_line(pooled: Settings, command: list[str]) -> None:
    done = run_cli(pooled, *command)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: 127.0.0.1:{pooled.postgre_port}/{pooled.postgre_dbname} is a connection pooler")
    assert last.endswith("set POSTGRE_HOST and POSTGRE_PORT to PostgreSQL itself")
