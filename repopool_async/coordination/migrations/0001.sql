-- Slots, leases, waiters and what else the processes of a pool share. All clocks are the server's clock_timestamp().
--
-- Nothing that a claim or a heartbeat changes is indexed and half of every page is left free, so that these updates are
-- HOT: no index grows, and no vacuum is waited for.

CREATE TABLE repopool.session (
    session_id uuid PRIMARY KEY,        -- one per life of a process; never used again
    owner jsonb NOT NULL,               -- for people
    channel text NOT NULL,              -- where its process listens
    ttl interval NOT NULL,
    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- This life of the server: started, or promoted, at another time it is another one.
CREATE TABLE repopool.incarnation (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    identity text NOT NULL,
    noticed_at timestamptz NOT NULL
);

CREATE TABLE repopool.pool (
    name text PRIMARY KEY,
    record jsonb NOT NULL,
    next_slot_number bigint NOT NULL DEFAULT 1
);

CREATE TABLE repopool.slot (
    slot_id text PRIMARY KEY,
    pool text NOT NULL REFERENCES repopool.pool (name) ON DELETE CASCADE,
    number bigint NOT NULL,
    host_id text NOT NULL DEFAULT '',
    labels text[] NOT NULL DEFAULT '{}',
    state text NOT NULL CHECK (state IN ('available', 'allocated', 'cleaning', 'error', 'parked')),
    token bigint NOT NULL,              -- grows with every lease and every taking-away
    session_id uuid,                    -- who works on it; a detached lease is nobody's, but has an expiry
    hold_id uuid,                       -- chosen by the client, so that it can give back what it was never told of
    ended_hold_id uuid,                 -- the last hold that was finished, so that its release may be repeated
    sealed_commit text,                 -- null unless it may be leased once it is available
    sealed_branch text,
    leased_at timestamptz,
    expires_at timestamptz,             -- of a detached lease
    overwritten jsonb,                  -- what the claim replaced in the record, to undo it
    record jsonb NOT NULL,
    CHECK ((session_id IS NULL) = (hold_id IS NULL))
) WITH (
    fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX slot_pool ON repopool.slot (pool);

CREATE TABLE repopool.waiter (          -- empty unless a pool is exhausted
    ticket bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    pool text NOT NULL REFERENCES repopool.pool (name) ON DELETE CASCADE,
    session_id uuid NOT NULL,
    hold_id uuid NOT NULL UNIQUE,
    want jsonb,                         -- null for one that only wants to know when it is its turn
    slot_id text,                       -- what it was given
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    asked_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

CREATE TABLE repopool.history (
    id bigint GENERATED ALWAYS AS IDENTITY,
    slot_id text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('allocation', 'cleanup')),
    event text,                         -- these four of an allocation, whose lease is the record: put together when read
    at timestamptz,
    wait_seconds double precision,
    held_seconds double precision,
    record jsonb NOT NULL
);
CREATE INDEX history_slot ON repopool.history (slot_id, id);

CREATE TABLE repopool.named_lock (
    name text PRIMARY KEY,
    session_id uuid,
    hold_id uuid,
    owner jsonb,
    token bigint NOT NULL DEFAULT 0,    -- grows with every holder
    acquired_at timestamptz
) WITH (fillfactor = 50);

-- Small things

CREATE FUNCTION repopool.in_iso(moment timestamptz) RETURNS text LANGUAGE sql STABLE AS
$$ SELECT to_char(moment AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"') $$;

CREATE FUNCTION repopool.seconds_since(moment timestamptz) RETURNS double precision LANGUAGE sql VOLATILE AS
$$ SELECT extract(epoch FROM clock_timestamp() - moment)::double precision $$;

-- From here on plpgsql, also for a single statement: it keeps its plans, and a function in SQL is planned at every call.

CREATE FUNCTION repopool.texts(list jsonb) RETURNS text[] LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN ARRAY(SELECT jsonb_array_elements_text(list));
END $$;

CREATE FUNCTION repopool.is_alive(p_session uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    RETURN EXISTS (SELECT FROM repopool.session WHERE session_id = p_session AND expires_at > clock_timestamp());
END $$;

CREATE FUNCTION repopool.require_session(p_session uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM repopool.session WHERE session_id = p_session AND expires_at > clock_timestamp()
    ) THEN
        RAISE EXCEPTION 'the session has expired' USING ERRCODE = 'RP001';
    END IF;
END $$;

-- A line of allocation history; a record that has no lease has none.
CREATE FUNCTION repopool.remember(
    p_event text, p_record jsonb, p_wait double precision, p_held double precision
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF jsonb_typeof(p_record -> 'lease') = 'object' THEN
        INSERT INTO repopool.history (slot_id, kind, event, at, wait_seconds, held_seconds, record)
        VALUES (p_record ->> 'slot_id', 'allocation', p_event, clock_timestamp(), p_wait, p_held, p_record -> 'lease');
    END IF;
END $$;

-- Keep a slot's logs short. Ids are counted over all slots, so each slot is looked after every now and then.
CREATE FUNCTION repopool.shorten_log() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM repopool.history h WHERE h.slot_id = NEW.slot_id AND h.kind = NEW.kind AND h.id <= (
        SELECT o.id FROM repopool.history o WHERE o.slot_id = NEW.slot_id AND o.kind = NEW.kind
        ORDER BY o.id DESC OFFSET 2000 LIMIT 1);
    RETURN NULL;
END $$;
CREATE TRIGGER shorten_log AFTER INSERT ON repopool.history FOR EACH ROW WHEN (NEW.id % 256 = 0)
EXECUTE FUNCTION repopool.shorten_log();

-- Sessions

-- A session that is late but not yet reaped comes back, so that an outage of the database costs nobody a lease. Once its
-- row is gone there is no row: all is lost. The row's lock keeps a beat and a reaper apart.
CREATE FUNCTION repopool.beat(p_session uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE repopool.session SET expires_at = clock_timestamp() + ttl WHERE session_id = p_session;
    RETURN FOUND;
END $$;

-- Claiming

-- Lease a free slot: a preferred one, else one that stands at the commit, else any. Two or three short looks cost a
-- fifth of one that sorts.
CREATE FUNCTION repopool.take(p_pool text, p_session uuid, p_hold uuid, p_want jsonb, p_waited double precision)
RETURNS SETOF repopool.slot LANGUAGE plpgsql AS $$
DECLARE
    v_prefer text[] := '{}';
    v_exclude text[] := '{}';
    v_hosts text[] := '{}';
    v_labels text[] := '{}';
    v_commit text := p_want -> 'lease' ->> 'commit';
    v_ttl double precision := (p_want ->> 'ttl')::double precision;
    v_boottime double precision := (p_want ->> 'asked_boottime')::double precision + p_waited;
    v_now timestamptz := clock_timestamp();
    v_at text := repopool.in_iso(v_now);
    v_id text;
    v_slot repopool.slot;
BEGIN
    IF jsonb_typeof(p_want -> 'limits') = 'object' THEN
        v_prefer := repopool.texts(p_want -> 'limits' -> 'prefer');
        v_exclude := repopool.texts(p_want -> 'limits' -> 'exclude');
        v_hosts := repopool.texts(p_want -> 'limits' -> 'exclude_hosts');
        v_labels := repopool.texts(p_want -> 'limits' -> 'labels');
    END IF;
    FOR look IN 1..3 LOOP
        CONTINUE WHEN (look = 1 AND v_prefer = '{}') OR (look = 2 AND v_commit IS NULL);
        SELECT s.slot_id INTO v_id FROM repopool.slot s
        WHERE s.pool = p_pool AND s.state = 'available' AND s.session_id IS NULL AND s.sealed_commit IS NOT NULL
          AND s.slot_id <> ALL (v_exclude) AND s.host_id <> ALL (v_hosts) AND s.labels @> v_labels
          AND (look <> 1 OR s.slot_id = ANY (v_prefer)) AND (look <> 2 OR s.sealed_commit = v_commit)
        LIMIT 1 FOR UPDATE SKIP LOCKED;
        EXIT WHEN FOUND;
    END LOOP;
    IF v_id IS NULL THEN
        RETURN;
    END IF;
    UPDATE repopool.slot s SET
        state = 'allocated', token = s.token + 1, session_id = p_session, hold_id = p_hold, leased_at = v_now,
        expires_at = v_now + make_interval(secs => v_ttl),
        overwritten = jsonb_build_object('last_used_at', s.record -> 'last_used_at',
            'last_branch', s.record -> 'last_branch', 'allocation_count', s.record -> 'allocation_count'),
        record = s.record || jsonb_build_object(
            'state', 'allocated', 'token', s.token + 1, 'error', NULL, 'last_used_at', v_at,
            'last_branch', p_want -> 'lease' -> 'branch',
            'allocation_count', (s.record ->> 'allocation_count')::bigint + 1,
            'lease', (p_want -> 'lease') || jsonb_build_object('token', s.token + 1,
                'acquired_at', v_at, 'acquired_boottime', v_boottime,
                'expires_boottime', v_boottime + v_ttl))
    WHERE s.slot_id = v_id RETURNING s.* INTO v_slot;
    PERFORM repopool.remember(
        'allocated', v_slot.record, (p_want ->> 'wait_seconds')::double precision + p_waited, NULL);
    RETURN NEXT v_slot;
END $$;

CREATE FUNCTION repopool.has_waiters(p_pool text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    RETURN EXISTS (SELECT FROM repopool.waiter w WHERE w.pool = p_pool AND w.slot_id IS NULL
                   AND w.asked_at > clock_timestamp() - interval '5 s' AND repopool.is_alive(w.session_id));
END $$;

CREATE FUNCTION repopool.claim(p_pool text, p_session uuid, p_hold uuid, p_want jsonb, p_stand_back boolean)
RETURNS TABLE (record text, overwritten text) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM repopool.require_session(p_session);
    IF p_stand_back AND repopool.has_waiters(p_pool) THEN
        RETURN;
    END IF;
    RETURN QUERY SELECT t.record::text, t.overwritten::text
        FROM repopool.take(p_pool, p_session, p_hold, p_want, 0) t;
END $$;

-- Give free slots to those who wait, the oldest first; the only place that notifies. One at a time per pool: two at
-- once could each overlook what the other has locked, and leave a free slot beside a waiter.
CREATE FUNCTION repopool.hand_off(p_pool text) RETURNS void LANGUAGE plpgsql AS $$
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
        IF FOUND THEN
            UPDATE repopool.waiter x SET slot_id = v_slot_id WHERE x.ticket = w.ticket;
            PERFORM pg_notify(w.channel, w.hold_id::text);
        ELSIF w.want -> 'limits' = 'null' THEN
            RETURN; -- nothing is free at all
        END IF;
    END LOOP;
END $$;

CREATE FUNCTION repopool.draw(p_pool text, p_session uuid, p_hold uuid, p_want jsonb) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM repopool.require_session(p_session);
    IF NOT EXISTS (SELECT FROM repopool.pool WHERE name = p_pool) THEN
        RETURN false;
    END IF;
    INSERT INTO repopool.waiter (pool, session_id, hold_id, want) VALUES (p_pool, p_session, p_hold, p_want);
    RETURN true;
END $$;

-- Note that a waiter is still there, and return whether it is its turn.
CREATE FUNCTION repopool.ask(p_pool text, p_hold uuid) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_ticket bigint;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE repopool.waiter SET asked_at = clock_timestamp() WHERE hold_id = p_hold RETURNING ticket INTO v_ticket;
    RETURN v_ticket IS NOT NULL AND NOT EXISTS (
        SELECT FROM repopool.waiter w WHERE w.pool = p_pool AND w.ticket < v_ticket AND w.slot_id IS NULL
        AND w.asked_at > clock_timestamp() - interval '5 s' AND repopool.is_alive(w.session_id));
END $$;

-- What a waiter was given. Each step is a transaction: who frees a slot first commits and then looks for waiters, who
-- waits first commits that it does and then looks for slots, so that one of the two sees the other.
CREATE PROCEDURE repopool.collect(p_pool text, p_session uuid, p_hold uuid, INOUT p_record text, INOUT p_overwritten text)
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM repopool.ask(p_pool, p_hold);
    COMMIT;
    PERFORM repopool.hand_off(p_pool);
    COMMIT;
    IF EXISTS (SELECT FROM repopool.waiter w WHERE w.hold_id = p_hold AND w.slot_id IS NULL) THEN
        RETURN;
    END IF;
    SELECT s.record::text, s.overwritten::text INTO p_record, p_overwritten FROM repopool.slot s
    WHERE s.pool = p_pool AND s.session_id = p_session AND s.hold_id = p_hold;
    DELETE FROM repopool.waiter w WHERE w.hold_id = p_hold;
END $$;

-- Giving back

CREATE FUNCTION repopool.begin_return(p_slot text, p_hold uuid, p_token bigint, p_is_repeated boolean)
RETURNS TABLE (total_seconds double precision, unsaved text) LANGUAGE plpgsql AS $$
DECLARE
    v_held double precision;
    v_record jsonb;
BEGIN
    -- Should it be lost with the server, the lease has not ended: what follows does not mind.
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE repopool.slot s SET state = 'cleaning', expires_at = NULL, overwritten = NULL,
        record = s.record || jsonb_build_object('state', 'cleaning', 'error', NULL,
            'unsaved', coalesce(s.record ->> 'unsaved', 'returned'),
            'total_allocated_seconds',
            (s.record ->> 'total_allocated_seconds')::double precision + repopool.seconds_since(s.leased_at))
    WHERE s.slot_id = p_slot AND s.hold_id = p_hold AND s.token = p_token
      AND s.state = 'allocated' AND (s.expires_at IS NULL OR s.expires_at > clock_timestamp())
    RETURNING s.record, repopool.seconds_since(s.leased_at) INTO v_record, v_held;
    IF FOUND THEN
        PERFORM repopool.remember('released', v_record, NULL, v_held);
        RETURN QUERY SELECT (v_record ->> 'total_allocated_seconds')::double precision, v_record ->> 'unsaved';
    ELSIF p_is_repeated THEN
        RETURN QUERY SELECT (s.record ->> 'total_allocated_seconds')::double precision, s.record ->> 'unsaved' FROM repopool.slot s
        WHERE s.slot_id = p_slot AND s.hold_id = p_hold AND s.token = p_token AND s.state = 'cleaning';
    END IF;
END $$;

-- Write a held slot's record; an expiry that was renewed meanwhile stays.
CREATE FUNCTION repopool.write(
    p_slot text, p_hold uuid, p_token bigint, p_state text, p_commit text, p_branch text, p_record jsonb
) RETURNS TABLE (record text) LANGUAGE plpgsql AS $$
BEGIN
    RETURN QUERY UPDATE repopool.slot s SET state = p_state, sealed_commit = p_commit, sealed_branch = p_branch,
        overwritten = NULL,
        record = CASE WHEN s.expires_at IS NOT NULL
                       AND p_record -> 'lease' -> 'lease_id' = s.record -> 'lease' -> 'lease_id'
            THEN jsonb_set(p_record, '{lease,expires_boottime}', s.record -> 'lease' -> 'expires_boottime')
            ELSE p_record END
    WHERE s.slot_id = p_slot AND s.token = p_token
      AND (s.hold_id = p_hold
           OR (s.hold_id IS NULL AND s.state = 'allocated' AND s.expires_at IS NOT NULL))
      AND (s.expires_at IS NULL OR s.expires_at > clock_timestamp())
    RETURNING s.record::text;
END $$;

CREATE PROCEDURE repopool.finish(
    p_slot text, p_pool text, p_hold uuid, p_token bigint, p_state text, p_commit text, p_branch text, p_record jsonb,
    p_is_repeated boolean, INOUT p_is_done boolean
) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE repopool.slot s SET state = p_state, sealed_commit = p_commit, sealed_branch = p_branch, record = p_record,
        session_id = NULL, hold_id = NULL, ended_hold_id = p_hold, leased_at = NULL, expires_at = NULL,
        overwritten = NULL
    WHERE s.slot_id = p_slot AND s.token = p_token AND s.hold_id = p_hold;
    p_is_done := FOUND;
    IF NOT p_is_done THEN
        p_is_done := p_is_repeated
            AND EXISTS (SELECT FROM repopool.slot s WHERE s.slot_id = p_slot AND s.ended_hold_id = p_hold);
        RETURN;
    END IF;
    COMMIT;
    PERFORM repopool.hand_off(p_pool);
END $$;

-- Undo what a client may or may not have been given; it names it by the id that it chose itself. A claim is undone
-- altogether, but for the token. May be repeated.
CREATE PROCEDURE repopool.abandon(p_pool text, p_hold uuid, p_is_new boolean) LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM repopool.waiter w WHERE w.hold_id = p_hold;
    IF p_is_new THEN
        DELETE FROM repopool.slot s WHERE s.pool = p_pool AND s.hold_id = p_hold;
    END IF;
    PERFORM repopool.remember('released', s.record, NULL, 0) FROM repopool.slot s
    WHERE s.pool = p_pool AND s.hold_id = p_hold AND s.overwritten IS NOT NULL;
    UPDATE repopool.slot s SET session_id = NULL, hold_id = NULL, overwritten = NULL,
        state = CASE WHEN s.overwritten IS NULL THEN s.state ELSE 'available' END,
        leased_at = CASE WHEN s.overwritten IS NULL THEN s.leased_at END,
        expires_at = CASE WHEN s.overwritten IS NULL THEN s.expires_at END,
        record = CASE WHEN s.overwritten IS NULL THEN s.record
            ELSE s.record || s.overwritten || '{"state": "available", "lease": null}' END
    WHERE s.pool = p_pool AND s.hold_id = p_hold;
    COMMIT;
    PERFORM repopool.hand_off(p_pool);
END $$;

-- Let go of a held slot as it is.
CREATE PROCEDURE repopool.let_go(p_slot text, p_pool text, p_hold uuid) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE repopool.slot s SET session_id = NULL, hold_id = NULL, overwritten = NULL
    WHERE s.slot_id = p_slot AND s.hold_id = p_hold;
    COMMIT;
    PERFORM repopool.hand_off(p_pool);
END $$;

-- Detached leases: the token is all that is needed.

CREATE FUNCTION repopool.renew(p_slot text, p_token bigint, p_ttl double precision, p_lets_go boolean)
RETURNS TABLE (record text) LANGUAGE plpgsql AS $$
BEGIN
    RETURN QUERY UPDATE repopool.slot s SET
        expires_at = CASE WHEN s.expires_at IS NULL OR p_ttl IS NULL THEN s.expires_at
            ELSE clock_timestamp() + make_interval(secs => p_ttl) END,
        session_id = CASE WHEN p_lets_go THEN NULL ELSE s.session_id END,
        hold_id = CASE WHEN p_lets_go THEN NULL ELSE s.hold_id END,
        overwritten = CASE WHEN p_lets_go THEN NULL ELSE s.overwritten END,
        record = CASE WHEN s.expires_at IS NULL OR p_ttl IS NULL THEN s.record
            ELSE jsonb_set(s.record, '{lease,expires_boottime}',
                to_jsonb((s.record -> 'lease' ->> 'acquired_boottime')::double precision
                         + repopool.seconds_since(s.leased_at) + p_ttl)) END
    WHERE s.slot_id = p_slot AND s.token = p_token AND s.state = 'allocated'
      AND (s.expires_at IS NULL OR s.expires_at > clock_timestamp())
    RETURNING s.record::text;
END $$;

-- The dead

CREATE FUNCTION repopool.settled_for() RETURNS interval LANGUAGE plpgsql AS $$
DECLARE
    v_identity text := pg_postmaster_start_time()::text || ' ' || left(pg_walfile_name(pg_current_wal_lsn()), 8);
    v_noticed timestamptz;
BEGIN
    SELECT noticed_at INTO v_noticed FROM repopool.incarnation WHERE identity = v_identity;
    IF NOT FOUND THEN
        INSERT INTO repopool.incarnation (identity, noticed_at) VALUES (v_identity, clock_timestamp())
        ON CONFLICT (is_only) DO UPDATE SET identity = excluded.identity, noticed_at = excluded.noticed_at
        RETURNING noticed_at INTO v_noticed;
    END IF;
    RETURN clock_timestamp() - v_noticed;
END $$;

-- Take everything from sessions that are gone: "held, but by no session", never a join with the dead ones, whose rows
-- may be lost with a crash. Held slots keep their state; those that nobody may get before they were cleaned are orphans.
CREATE FUNCTION repopool.bury() RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    v_pools text[];
BEGIN
    DELETE FROM repopool.waiter w
    WHERE NOT EXISTS (SELECT FROM repopool.session z WHERE z.session_id = w.session_id);
    WITH dead AS MATERIALIZED (
        SELECT s.slot_id FROM repopool.slot s WHERE s.session_id IS NOT NULL
        AND NOT EXISTS (SELECT FROM repopool.session z WHERE z.session_id = s.session_id) FOR UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE repopool.slot s SET session_id = NULL, hold_id = NULL, overwritten = NULL,
            -- A detached lease is not its process's: its token stays good.
            token = s.token + CASE WHEN s.expires_at IS NULL THEN 1 ELSE 0 END,
            record = CASE WHEN s.expires_at IS NULL
                THEN s.record || jsonb_build_object('token', s.token + 1) ELSE s.record END
        FROM dead d WHERE s.slot_id = d.slot_id RETURNING s.pool
    )
    SELECT coalesce(array_agg(DISTINCT t.pool), '{}') INTO v_pools FROM taken t;
    RETURN v_pools;
END $$;

-- End the sessions whose processes no longer beat, and take from them what they held. Any process may call it that is
-- alive itself: who was cut off would take all others for dead that were cut off with it. Nobody is ended in the first
-- time after the server started or was promoted: then nobody could beat.
CREATE PROCEDURE repopool.reap(
    p_session uuid, p_grace double precision, p_is_full boolean, INOUT p_reaped integer
) LANGUAGE plpgsql AS $$
DECLARE
    v_settled interval;
    v_pools text[] := '{}';
    v_pool text;
BEGIN
    p_reaped := 0;
    IF NOT repopool.is_alive(p_session) OR NOT pg_try_advisory_xact_lock(1919250033) THEN
        RETURN;
    END IF;
    v_settled := repopool.settled_for();
    DELETE FROM repopool.session z USING (
        SELECT y.session_id FROM repopool.session y
        WHERE y.expires_at < clock_timestamp() - make_interval(secs => p_grace) AND v_settled > y.ttl
        FOR UPDATE SKIP LOCKED) late
    WHERE z.session_id = late.session_id;
    GET DIAGNOSTICS p_reaped = ROW_COUNT;
    IF p_reaped > 0 OR p_is_full THEN
        v_pools := repopool.bury();
    END IF;
    COMMIT;
    FOREACH v_pool IN ARRAY v_pools LOOP
        PERFORM repopool.hand_off(v_pool);
        COMMIT;
    END LOOP;
END $$;

-- A process that ends in good order takes its session with it.
CREATE PROCEDURE repopool.end_session(p_session uuid) LANGUAGE plpgsql AS $$
DECLARE
    v_pools text[];
    v_pool text;
BEGIN
    DELETE FROM repopool.session WHERE session_id = p_session;
    v_pools := repopool.bury();
    COMMIT;
    FOREACH v_pool IN ARRAY v_pools LOOP
        PERFORM repopool.hand_off(v_pool);
        COMMIT;
    END LOOP;
END $$;

-- Hosts

-- A host does not answer: its leases are lost, and nobody gets its slots before it is back and they were cleaned.
-- Quarantined slots keep their reason.
CREATE FUNCTION repopool.park_host(p_host text, p_reason text) RETURNS SETOF text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM repopool.remember('forced', s.record, NULL, repopool.seconds_since(s.leased_at))
    FROM repopool.slot s WHERE s.host_id = p_host AND s.state = 'allocated';
    RETURN QUERY UPDATE repopool.slot s SET state = 'parked', token = s.token + 1, session_id = NULL, hold_id = NULL,
        leased_at = NULL, expires_at = NULL, overwritten = NULL, sealed_commit = NULL, sealed_branch = NULL,
        record = s.record || jsonb_build_object('state', 'error', 'error', p_reason, 'token', s.token + 1)
            || CASE WHEN s.state = 'allocated' THEN jsonb_build_object(
                'unsaved', coalesce(s.record ->> 'unsaved', 'forced'), 'total_allocated_seconds',
                (s.record ->> 'total_allocated_seconds')::double precision + repopool.seconds_since(s.leased_at))
               ELSE '{}' END
    WHERE s.host_id = p_host AND s.state IN ('available', 'allocated', 'cleaning') RETURNING s.slot_id;
END $$;

CREATE FUNCTION repopool.unpark_host(p_host text) RETURNS SETOF text LANGUAGE sql AS $$
    UPDATE repopool.slot s SET state = 'cleaning',
        record = s.record || '{"state": "cleaning", "error": null}'
    WHERE s.host_id = p_host AND s.state = 'parked' RETURNING s.slot_id
$$;
