-- Version 1. Never edited once it has been released: what changes is a new version.
-- Times are UTC, RFC 3339 with six digits of a second, so that they sort as text.

-- What a service is. Its addresses have a table of their own, so that no two services can claim one.
CREATE TABLE services (
    name       TEXT PRIMARY KEY,
    settings   TEXT NOT NULL,
    changed_at TEXT NOT NULL
) STRICT;

CREATE TABLE service_addresses (
    address TEXT PRIMARY KEY,
    service TEXT NOT NULL REFERENCES services (name) ON DELETE CASCADE
) STRICT;

-- The resource table of logical computers (patent Fig. 5).
CREATE TABLE partitions (
    name        TEXT PRIMARY KEY,                                              -- 501
    cpu_percent INTEGER NOT NULL CHECK (cpu_percent > 0),                      -- 502
    memory      INTEGER NOT NULL CHECK (memory > 0),                           -- 503, bytes
    network     TEXT,                                                          -- 505
    role        TEXT NOT NULL CHECK (role IN ('active', 'standby', 'retiring')),
    state       TEXT NOT NULL CHECK (state IN ('defined', 'running', 'stopped', 'failed')),
    service     TEXT REFERENCES services (name),                               -- none: an unassigned standby
    generation  INTEGER NOT NULL CHECK (generation >= 0),
    definition  TEXT NOT NULL,
    changed_at  TEXT NOT NULL,
    CHECK (role = 'standby' OR service IS NOT NULL)
) STRICT;
CREATE UNIQUE INDEX one_active ON partitions (service) WHERE role = 'active';

CREATE TABLE disks (                                                           -- 504
    partition TEXT NOT NULL REFERENCES partitions (name) ON DELETE CASCADE,
    name      TEXT NOT NULL,
    sectors   INTEGER NOT NULL CHECK (sectors > 0),                            -- of 512 bytes
    backing   TEXT NOT NULL,
    cow       TEXT,
    PRIMARY KEY (partition, name)
) STRICT;

-- Who serves: what is believed after a boot, when no phase word is left.
CREATE TABLE primaries (
    service     TEXT PRIMARY KEY REFERENCES services (name) ON DELETE CASCADE,
    partition   TEXT NOT NULL REFERENCES partitions (name),
    generation  INTEGER NOT NULL CHECK (generation >= 0),
    recorded_at TEXT NOT NULL
) STRICT;

-- The patch table (patent Fig. 6). Column 607 is the newest row of patch_results.
CREATE TABLE patches (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    file         TEXT NOT NULL,                                                -- 601
    security     INTEGER NOT NULL CHECK (security IN (0, 1)),                  -- 602
    enhancement  INTEGER NOT NULL CHECK (enhancement IN (0, 1)),               -- 603
    bugfix       INTEGER NOT NULL CHECK (bugfix IN (0, 1)),                    -- 604
    issued_at    TEXT NOT NULL,                                                -- 605
    decision     TEXT NOT NULL                                                 -- 606
                 CHECK (decision IN ('pending', 'approved', 'rejected', 'held', 'superseded')),
    decided_by   TEXT NOT NULL,
    decided_how  TEXT NOT NULL,
    decided_at   TEXT NOT NULL,
    sha256       TEXT NOT NULL UNIQUE CHECK (length(sha256) = 64),
    size         INTEGER NOT NULL CHECK (size >= 0),
    source       TEXT NOT NULL,
    driver       TEXT NOT NULL CHECK (driver IN ('deb', 'script')),
    package      TEXT,
    version      TEXT,
    architecture TEXT,
    added_at     TEXT NOT NULL,
    CHECK (security + enhancement + bugfix > 0)
) STRICT;
CREATE TRIGGER patches_are_what_they_are BEFORE UPDATE OF id, file, sha256, size, source, driver ON patches
BEGIN SELECT RAISE(ABORT, 'a patch does not change'); END;

CREATE TABLE jobs (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    service     TEXT NOT NULL,
    kind        TEXT NOT NULL,
    plan        TEXT NOT NULL,
    pid         INTEGER NOT NULL,
    boot_id     TEXT NOT NULL,
    started_at  TEXT NOT NULL,
    ended_at    TEXT,
    exit_code   INTEGER,
    message     TEXT,
    CHECK ((ended_at IS NULL) = (exit_code IS NULL))
) STRICT;
CREATE UNIQUE INDEX one_open_job ON jobs (service) WHERE ended_at IS NULL;

-- The intent is written before the act, the outcome after it.
CREATE TABLE steps (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    job      INTEGER NOT NULL REFERENCES jobs (id),
    phase    TEXT NOT NULL,
    intent   TEXT NOT NULL,
    state    TEXT NOT NULL CHECK (state IN ('intended', 'done', 'failed', 'undone')),
    outcome  TEXT,
    began_at TEXT NOT NULL,
    ended_at TEXT,
    CHECK ((state = 'intended') = (ended_at IS NULL))
) STRICT;
CREATE INDEX steps_of_job ON steps (job);

-- History, never changed.
CREATE TABLE patch_results (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    patch       INTEGER NOT NULL REFERENCES patches (id),
    job         INTEGER NOT NULL REFERENCES jobs (id),
    partition   TEXT NOT NULL,
    attempt     INTEGER NOT NULL,
    success     INTEGER NOT NULL CHECK (success IN (0, 1)),
    exit_code   INTEGER,
    signal      INTEGER,
    failure     TEXT,
    duration_ms INTEGER NOT NULL,
    log_digest  TEXT NOT NULL,
    log_tail    TEXT NOT NULL,
    boot_id     TEXT NOT NULL,
    recorded_at TEXT NOT NULL,
    UNIQUE (patch, job),
    UNIQUE (patch, attempt)
) STRICT;
CREATE TRIGGER results_are_not_changed BEFORE UPDATE ON patch_results
BEGIN SELECT RAISE(ABORT, 'results are only added'); END;
CREATE TRIGGER results_are_not_removed BEFORE DELETE ON patch_results
BEGIN SELECT RAISE(ABORT, 'results are only added'); END;

-- What runs in a service's active partition: results of a clone that was given back or rolled back do not count.
CREATE TABLE applied (
    service TEXT NOT NULL REFERENCES services (name) ON DELETE CASCADE,
    patch   INTEGER NOT NULL REFERENCES patches (id),
    job     INTEGER NOT NULL REFERENCES jobs (id),
    PRIMARY KEY (service, patch)
) STRICT;

CREATE TABLE audit (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at      TEXT NOT NULL,
    who     TEXT NOT NULL,
    how     TEXT NOT NULL,
    subject TEXT NOT NULL,
    action  TEXT NOT NULL,
    before  TEXT NOT NULL,
    after   TEXT NOT NULL
) STRICT;
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END;
CREATE TRIGGER audit_is_not_removed BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END;
