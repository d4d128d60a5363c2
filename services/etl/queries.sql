-- What etl runs. Schema: migrations/versions/0001_create_schema.py

-- name: read_lease
-- And show by a lock that this session is alive. Anybody may take such a lock; all that it can do is make a session that
-- is gone look alive. The time as text: Python has no -infinity.
SELECT holder, expires_at::text, expires_at < clock_timestamp(),
       holder = pg_backend_pid() OR NOT EXISTS (
           SELECT FROM pg_locks
           WHERE locktype = 'advisory' AND granted AND objsubid = 2
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
             AND classid::bigint = %(key)s AND objid::bigint = holder),
       pg_try_advisory_lock_shared(%(key)s, pg_backend_pid())
FROM etl_lease

-- name: hold_state
-- One at a time changes what etl decides on. Readers are not in the way, and only etl's role may take this lock.
LOCK TABLE summary_state IN SHARE ROW EXCLUSIVE MODE

-- name: take_lease
-- As it was seen: nobody has taken or renewed it since. Our own is renewed all the time.
UPDATE etl_lease SET holder = pg_backend_pid(), expires_at = clock_timestamp() + make_interval(secs => %(lasts)s)
WHERE holder = %(holder)s AND (expires_at = %(expires_at)s::timestamptz OR holder = pg_backend_pid())

-- name: is_leading
SELECT holder = pg_backend_pid() FROM etl_lease

-- name: renew_lease
UPDATE etl_lease SET expires_at = clock_timestamp() + make_interval(secs => %(lasts)s) WHERE holder = %(holder)s

-- name: release_lease
UPDATE etl_lease SET holder = 0, expires_at = '-infinity' WHERE holder = pg_backend_pid()

-- name: prefer_hashing
-- A refresh makes few groups of many readings. Without statistics of a chunk that is being filled the server expects
-- as many groups as readings, and would sort them all. The mirror compares sensors of one interval: a merge by time,
-- which needs no sort, would look at each pair of them. A sort that cannot be avoided would count as so expensive that
-- the server compiles the statement, for longer than it takes. And TimescaleDB would look its watermark up once for
-- each of the minutes, were they read without an index.
SET enable_sort = off; SET enable_mergejoin = off; SET enable_seqscan = off; SET jit = off

-- name: read_queue
-- Of the past (older than an hour) only what nobody has touched for a second, or what has waited for five: history
-- that is loaded comes in many pieces, and its intervals should be computed when they are complete.
SELECT array_agg(id), range_agg(touched), extract(epoch FROM clock_timestamp() - min(queued_at))::float8,
       count(*) < (SELECT count(*) FROM summary_refresh_queue)
FROM summary_refresh_queue
WHERE %(all)s OR upper(touched) > now() - interval '1 hour' OR queued_at < now() - interval '5 seconds'
   OR NOT touched && (SELECT coalesce(range_agg(touched), tstzmultirange()) FROM summary_refresh_queue
                      WHERE queued_at > now() - interval '1 second')

-- name: queue_state
SELECT queue_rows, oldest_age_s FROM refresh_queue_state

-- name: delete_queued
-- Exactly the rows that were read, for a lower id may commit later, and of them those with nothing before the cut.
DELETE FROM summary_refresh_queue
WHERE id = ANY(%(ids)s) AND NOT touched && tstzrange(NULL, %(cut)s::timestamptz)

-- name: keep_rest
UPDATE summary_refresh_queue SET touched = touched * tstzmultirange(tstzrange(NULL, %(cut)s::timestamptz))
WHERE id = ANY(%(ids)s) AND upper(touched) > %(cut)s::timestamptz

-- name: uncompressed_chunks
-- Bit 1 says that a chunk is compressed, 2 and 8 that readings came later, 4 that somebody has frozen it.
SELECT chunk FROM reading_chunks(), _timescaledb_functions.chunk_status(chunk::regclass) AS status
WHERE range_end <= now() - %(age)s AND status & 4 = 0 AND (status & 1 = 0 OR status & 10 <> 0) ORDER BY range_start

-- name: compress_chunk
SELECT compress_chunk(%(chunk)s::regclass)

-- name: refresh
CALL refresh_continuous_aggregate({aggregate}, {start}, {end}, force => {force}{options})

-- name: end_mistaken_sessions
-- A refresh is registered with the pid of its session. If the server crashes in the middle of one and gives the pid to
-- another session afterwards, TimescaleDB refuses that refresh as long as this session lives.
WITH mistaken AS MATERIALIZED (
    SELECT pid
    FROM _timescaledb_catalog.continuous_aggs_jobs_refresh_ranges JOIN pg_stat_activity USING (pid)
    WHERE backend_start > created_at
)
SELECT pid FROM mistaken WHERE pg_terminate_backend(pid)

-- name: refresh_has_options
-- Since TimescaleDB 2.28.
SELECT EXISTS (SELECT FROM pg_proc WHERE proname = 'refresh_continuous_aggregate' AND 'options' = ANY(proargnames))

-- name: as_owner
-- Until the transaction ends: an aggregate is sensor_etl's, whoever runs etl. Its members may do the rest as themselves.
SET LOCAL ROLE sensor_etl

-- name: create_base
-- Without an index that begins with the sensor: whatever reads it asks for a time.
CREATE MATERIALIZED VIEW {base}
WITH (timescaledb.continuous, timescaledb.materialized_only = false, timescaledb.create_group_indexes = false) AS
SELECT sensor_id, time_bucket(interval '1 minute', time) AS minute, {columns}
FROM sensor_data
GROUP BY sensor_id, time_bucket(interval '1 minute', time)
WITH NO DATA

-- name: base_columns
sum({measurement}) AS {base_sum}, min({measurement}) AS {base_min}, max({measurement}) AS {base_max}, count({measurement}) AS {base_count}

-- name: list_bases
-- Each with its measurements: those that it counts.
SELECT view_name::text, array_agg(left(attname, -length('_count')))
FROM timescaledb_information.continuous_aggregates
JOIN pg_attribute ON attrelid = format('%%I.%%I', view_schema, view_name)::regclass
WHERE view_schema = 'public' AND starts_with(view_name, %(base)s) AND attname LIKE '%%\_count' AND attnum > 0
GROUP BY view_name

-- name: create_of_readings
CREATE MATERIALIZED VIEW {aggregate}
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT sensor_id, time_bucket({width}, time) AS interval_start, avg({measurement}) AS average,
       min({measurement}) AS least, max({measurement}) AS greatest, count({measurement}) AS reading_count
FROM sensor_data
WHERE {measurement} IS NOT NULL
GROUP BY sensor_id, time_bucket({width}, time)
WITH NO DATA

-- name: create_of_minutes
-- The CASE is for the server, to which a quotient below the smallest number is an error.
CREATE MATERIALIZED VIEW {aggregate}
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT sensor_id, time_bucket({width}, minute) AS interval_start,
       CASE WHEN abs(sum({base_sum})) >= sum({base_count}) * '5e-324'::float8
            THEN sum({base_sum}) / sum({base_count}) ELSE 0 END AS average,
       min({base_min}) AS least, max({base_max}) AS greatest, sum({base_count})::bigint AS reading_count
FROM {base}
WHERE {base_count} > 0
GROUP BY sensor_id, time_bucket({width}, minute)
WITH NO DATA

-- name: list_aggregates
SELECT view_name, materialization_hypertable_schema, materialization_hypertable_name
FROM timescaledb_information.continuous_aggregates WHERE view_schema = 'public'

-- name: vacuum_often
-- Each refresh replaces the rows of the open intervals. They would be a fifth of a chunk, ten weeks, before autovacuum came.
ALTER TABLE {materialized} SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000)

-- name: drop_aggregate
DROP MATERIALIZED VIEW {aggregate}

-- name: live_view_shows
-- As it should: what is behind has to wait.
SELECT pg_get_viewdef({live_name}::regclass) ~ {aggregate_name} OR behind_before > '-infinity'
FROM summary_state WHERE measurement = {measurement_name}

-- name: probe_live_view
-- Changes nothing, but waits for whoever reads the view in an open transaction.
ALTER VIEW {live} OWNER TO sensor_etl

-- name: replace_live_view
-- Intervals whose raw rows are not all there any more come from the summary table, the others from the aggregate.
CREATE OR REPLACE VIEW {live} AS
SELECT sensor_id, interval_start, interval_start + {width} AS interval_end,
       average AS {avg}, least AS {min}, greatest AS {max}, reading_count
FROM {aggregate}
WHERE interval_start >= (SELECT frozen_before FROM summary_state WHERE measurement = {measurement_name})
UNION ALL
SELECT sensor_id, interval_start, interval_end, {avg}, {min}, {max}, reading_count
FROM {summary}
WHERE interval_start < (SELECT frozen_before FROM summary_state WHERE measurement = {measurement_name})

-- name: show_summary_live
-- While there is no aggregate.
CREATE OR REPLACE VIEW {live} AS SELECT * FROM {summary}

-- name: read_state
SELECT measurement, extract(epoch FROM width)::bigint / 60, aggregate FROM summary_state ORDER BY measurement

-- name: write_state
INSERT INTO summary_state (measurement, aggregate, width, behind_before)
VALUES (%(measurement)s, %(aggregate)s, %(width)s, %(behind)s::timestamptz)
ON CONFLICT (measurement) DO UPDATE SET aggregate = excluded.aggregate, width = excluded.width

-- name: read_behind
SELECT behind_before::text FROM summary_state WHERE measurement = {measurement_name} AND behind_before > '-infinity'

-- name: write_behind
UPDATE summary_state SET behind_before = coalesce(%(before)s::timestamptz, '-infinity')
WHERE measurement = {measurement_name}

-- name: is_summary_empty
SELECT NOT EXISTS (SELECT FROM {summary})

-- name: newest_chunks
-- Where the last ten begin: a reading from the future may have one of its own.
SELECT min(range_start)::text
FROM (SELECT range_start FROM reading_chunks() ORDER BY range_start DESC LIMIT 10) AS newest

-- name: rate
-- How many readings per minute a sensor sends, by the newest of all, without those before and after most; no row where
-- that cannot be told: few readings, or none of most sensors came again. By a constant time, or each chunk is locked.
WITH newest AS MATERIALIZED (
    SELECT sensor_id, time FROM sensor_data WHERE time >= %(since)s::timestamptz ORDER BY time DESC LIMIT 100000
)
SELECT 60 * 0.8 * count(*) / max(sensors) / nullif(extract(epoch FROM
           percentile_disc(0.9) WITHIN GROUP (ORDER BY time) - percentile_disc(0.1) WITHIN GROUP (ORDER BY time)), 0)::float8
FROM newest, (SELECT count(*) AS sensors FROM (SELECT DISTINCT sensor_id FROM newest) AS each) AS counted
HAVING count(*) >= greatest(1000, 2 * max(sensors))

-- name: queue_all
-- All the history there is, for an aggregate that has just been created, unless it catches up by itself; by chunks,
-- since a look into thousands of them needs thousands of locks.
INSERT INTO summary_refresh_queue (touched) SELECT range_agg(tstzrange(range_start, range_end)) FROM reading_chunks()
WHERE (SELECT behind_before = '-infinity' FROM summary_state WHERE measurement = {measurement_name})
HAVING count(*) > 0

-- name: piece_before
-- The last interval before the time that can hold a reading (by its chunk) or has a summary row, and what is before it
-- as far as it is not frozen.
SELECT greatest(last + {width} - %(length)s, frozen_before), last + {width}
FROM summary_state, LATERAL (
    SELECT time_bucket({width}, greatest(
        (SELECT max(least(range_end, before)) - interval '1 microsecond' FROM reading_chunks() WHERE range_start < before),
        (SELECT max(interval_start) FROM {summary} WHERE interval_start < before))) AS last
    FROM (SELECT coalesce(%(before)s::timestamptz, 'infinity') AS before) AS at
) AS stored
WHERE measurement = {measurement_name} AND last >= frozen_before

-- name: last_check
-- Since when history is recent, and how far back the older pieces have come.
SELECT greatest(time_bucket({width}, now() - interval '1 day'), frozen_before),
       (SELECT next_before FROM summary_check WHERE measurement = {measurement_name})
FROM summary_state WHERE measurement = {measurement_name}

-- name: note_check
INSERT INTO summary_check AS old (measurement, checked_at, next_before, differences, differed_at)
VALUES (%(measurement)s, now(), %(next_before)s, %(differing)s, CASE WHEN %(differing)s > 0 THEN now() END)
ON CONFLICT (measurement) DO UPDATE
SET checked_at = excluded.checked_at, next_before = excluded.next_before,
    differences = old.differences + excluded.differences, differed_at = coalesce(excluded.differed_at, old.differed_at)

-- name: find_differences
-- One snapshot: what the queue does not name must be equal. An average may differ in its last digits.
-- The queue rows of this comparison do not count, or one measurement's difference would hide the other's.
-- What a chunk that was dropped held cannot be compared any more.
WITH fresh AS (
    SELECT sensor_id, time_bucket({width}, time) AS interval_start,
           avg({measurement}) AS average, min({measurement}) AS least, max({measurement}) AS greatest, count({measurement}) AS readings
    FROM sensor_data
    WHERE time >= %(start)s AND time < %(end)s AND {measurement} IS NOT NULL
    GROUP BY sensor_id, time_bucket({width}, time)
), stored AS (
    SELECT sensor_id, interval_start, interval_end, {avg} AS average, {min} AS least, {max} AS greatest,
           reading_count AS readings
    FROM {summary}
    WHERE interval_start >= %(start)s AND interval_start < %(end)s
), different AS (
    SELECT interval_start
    FROM fresh FULL JOIN stored USING (sensor_id, interval_start)
    WHERE (fresh.readings, fresh.least, fresh.greatest, interval_start + {width})
          IS DISTINCT FROM (stored.readings, stored.least, stored.greatest, stored.interval_end)
          OR abs(fresh.average - stored.average) > 1e-9 * greatest(1, abs(fresh.least), abs(fresh.greatest))
)
SELECT count(*), coalesce(range_agg(tstzrange(interval_start, interval_start + {width})), tstzmultirange())
FROM different
WHERE NOT tstzrange(interval_start, interval_start + {width})
          && (SELECT coalesce(range_agg(touched), tstzmultirange()) FROM summary_refresh_queue WHERE id <> ALL(%(ours)s::bigint[]))
  AND NOT tstzrange(interval_start, interval_start + {width})
          && (SELECT coalesce(range_agg(tstzrange(range_start, range_end)), tstzmultirange()) FROM raw_chunk
              WHERE dropped_at IS NOT NULL)

-- name: queue_again
INSERT INTO summary_refresh_queue (touched) VALUES (%(touched)s) RETURNING id

-- name: queued_ids
SELECT id FROM summary_refresh_queue

-- name: still_queued
SELECT EXISTS (SELECT FROM summary_refresh_queue WHERE id = ANY(%(ids)s))

-- name: delete_from
DELETE FROM {summary} WHERE interval_start >= %(boundary)s::timestamptz

-- name: fill_from
INSERT INTO {summary} (sensor_id, interval_start, interval_end, {avg}, {min}, {max}, reading_count)
SELECT sensor_id, interval_start, interval_start + {width}, average, least, greatest, reading_count
FROM {materialized}
WHERE interval_start >= %(boundary)s::timestamptz

-- name: merge_summary
-- From what is materialized, as the refresh left it: through the view, the server would also read and throw away every
-- reading that is not materialized yet.
-- The last digits of a sum depend on the order of its rows, so an average that differs only there has not changed.
-- The 1e-200 is for the server, to which a product below the smallest number is an error.
-- Nobody else inserts, so there is no need for ON CONFLICT, which takes twice as long for each new row.
MERGE INTO {summary} AS stored
USING (SELECT * FROM {materialized} WHERE interval_start >= %(start)s AND interval_start < %(end)s) AS fresh
ON stored.sensor_id = fresh.sensor_id AND stored.interval_start = fresh.interval_start
   AND stored.interval_start >= %(start)s AND stored.interval_start < %(end)s
WHEN MATCHED AND (
    (stored.interval_end, stored.{min}, stored.{max}, stored.reading_count)
    IS DISTINCT FROM (fresh.interval_start + {width}, fresh.least, fresh.greatest, fresh.reading_count)
    OR abs(stored.{avg} - fresh.average) > 1e-12 * greatest(abs(stored.{avg}), abs(fresh.average), 1e-200)
) THEN UPDATE
SET interval_end = fresh.interval_start + {width}, {avg} = fresh.average, {min} = fresh.least, {max} = fresh.greatest,
    reading_count = fresh.reading_count
WHEN NOT MATCHED THEN INSERT (sensor_id, interval_start, interval_end, {avg}, {min}, {max}, reading_count)
VALUES (fresh.sensor_id, fresh.interval_start, fresh.interval_start + {width}, fresh.average, fresh.least,
        fresh.greatest, fresh.reading_count)

-- name: never_compare_all_pairs
-- Until the transaction ends. Without statistics the server expects one row, and would read all of them for each.
SET LOCAL enable_nestloop = off

-- name: delete_vanished
DELETE FROM {summary} AS stored
WHERE interval_start >= %(start)s AND interval_start < %(end)s
  AND NOT EXISTS (
      SELECT FROM {materialized} AS fresh
      WHERE fresh.sensor_id = stored.sensor_id AND fresh.interval_start = stored.interval_start
        AND fresh.interval_start >= %(start)s AND fresh.interval_start < %(end)s
  )
