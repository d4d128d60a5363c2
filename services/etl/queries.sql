-- What etl runs. Schema: migrations/versions/0002_create_summaries.py

-- name: try_lead
SELECT pg_try_advisory_lock(%(key)s)

-- name: prefer_hashing
-- A refresh makes few groups of many readings. Without statistics of a chunk that is being filled the server expects
-- as many groups as readings, and would sort them all.
SET enable_sort = off

-- name: read_queue
-- Of the past (older than an hour) only what nobody has touched for a second, or what has waited for five: history
-- that is loaded comes in many pieces, and its intervals shall be computed when they are complete.
SELECT array_agg(id), range_agg(touched), coalesce(range_agg(touched) FILTER (WHERE forced), '{}'),
       min(queued_at), clock_timestamp(), count(*) < (SELECT count(*) FROM summary_refresh_queue)
FROM summary_refresh_queue
WHERE %(all)s OR forced OR upper(touched) > now() - interval '1 hour' OR queued_at < now() - interval '5 seconds'
   OR NOT touched && (SELECT coalesce(range_agg(touched), '{}') FROM summary_refresh_queue
                      WHERE queued_at > now() - interval '1 second')

-- name: queue_depth
SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(queued_at)), 0)::float8
FROM summary_refresh_queue

-- name: delete_queued
-- Exactly the rows that were read: a lower id may commit later.
DELETE FROM summary_refresh_queue WHERE id = ANY(%(ids)s)

-- name: note_chunks
-- A chunk that was seen and is gone marks history that is no longer whole, even if a late reading made a new one.
WITH present AS (
    SELECT range_start, range_end, chunk_creation_time AS created_at FROM timescaledb_information.chunks
    WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'
), seen AS (
    INSERT INTO raw_chunk (range_start, range_end, created_at) SELECT range_start, range_end, created_at FROM present
    ON CONFLICT (range_start) DO NOTHING
)
UPDATE raw_chunk SET dropped_at = now()
WHERE dropped_at IS NULL AND (range_start, created_at) NOT IN (SELECT range_start, created_at FROM present)

-- name: whole_minutes
-- The queued ranges as whole minutes, without those before all that is frozen.
SELECT coalesce(range_agg(tstzrange(date_trunc('minute', lower(piece)),
                                    date_trunc('minute', upper(piece) - interval '1 microsecond') + interval '1 minute'))
                * tstzmultirange(tstzrange((SELECT min(frozen_before) FROM summary_state), NULL)), '{}')
FROM unnest(%(touched)s::tstzmultirange) AS piece

-- name: widen
-- The queued ranges as whole intervals, without those that begin before the raw history is whole. That may be in
-- the middle of an interval, when the width is one that shall take over.
SELECT coalesce(range_agg(interval) * tstzmultirange(tstzrange(
    (SELECT CASE WHEN isfinite(frozen_before)
                 THEN time_bucket(%(width)s, frozen_before + %(width)s - interval '1 microsecond')
                 ELSE frozen_before END
     FROM summary_state WHERE metric = %(metric)s), NULL)), '{}')
FROM (
    SELECT tstzrange(time_bucket(%(width)s, lower(piece)),
                     time_bucket(%(width)s, upper(piece) - interval '1 microsecond') + %(width)s) AS interval
    FROM unnest(%(touched)s::tstzmultirange) AS piece
) AS widened

-- name: freeze_dropped
-- Intervals that begin before the end of a dropped chunk are not all there.
UPDATE summary_state
SET frozen_before = greatest(frozen_before, edge), closed_before = greatest(closed_before, edge)
FROM (
    SELECT time_bucket(%(width)s, max(range_end) + %(width)s - interval '1 microsecond') AS edge
    FROM raw_chunk WHERE dropped_at IS NOT NULL
) AS dropped
WHERE metric = %(metric)s AND edge > least(frozen_before, closed_before)

-- name: close_history
-- Waits for the transactions that are storing readings; none that begins later stores one from before the edge.
UPDATE summary_state SET closed_before = greatest(closed_before, %(edge)s::timestamptz) WHERE metric = %(metric)s

-- name: freeze_closed
UPDATE summary_state SET frozen_before = closed_before

-- name: expired_edge
-- Where the whole intervals begin after what the retention policy is about to drop; a minute more, for the clock.
SELECT time_bucket(%(width)s, max(range_end) + %(width)s - interval '1 microsecond')::text
FROM timescaledb_information.chunks
WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data'
  AND range_end <= now() - %(age)s + interval '1 minute'

-- name: find_policy
SELECT job_id, (config ->> %(field)s)::interval = %(age)s
FROM timescaledb_information.jobs
WHERE hypertable_schema = 'public' AND hypertable_name = 'sensor_data' AND proc_name = %(procedure)s

-- name: add_retention_policy
SELECT add_retention_policy('sensor_data', drop_after => %(age)s)

-- name: remove_retention_policy
SELECT remove_retention_policy('sensor_data')

-- name: add_compression_policy
SELECT add_compression_policy('sensor_data', compress_after => %(age)s)

-- name: remove_compression_policy
SELECT remove_compression_policy('sensor_data')

-- name: unschedule_policy
SELECT alter_job(%(job)s, scheduled => false)

-- name: drop_expired
-- What the retention policy would drop, as far as it is frozen: a reading that came just now may have made a chunk.
SELECT drop_chunks('sensor_data', older_than => least(min(frozen_before), now() - %(age)s)) FROM summary_state

-- name: drop_frozen_minutes
-- They would only be in the way: nothing reads the minutes of frozen intervals again.
SELECT drop_chunks({base}, older_than => min(frozen_before)) FROM summary_state

-- name: run_policy
CALL run_job(%(job)s)

-- name: refresh
CALL refresh_continuous_aggregate({aggregate}, {start}, {end}, force => {force}{options})

-- name: as_owner
-- Until the transaction ends: an aggregate is sensor_etl's, whoever runs etl. Its members may do the rest as themselves.
SET LOCAL ROLE sensor_etl

-- name: create_base
CREATE MATERIALIZED VIEW {base}
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT sensor_id,
       time_bucket(interval '1 minute', time) AS minute,
       {columns}
FROM sensor_data
GROUP BY sensor_id, time_bucket(interval '1 minute', time)
WITH NO DATA

-- name: base_columns
-- Of each metric.
sum({metric}) AS {base_sum}, min({metric}) AS {base_min}, max({metric}) AS {base_max}, count({metric}) AS {base_count}

-- name: list_columns
SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%(table)s) AND attnum > 0 AND NOT attisdropped

-- name: create_aggregate
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

-- name: refresh_has_options
-- Since TimescaleDB 2.28 a refresh works in small batches unless told otherwise.
SELECT coalesce(bool_or('options' = ANY(proargnames)), false) FROM pg_proc
WHERE proname = 'refresh_continuous_aggregate'

-- name: drop_aggregate
DROP MATERIALIZED VIEW {aggregate}

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
WHERE interval_start >= (SELECT frozen_before FROM summary_state WHERE metric = {metric_name})
UNION ALL
SELECT sensor_id, interval_start, interval_end, {avg}, {min}, {max}, reading_count
FROM {summary}
WHERE interval_start < (SELECT frozen_before FROM summary_state WHERE metric = {metric_name})

-- name: show_summary_live
-- For as long as there is no aggregate.
CREATE OR REPLACE VIEW {live} AS SELECT * FROM {summary}

-- name: read_state
SELECT metric, extract(epoch FROM width)::bigint / 60 FROM summary_state ORDER BY metric

-- name: write_state
INSERT INTO summary_state (metric, aggregate, width) VALUES (%(metric)s, %(aggregate)s, %(width)s)
ON CONFLICT (metric) DO NOTHING

-- name: queue_all
-- All the history there is, for an aggregate that has just been created.
INSERT INTO summary_refresh_queue (touched)
SELECT tstzmultirange(tstzrange(min(time), max(time) + interval '1 microsecond')) FROM sensor_data HAVING count(*) > 0

-- name: history
-- The whole intervals that hold all there is from the edge on, which is where an interval begins: readings, and minutes
-- whose readings were deleted by hand. Without any nothing: greatest() takes no notice of NULL.
SELECT CASE WHEN min(first) IS NOT NULL THEN greatest(time_bucket(%(width)s, min(first)), %(edge)s::timestamptz) END,
       time_bucket(%(width)s, max(last)) + %(width)s
FROM (SELECT min(time) AS first, max(time) AS last FROM sensor_data
      UNION ALL
      SELECT min(minute), max(minute) FROM sensor_data_minute) AS stored

-- name: compared_range
-- All raw readings and all summary rows, as whole intervals from the first that is not frozen. Without any, NULL:
-- greatest() takes no notice of it, and Python has no -infinity.
SELECT nullif(greatest(least(time_bucket({width}, (SELECT min(time) FROM sensor_data)),
                             time_bucket({width}, (SELECT min(interval_start) FROM {summary}
                                                   WHERE interval_start >= frozen_before))),
                       frozen_before), '-infinity'),
       greatest(time_bucket({width}, (SELECT max(time) FROM sensor_data)),
                time_bucket({width}, (SELECT max(interval_start) FROM {summary}))) + {width}
FROM summary_state WHERE metric = {metric_name}

-- name: find_differences
-- One snapshot: what the queue does not name must be equal. An average may differ in its last digits.
-- The queue rows of this comparison do not count, or one metric's difference would hide the other's.
WITH fresh AS (
    SELECT sensor_id, time_bucket({width}, time) AS interval_start,
           avg({metric}) AS average, min({metric}) AS least, max({metric}) AS greatest, count({metric}) AS readings
    FROM sensor_data
    WHERE time >= %(start)s AND time < %(end)s AND {metric} IS NOT NULL
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

-- name: queue_forced
INSERT INTO summary_refresh_queue (touched, forced) VALUES (%(touched)s, true) RETURNING id

-- name: still_queued
SELECT EXISTS (SELECT FROM summary_refresh_queue WHERE id = ANY(%(ids)s))

-- name: common_edge
-- The first time that is not closed and where an interval of both widths begins. (A change that was given up may
-- have closed more than is frozen.)
-- As text: Python has no -infinity.
SELECT (CASE WHEN isfinite(closed_before)
             THEN time_bucket(%(common)s, closed_before + %(common)s - interval '1 microsecond')
             ELSE closed_before END)::text
FROM summary_state WHERE metric = %(metric)s

-- name: replace_state
UPDATE summary_state
SET aggregate = %(aggregate)s, width = %(width)s, frozen_before = %(edge)s::timestamptz,
    closed_before = greatest(closed_before, %(edge)s::timestamptz)
WHERE metric = %(metric)s

-- name: delete_from
DELETE FROM {summary} WHERE interval_start >= %(edge)s::timestamptz

-- name: fill_from
INSERT INTO {summary} (sensor_id, interval_start, interval_end, {avg}, {min}, {max}, reading_count)
SELECT sensor_id, interval_start, interval_start + {width}, average, least, greatest, reading_count
FROM {materialized}
WHERE interval_start >= %(edge)s::timestamptz

-- name: upsert_summary
-- From what is materialized, as the refresh left it: through the view, the server would also read and throw away every
-- reading that is not materialized yet.
-- The last digits of a sum depend on the order of its rows, so an average that differs only there has not changed.
-- The 1e-200 is for the server, to which a product below the smallest number is an error.
INSERT INTO {summary} AS stored
    (sensor_id, interval_start, interval_end, {avg}, {min}, {max}, reading_count)
SELECT sensor_id, interval_start, interval_start + {width}, average, least, greatest, reading_count
FROM {materialized}
WHERE interval_start >= %(start)s AND interval_start < %(end)s
ON CONFLICT (sensor_id, interval_start) DO UPDATE
SET interval_end = excluded.interval_end, {avg} = excluded.{avg}, {min} = excluded.{min}, {max} = excluded.{max},
    reading_count = excluded.reading_count
WHERE (stored.interval_end, stored.{min}, stored.{max}, stored.reading_count)
      IS DISTINCT FROM (excluded.interval_end, excluded.{min}, excluded.{max}, excluded.reading_count)
   OR abs(stored.{avg} - excluded.{avg}) > 1e-12 * greatest(abs(stored.{avg}), abs(excluded.{avg}), 1e-200)

-- name: delete_vanished
DELETE FROM {summary} AS stored
WHERE interval_start >= %(start)s AND interval_start < %(end)s
  AND NOT EXISTS (
      SELECT FROM {materialized} AS fresh
      WHERE fresh.sensor_id = stored.sensor_id AND fresh.interval_start = stored.interval_start
        AND fresh.interval_start >= %(start)s AND fresh.interval_start < %(end)s
  )
