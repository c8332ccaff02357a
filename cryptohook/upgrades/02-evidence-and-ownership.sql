-- v1 -> v2: Evidence that outlives devices, late keys, one owner

ALTER TABLE sendertrust_identity ADD COLUMN pinned_key TEXT NOT NULL DEFAULT '';
CREATE INDEX sendertrust_identity_verified_idx ON sendertrust_identity (user_id) WHERE verified_by<>'' OR pinned_key<>'';

CREATE TABLE sendertrust_withdrawal (
	user_id    TEXT NOT NULL,
	master_key TEXT NOT NULL,

	PRIMARY KEY (user_id, master_key)
);

CREATE TABLE sendertrust_signature (
	user_id          TEXT NOT NULL,
	identity_key     TEXT NOT NULL,
	signing_key      TEXT NOT NULL,
	self_signing_key TEXT NOT NULL,

	PRIMARY KEY (user_id, identity_key, signing_key, self_signing_key)
);
-- What was proven before rests on a signature of the self-signing key of that time; where that is today's, it is known.
INSERT INTO sendertrust_signature (user_id, identity_key, signing_key, self_signing_key)
	SELECT DISTINCT s.sender, s.sender_key, s.signing_key, i.self_signing_key
	FROM sendertrust_session s JOIN sendertrust_identity i ON i.user_id=s.sender AND i.master_key=s.master_key
	WHERE i.self_signing_key<>'' AND s.state IN ('verification_violation', 'sender_unverified', 'sender_verified');

DROP INDEX sendertrust_session_retry_idx;
CREATE INDEX sendertrust_session_retry_idx ON sendertrust_session (next_retry_time_ms, sender) WHERE next_retry_time_ms IS NOT NULL;

ALTER TABLE sendertrust_inbox ADD COLUMN told BOOLEAN NOT NULL DEFAULT false;
ALTER TABLE sendertrust_inbox ADD COLUMN late_session TEXT;
DROP INDEX sendertrust_inbox_pending_idx;
CREATE INDEX sendertrust_inbox_pending_idx ON sendertrust_inbox (seq) WHERE event IS NOT NULL AND late_session IS NULL;
CREATE INDEX sendertrust_inbox_late_idx ON sendertrust_inbox (late_session) WHERE late_session IS NOT NULL;

CREATE TABLE sendertrust_key_request (
	session_id      TEXT    PRIMARY KEY,
	room_id         TEXT    NOT NULL,
	request_id      TEXT    NOT NULL,
	wanted_at_ms    BIGINT  NOT NULL,
	looked_up_at_ms BIGINT  NOT NULL,
	asked_at_ms     BIGINT  NOT NULL,
	due             BOOLEAN NOT NULL,
	answered        BOOLEAN NOT NULL
);
CREATE INDEX sendertrust_key_request_age_idx ON sendertrust_key_request (wanted_at_ms);
CREATE INDEX sendertrust_key_request_due_idx ON sendertrust_key_request (session_id) WHERE due;
CREATE INDEX sendertrust_key_request_asked_idx ON sendertrust_key_request (session_id) WHERE request_id<>'' AND answered=false;

CREATE TABLE sendertrust_key_bundle (
	room_id        TEXT   NOT NULL,
	sender         TEXT   NOT NULL,
	sender_key     TEXT   NOT NULL,
	signing_key    TEXT   NOT NULL,
	content        TEXT   NOT NULL,
	device_keys    TEXT   NOT NULL,
	received_at_ms BIGINT NOT NULL,

	PRIMARY KEY (room_id, sender)
);
CREATE INDEX sendertrust_key_bundle_sender_idx ON sendertrust_key_bundle (sender, received_at_ms, room_id);
CREATE INDEX sendertrust_key_bundle_age_idx ON sendertrust_key_bundle (received_at_ms);

CREATE TABLE sendertrust_invite (
	room_id       TEXT   PRIMARY KEY,
	inviter       TEXT   NOT NULL,
	invited_at_ms BIGINT NOT NULL
);
CREATE INDEX sendertrust_invite_age_idx ON sendertrust_invite (invited_at_ms);

CREATE TABLE sendertrust_migration (
	name    TEXT    PRIMARY KEY,
	cursor  TEXT    NOT NULL,
	done    BOOLEAN NOT NULL
);

CREATE TABLE sendertrust_owner (
	id         INTEGER PRIMARY KEY,
	generation BIGINT  NOT NULL,
	holder     TEXT    NOT NULL
);
