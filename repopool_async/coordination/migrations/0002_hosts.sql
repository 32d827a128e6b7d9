-- What managers must agree on about the machines that hold slots.

-- Which database this is, wherever it is moved or restored to.
CREATE TABLE repopool.identity (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    identity uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO repopool.identity DEFAULT VALUES;

CREATE TABLE repopool.host (
    name text PRIMARY KEY,
    record jsonb,                       -- its condition, and what it is where no configuration says; null: nothing
    place uuid UNIQUE,                  -- the directory there, which bears the same id; two names are two directories
    described text                      -- the place, for people
);
