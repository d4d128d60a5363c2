"""TimescaleDB as a process of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg

from services.local.runtime import install
from services.local.security import SERVER_NAME, Security
from services.local.servers import HOST, Server


class TimescaleDB(Server):
    """PostgreSQL with TimescaleDB compiled to WebAssembly, behind our gateway (gateway/main.mjs)."""

    name = "timescaledb"
    port_setting = "POSTGRE_PORT"

    def __init__(
        self, directory: Path, port: int, user: str, password: str, dbname: str, security: Security | None = None
    ) -> None:
        super().__init__(directory, port)
        self._user, self._password, self._dbname = user, password, dbname
        self._security = security

    def _command(self) -> list[str]:
        runtime = install()
        template = runtime.gateway.parents[1] / "cluster"
        arguments = [f"--port={self.port}", f"--data={self.data_path}", f"--template={template}"]
        arguments += [f"--user={self._user}", f"--database={self._dbname}"]
        if self._security is not None:
            server = self._security.server
            arguments += [f"--certificate={server.certificate}", f"--key={server.key}"]
            arguments += [f"--authority={self._security.authority.certificate}"]
        # V8's own stack: deep enough that PostgreSQL notices its depth first, within the usual limit of 8 MB.
        return [str(runtime.node), "--stack-size=6000", str(runtime.gateway), *arguments]

    def _environment(self) -> dict[str, str]:
        return {"GATEWAY_PASSWORD": self._password}

    def _answers(self) -> bool:
        arguments: dict[str, Any] = {"host": HOST}
        if self._security is not None:
            ca = str(self._security.authority.certificate)
            arguments = {"host": SERVER_NAME, "sslmode": "verify-full", "sslrootcert": ca}
        arguments |= {"port": self.port, "user": self._user, "password": self._password, "dbname": self._dbname}
        try:
            with psycopg.connect(**arguments, connect_timeout=2, autocommit=True) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False
