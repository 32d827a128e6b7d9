-- A claim can name the host that it would rather have, and costs less.

-- What a CHECK says is parsed anew by every statement that writes: a seventh of a claim. These columns are written by
-- the functions here and by one statement of the library, with constants.
ALTER TABLE repopool.slot DROP CONSTRAINT slot_state_check, DROP CONSTRAINT slot_check;
ALTER TABLE repopool.history DROP CONSTRAINT history_kind_check;

DROP FUNCTION repopool.take(text, uuid, uuid, jsonb, double precision);
DROP FUNCTION repopool.claim(text, uuid, uuid, jsonb, boolean);
DROP FUNCTION repopool.begin_return(text, uuid, bigint, boolean);

-- Lease a free slot: a preferred one, else one that stands at the commit, else any, of these two first one on the host
-- that is asked for. A few short looks cost a fifth of one that sorts. Nulls where none is free, or the session is not.
-- Every plan is kept, whatever the arguments: planning costs more than what a better plan could save.
CREATE FUNCTION repopool.take(
    p_pool text, p_session uuid, p_hold uuid, p_want jsonb, p_waited double precision,
    OUT slot_id text, OUT record text, OUT overwritten text
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_prefer text[] := '{}';
    v_exclude text[] := '{}';
    v_hosts text[] := '{}';
    v_labels text[] := '{}';
    v_lease jsonb := p_want -> 'lease';
    v_commit text := v_lease ->> 'commit';
    v_host text := p_want ->> 'host';
    v_ttl double precision := (p_want ->> 'ttl')::double precision;
    v_boottime double precision := (p_want ->> 'asked_boottime')::double precision + p_waited;
    v_now timestamptz := clock_timestamp();
    v_at text := repopool.in_iso(v_now);
BEGIN
    IF jsonb_typeof(p_want -> 'limits') = 'object' THEN
        v_prefer := repopool.texts(p_want -> 'limits' -> 'prefer');
        v_exclude := repopool.texts(p_want -> 'limits' -> 'exclude');
        v_hosts := repopool.texts(p_want -> 'limits' -> 'exclude_hosts');
        v_labels := repopool.texts(p_want -> 'limits' -> 'labels');
    END IF;
    FOR look IN 1..5 LOOP
        CONTINUE WHEN (look = 1 AND v_prefer = '{}') OR (look IN (2, 3) AND v_commit IS NULL)
            OR (look IN (2, 4) AND v_host IS NULL);
        WITH pick AS MATERIALIZED (
            SELECT s.slot_id FROM repopool.slot s
            WHERE s.pool = p_pool AND s.state = 'available' AND s.session_id IS NULL AND s.sealed_commit IS NOT NULL
              AND s.slot_id <> ALL (v_exclude) AND s.host_id <> ALL (v_hosts) AND s.labels @> v_labels
              AND (look <> 1 OR s.slot_id = ANY (v_prefer)) AND (look NOT IN (2, 3) OR s.sealed_commit = v_commit)
              AND (look NOT IN (2, 4) OR s.host_id = v_host)
              AND EXISTS (SELECT FROM repopool.session z WHERE z.session_id = p_session AND z.expires_at > v_now)
            LIMIT 1 FOR UPDATE OF s SKIP LOCKED
        ), taken AS (
            UPDATE repopool.slot s SET
                state = 'allocated', token = s.token + 1, session_id = p_session, hold_id = p_hold, leased_at = v_now,
                expires_at = v_now + make_interval(secs => v_ttl),
                overwritten = jsonb_build_object('last_used_at', s.record -> 'last_used_at',
                    'last_branch', s.record -> 'last_branch', 'allocation_count', s.record -> 'allocation_count'),
                record = s.record || jsonb_build_object(
                    'state', 'allocated', 'token', s.token + 1, 'error', NULL, 'last_used_at', v_at,
                    'last_branch', v_lease -> 'branch',
                    'allocation_count', (s.record ->> 'allocation_count')::bigint + 1,
                    'lease', v_lease || jsonb_build_object('token', s.token + 1,
                        'acquired_at', v_at, 'acquired_boottime', v_boottime,
                        'expires_boottime', v_boottime + v_ttl))
            FROM pick WHERE s.slot_id = pick.slot_id RETURNING s.slot_id, s.record, s.overwritten
        ), noted AS (
            INSERT INTO repopool.history (slot_id, kind, event, at, wait_seconds, record)
            SELECT t.slot_id, 'allocation', 'allocated', v_now,
                (p_want ->> 'wait_seconds')::double precision + p_waited, t.record -> 'lease' FROM taken t
        )
        SELECT t.slot_id, t.record::text, t.overwritten::text INTO slot_id, record, overwritten FROM taken t;
        EXIT WHEN FOUND;
    END LOOP;
END $$;

CREATE FUNCTION repopool.claim(
    p_pool text, p_session uuid, p_hold uuid, p_want jsonb, p_stand_back boolean,
    OUT record text, OUT overwritten text
) LANGUAGE plpgsql AS $$
BEGIN
    IF p_stand_back AND repopool.has_waiters(p_pool) THEN
        PERFORM repopool.require_session(p_session);
        RETURN;
    END IF;
    SELECT t.record, t.overwritten INTO record, overwritten
    FROM repopool.take(p_pool, p_session, p_hold, p_want, 0) t;
    IF record IS NULL THEN
        PERFORM repopool.require_session(p_session);
    END IF;
END $$;

-- As it was, but for what `take` returns.
CREATE OR REPLACE FUNCTION repopool.hand_off(p_pool text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    w record;
    v_slot_id text;
BEGIN
    IF NOT EXISTS (SELECT FROM repopool.waiter x WHERE x.pool = p_pool AND x.slot_id IS NULL) THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(1919250032, hashtext(p_pool));
    FOR w IN SELECT x.*, z.channel FROM repopool.waiter x JOIN repopool.session z USING (session_id)
             WHERE x.pool = p_pool AND x.slot_id IS NULL AND z.expires_at > clock_timestamp()
               AND x.asked_at > clock_timestamp() - interval '5 s' ORDER BY x.ticket LOOP
        PERFORM FROM repopool.waiter x WHERE x.ticket = w.ticket AND x.slot_id IS NULL FOR UPDATE;
        CONTINUE WHEN NOT FOUND;
        IF w.want IS NULL THEN
            PERFORM pg_notify(w.channel, w.hold_id::text);
            RETURN;
        END IF;
        SELECT t.slot_id INTO v_slot_id
        FROM repopool.take(p_pool, w.session_id, w.hold_id, w.want, repopool.seconds_since(w.created_at)) t;
        IF v_slot_id IS NOT NULL THEN
            UPDATE repopool.waiter x SET slot_id = v_slot_id WHERE x.ticket = w.ticket;
            PERFORM pg_notify(w.channel, w.hold_id::text);
        ELSIF w.want -> 'limits' = 'null' AND repopool.is_alive(w.session_id) THEN
            RETURN; -- nothing is free at all
        END IF;
    END LOOP;
END $$;

-- Nulls where the lease was taken away.
CREATE FUNCTION repopool.begin_return(
    p_slot text, p_hold uuid, p_token bigint, p_is_repeated boolean,
    OUT total_seconds double precision, OUT unsaved text
) LANGUAGE plpgsql AS $$
BEGIN
    WITH ended AS (
        UPDATE repopool.slot s SET state = 'cleaning', expires_at = NULL, overwritten = NULL,
            record = s.record || jsonb_build_object('state', 'cleaning', 'error', NULL,
                'unsaved', coalesce(s.record ->> 'unsaved', 'returned'),
                'total_allocated_seconds',
                (s.record ->> 'total_allocated_seconds')::double precision + repopool.seconds_since(s.leased_at))
        WHERE s.slot_id = p_slot AND s.hold_id = p_hold AND s.token = p_token
          AND s.state = 'allocated' AND (s.expires_at IS NULL OR s.expires_at > clock_timestamp())
        RETURNING s.record, repopool.seconds_since(s.leased_at) AS held_seconds
    ), noted AS (
        INSERT INTO repopool.history (slot_id, kind, event, at, held_seconds, record)
        SELECT p_slot, 'allocation', 'released', clock_timestamp(), e.held_seconds, e.record -> 'lease' FROM ended e
    )
    SELECT (e.record ->> 'total_allocated_seconds')::double precision, e.record ->> 'unsaved'
    INTO total_seconds, unsaved FROM ended e;
    IF FOUND THEN
        -- Should it be lost with the server, the lease has not ended: what follows does not mind.
        PERFORM set_config('synchronous_commit', 'off', true);
    ELSIF p_is_repeated THEN
        SELECT (s.record ->> 'total_allocated_seconds')::double precision, s.record ->> 'unsaved'
        INTO total_seconds, unsaved FROM repopool.slot s
        WHERE s.slot_id = p_slot AND s.hold_id = p_hold AND s.token = p_token AND s.state = 'cleaning';
    END IF;
END $$;
