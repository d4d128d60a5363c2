"""Create everything but the continuous aggregates, whose width is configuration: they belong to etl.

The natural key, time and sensor, is what makes every retry harmless. Its index begins with the time: a refresh reads
the few minutes that changed, and must find them without reading the whole chunk. A second index on time would cost a
third of the ingest rate. Sensor ids have the collation "C", so that the key means the same on every machine: an index
in the order of a language is silently wrong after a move to another C library.

Three roles that nobody logs in as until an operator says so (docs/security.md):

sensor_consumer  stores readings, and queues what changed. It sees no summary and deletes nothing.
sensor_etl       owns what etl writes, and sensor_data too, because TimescaleDB lets only the owner drop chunks and
                 compress them. It cannot write readings: as the owner it lost that right, and gets it back only by an
                 explicit GRANT.
sensor_reader    reads the summaries, the live views and the state of the queue, nothing else.

And two logins that are members of sensor_reader, sensor_grafana and sensor_dashboard, whose share of the server is
limited. Everybody else may not even connect.

Roles belong to the whole server, so another database may have created them and may still need them; those that exist
stay as they are. Whoever migrates need not be a superuser: what only one may do is asked for, in SQL.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import sqlalchemy as sa
from alembic import context, op
from psycopg.errors import InsufficientPrivilege, InternalError_, UndefinedObject

from services.core.errors import ConfigurationError
from services.core.logs import fields

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

OLDEST_TIMESCALEDB = (2, 23)
INSTALL = "install TimescaleDB 2.23 or newer, community edition (image timescale/timescaledb), and preload it"
ROLES = ("sensor_consumer", "sensor_etl", "sensor_reader")
# Who reads the summaries from elsewhere, and with how many connections at most. A session may change its time
# limits, but not the two others.
READERS = {"sensor_grafana": 10, "sensor_dashboard": 8}
READER_LIMITS = (
    "SET statement_timeout = '30s'",
    "SET idle_in_transaction_session_timeout = '60s'",
    "SET default_transaction_read_only = on",
)
# What anybody may do by default who may connect, and fill memory or the disk with: locks of no table, large objects.
OPEN_TO_ALL = """
    SELECT string_agg(oid::regprocedure::text, ', ' ORDER BY oid::regprocedure::text) FROM pg_proc
    WHERE pronamespace = 'pg_catalog'::regnamespace
      AND (proname ~ '^pg_(try_)?advisory_(xact_)?lock' OR proname IN ('lo_creat', 'lo_create', 'lo_from_bytea'))
"""
COMPRESSION = (
    "timescaledb.compress, timescaledb.compress_segmentby = 'sensor_id', timescaledb.compress_orderby = 'time'"
)

log = logging.getLogger("migrations")


def upgrade() -> None:
    create_extension()
    create_roles()
    advised = [*limit_everybody(), *create_readers()]
    if advised:
        log.warning(
            "superuser_needed", extra=fields(detail="the rest works without; run as one", sql="; ".join(advised))
        )
    create_readings()
    create_reading_chunks()
    create_progress()
    create_summaries()
    create_queue_state()
    create_add_measurement()


def downgrade() -> None:
    refuse_to_drop_data()
    op.execute("DROP VIEW refresh_queue_state")
    for name in measurements():
        op.execute(f"DROP VIEW {name}_summary_live")
        op.execute(f"DROP TABLE {name}_summary")
    op.execute("DROP FUNCTION add_measurement, measurements")
    op.execute("DROP TABLE sensor_data CASCADE")  # takes the continuous aggregates along
    op.execute("DROP FUNCTION hold_readings, reading_chunks")
    op.execute("DROP TABLE raw_chunk, summary_state, summary_refresh_queue, etl_lease, summary_check")
    op.execute("DROP FUNCTION advance_partitions")
    op.execute("DROP TABLE partition_progress")
    attempt([f"GRANT EXECUTE ON FUNCTION {find(OPEN_TO_ALL)} TO PUBLIC"])
    attempt([f"GRANT CONNECT, TEMPORARY ON DATABASE {find('SELECT quote_ident(current_database())')} TO PUBLIC"])
    for role in ROLES:
        op.execute(f"GRANT {role} TO CURRENT_USER")  # only a member may take away what it was granted
        op.execute(f"DROP OWNED BY {role}")  # it owns nothing any more
    for role in (*READERS, *ROLES):
        op.execute(f"""
            DO $$ BEGIN
                DROP ROLE IF EXISTS {role};
            EXCEPTION WHEN dependent_objects_still_exist OR insufficient_privilege THEN
                RAISE NOTICE 'role {role} is not ours to drop, or used by another database, and stays';
            END $$
        """)


def refuse_to_drop_data() -> None:
    """Unless asked for by an explicit word: summaries may be all that is left of readings that were dropped."""
    if context.get_x_argument(as_dictionary=True).get("drop_data") == "yes":
        return
    tables = ("sensor_data", *(f"{name}_summary" for name in measurements()))
    full = [name for name in tables if op.get_bind().scalar(sa.text(f"SELECT EXISTS (SELECT FROM {name})"))]
    if full:
        raise ConfigurationError(
            f"{', '.join(full)} hold data that this downgrade drops for good; if that is what you want: "
            "alembic -x drop_data=yes downgrade base"
        )


def measurements() -> list[str]:
    """Those that add_measurement has added."""
    return list(op.get_bind().scalar(sa.text("SELECT measurements()")))


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


def find(query: str) -> str | None:
    """The one value of a query."""
    value: str | None = op.get_bind().scalar(sa.text(query))
    return value


def is_role(role: str) -> bool:
    return find(f"SELECT 1 FROM pg_roles WHERE rolname = '{role}'") is not None


def attempt(statements: Iterable[str]) -> list[str]:
    """Run each; returns those that whoever migrates may not run, and those that need what these were to create."""
    refused = []
    for statement in statements:
        try:
            with op.get_bind().begin_nested():
                op.execute(statement)
        except sa.exc.DBAPIError as error:
            # An embedded server may be unable to change the entry of the one database it has.
            if not isinstance(error.orig, InsufficientPrivilege | UndefinedObject | InternalError_):
                raise
            refused.append(statement)
    return refused


def create_roles() -> None:
    """Create the roles that do not exist; whoever migrates becomes a member of sensor_etl, to give it its tables."""
    new = [role for role in ROLES if not is_role(role)]
    refused = attempt(f"CREATE ROLE {role}" for role in new)
    me = find("SELECT quote_ident(current_user)")
    if not find("SELECT pg_has_role(rolname, 'USAGE') FROM pg_roles WHERE rolname = 'sensor_etl'"):
        refused += attempt([f"GRANT sensor_etl TO {me}"])
    if refused:
        raise ConfigurationError(f"{me} may not create roles; as a superuser, run: {'; '.join(refused)}")
    if "sensor_etl" in new:
        # TimescaleDB writes a line about each refresh, several per second, and etl reports its errors itself.
        attempt(["ALTER ROLE sensor_etl SET log_min_messages = fatal"])
    op.execute(f"GRANT USAGE ON SCHEMA public TO {', '.join(ROLES)}")
    op.execute("GRANT CREATE ON SCHEMA public TO sensor_etl")
    op.execute("GRANT SELECT ON alembic_version TO sensor_etl")  # for the command status


def limit_everybody() -> list[str]:
    """Take from everybody what only the services need; returns what a superuser would have to run for that."""
    database = find("SELECT quote_ident(current_database())")
    rights = (
        f"GRANT CONNECT, TEMPORARY ON DATABASE {database} TO sensor_consumer, sensor_etl; "
        f"GRANT CONNECT ON DATABASE {database} TO sensor_reader; "
        f"REVOKE CONNECT, TEMPORARY ON DATABASE {database} FROM PUBLIC; "
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    )
    locks = (
        f"REVOKE EXECUTE ON FUNCTION {find(OPEN_TO_ALL)} FROM PUBLIC; "
        "GRANT EXECUTE ON FUNCTION pg_try_advisory_lock_shared(integer, integer) TO sensor_etl"
    )
    # Others than the owner would only be warned that nothing was changed.
    if not find("SELECT pg_has_role(datdba, 'USAGE') FROM pg_database WHERE datname = current_database()"):
        return [rights, locks]
    if not find("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"):
        return [*attempt([rights]), locks]
    return attempt([rights, locks])


def create_readers() -> list[str]:
    """Create the logins that do not exist; returns what a superuser would have to run for that."""
    return attempt(
        statement
        for login, connections in READERS.items()
        if not is_role(login)
        for statement in (
            f"CREATE ROLE {login} CONNECTION LIMIT {connections} IN ROLE sensor_reader",
            *(f"ALTER ROLE {login} {limit}" for limit in READER_LIMITS),
            f"ALTER ROLE {login} SET temp_file_limit = '1GB'",
        )
    )


def create_readings() -> None:
    op.execute("""
        CREATE TABLE sensor_data (
            time      timestamptz      NOT NULL,
            sensor_id text COLLATE "C" NOT NULL,
            CONSTRAINT sensor_data_key UNIQUE (time, sensor_id)
        )
    """)
    op.execute("SELECT create_hypertable('sensor_data', by_range('time'), create_default_indexes => false)")
    op.execute("ALTER TABLE sensor_data OWNER TO sensor_etl")
    op.execute("REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON sensor_data FROM sensor_etl")
    # Nothing is compressed until COMPRESS_AFTER_DAYS asks for it; etl then adds the policy.
    op.execute(f"ALTER TABLE sensor_data SET ({COMPRESSION})")
    op.execute("""
        COMMENT ON TABLE sensor_data IS
            'raw readings, one row per sensor and time; for each field the last non-null value wins'
    """)
    op.execute("GRANT SELECT, INSERT, UPDATE ON sensor_data TO sensor_consumer")
    op.execute("GRANT ALL ON sensor_data TO CURRENT_USER")
    # Before PostgreSQL 17 nobody may take this lock who may not write readings.
    op.execute("""
        CREATE FUNCTION hold_readings() RETURNS void
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
        BEGIN
            LOCK TABLE ONLY public.sensor_data IN SHARE MODE;
        END $$
    """)
    op.execute("""
        COMMENT ON FUNCTION hold_readings IS
            'stops the storing of readings until the transaction ends; first waits, in turn, for transactions '
            'that are storing some'
    """)
    op.execute("REVOKE EXECUTE ON FUNCTION hold_readings FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION hold_readings TO sensor_etl")


def create_reading_chunks() -> None:
    """A function and not a view, which would stop updates of TimescaleDB: they drop and create the view below."""
    op.execute("""
        CREATE FUNCTION reading_chunks() RETURNS TABLE (
            range_start timestamptz, range_end timestamptz, created_at timestamptz, chunk text, is_compressed boolean
        ) STABLE LANGUAGE sql AS $$
            SELECT range_start, range_end, chunk_creation_time, format('%I.%I', chunk_schema, chunk_name), is_compressed
            FROM timescaledb_information.chunks
            WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'
        $$
    """)
    op.execute("COMMENT ON FUNCTION reading_chunks IS 'the chunks of sensor_data'")


def create_progress() -> None:
    """How far each partition of the topic is stored, and the one way to move on."""
    op.execute("""
        CREATE TABLE partition_progress (
            topic_id    text   NOT NULL,
            partition   int    NOT NULL,
            next_offset bigint NOT NULL,
            PRIMARY KEY (topic_id, partition)
        )
    """)
    op.execute("""
        COMMENT ON TABLE partition_progress IS
            'next offset of each partition, advanced in the transaction that stores everything before it; topics are '
            'identified by their id, so a topic that is deleted and created again starts at its beginning'
    """)
    op.execute("""
        CREATE FUNCTION advance_partitions(topic text, numbers int[], expected bigint[], next bigint[]) RETURNS void
        LANGUAGE plpgsql AS $$
        DECLARE
            matching bigint;
        BEGIN
            PERFORM FROM partition_progress WHERE topic_id = topic AND partition = ANY(numbers)
            ORDER BY partition FOR UPDATE;
            UPDATE partition_progress AS stored SET next_offset = step.next_offset
            FROM unnest(numbers, expected, next) AS step (partition, expected_offset, next_offset)
            WHERE stored.topic_id = topic AND stored.partition = step.partition
              AND stored.next_offset = step.expected_offset;
            GET DIAGNOSTICS matching = ROW_COUNT;
            IF matching <> cardinality(numbers) THEN
                RAISE EXCEPTION 'partitions % are no longer where this consumer began', numbers
                    USING ERRCODE = 'KP001';
            END IF;
        END $$
    """)
    op.execute("""
        COMMENT ON FUNCTION advance_partitions IS
            'compare and set: raises KP001 unless each partition is exactly where the caller began'
    """)
    op.execute("REVOKE EXECUTE ON FUNCTION advance_partitions FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION advance_partitions TO sensor_consumer")
    op.execute("GRANT SELECT, INSERT, UPDATE ON partition_progress TO sensor_consumer")
    op.execute("GRANT SELECT ON partition_progress TO sensor_etl")  # for the command status


def create_summaries() -> None:
    """What etl writes, and the queue that tells it what to do."""
    op.execute("""
        CREATE TABLE summary_refresh_queue (
            id        bigint         GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            touched   tstzmultirange NOT NULL CHECK (NOT isempty(touched) AND NOT lower_inf(touched)
                                                     AND NOT upper_inf(touched)),
            queued_at timestamptz    NOT NULL DEFAULT now()
        )
    """)
    op.execute("""
        COMMENT ON TABLE summary_refresh_queue IS
            'time ranges whose readings changed, written in the transaction that changed them'
    """)
    op.execute("GRANT INSERT (touched) ON summary_refresh_queue TO sensor_consumer")
    op.execute("""
        CREATE TABLE summary_state (
            measurement    text        PRIMARY KEY,
            aggregate      text        NOT NULL,
            width          interval    NOT NULL,
            closed_before  timestamptz NOT NULL DEFAULT '-infinity',
            frozen_before  timestamptz NOT NULL DEFAULT '-infinity',
            behind_before  timestamptz NOT NULL DEFAULT '-infinity',
            CHECK (closed_before >= frozen_before)
        )
    """)
    op.execute("""
        COMMENT ON TABLE summary_state IS 'which aggregate each summary mirrors, and how far back it may change'
    """)
    op.execute("""
        COMMENT ON COLUMN summary_state.closed_before IS
            'the consumer stores no reading from before this time: its interval is no longer complete, or soon will '
            'not be'
    """)
    op.execute("""
        COMMENT ON COLUMN summary_state.frozen_before IS
            'summary rows of earlier intervals never change again: their raw readings may be gone'
    """)
    op.execute("""
        COMMENT ON COLUMN summary_state.behind_before IS
            'summary rows of earlier intervals may be out of date: they were not refreshed while not configured'
    """)
    op.execute("GRANT SELECT (measurement, closed_before) ON summary_state TO sensor_consumer")
    op.execute("""
        CREATE TABLE raw_chunk (
            range_start timestamptz PRIMARY KEY,
            range_end   timestamptz NOT NULL,
            created_at  timestamptz NOT NULL,
            dropped_at  timestamptz
        )
    """)
    op.execute("""
        COMMENT ON TABLE raw_chunk IS
            'chunks of sensor_data that etl has seen; a chunk that is gone marks history that is no longer complete'
    """)
    op.execute("""
        CREATE TABLE etl_lease (
            only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
            holder     int         NOT NULL DEFAULT 0,
            expires_at timestamptz NOT NULL DEFAULT '-infinity'
        )
    """)
    op.execute("INSERT INTO etl_lease DEFAULT VALUES")
    op.execute("""
        COMMENT ON TABLE etl_lease IS
            'the session of the leading etl; no other session changes anything that etl decides on'
    """)
    op.execute("""
        CREATE TABLE summary_check (
            measurement text        PRIMARY KEY,
            checked_at  timestamptz NOT NULL,
            next_before timestamptz,
            differences bigint      NOT NULL DEFAULT 0,
            differed_at timestamptz
        )
    """)
    op.execute("""
        COMMENT ON TABLE summary_check IS
            'when etl last compared a summary with the raw readings, how far back it has got, and how many rows '
            'ever differed'
    """)
    for table in ("summary_refresh_queue", "summary_state", "raw_chunk", "etl_lease", "summary_check"):
        op.execute(f"ALTER TABLE {table} OWNER TO sensor_etl")


def create_queue_state() -> None:
    """What a reader may know of the queue: how much waits and for how long, and no readings."""
    op.execute("""
        CREATE VIEW refresh_queue_state AS
        SELECT count(*) AS queue_rows,
               coalesce(extract(epoch FROM clock_timestamp() - min(queued_at)), 0)::float8 AS oldest_age_s
        FROM summary_refresh_queue
    """)
    op.execute("""
        COMMENT ON VIEW refresh_queue_state IS
            'number of ranges of changed readings that wait for their summaries, and how many seconds the oldest has '
            'waited; 0: none waits'
    """)
    # A view sees what its owner may see.
    op.execute("ALTER VIEW refresh_queue_state OWNER TO sensor_etl")
    op.execute("GRANT SELECT ON refresh_queue_state TO sensor_reader")


def create_add_measurement() -> None:
    """What brings the database up to MEASUREMENTS: migrations/env.py calls it after the revisions."""
    op.execute("""
        CREATE FUNCTION measurements() RETURNS text[] STABLE LANGUAGE sql AS $$
            SELECT coalesce(array_agg(attname::text ORDER BY attnum), '{}') FROM pg_attribute
            WHERE attrelid = 'sensor_data'::regclass AND attnum > 0 AND NOT attisdropped
              AND to_regclass(format('%I', attname || '_summary')) IS NOT NULL
        $$
    """)
    op.execute("""
        COMMENT ON FUNCTION measurements IS 'what this database can store: columns that have a summary table'
    """)
    op.execute("""
        CREATE FUNCTION add_measurement(name text) RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN
            IF name = ANY(measurements()) THEN
                RETURN false;
            END IF;
            EXECUTE format('ALTER TABLE sensor_data ADD COLUMN %I double precision', name);
            EXECUTE format('
                CREATE TABLE %I (
                    sensor_id      text COLLATE "C" NOT NULL,
                    interval_start timestamptz      NOT NULL,
                    interval_end   timestamptz      NOT NULL,
                    %I             double precision NOT NULL,
                    %I             double precision NOT NULL,
                    %I             double precision NOT NULL,
                    reading_count  bigint           NOT NULL,
                    PRIMARY KEY (sensor_id, interval_start)
                )', name || '_summary', 'avg_' || name, 'min_' || name, 'max_' || name);
            EXECUTE format('CREATE INDEX %I ON %I (interval_start)',
                           name || '_summary_interval_start', name || '_summary');
            -- etl points the view at the continuous aggregate once that exists; the columns stay the same.
            EXECUTE format('CREATE VIEW %I AS SELECT * FROM %I', name || '_summary_live', name || '_summary');
            EXECUTE format('GRANT SELECT ON %I, %I TO sensor_reader', name || '_summary', name || '_summary_live');
            EXECUTE format('ALTER TABLE %I OWNER TO sensor_etl', name || '_summary');
            EXECUTE format('ALTER VIEW %I OWNER TO sensor_etl', name || '_summary_live');
            RETURN true;
        END $$
    """)
    op.execute("""
        COMMENT ON FUNCTION add_measurement IS
            'adds a column to sensor_data, a summary table and its live view; false if they exist'
    """)
    op.execute("REVOKE EXECUTE ON FUNCTION add_measurement FROM PUBLIC")
