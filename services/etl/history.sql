-- What history.py runs: what of history is closed, frozen and dropped.

-- name: hold_readings
SELECT hold_readings()

-- name: note_chunks
-- A chunk that was seen and is gone marks history that is no longer whole, even if a late reading made a new one. One
-- that was merged into another that was seen is not gone.
WITH present AS (
    SELECT range_start, range_end, created_at FROM reading_chunks()
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
SELECT EXISTS (SELECT FROM raw_chunk WHERE dropped_at IS NULL
               AND (range_start, created_at) NOT IN (SELECT range_start, created_at FROM reading_chunks()))

-- name: read_boundaries
-- With what history.Lost says of the chunks that are gone, and since when readings are kept.
SELECT measurement, width, greatest(closed_before, %(start)s), greatest(frozen_before, %(start)s),
       greatest(ended, %(start)s), greatest(unfinished, %(start)s), now() - %(keep)s
FROM summary_state, (SELECT max(range_end) FILTER (WHERE range_end <= dropped_at) AS ended,
                            max(dropped_at) FILTER (WHERE range_end > dropped_at) AS unfinished
                     FROM raw_chunk WHERE dropped_at IS NOT NULL) AS lost

-- name: move_boundaries
UPDATE summary_state SET closed_before = greatest(closed_before, %(closed)s::timestamptz),
                         frozen_before = greatest(frozen_before, %(frozen)s::timestamptz)
WHERE measurement = %(measurement)s

-- name: is_queued_before
SELECT EXISTS (SELECT FROM summary_refresh_queue WHERE touched && tstzrange(NULL, %(boundary)s))

-- name: expired_chunks
-- None while a summary that is refreshed is behind its readings.
SELECT greatest(range_end, %(start)s) FROM reading_chunks()
WHERE range_end <= now() - %(keep)s AND NOT EXISTS (
    SELECT FROM summary_state JOIN timescaledb_information.continuous_aggregates ON view_name = aggregate
    WHERE behind_before > '-infinity')

-- name: frozen_chunks
-- As text: Python has no time BC.
SELECT range_start::text, range_end::text FROM reading_chunks()
WHERE range_end <= least((SELECT min(frozen_before) FROM summary_state), now() - %(keep)s) ORDER BY range_start

-- name: drop_chunk
SELECT drop_chunks('sensor_data', newer_than => %(start)s::timestamptz, older_than => %(end)s::timestamptz)

-- name: drop_frozen_minutes
SELECT drop_chunks(view_name::regclass, older_than => (SELECT min(frozen_before) FROM summary_state))
FROM timescaledb_information.continuous_aggregates WHERE view_schema = 'public' AND starts_with(view_name, %(base)s)
