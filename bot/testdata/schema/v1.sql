-- v0 -> v1: Latest revision

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
	due_ms       BIGINT               -- when it is to be corrected; null: it is right
);
CREATE INDEX bot_answer_session_idx ON bot_answer (session_id);
CREATE INDEX bot_answer_owner_idx ON bot_answer (owner);
CREATE INDEX bot_answer_room_idx ON bot_answer (room_id);
CREATE INDEX bot_answer_told_idx ON bot_answer (told_at_ms);
CREATE INDEX bot_answer_due_idx ON bot_answer (due_ms) WHERE due_ms IS NOT NULL;

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
