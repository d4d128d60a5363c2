-- What the consumer runs. Schema: migrations/versions/0001_create_schema.py
-- In braces, for all measurements with commas between: their columns, what is stored, and the values of a merged row.
-- The statements with several commands are sent as one, without parameters: one round trip.

-- name: decompress_without_limit
SET timescaledb.max_tuples_decompressed_per_dml_transaction = 0

-- name: begin
-- Until the transaction ends no history is closed: closing it locks out all writers of readings.
BEGIN;
LOCK TABLE ONLY sensor_data IN ROW EXCLUSIVE MODE;
SELECT max(closed_before) FILTER (WHERE isfinite(closed_before)), clock_timestamp() FROM summary_state

-- name: copy_readings
COPY sensor_data (sensor_id, time, {measurements}) FROM STDIN (FORMAT binary)

-- name: queue_and_commit
-- The rows of partition_progress are locked for no longer than it takes to commit.
INSERT INTO summary_refresh_queue (touched) VALUES ({touched});
SELECT advance_partitions({topic}, {partitions}::int[], {expected}::bigint[], {next}::bigint[]);
COMMIT

-- name: advance
SELECT advance_partitions({topic}, {partitions}::int[], {expected}::bigint[], {next}::bigint[])

-- name: create_incoming
CREATE TEMPORARY TABLE incoming (LIKE sensor_data)

-- name: copy_incoming
COPY incoming (sensor_id, time, {measurements}) FROM STDIN (FORMAT binary)

-- name: merge_incoming
-- xmax is 0 in a row that this statement inserted, and our transaction's id in one that it updated.
-- Only what changed is queued, in whole minutes: every interval is made of whole minutes.
WITH changed AS (
    INSERT INTO sensor_data AS stored (sensor_id, time, {measurements})
    SELECT sensor_id, time, {measurements} FROM incoming
    ON CONFLICT (sensor_id, time) DO UPDATE
    SET ({measurements}) = ROW({values})
    WHERE ROW({values}) IS DISTINCT FROM ROW({stored})
    RETURNING stored.time, stored.xmax = 0 AS inserted
), queued AS (
    INSERT INTO summary_refresh_queue (touched)
    SELECT range_agg(tstzrange(minute, minute + interval '1 minute'))
    FROM (SELECT DISTINCT date_trunc('minute', time) AS minute FROM changed) AS minutes
    HAVING count(*) > 0
)
SELECT count(*) FILTER (WHERE inserted), count(*) FILTER (WHERE NOT inserted) FROM changed

-- name: drop_and_commit
-- Dropped before the commit, which is then as short as any.
DROP TABLE incoming;
SELECT advance_partitions({topic}, {partitions}::int[], {expected}::bigint[], {next}::bigint[]);
COMMIT

-- name: end_dead_writers
-- Consumers encode before they begin and never pause inside a transaction, so one that PostgreSQL waits for is gone.
-- Materialized: in one WHERE the server chooses the order, and might end sessions before it checks whose they are.
WITH dead AS MATERIALIZED (
    SELECT pid FROM pg_stat_activity
    WHERE application_name = %(name)s AND usename = current_user AND pid <> pg_backend_pid()
      AND wait_event_type = 'Client' AND state IN ('active', 'idle in transaction')
      AND xact_start < now() - interval '2 seconds'
)
SELECT pid FROM dead WHERE pg_terminate_backend(pid)

-- name: add_partitions
-- A partition that the database does not know begins at the beginning.
INSERT INTO partition_progress (topic_id, partition, next_offset)
SELECT %(topic)s, partition, 0 FROM unnest(%(partitions)s::int[]) AS partition ORDER BY partition
ON CONFLICT DO NOTHING

-- name: read_positions
SELECT partition, next_offset FROM partition_progress
WHERE topic_id = %(topic)s AND partition = ANY(%(partitions)s)

-- name: knows_another_topic
SELECT EXISTS (SELECT FROM partition_progress WHERE topic_id <> %(topic)s AND next_offset > 0)

-- name: set_position
UPDATE partition_progress SET next_offset = %(offset)s WHERE topic_id = %(topic)s AND partition = %(partition)s
