-- What status asks. Each is an index lookup, a catalogue, or bounded by the statement timeout.

-- name: versions
SELECT current_setting('server_version'),
       (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'),
       to_regclass('public.alembic_version') IS NOT NULL

-- name: revision
-- Without a row after a downgrade to the beginning.
SELECT max(version_num) FROM alembic_version

-- name: readings
SELECT (SELECT min(time) FROM sensor_data), (SELECT max(time) FROM sensor_data),
       count(*), count(*) FILTER (WHERE is_compressed), hypertable_size('sensor_data')
FROM reading_chunks()

-- name: count_exactly
SELECT count(*) FROM {table}

-- name: count_about
-- From the statistics that autovacuum keeps.
SELECT approximate_row_count(%(table)s::regclass)

-- name: summary
-- With what etl found when it compared it with the readings.
SELECT pg_total_relation_size(%(table)s::regclass), aggregate, extract(epoch FROM width)::bigint / 60,
       extract(epoch FROM clock_timestamp() - checked_at)::float8, differences, differed_at
FROM (SELECT %(measurement)s AS measurement) AS asked
LEFT JOIN summary_state USING (measurement) LEFT JOIN summary_check USING (measurement)

-- name: aggregates
SELECT view_name FROM timescaledb_information.continuous_aggregates WHERE view_schema = 'public' ORDER BY view_name

-- name: etl
SELECT queue_rows, oldest_age_s, EXISTS (SELECT FROM etl_lease WHERE expires_at > clock_timestamp())
FROM refresh_queue_state

-- name: positions
SELECT topic_id, partition, next_offset FROM partition_progress
