-- v0 -> v1: Latest revision

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
CREATE INDEX sendertrust_session_retry_idx ON sendertrust_session (next_retry_time_ms) WHERE next_retry_time_ms IS NOT NULL;
CREATE INDEX sendertrust_session_sender_idx ON sendertrust_session (sender, state);

-- The cross-signing identity of each user, with the signatures checked before the row was written.
CREATE TABLE sendertrust_identity (
	user_id          TEXT    PRIMARY KEY,
	master_key       TEXT    NOT NULL,
	first_master_key TEXT    NOT NULL,
	self_signing_key TEXT    NOT NULL, -- empty: none that the master key has signed
	verified_by      TEXT    NOT NULL, -- our user-signing key whose signature on master_key was checked
	was_verified     BOOLEAN NOT NULL, -- some master key of this user was verified at some time
	updated_at_ms    BIGINT  NOT NULL
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

-- Events that handlers have yet to see, in the order of arrival; handled ones stay a while, to recognise repeats.
CREATE TABLE sendertrust_inbox (
	event_id       TEXT    PRIMARY KEY,
	seq            BIGINT  NOT NULL,
	room_id        TEXT    NOT NULL,
	room_encrypted BOOLEAN NOT NULL,
	received_at_ms BIGINT  NOT NULL,
	event          TEXT             -- JSON; null: handled
);
CREATE INDEX sendertrust_inbox_pending_idx ON sendertrust_inbox (seq) WHERE event IS NOT NULL;
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
