-- v0 -> v2: Latest revision

-- What the bot has said about each message, for a day: so that it can correct itself.
CREATE TABLE bot_answer (
	event_id     TEXT    PRIMARY KEY, -- the message
	room_id      TEXT    NOT NULL,
	sender       TEXT    NOT NULL,
	thread_id    TEXT    NOT NULL,    -- the root of the message's thread; empty: none
	answer_id    TEXT    NOT NULL,    -- empty: not answered (yet)
	session_id   TEXT    NOT NULL,
	owner        TEXT    NOT NULL,    -- whose device made the session
	verdict      TEXT    NOT NULL,    -- JSON, as the room was told last
	told_at_ms   BIGINT  NOT NULL,
	edits        INTEGER NOT NULL,
	edited_at_ms BIGINT  NOT NULL,
	due_ms       BIGINT,              -- when it is to be corrected; null: it is right
	kind         TEXT    NOT NULL DEFAULT 'reply', -- how it was answered: reply, reaction, command, or quiet (there was nothing to say)
	edit_of      TEXT    NOT NULL DEFAULT '',      -- the message that this one is an edit of; empty: it is none
	sign         TEXT    NOT NULL DEFAULT '',      -- the reaction that answer_id is
	next_sign    TEXT    NOT NULL DEFAULT '',      -- the one that is put in its place just now; empty: none
	redacted_by  TEXT    NOT NULL DEFAULT ''       -- who has deleted the message; empty: nobody
);
CREATE INDEX bot_answer_session_idx ON bot_answer (session_id);
CREATE INDEX bot_answer_owner_idx ON bot_answer (owner);
CREATE INDEX bot_answer_room_idx ON bot_answer (room_id);
CREATE INDEX bot_answer_told_idx ON bot_answer (told_at_ms);
CREATE INDEX bot_answer_due_idx ON bot_answer (due_ms) WHERE due_ms IS NOT NULL;
CREATE INDEX bot_answer_edit_idx ON bot_answer (edit_of) WHERE edit_of<>'';
CREATE INDEX bot_answer_answer_idx ON bot_answer (answer_id) WHERE answer_id<>'';

-- What a room was told aloud when it had become worse: once a sender and kind within a day.
CREATE TABLE bot_warning (
	room_id    TEXT   NOT NULL,
	sender     TEXT   NOT NULL,
	code       TEXT   NOT NULL,
	master_key TEXT   NOT NULL,
	said_at_ms BIGINT NOT NULL,

	PRIMARY KEY (room_id, sender, code, master_key)
);
CREATE INDEX bot_warning_said_idx ON bot_warning (said_at_ms);

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
