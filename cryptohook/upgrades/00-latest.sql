-- v0 -> v2: Latest revision

-- Who sent each inbound Megolm session (sender data), one row a claim: a session ID that two devices claim has two rows.
CREATE TABLE sendertrust_session (
	session_id         TEXT    NOT NULL,
	sender_key         TEXT    NOT NULL, -- curve25519 of the device whose Olm session brought the key
	signing_key        TEXT    NOT NULL, -- ed25519 that the Olm message claims
	room_id            TEXT    NOT NULL,
	sender             TEXT    NOT NULL, -- MXID of the Olm sender
	source             TEXT    NOT NULL,
	legacy_session     BOOLEAN NOT NULL,
	state              TEXT    NOT NULL,
	reason             TEXT    NOT NULL,
	device_id          TEXT    NOT NULL,
	master_key         TEXT    NOT NULL,
	device_keys        TEXT,             -- JSON, only while the device is not proven
	retry_count        INTEGER NOT NULL,
	next_retry_time_ms BIGINT,           -- null: nothing is scheduled
	received_at_ms     BIGINT  NOT NULL,
	updated_at_ms      BIGINT  NOT NULL,

	PRIMARY KEY (session_id, sender_key)
);
CREATE INDEX sendertrust_session_retry_idx ON sendertrust_session (next_retry_time_ms, sender) WHERE next_retry_time_ms IS NOT NULL;
CREATE INDEX sendertrust_session_sender_idx ON sendertrust_session (sender, state);

-- The cross-signing identity of each user, with the signatures checked before the row was written.
CREATE TABLE sendertrust_identity (
	user_id          TEXT    PRIMARY KEY,
	master_key       TEXT    NOT NULL,
	first_master_key TEXT    NOT NULL,
	self_signing_key TEXT    NOT NULL, -- empty: none that the master key has signed
	verified_by      TEXT    NOT NULL, -- our user-signing key whose signature on master_key was checked
	was_verified     BOOLEAN NOT NULL, -- some master key of this user was verified at some time
	pinned_key       TEXT    NOT NULL, -- the master key that the configuration pinned when this was last judged; empty: none
	updated_at_ms    BIGINT  NOT NULL
);
CREATE INDEX sendertrust_identity_verified_idx ON sendertrust_identity (user_id) WHERE verified_by<>'' OR pinned_key<>'';

-- The master keys that our signatures no longer count for: the user's verification was withdrawn while they were in use.
CREATE TABLE sendertrust_withdrawal (
	user_id    TEXT NOT NULL,
	master_key TEXT NOT NULL,

	PRIMARY KEY (user_id, master_key)
);

-- The device keys that users publish, whole, because their signatures are evidence.
CREATE TABLE sendertrust_device (
	user_id      TEXT    NOT NULL,
	device_id    TEXT    NOT NULL,
	identity_key TEXT    NOT NULL,
	signing_key  TEXT    NOT NULL,
	device_keys  TEXT    NOT NULL, -- JSON
	deleted      BOOLEAN NOT NULL,

	PRIMARY KEY (user_id, device_id)
);
CREATE INDEX sendertrust_device_key_idx ON sendertrust_device (user_id, identity_key);

-- Which keys have signed which devices in their users' names: each signature was checked once, when it was seen. It stays true when the
-- device is deleted. Whether a key is the user's self-signing key is known from the user's identity, and may be learnt later.
CREATE TABLE sendertrust_signature (
	user_id          TEXT NOT NULL,
	identity_key     TEXT NOT NULL,
	signing_key      TEXT NOT NULL,
	self_signing_key TEXT NOT NULL,

	PRIMARY KEY (user_id, identity_key, signing_key, self_signing_key)
);

-- Events that handlers have yet to see, in the order of arrival; handled ones stay a while, to recognise repeats.
CREATE TABLE sendertrust_inbox (
	event_id       TEXT    PRIMARY KEY,
	seq            BIGINT  NOT NULL,
	room_id        TEXT    NOT NULL,
	room_encrypted BOOLEAN NOT NULL,
	received_at_ms BIGINT  NOT NULL,
	event          TEXT,             -- JSON; null: handled
	told           BOOLEAN NOT NULL, -- the handler was told that it cannot be decrypted, and is called again when it can
	late_session   TEXT              -- the session whose key a told event still waits for
);
CREATE INDEX sendertrust_inbox_pending_idx ON sendertrust_inbox (seq) WHERE event IS NOT NULL AND late_session IS NULL;
CREATE INDEX sendertrust_inbox_late_idx ON sendertrust_inbox (late_session) WHERE late_session IS NOT NULL;
CREATE INDEX sendertrust_inbox_age_idx ON sendertrust_inbox (received_at_ms);

-- Why senders keep keys from us (m.room_key.withheld). The notice is not encrypted: it counts for its own sender's events only.
CREATE TABLE sendertrust_withheld (
	session_id     TEXT   NOT NULL, -- empty: all sessions of the sender (m.no_olm)
	sender         TEXT   NOT NULL,
	code           TEXT   NOT NULL,
	received_at_ms BIGINT NOT NULL,

	PRIMARY KEY (sender, session_id)
);
CREATE INDEX sendertrust_withheld_age_idx ON sendertrust_withheld (received_at_ms);

-- The sessions whose keys are looked for: in the backup, and by asking our own other devices (m.room_key_request). Only what was asked
-- for is taken from those.
CREATE TABLE sendertrust_key_request (
	session_id      TEXT    PRIMARY KEY,
	room_id         TEXT    NOT NULL,
	request_id      TEXT    NOT NULL, -- empty: nobody was asked yet
	wanted_at_ms    BIGINT  NOT NULL,
	looked_up_at_ms BIGINT  NOT NULL, -- in the backup; 0: never
	asked_at_ms     BIGINT  NOT NULL, -- 0: never
	due             BOOLEAN NOT NULL, -- the request is to be sent, or its cancellation if it is answered
	answered        BOOLEAN NOT NULL  -- the key has come, in whatever way
);
CREATE INDEX sendertrust_key_request_age_idx ON sendertrust_key_request (wanted_at_ms);
CREATE INDEX sendertrust_key_request_due_idx ON sendertrust_key_request (session_id) WHERE due;
CREATE INDEX sendertrust_key_request_asked_idx ON sendertrust_key_request (session_id) WHERE request_id<>'' AND answered=false;

-- The room key bundles (MSC4268) that are to be fetched.
CREATE TABLE sendertrust_key_bundle (
	room_id        TEXT   NOT NULL,
	sender         TEXT   NOT NULL,
	sender_key     TEXT   NOT NULL,
	signing_key    TEXT   NOT NULL,
	content        TEXT   NOT NULL, -- JSON of the m.room_key_bundle
	device_keys    TEXT   NOT NULL, -- JSON of the Olm message's sender_device_keys
	received_at_ms BIGINT NOT NULL,

	PRIMARY KEY (room_id, sender)
);
CREATE INDEX sendertrust_key_bundle_sender_idx ON sendertrust_key_bundle (sender, received_at_ms, room_id);
CREATE INDEX sendertrust_key_bundle_age_idx ON sendertrust_key_bundle (received_at_ms);

-- Who has invited us lately: only what they say of their rooms' history is looked at (MSC4268).
CREATE TABLE sendertrust_invite (
	room_id       TEXT   PRIMARY KEY,
	inviter       TEXT   NOT NULL,
	invited_at_ms BIGINT NOT NULL
);
CREATE INDEX sendertrust_invite_age_idx ON sendertrust_invite (invited_at_ms);

-- How far the sessions from before the hook have got their claims.
CREATE TABLE sendertrust_migration (
	name    TEXT    PRIMARY KEY,
	cursor  TEXT    NOT NULL, -- the last session ID that was done
	done    BOOLEAN NOT NULL
);

-- Which process owns the database: every unit of work of an earlier generation is refused.
CREATE TABLE sendertrust_owner (
	id         INTEGER PRIMARY KEY, -- always 1
	generation BIGINT  NOT NULL,
	holder     TEXT    NOT NULL     -- for people: host and process ID
);
