"""Create the group role sensor_reader: it may read summaries and live views and nothing else.

Roles belong to the whole server, so another database may have created it and may still need it.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

READABLE = "temperature_summary, humidity_summary, temperature_summary_live, humidity_summary_live"


def upgrade() -> None:
    op.execute("""
        DO $$ BEGIN
            CREATE ROLE sensor_reader NOLOGIN;
        EXCEPTION WHEN duplicate_object THEN
            RAISE NOTICE 'role sensor_reader exists already';
        END $$
    """)
    op.execute("GRANT USAGE ON SCHEMA public TO sensor_reader")
    op.execute(f"GRANT SELECT ON {READABLE} TO sensor_reader")


def downgrade() -> None:
    op.execute(f"REVOKE ALL ON {READABLE} FROM sensor_reader")
    op.execute("REVOKE ALL ON SCHEMA public FROM sensor_reader")
    op.execute("""
        DO $$ BEGIN
            DROP ROLE sensor_reader;
        EXCEPTION WHEN dependent_objects_still_exist THEN
            RAISE NOTICE 'role sensor_reader is used by another database and stays';
        END $$
    """)
