-- What status asks. Each is an index lookup, a catalogue, or bounded by the statement timeout.

-- name: versions
SELECT current_setting('server_version'),
       (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'),
       to_regclass('public.alembic_version') IS NOT NULL

-- name: revision
-- Without a row after a downgrade to the beginning.
SELECT max(version_num) FROM alembic_version

-- name: chunks
SELECT count(*), count(*) FILTER (WHERE is_compressed), hypertable_size('sensor_data')
FROM timescaledb_information.chunks
WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'

-- name: time_range
SELECT min(time), max(time) FROM sensor_data

-- name: table_size
SELECT pg_total_relation_size({table}::regclass)

-- name: count_exactly
SELECT count(*) FROM {table}

-- name: count_about
-- From the statistics that autovacuum keeps.
SELECT approximate_row_count({table})

-- name: widths
SELECT measurement, aggregate, extract(epoch FROM width)::bigint / 60 FROM summary_state

-- name: aggregates
SELECT view_name FROM timescaledb_information.continuous_aggregates WHERE view_schema = 'public' ORDER BY view_name

-- name: queue
SELECT queue_rows, coalesce(extract(epoch FROM clock_timestamp() - oldest_queued_at), 0)::float8
FROM refresh_queue_state

-- name: is_led
SELECT EXISTS (SELECT FROM etl_lease WHERE expires_at > clock_timestamp())

-- name: checks
-- When etl last compared each summary with the readings, and what it has found since the beginning.
SELECT measurement, extract(epoch FROM clock_timestamp() - checked_at)::float8, differences, differed_at FROM summary_check

-- name: positions
SELECT topic_id, partition, next_offset FROM partition_progress
