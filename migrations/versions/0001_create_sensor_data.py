"""Create the extension, the hypertable of readings, and what the consumer writes beside it.

The natural key, sensor and time, is what makes every retry harmless. Its index begins with the time: a refresh
reads the few minutes that changed, and must find them without reading the whole chunk. A second index on time
would cost a third of the ingest rate.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from services.core.errors import ConfigurationError

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

OLDEST_TIMESCALEDB = (2, 23)
INSTALL = "install TimescaleDB 2.23 or newer, community edition (image timescale/timescaledb), and preload it"


def upgrade() -> None:
    create_extension()
    op.execute("""
        CREATE TABLE sensor_data (
            time        timestamptz NOT NULL,
            sensor_id   text        NOT NULL,
            temperature double precision,
            humidity    double precision,
            CONSTRAINT sensor_data_key UNIQUE (time, sensor_id)
        )
    """)
    op.execute("SELECT create_hypertable('sensor_data', by_range('time'), create_default_indexes => false)")
    # Nothing is compressed until COMPRESS_AFTER_DAYS asks for it; etl then adds the policy.
    op.execute("""
        ALTER TABLE sensor_data SET (
            timescaledb.compress, timescaledb.compress_segmentby = 'sensor_id', timescaledb.compress_orderby = 'time'
        )
    """)
    op.execute("""
        COMMENT ON TABLE sensor_data IS
            'raw readings, one row for each sensor and time; for each field the last non-null value wins'
    """)
    op.execute("""
        CREATE TABLE summary_refresh_queue (
            id        bigint         GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            touched   tstzmultirange NOT NULL,
            forced    boolean        NOT NULL DEFAULT false,
            queued_at timestamptz    NOT NULL DEFAULT now()
        )
    """)
    op.execute("""
        COMMENT ON TABLE summary_refresh_queue IS
            'time ranges whose readings changed, written in the transaction that changed them'
    """)
    op.execute("""
        CREATE TABLE partition_owner (
            consumer_group text   NOT NULL,
            topic          text   NOT NULL,
            partition      int    NOT NULL,
            epoch          bigint NOT NULL,
            PRIMARY KEY (consumer_group, topic, partition)
        )
    """)
    op.execute("""
        COMMENT ON TABLE partition_owner IS
            'fence: each assignment of a partition raises its epoch, a consumer with an older epoch may not write'
    """)


def downgrade() -> None:
    op.execute("DROP TABLE partition_owner")
    op.execute("DROP TABLE summary_refresh_queue")
    op.execute("DROP TABLE sensor_data CASCADE")  # takes the continuous aggregates along


def create_extension() -> None:
    """Create TimescaleDB, or say in one line what is missing."""
    connection = op.get_bind()
    available = connection.scalar(
        sa.text("SELECT default_version FROM pg_available_extensions WHERE name = 'timescaledb'")
    )
    if available is None:
        raise ConfigurationError(f"this PostgreSQL server has no TimescaleDB: {INSTALL}")
    op.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
    version = str(connection.scalar(sa.text("SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'")))
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST_TIMESCALEDB:
        raise ConfigurationError(f"this PostgreSQL server has TimescaleDB {version}, which is too old: {INSTALL}")
    if connection.scalar(sa.text("SELECT current_setting('timescaledb.license', true)")) != "timescale":
        raise ConfigurationError(
            f"TimescaleDB {version} here is the Apache-only edition, without continuous aggregates: {INSTALL}"
        )
