-- Many leases of one process end, and many slots are released, in one call: the calls cost more than what they do.
-- Neither waits long for a row that somebody else has locked and forgotten: the calls are made one by one then.

DROP FUNCTION repopool.begin_return(text, uuid, bigint, boolean);
DROP PROCEDURE repopool.finish(text, text, uuid, bigint, text, text, text, jsonb, boolean, boolean);

-- End leases; a row, by its place in the arrays, for each that had not been taken away.
CREATE FUNCTION repopool.begin_return(p_slots text[], p_holds uuid[], p_tokens bigint[], p_repeated boolean[])
RETURNS TABLE (place bigint, total_seconds double precision, unsaved text)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET lock_timeout = '1s' AS $$
BEGIN
    -- Should it be lost with the server, no lease has ended: what follows does not mind.
    PERFORM set_config('synchronous_commit', 'off', true);
    RETURN QUERY WITH asked AS MATERIALIZED (
        SELECT a.* FROM unnest(p_slots, p_holds, p_tokens, p_repeated)
            WITH ORDINALITY a (slot_id, hold_id, token, is_repeated, place)
    ), ended AS (
        UPDATE repopool.slot s SET state = 'cleaning', expires_at = NULL, overwritten = NULL,
            record = s.record || jsonb_build_object('state', 'cleaning', 'error', NULL,
                'unsaved', coalesce(s.record ->> 'unsaved', 'returned'),
                'total_allocated_seconds',
                (s.record ->> 'total_allocated_seconds')::double precision + repopool.seconds_since(s.leased_at))
        FROM asked a
        WHERE s.slot_id = a.slot_id AND s.hold_id = a.hold_id AND s.token = a.token
          AND s.state = 'allocated' AND (s.expires_at IS NULL OR s.expires_at > clock_timestamp())
        RETURNING a.place, s.slot_id, s.record, repopool.seconds_since(s.leased_at) AS held_seconds
    ), noted AS (
        INSERT INTO repopool.history (slot_id, kind, event, at, held_seconds, record)
        SELECT e.slot_id, 'allocation', 'released', clock_timestamp(), e.held_seconds, e.record -> 'lease' FROM ended e
    )
    SELECT e.place, (e.record ->> 'total_allocated_seconds')::double precision, e.record ->> 'unsaved' FROM ended e
    UNION ALL
    SELECT a.place, (s.record ->> 'total_allocated_seconds')::double precision, s.record ->> 'unsaved'
    FROM asked a JOIN repopool.slot s ON s.slot_id = a.slot_id
    WHERE a.is_repeated AND s.hold_id = a.hold_id AND s.token = a.token AND s.state = 'cleaning';
END $$;

-- Write the records of held slots and let go of them; whether each was done, in order.
CREATE FUNCTION repopool.let_go_with(
    p_slots text[], p_holds uuid[], p_tokens bigint[], p_states text[], p_commits text[], p_branches text[],
    p_records jsonb[], p_repeated boolean[]
) RETURNS boolean[] LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET lock_timeout = '1s' AS $$
DECLARE
    v_done boolean[];
BEGIN
    WITH asked AS MATERIALIZED (
        SELECT a.* FROM unnest(p_slots, p_holds, p_tokens, p_states, p_commits, p_branches, p_records, p_repeated)
            WITH ORDINALITY a (slot_id, hold_id, token, state, commit, branch, record, is_repeated, place)
    ), ended AS (
        UPDATE repopool.slot s SET state = a.state, sealed_commit = a.commit, sealed_branch = a.branch,
            record = a.record, session_id = NULL, hold_id = NULL, ended_hold_id = a.hold_id, leased_at = NULL,
            expires_at = NULL, overwritten = NULL
        FROM asked a WHERE s.slot_id = a.slot_id AND s.token = a.token AND s.hold_id = a.hold_id
        RETURNING a.place
    )
    SELECT array_agg(e.place IS NOT NULL OR (a.is_repeated AND EXISTS (
        SELECT FROM repopool.slot s WHERE s.slot_id = a.slot_id AND s.ended_hold_id = a.hold_id)) ORDER BY a.place)
    INTO v_done FROM asked a LEFT JOIN ended e ON e.place = a.place;
    RETURN v_done;
END $$;

-- Release slots. They are committed as free before anybody looks for waiters: see `collect`.
CREATE PROCEDURE repopool.finish(
    p_slots text[], p_pools text[], p_holds uuid[], p_tokens bigint[], p_states text[], p_commits text[],
    p_branches text[], p_records jsonb[], p_repeated boolean[], INOUT p_done boolean[]
) LANGUAGE plpgsql AS $$
DECLARE
    v_pools text[] := ARRAY(SELECT DISTINCT unnest(p_pools));
    v_pool text;
BEGIN
    p_done := repopool.let_go_with(
        p_slots, p_holds, p_tokens, p_states, p_commits, p_branches, p_records, p_repeated);
    COMMIT;
    FOREACH v_pool IN ARRAY v_pools LOOP
        PERFORM repopool.hand_off(v_pool);
        COMMIT; -- it may hold this pool's lock
    END LOOP;
END $$;
