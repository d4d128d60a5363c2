-- What etl runs. Schema: migrations/versions/0001_create_schema.py

-- name: show_session
-- Anybody may take such a lock; it can make a session look alive that is gone, and nothing else.
SELECT pg_try_advisory_lock_shared(%(key)s, pg_backend_pid())

-- name: look_at_lease
-- The time as text: Python has no -infinity.
SELECT holder, expires_at::text, expires_at < clock_timestamp(),
       holder = pg_backend_pid() OR NOT EXISTS (
           SELECT FROM pg_locks
           WHERE locktype = 'advisory' AND granted AND objsubid = 2
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
             AND classid::bigint = %(key)s AND objid::bigint = holder)
FROM etl_lease

-- name: hold_state
-- One at a time changes what etl decides on. Readers are not in the way, and only etl's role may take this lock.
LOCK TABLE summary_state IN SHARE ROW EXCLUSIVE MODE

-- name: take_lease
-- As it was seen: nobody has taken or renewed it since.
UPDATE etl_lease SET holder = pg_backend_pid(), expires_at = clock_timestamp() + make_interval(secs => %(lasts)s)
WHERE holder = %(holder)s AND expires_at = %(expires_at)s::timestamptz

-- name: is_leading
SELECT holder = pg_backend_pid() FROM etl_lease

-- name: renew_lease
UPDATE etl_lease SET expires_at = clock_timestamp() + make_interval(secs => %(lasts)s) WHERE holder = %(holder)s

-- name: release_lease
UPDATE etl_lease SET holder = 0, expires_at = '-infinity' WHERE holder = pg_backend_pid()

-- name: prefer_hashing
-- A refresh makes few groups of many readings. Without statistics of a chunk that is being filled the server expects
-- as many groups as readings, and would sort them all. The mirror compares sensors of one interval: a merge by time alone,
-- which needs no sort, would look at each pair of them. Where there is no way but a sort, it counts as so dear that the
-- server would compile the statement, for longer than it takes. Where the minutes are read whole, TimescaleDB looks its
-- watermark up for each of them; by an index, once.
SET enable_sort = off; SET enable_mergejoin = off; SET enable_seqscan = off; SET jit = off

-- name: read_queue
-- Of the past (older than an hour) only what nobody has touched for a second, or what has waited for five: history
-- that is loaded comes in many pieces, and its intervals should be computed when they are complete.
SELECT array_agg(id), range_agg(touched), min(queued_at), clock_timestamp(),
       count(*) < (SELECT count(*) FROM summary_refresh_queue)
FROM summary_refresh_queue
WHERE %(all)s OR upper(touched) > now() - interval '1 hour' OR queued_at < now() - interval '5 seconds'
   OR NOT touched && (SELECT coalesce(range_agg(touched), '{}') FROM summary_refresh_queue
                      WHERE queued_at > now() - interval '1 second')

-- name: queue_depth
SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(queued_at)), 0)::float8
FROM summary_refresh_queue

-- name: delete_queued
-- Exactly the rows that were read, for a lower id may commit later, and of them what has nothing left before the cut.
DELETE FROM summary_refresh_queue
WHERE id = ANY(%(ids)s) AND NOT touched && tstzrange(NULL, %(cut)s::timestamptz)

-- name: keep_rest
UPDATE summary_refresh_queue SET touched = touched * tstzmultirange(tstzrange(NULL, %(cut)s::timestamptz))
WHERE id = ANY(%(ids)s) AND upper(touched) > %(cut)s::timestamptz

-- name: is_queued_before
SELECT EXISTS (SELECT FROM summary_refresh_queue WHERE touched && tstzrange(NULL, %(edge)s::timestamptz))

-- name: note_chunks
-- A chunk that was seen and is gone marks history that is no longer whole, even if a late reading made a new one. One
-- that was merged into another that was seen is not gone.
WITH present AS (
    SELECT range_start, range_end, chunk_creation_time AS created_at FROM timescaledb_information.chunks
    WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'
), kept AS (
    SELECT present.range_start, present.range_end
    FROM present JOIN raw_chunk USING (range_start, created_at) WHERE dropped_at IS NULL
), missing AS (
    SELECT range_start, EXISTS (SELECT FROM kept WHERE kept.range_start < raw_chunk.range_start
                                AND kept.range_end >= raw_chunk.range_end) AS is_merged
    FROM raw_chunk
    WHERE dropped_at IS NULL AND (range_start, created_at) NOT IN (SELECT range_start, created_at FROM present)
), merged AS (
    DELETE FROM raw_chunk USING missing WHERE raw_chunk.range_start = missing.range_start AND is_merged
), dropped AS (
    UPDATE raw_chunk SET dropped_at = now() FROM missing
    WHERE raw_chunk.range_start = missing.range_start AND NOT is_merged
)
INSERT INTO raw_chunk AS seen (range_start, range_end, created_at)
SELECT range_start, range_end, created_at FROM present WHERE range_start NOT IN (SELECT range_start FROM missing)
ON CONFLICT (range_start) DO UPDATE SET range_end = excluded.range_end
WHERE seen.created_at = excluded.created_at AND seen.range_end <> excluded.range_end

-- name: is_chunk_missing
SELECT EXISTS (
    SELECT FROM raw_chunk WHERE dropped_at IS NULL AND (range_start, created_at) NOT IN (
        SELECT range_start, chunk_creation_time FROM timescaledb_information.chunks
        WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'))

-- name: whole_minutes
-- The queued ranges as whole minutes, without those before all that is frozen.
SELECT coalesce(range_agg(tstzrange(date_trunc('minute', lower(piece)),
                                    date_trunc('minute', upper(piece) - interval '1 microsecond') + interval '1 minute'))
                * tstzmultirange(tstzrange((SELECT min(frozen_before) FROM summary_state), NULL)), '{}')
FROM unnest(%(touched)s::tstzmultirange) AS piece

-- name: widen
-- Minutes as whole intervals, without those that begin before the raw history is whole (which may be in the middle of
-- an interval, when the width is one that is about to take over), or before ``rest_end``, where later steps go on.
SELECT coalesce(range_agg(interval) * tstzmultirange(tstzrange(
    (SELECT CASE WHEN isfinite(edge)
                 THEN time_bucket(%(width)s, edge + %(width)s - interval '1 microsecond')
                 ELSE edge END
     FROM (SELECT greatest(frozen_before, %(rest_end)s::timestamptz) AS edge
           FROM summary_state WHERE measurement = %(measurement)s) AS state), NULL)), '{}')
FROM (
    SELECT tstzrange(time_bucket(%(width)s, lower(piece)),
                     time_bucket(%(width)s, upper(piece) - interval '1 microsecond') + %(width)s) AS interval
    FROM unnest(%(minutes)s::tstzmultirange) AS piece
) AS widened

-- name: freeze_dropped
-- Intervals that begin before the end of a dropped chunk are not all there. What came after it was dropped, and what is
-- younger than what is kept, stays open.
UPDATE summary_state AS state
SET frozen_before = greatest(frozen_before, edge), closed_before = greatest(closed_before, edge)
FROM (
    SELECT measurement, least(max(CASE WHEN range_end <= dropped_at
                                  THEN time_bucket(width, range_end + width - interval '1 microsecond')
                                  ELSE time_bucket(width, dropped_at) END),
                         time_bucket(width, now() - %(keep)s)) AS edge
    FROM raw_chunk, summary_state WHERE dropped_at IS NOT NULL GROUP BY measurement, width
) AS dropped
WHERE state.measurement = dropped.measurement AND edge > frozen_before

-- name: hold_readings
SELECT hold_readings()

-- name: close_history
-- Never later than now minus what is kept, whatever was asked for.
UPDATE summary_state SET closed_before = greatest(closed_before, %(edge)s::timestamptz)
WHERE measurement = %(measurement)s AND %(edge)s::timestamptz <= now() - %(keep)s

-- name: freeze_closed
UPDATE summary_state SET frozen_before = closed_before WHERE frozen_before < closed_before

-- name: expired_edges
-- Where the whole intervals begin after what has expired: a chunk of which every interval, at every width, ended long
-- enough ago; and whether that is still to be closed. Nothing while a summary that is refreshed is behind its readings.
SELECT measurement, edge::text, edge > closed_before
FROM summary_state, LATERAL (
    SELECT time_bucket(width, max(range_end) + width - interval '1 microsecond') AS edge
    FROM timescaledb_information.chunks
    WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data' AND range_end <= now() - %(keep)s
      AND (SELECT max(time_bucket(each.width, range_end + each.width - interval '1 microsecond'))
           FROM summary_state AS each) <= now() - %(keep)s
) AS expired
WHERE edge IS NOT NULL AND NOT EXISTS (
    SELECT FROM summary_state AS each JOIN timescaledb_information.continuous_aggregates ON view_name = each.aggregate
    WHERE each.behind_before > '-infinity')
ORDER BY measurement

-- name: is_closing
-- Whether something is closed and not frozen, and whether any of it waits for its summaries.
SELECT coalesce(bool_or(frozen_before < closed_before), false),
       EXISTS (SELECT FROM summary_refresh_queue
               WHERE touched && tstzrange(NULL, (SELECT max(closed_before) FROM summary_state)))
FROM summary_state

-- name: expired_chunks
-- As far as it is frozen: a reading that came just now may have made a chunk. As text: Python has no time BC.
SELECT range_start::text, range_end::text FROM timescaledb_information.chunks
WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'
  AND range_end <= least((SELECT min(frozen_before) FROM summary_state), now() - %(keep)s)
ORDER BY range_start

-- name: drop_chunk
SELECT drop_chunks('sensor_data', newer_than => %(start)s::timestamptz, older_than => %(end)s::timestamptz)

-- name: drop_frozen_minutes
-- If there are any: they would only be in the way, since nothing reads the minutes of frozen intervals again.
SELECT drop_chunks(view_name::regclass, older_than => (SELECT min(frozen_before) FROM summary_state))
FROM timescaledb_information.continuous_aggregates WHERE view_schema = 'public' AND starts_with(view_name, %(base)s)

-- name: uncompressed_chunks
-- Bit 1 says that a chunk is compressed, 2 and 8 that readings came later, 4 that somebody has frozen it.
SELECT format('%%I.%%I', chunk_schema, chunk_name) FROM (
    SELECT *, _timescaledb_functions.chunk_status(format('%%I.%%I', chunk_schema, chunk_name)::regclass) AS status
    FROM timescaledb_information.chunks
    WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data' AND range_end <= now() - %(age)s
) AS old
WHERE status & 4 = 0 AND (status & 1 = 0 OR status & 10 <> 0) ORDER BY range_start

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
SELECT coalesce(bool_or('options' = ANY(proargnames)), false) FROM pg_proc
WHERE proname = 'refresh_continuous_aggregate'

-- name: as_owner
-- Until the transaction ends: an aggregate is sensor_etl's, whoever runs etl. Its members may do the rest as themselves.
SET LOCAL ROLE sensor_etl

-- name: create_base
-- Without an index that begins with the sensor: whatever reads it asks for a time.
CREATE MATERIALIZED VIEW {base}
WITH (timescaledb.continuous, timescaledb.materialized_only = false, timescaledb.create_group_indexes = false) AS
SELECT sensor_id,
       time_bucket(interval '1 minute', time) AS minute,
       {columns}
FROM sensor_data
GROUP BY sensor_id, time_bucket(interval '1 minute', time)
WITH NO DATA

-- name: base_columns
-- Of each measurement.
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
SELECT sensor_id,
       time_bucket({width}, time) AS interval_start,
       avg({measurement}) AS average,
       min({measurement}) AS least,
       max({measurement}) AS greatest,
       count({measurement}) AS reading_count
FROM sensor_data
WHERE {measurement} IS NOT NULL
GROUP BY sensor_id, time_bucket({width}, time)
WITH NO DATA

-- name: create_of_minutes
-- The CASE is for the server, to which a quotient below the smallest number is an error.
CREATE MATERIALIZED VIEW {aggregate}
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT sensor_id,
       time_bucket({width}, minute) AS interval_start,
       CASE WHEN abs(sum({base_sum})) >= sum({base_count}) * '5e-324'::float8
            THEN sum({base_sum}) / sum({base_count}) ELSE 0 END AS average,
       min({base_min}) AS least,
       max({base_max}) AS greatest,
       sum({base_count})::bigint AS reading_count
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
SELECT sensor_id,
       interval_start,
       interval_start + {width} AS interval_end,
       average AS {avg},
       least AS {min},
       greatest AS {max},
       reading_count
FROM {aggregate}
WHERE interval_start >= (SELECT frozen_before FROM summary_state WHERE measurement = {measurement_name})
UNION ALL
SELECT sensor_id, interval_start, interval_end, {avg}, {min}, {max}, reading_count
FROM {summary}
WHERE interval_start < (SELECT frozen_before FROM summary_state WHERE measurement = {measurement_name})

-- name: show_summary_live
-- For as long as there is no aggregate.
CREATE OR REPLACE VIEW {live} AS SELECT * FROM {summary}

-- name: read_state
SELECT measurement, extract(epoch FROM width)::bigint / 60, aggregate FROM summary_state ORDER BY measurement

-- name: write_state
INSERT INTO summary_state (measurement, aggregate, width, behind_before)
VALUES (%(measurement)s, %(aggregate)s, %(width)s, %(behind)s::timestamptz)
ON CONFLICT (measurement) DO UPDATE SET aggregate = excluded.aggregate

-- name: read_behind
SELECT behind_before::text FROM summary_state WHERE measurement = {measurement_name} AND behind_before > '-infinity'

-- name: write_behind
UPDATE summary_state SET behind_before = coalesce(%(edge)s::timestamptz, '-infinity')
WHERE measurement = {measurement_name}

-- name: is_summary_empty
SELECT NOT EXISTS (SELECT FROM {summary})

-- name: newest_chunks
-- Where the last ten begin: a reading from the future may have one of its own.
SELECT min(range_start)::text
FROM (SELECT range_start FROM timescaledb_information.chunks
      WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data' ORDER BY range_start DESC LIMIT 10) AS newest

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
INSERT INTO summary_refresh_queue (touched)
SELECT range_agg(tstzrange(range_start, range_end)) FROM timescaledb_information.chunks
WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'
  AND (SELECT behind_before = '-infinity' FROM summary_state WHERE measurement = {measurement_name})
HAVING count(*) > 0

-- name: history
-- The whole intervals that hold all there is from the edge on, which is where an interval begins, and is not frozen:
-- chunks of readings, and intervals whose readings were deleted by hand. Without any nothing: greatest() takes no notice
-- of NULL.
SELECT CASE WHEN min(first) IS NOT NULL
            THEN greatest(time_bucket({width}, min(first)), %(edge)s::timestamptz,
                          (SELECT frozen_before FROM summary_state WHERE measurement = {measurement_name})) END,
       time_bucket({width}, max(last)) + {width}
FROM (SELECT min(range_start) AS first, max(range_end) - interval '1 microsecond' AS last
      FROM timescaledb_information.chunks
      WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'
      UNION ALL
      SELECT min(interval_start), max(interval_start) FROM {summary}) AS stored

-- name: piece_before
-- The last interval before the edge that can hold a reading (by its chunk) or has a summary row, and what is before it
-- as far as it is not frozen.
SELECT greatest(last + {width} - %(piece)s, frozen_before), last + {width}
FROM summary_state, LATERAL (
    SELECT time_bucket({width}, greatest(
        (SELECT max(least(range_end, %(edge)s::timestamptz)) - interval '1 microsecond'
         FROM timescaledb_information.chunks
         WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'
           AND (%(edge)s::timestamptz IS NULL OR range_start < %(edge)s::timestamptz)),
        (SELECT max(interval_start) FROM {summary}
         WHERE %(edge)s::timestamptz IS NULL OR interval_start < %(edge)s::timestamptz))) AS last
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
SELECT count(*), coalesce(range_agg(tstzrange(interval_start, interval_start + {width})), '{{}}')
FROM different
WHERE NOT tstzrange(interval_start, interval_start + {width})
          && (SELECT coalesce(range_agg(touched), '{{}}') FROM summary_refresh_queue WHERE id <> ALL(%(ours)s::bigint[]))
  AND NOT tstzrange(interval_start, interval_start + {width})
          && (SELECT coalesce(range_agg(tstzrange(range_start, range_end)), '{{}}') FROM raw_chunk
              WHERE dropped_at IS NOT NULL)

-- name: queue_again
INSERT INTO summary_refresh_queue (touched) VALUES (%(touched)s) RETURNING id

-- name: queued_ids
SELECT id FROM summary_refresh_queue

-- name: still_queued
SELECT EXISTS (SELECT FROM summary_refresh_queue WHERE id = ANY(%(ids)s))

-- name: common_edge
-- The first time that is not closed and where an interval of both widths begins, and whether that is long enough ago.
-- (A change that was given up may have closed more than is frozen.)
-- As text: Python has no -infinity.
SELECT edge::text, edge <= now() - %(keep)s
FROM (SELECT CASE WHEN isfinite(closed_before)
                  THEN time_bucket(%(common)s, closed_before + %(common)s - interval '1 microsecond')
                  ELSE closed_before END AS edge
      FROM summary_state WHERE measurement = %(measurement)s) AS state

-- name: replace_state
-- Without an edge nothing more is frozen.
UPDATE summary_state
SET aggregate = %(aggregate)s, width = %(width)s, frozen_before = coalesce(%(edge)s::timestamptz, frozen_before),
    closed_before = greatest(closed_before, %(edge)s::timestamptz)
WHERE measurement = %(measurement)s

-- name: delete_from
DELETE FROM {summary} WHERE interval_start >= %(edge)s::timestamptz

-- name: fill_from
INSERT INTO {summary} (sensor_id, interval_start, interval_end, {avg}, {min}, {max}, reading_count)
SELECT sensor_id, interval_start, interval_start + {width}, average, least, greatest, reading_count
FROM {materialized}
WHERE interval_start >= %(edge)s::timestamptz

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
