-- What the consumer runs. Schema: migrations/versions/0001_create_sensor_data.py
-- In braces, for all metrics with commas between: their columns, what is stored, and the last value that is not null.

-- name: copy_readings
COPY sensor_data (sensor_id, time, {metrics}) FROM STDIN (FORMAT binary)

-- name: queue_ranges
INSERT INTO summary_refresh_queue (touched) VALUES (%(touched)s)

-- name: create_incoming
-- One a transaction: a table that outlives it would tie us to one session, which poolers do not promise.
CREATE TEMPORARY TABLE incoming (LIKE sensor_data) ON COMMIT DROP

-- name: copy_incoming
COPY incoming (sensor_id, time, {metrics}) FROM STDIN (FORMAT binary)

-- name: merge_incoming
-- xmax is 0 in a row that this statement inserted, and our transaction's id in one that it updated.
-- Only what changed is queued, in whole minutes: every interval is made of whole minutes.
WITH changed AS (
    INSERT INTO sensor_data AS stored (sensor_id, time, {metrics})
    SELECT sensor_id, time, {metrics} FROM incoming
    ON CONFLICT (sensor_id, time) DO UPDATE
    SET ({metrics}) = ROW({latest})
    WHERE ROW({latest}) IS DISTINCT FROM ROW({stored})
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
