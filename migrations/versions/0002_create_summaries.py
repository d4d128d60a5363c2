"""Create the summary tables, the live views, and what etl remembers about them."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

METRICS = ("temperature", "humidity")


def upgrade() -> None:
    for metric in METRICS:
        op.execute(f"""
            CREATE TABLE {metric}_summary (
                sensor_id      text             NOT NULL,
                interval_start timestamptz      NOT NULL,
                interval_end   timestamptz      NOT NULL,
                avg_{metric}   double precision NOT NULL,
                min_{metric}   double precision NOT NULL,
                max_{metric}   double precision NOT NULL,
                reading_count  bigint           NOT NULL,
                PRIMARY KEY (sensor_id, interval_start)
            )
        """)
        op.execute(f"CREATE INDEX {metric}_summary_interval_start ON {metric}_summary (interval_start)")
        # etl points the view at the continuous aggregate once that exists; the columns stay the same.
        op.execute(f"CREATE VIEW {metric}_summary_live AS SELECT * FROM {metric}_summary")
    op.execute("""
        CREATE TABLE summary_state (
            metric         text        PRIMARY KEY,
            aggregate      text        NOT NULL,
            width          interval    NOT NULL,
            closed_before  timestamptz NOT NULL DEFAULT '-infinity',
            frozen_before  timestamptz NOT NULL DEFAULT '-infinity',
            CHECK (closed_before >= frozen_before)
        )
    """)
    op.execute("""
        COMMENT ON TABLE summary_state IS 'which aggregate each summary mirrors, and how far back it may change'
    """)
    op.execute("""
        COMMENT ON COLUMN summary_state.closed_before IS
            'the consumer stores no reading of an earlier time: its interval is not, or soon not, whole any more'
    """)
    op.execute("""
        COMMENT ON COLUMN summary_state.frozen_before IS
            'summary rows of earlier intervals never change again: their raw readings may be gone'
    """)
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
            'chunks of sensor_data that etl has seen; one that is gone marks history that is no longer whole'
    """)


def downgrade() -> None:
    for metric in METRICS:
        op.execute(f"DROP VIEW {metric}_summary_live")
        op.execute(f"DROP TABLE {metric}_summary")
    op.execute("DROP TABLE raw_chunk")
    op.execute("DROP TABLE summary_state")
