-- v1 -> v2: Commands, verification, and other ways to answer

-- How a message was answered: reply, reaction, command, or quiet, if there was nothing to say. An edit of a message is judged like a message: it has a
-- row of its own.
ALTER TABLE bot_answer ADD COLUMN kind TEXT NOT NULL DEFAULT 'reply';
ALTER TABLE bot_answer ADD COLUMN edit_of TEXT NOT NULL DEFAULT '';
ALTER TABLE bot_answer ADD COLUMN sign TEXT NOT NULL DEFAULT '';
ALTER TABLE bot_answer ADD COLUMN next_sign TEXT NOT NULL DEFAULT '';
ALTER TABLE bot_answer ADD COLUMN redacted_by TEXT NOT NULL DEFAULT '';
UPDATE bot_answer SET kind='quiet' WHERE answer_id='';
CREATE INDEX bot_answer_edit_idx ON bot_answer (edit_of) WHERE edit_of<>'';
CREATE INDEX bot_answer_answer_idx ON bot_answer (answer_id) WHERE answer_id<>'';

CREATE TABLE bot_audit (
	event_id   TEXT   PRIMARY KEY, -- the message that gave the command
	at_ms      BIGINT NOT NULL,    -- when it was first seen
	room_id    TEXT   NOT NULL,
	sender     TEXT   NOT NULL,
	device_id  TEXT   NOT NULL,    -- of the message, and its owner's master key, as far as they are known
	master_key TEXT   NOT NULL,
	code       TEXT   NOT NULL,    -- the verdict on the message
	command    TEXT   NOT NULL,
	arguments  TEXT   NOT NULL,
	outcome    TEXT   NOT NULL,    -- empty: begun
	detail     TEXT   NOT NULL
);
CREATE INDEX bot_audit_time_idx ON bot_audit (at_ms);
CREATE INDEX bot_audit_outcome_idx ON bot_audit (outcome, at_ms);

-- The verifications that are open: after a crash they are ended. Those that have ended are kept for a day, so that a request that is
-- delivered again is known.
CREATE TABLE bot_verification (
	transaction_id TEXT    PRIMARY KEY,
	user_id        TEXT    NOT NULL,
	device_id      TEXT    NOT NULL, -- empty: none has accepted yet
	room_id        TEXT    NOT NULL, -- where the bot talks about it
	in_room        BOOLEAN NOT NULL, -- the protocol runs in the room, not between devices
	opened_at_ms   BIGINT  NOT NULL,
	ended_at_ms    BIGINT            -- null: it is open
);
CREATE INDEX bot_verification_ended_idx ON bot_verification (ended_at_ms);

-- How the bot answers in a room, if it was told so there.
CREATE TABLE bot_mode (
	room_id     TEXT PRIMARY KEY,
	mode        TEXT NOT NULL, -- empty: as the configuration says
	state_event TEXT NOT NULL  -- the last state event that was taken for it; empty: none was
);
