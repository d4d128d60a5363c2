"""Create the view of the refresh queue that a reader may see: how much waits and for how long, and no readings."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE VIEW refresh_queue_state AS
        SELECT count(*) AS queue_rows, min(queued_at) AS oldest_queued_at FROM summary_refresh_queue
    """)
    op.execute("""
        COMMENT ON VIEW refresh_queue_state IS
            'how many ranges of changed readings wait for their summaries, and since when the oldest does'
    """)
    # A view sees what its owner may see.
    op.execute("ALTER VIEW refresh_queue_state OWNER TO sensor_etl")
    op.execute("GRANT SELECT ON refresh_queue_state TO sensor_reader")


def downgrade() -> None:
    op.execute("DROP VIEW refresh_queue_state")
