-- What the dashboard asks. Of the summaries and of the queue's view only, as sensor_reader may.

-- name: queue
SELECT queue_rows, oldest_age_s FROM refresh_queue_state

-- name: sensors
-- One index lookup for each sensor, not one for each row.
WITH RECURSIVE sensor AS (
    (SELECT sensor_id FROM {summary} ORDER BY sensor_id LIMIT 1)
    UNION ALL
    SELECT (SELECT sensor_id FROM {summary} WHERE sensor_id > sensor.sensor_id ORDER BY sensor_id LIMIT 1)
    FROM sensor WHERE sensor_id IS NOT NULL
)
SELECT sensor_id FROM sensor WHERE sensor_id IS NOT NULL LIMIT %(most)s

-- name: extent
-- The first and the last interval of a sensor, and the width of the last.
SELECT (SELECT min(interval_start) FROM {summary} WHERE sensor_id = %(sensor)s), interval_end, interval_end - interval_start
FROM {summary} WHERE sensor_id = %(sensor)s ORDER BY interval_start DESC LIMIT 1

-- name: series
-- Intervals joined to wider ones; a single one stays as it is stored, to the last digit.
SELECT time_bucket(%(width)s, interval_start) AS start,
       CASE WHEN count(*) = 1 THEN min({avg}) ELSE sum({avg} * reading_count) / sum(reading_count) END,
       min({min}), max({max}), sum(reading_count)::bigint
FROM {summary}
WHERE sensor_id = %(sensor)s AND interval_start >= %(start)s AND interval_start < %(end)s
GROUP BY start ORDER BY start
