"""Create the group roles sensor_consumer and sensor_etl: what each service needs and nothing else.

sensor_consumer stores readings and queues what changed. It sees no summary and deletes nothing.

sensor_etl owns the summaries, the live views, the aggregates and the queue. It owns sensor_data too, because
TimescaleDB lets only the owner drop chunks, compress them and set policies. Functions that do so with the rights
of another role would keep little from it (by retention it may drop any chunk in either case) and could not run a
policy, which commits between chunks. But it cannot write readings: as the owner it lost that right, and gets it
back only by an explicit GRANT.

Neither has a password, so nobody logs in as one until an operator says so (docs/security.md). sensor_etl has LOGIN
all the same: TimescaleDB asks it of the owner of a policy. Who owned these objects before, or runs this migration,
becomes a member of sensor_etl and may do all that it could do.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from services.core.errors import ConfigurationError

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

ROLES = {"sensor_consumer": "NOLOGIN", "sensor_etl": "LOGIN"}
FOR_ETL = (
    "temperature_summary",
    "humidity_summary",
    "temperature_summary_live",
    "humidity_summary_live",
    "summary_state",
    "raw_chunk",
    "summary_refresh_queue",
)
HAS_CHUNKS = """
    SELECT EXISTS (SELECT FROM timescaledb_information.chunks
                   WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data')
"""
AGGREGATES = """
    SELECT format('%I.%I', view_schema, view_name) FROM timescaledb_information.continuous_aggregates
    WHERE view_schema = 'public' AND view_name ~ '^(sensor_data_minute|(temperature|humidity)_[0-9]+min)$'
"""
# A superuser needs no right of its own; who is none must be a member to give its tables away.
OWNERS = """
    SELECT quote_ident(rolname) FROM pg_roles
    WHERE NOT rolsuper AND rolname <> 'sensor_etl'
      AND (rolname = current_user
           OR oid = (SELECT relowner FROM pg_class WHERE oid = 'sensor_data'::regclass)
           OR rolname IN (SELECT view_owner FROM timescaledb_information.continuous_aggregates
                          WHERE view_schema = 'public'))
"""
COMPRESSION = (
    "timescaledb.compress, timescaledb.compress_segmentby = 'sensor_id', timescaledb.compress_orderby = 'time'"
)


def upgrade() -> None:
    for role, login in ROLES.items():
        op.execute(f"""
            DO $$ BEGIN
                CREATE ROLE {role} {login};
            EXCEPTION WHEN duplicate_object THEN
                RAISE NOTICE 'role {role} exists already';
            END $$
        """)
        op.execute(f"GRANT USAGE ON SCHEMA public TO {role}")
        # An embedded server may be unable to change the entry of the one database it has. By default everybody has
        # these rights, so that is no failure; where they were taken away, it is.
        op.execute(f"""
            DO $$ BEGIN
                EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO {role}', current_database());
            EXCEPTION WHEN internal_error THEN
                IF NOT (has_database_privilege('{role}', current_database(), 'CONNECT')
                        AND has_database_privilege('{role}', current_database(), 'TEMPORARY')) THEN
                    RAISE;
                END IF;
            END $$
        """)
    op.execute("GRANT CREATE ON SCHEMA public TO sensor_etl")
    op.execute("GRANT SELECT ON alembic_version TO sensor_etl")  # for the command status
    remove_policies()
    keepers = op.get_bind().scalars(sa.text(OWNERS)).all()
    for keeper in keepers:
        op.execute(f"GRANT sensor_etl TO {keeper}")
    give_to_etl()
    for keeper in keepers:
        op.execute(f"GRANT ALL ON sensor_data TO {keeper}")
    grant_to_consumer()


def downgrade() -> None:
    remove_policies()
    op.execute("REASSIGN OWNED BY sensor_etl TO CURRENT_USER")
    op.execute("GRANT ALL ON sensor_data TO CURRENT_USER")
    op.execute("ALTER TABLE summary_state DROP COLUMN gate")
    for role in ROLES:
        op.execute(f"GRANT {role} TO CURRENT_USER")  # only a member may take away what it was granted
        op.execute(f"DROP OWNED BY {role}")  # it owns nothing any more
        op.execute(f"""
            DO $$ BEGIN
                DROP ROLE {role};
            EXCEPTION WHEN dependent_objects_still_exist THEN
                RAISE NOTICE 'role {role} is used by another database and stays';
            END $$
        """)


def remove_policies() -> None:
    """They keep the owner that they were made with; etl makes them anew when it starts."""
    for policy in ("retention", "compression"):
        op.execute(f"SELECT remove_{policy}_policy('sensor_data', if_exists => true)")


def give_to_etl() -> None:
    """The objects of etl become sensor_etl's, the aggregates that there are already too."""
    for relation in FOR_ETL:
        op.execute(f"ALTER TABLE {relation} OWNER TO sensor_etl")
    give_hypertable_to_etl()
    for aggregate in op.get_bind().scalars(sa.text(AGGREGATES)).all():
        op.execute(f"ALTER MATERIALIZED VIEW {aggregate} OWNER TO sensor_etl")


def give_hypertable_to_etl() -> None:
    """Who is no superuser cannot give away what lies in TimescaleDB's own schema: chunks and compressed data."""
    connection = op.get_bind()
    empty = not connection.scalar(sa.text(HAS_CHUNKS))
    if empty:
        op.execute("ALTER TABLE sensor_data SET (timescaledb.compress = false)")
    elif not connection.scalar(sa.text("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")):
        raise ConfigurationError(
            "sensor_data has readings already, and only a superuser can give it to the role sensor_etl: "
            "run 'alembic upgrade head' as one (POSTGRE_USER), this once"
        )
    op.execute("ALTER TABLE sensor_data OWNER TO sensor_etl")
    op.execute("REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON sensor_data FROM sensor_etl")
    if empty:
        op.execute(f"ALTER TABLE sensor_data SET ({COMPRESSION})")


def grant_to_consumer() -> None:
    op.execute("GRANT SELECT, INSERT, UPDATE ON sensor_data TO sensor_consumer")
    op.execute("GRANT INSERT ON summary_refresh_queue TO sensor_consumer")
    op.execute("GRANT SELECT, INSERT, UPDATE ON partition_owner TO sensor_consumer")
    # SELECT ... FOR SHARE takes the right to update a column. Of this one nobody can change the value.
    op.execute("ALTER TABLE summary_state ADD COLUMN gate boolean GENERATED ALWAYS AS (true) STORED")
    op.execute("""
        COMMENT ON COLUMN summary_state.gate IS
            'means nothing: a consumer may update it, which cannot be done, and so it may lock the row'
    """)
    op.execute("GRANT SELECT (metric, closed_before), UPDATE (gate) ON summary_state TO sensor_consumer")
