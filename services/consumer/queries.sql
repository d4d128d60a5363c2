-- What the consumer runs. Schema: migrations/versions/0001_create_sensor_data.py

-- name: copy_readings
COPY sensor_data (time, sensor_id, temperature, humidity) FROM STDIN (FORMAT binary)

-- name: queue_ranges
INSERT INTO summary_refresh_queue (touched) VALUES (%(touched)s)

-- name: create_incoming
-- One a transaction: a table that outlives it would tie us to one session, which poolers do not promise.
CREATE TEMPORARY TABLE incoming (
    time timestamptz, sensor_id text, temperature double precision, humidity double precision
) ON COMMIT DROP

-- name: copy_incoming
COPY incoming (time, sensor_id, temperature, humidity) FROM STDIN (FORMAT binary)

-- name: merge_incoming
-- xmax is 0 in a row that this statement inserted, and our transaction's id in one that it updated.
-- Only what changed is queued, in whole minutes: every interval is made of whole minutes.
WITH changed AS (
    INSERT INTO sensor_data AS stored (time, sensor_id, temperature, humidity)
    SELECT time, sensor_id, temperature, humidity FROM incoming
    ON CONFLICT (sensor_id, time) DO UPDATE
    SET temperature = coalesce(excluded.temperature, stored.temperature),
        humidity = coalesce(excluded.humidity, stored.humidity)
    WHERE coalesce(excluded.temperature, stored.temperature) IS DISTINCT FROM stored.temperature
       OR coalesce(excluded.humidity, stored.humidity) IS DISTINCT FROM stored.humidity
    RETURNING stored.time, stored.xmax = 0 AS inserted
), queued AS (
    INSERT INTO summary_refresh_queue (touched)
    SELECT range_agg(tstzrange(minute, minute + interval '1 minute'))
    FROM (SELECT DISTINCT date_trunc('minute', time) AS minute FROM changed) AS minutes
    HAVING count(*) > 0
)
SELECT count(*) FILTER (WHERE inserted), count(*) FILTER (WHERE NOT inserted) FROM changed

-- name: claim_partitions
-- Waits for a transaction that holds an older epoch, and shuts out every later one.
INSERT INTO partition_owner AS owner (consumer_group, topic, partition, epoch)
SELECT %(group)s, %(topic)s, partition, 1 FROM unnest(%(partitions)s::int[]) AS partition ORDER BY partition
ON CONFLICT (consumer_group, topic, partition) DO UPDATE SET epoch = owner.epoch + 1
RETURNING partition, epoch

-- name: hold
-- Until the transaction ends nobody else claims the partitions and no history is closed.
WITH held AS (
    SELECT partition FROM partition_owner
    WHERE consumer_group = %(group)s AND topic = %(topic)s
      AND (partition, epoch) IN (SELECT * FROM unnest(%(partitions)s::int[], %(epochs)s::bigint[]))
    ORDER BY partition
    FOR SHARE
), state AS (
    SELECT closed_before FROM summary_state ORDER BY metric FOR SHARE
)
SELECT (SELECT count(*) FROM held), (SELECT max(closed_before) FILTER (WHERE isfinite(closed_before)) FROM state)
