-- v2 -> v3: What was signed, and since when identities are known

-- Of before, only the first and today's master key are known, and not since when.
CREATE TABLE sendertrust_identity_key (
	user_id             TEXT   NOT NULL,
	master_key          TEXT   NOT NULL,
	seen_at_ms          BIGINT NOT NULL,
	master_object       TEXT,
	self_signing_key    TEXT   NOT NULL,
	self_signing_object TEXT,

	PRIMARY KEY (user_id, master_key)
);
CREATE INDEX sendertrust_identity_key_seen_idx ON sendertrust_identity_key (user_id, seen_at_ms, master_key);
INSERT INTO sendertrust_identity_key (user_id, master_key, seen_at_ms, self_signing_key)
	SELECT user_id, master_key, 0, self_signing_key FROM sendertrust_identity WHERE master_key<>'';
INSERT INTO sendertrust_identity_key (user_id, master_key, seen_at_ms, self_signing_key)
	SELECT user_id, first_master_key, 0, '' FROM sendertrust_identity WHERE first_master_key<>'' AND first_master_key<>master_key;

ALTER TABLE sendertrust_signature ADD COLUMN device_keys TEXT;

DROP VIEW sendertrust_session;
ALTER TABLE sendertrust_claim ADD COLUMN embedded BOOLEAN;
CREATE VIEW sendertrust_session AS
	SELECT session_id, identity_key AS sender_key, signing_key, room_id, user_id AS sender, source, legacy_session, state, reason, device_id,
	       master_key, device_keys, embedded, retry_count, next_retry_time_ms, received_at_ms, updated_at_ms
	FROM sendertrust_claim JOIN sendertrust_sender ON sendertrust_sender.id=sendertrust_claim.sender_id;
