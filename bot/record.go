package bot

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

//go:embed upgrades/*.sql
var upgradeFiles embed.FS

var upgradeTable = dbutil.BuildUpgradeTable().WithFSPath(upgradeFiles, "upgrades").Finish()

// records is what the bot has told rooms in the last day.
type records struct {
	*dbutil.Database
	// owner is the process's ownership of the database; nil in tests.
	owner *cryptohook.Ownership
}

func newRecords(db *dbutil.Database, owner *cryptohook.Ownership, log dbutil.DatabaseLogger) *records {
	return &records{db.Child("sendertrust_bot_version", upgradeTable, log), owner}
}

// answerKind is how a message is answered.
type answerKind string

const (
	kindReply    answerKind = "reply"    // by a message in words
	kindReaction answerKind = "reaction" // by a sign on it
	kindQuiet    answerKind = "quiet"    // not at all, as long as nothing about it is wrong
	kindCommand  answerKind = "command"  // by what was asked for: that is cleared when the command is deleted, and never corrected
)

// record is what was told about one message, or about one edit of a message.
type record struct {
	eventID id.EventID
	roomID  id.RoomID
	sender  id.UserID
	// threadID is the root of the message's thread, if it is in one.
	threadID id.EventID
	// editOf is the message that this one is an edit of; empty: it is none.
	editOf id.EventID
	kind   answerKind
	// answerID is empty while the message is not answered.
	answerID id.EventID
	// sign is the reaction that the answer is; nextSign the one that is being put in its place.
	sign, nextSign string
	// verdict is what the room was told last, or would have been if it had been worth saying.
	verdict  cryptohook.Verdict
	toldAt   time.Time
	edits    int
	editedAt time.Time
	// due is when the answer is to be corrected; zero: it is right.
	due time.Time
	// redactedBy is who has deleted the message; empty: nobody.
	redactedBy id.UserID
}

// about is the message as people see it: an edit is not a message of its own.
func (r *record) about() id.EventID { return cmp.Or(r.editOf, r.eventID) }

const (
	selectRecord = `
		SELECT event_id, room_id, sender, thread_id, edit_of, kind, answer_id, sign, next_sign, verdict, told_at_ms, edits, edited_at_ms, due_ms, redacted_by
		FROM bot_answer
	`
	getRecordQuery    = selectRecord + `WHERE event_id=$1`
	getOfSessionQuery = selectRecord + `WHERE session_id=$1`
	getOfOwnerQuery   = selectRecord + `WHERE owner=$1`
	getOfAnswerQuery  = selectRecord + `WHERE answer_id=$1 AND answer_id<>''`
	getEditsQuery     = selectRecord + `WHERE edit_of=$1 AND edit_of<>''`
	getSinceQuery     = selectRecord + `WHERE told_at_ms>=$1 ORDER BY told_at_ms`
	// CAST keeps SQLite from preparing it anew each time: the plan does not depend on the values.
	getDueQuery       = selectRecord + `WHERE due_ms<=CAST($1 AS BIGINT) ORDER BY due_ms LIMIT CAST($2 AS BIGINT)`
	getNextDueQuery   = `SELECT MIN(due_ms) FROM bot_answer WHERE due_ms>$1`
	insertRecordQuery = `
		INSERT INTO bot_answer (
			event_id, room_id, sender, thread_id, edit_of, kind, answer_id, sign, session_id, owner, verdict, told_at_ms, edits, edited_at_ms, redacted_by
		) VALUES ($1, $2, $3, $4, $5, $6, '', $7, $8, $9, $10, $11, 0, 0, $12) ON CONFLICT (event_id) DO NOTHING
	`
	setAnswerQuery  = `UPDATE bot_answer SET answer_id=$2 WHERE event_id=$1`
	setDueQuery     = `UPDATE bot_answer SET due_ms=$2 WHERE event_id=$1`
	setVerdictQuery = `
		UPDATE bot_answer SET verdict=$2, session_id=$3, owner=$4, edits=$5, edited_at_ms=$6, kind=$7, answer_id=$8, sign=$9, next_sign='', due_ms=NULL
		WHERE event_id=$1
	`
	setNextSignQuery  = `UPDATE bot_answer SET kind='reaction', next_sign=$2 WHERE event_id=$1`
	setRedactedQuery  = `UPDATE bot_answer SET redacted_by=$2, due_ms=$3 WHERE event_id=$1`
	clearRecordQuery  = `UPDATE bot_answer SET answer_id='', session_id='', owner='', due_ms=NULL WHERE event_id=$1`
	deleteRecordQuery = `DELETE FROM bot_answer WHERE event_id=$1`
	forgetRoomQuery   = `DELETE FROM bot_answer WHERE room_id=$1`
	forgetOldQuery    = `DELETE FROM bot_answer WHERE told_at_ms<$1`
	wasSaidQuery      = `SELECT true FROM bot_warning WHERE room_id=$1 AND sender=$2 AND code=$3 AND master_key=$4`
	insertSaidQuery   = `
		INSERT INTO bot_warning (room_id, sender, code, master_key, said_at_ms) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (room_id, sender, code, master_key) DO UPDATE SET said_at_ms=excluded.said_at_ms
	`
	// What rooms were told about the bot itself is kept until it is over.
	forgetSaidQuery = `DELETE FROM bot_warning WHERE said_at_ms<$1 AND code<>'own_identity'`
)

func scanRecord(row dbutil.Scannable) (*record, error) {
	var r record
	var verdict string
	var told, edited int64
	var due sql.NullInt64
	err := row.Scan(
		&r.eventID, &r.roomID, &r.sender, &r.threadID, &r.editOf, &r.kind, &r.answerID, &r.sign, &r.nextSign, &verdict, &told, &r.edits, &edited,
		&due, &r.redactedBy,
	)
	if err != nil {
		return nil, err
	}
	if err = json.Unmarshal([]byte(verdict), &r.verdict); err != nil {
		return nil, fmt.Errorf("failed to parse the verdict on %s: %w", r.eventID, err)
	}
	r.toldAt, r.editedAt = time.UnixMilli(told), time.UnixMilli(edited)
	if due.Valid {
		r.due = time.UnixMilli(due.Int64)
	}
	return &r, nil
}

func (s *records) list(ctx context.Context, query string, args ...any) ([]*record, error) {
	rows, err := s.Query(ctx, query, args...)
	list, err := dbutil.NewRowIterWithError(rows, scanRecord, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read what was answered: %w", err)
	}
	return list, nil
}

// get gives what is recorded of a message, or nil.
func (s *records) get(ctx context.Context, eventID id.EventID) (*record, error) {
	r, err := scanRecord(s.QueryRow(ctx, getRecordQuery, eventID))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return r, err
}

// add records what is about to be told, and gives what is recorded: after a crash that is what was about to be told before.
func (s *records) add(ctx context.Context, r *record) (*record, error) {
	verdict, err := json.Marshal(r.verdict)
	if err != nil {
		return nil, err
	}
	err = s.exec(ctx, insertRecordQuery, r.eventID, r.roomID, r.sender, r.threadID, r.editOf, r.kind, r.sign, r.verdict.SessionID, r.verdict.UserID,
		string(verdict), r.toldAt.UnixMilli(), r.redactedBy)
	if err != nil {
		return nil, err
	}
	return s.get(ctx, r.eventID)
}

// exec waits for a database that fails: an answer that is not noted cannot be corrected.
func (s *records) exec(ctx context.Context, query string, args ...any) error {
	err := cryptohook.Patiently(ctx, s.Database, func() error {
		return s.owner.Write(ctx, s.Database, func(ctx context.Context) error {
			_, err := s.Exec(ctx, query, args...)
			return err
		})
	})
	if err != nil {
		return fmt.Errorf("failed to record an answer: %w", err)
	}
	return nil
}

func (s *records) setAnswer(ctx context.Context, r *record, answerID id.EventID) error {
	r.answerID = answerID
	return s.exec(ctx, setAnswerQuery, r.eventID, answerID)
}

// setDue notes when the answer is to be corrected; the zero time, that it is right.
func (s *records) setDue(ctx context.Context, r *record, due time.Time) error {
	if r.due.Equal(due) {
		return nil
	}
	r.due = due
	return s.exec(ctx, setDueQuery, r.eventID, dbutil.UnixMilliPtr(due))
}

// setNextSign notes which reaction is about to be put in the place of the one that is there.
func (s *records) setNextSign(ctx context.Context, r *record, sign string) error {
	r.kind, r.nextSign = kindReaction, sign
	return s.exec(ctx, setNextSignQuery, r.eventID, sign)
}

// setRedacted notes that a message was deleted, and that what was said about it is to be cleared now.
func (s *records) setRedacted(ctx context.Context, r *record, by id.UserID, now time.Time) error {
	r.redactedBy, r.due = by, now
	return s.exec(ctx, setRedactedQuery, r.eventID, by, now.UnixMilli())
}

// setVerdict notes what the room was told now, and how.
func (s *records) setVerdict(ctx context.Context, r *record, verdict cryptohook.Verdict) error {
	text, err := json.Marshal(verdict)
	if err != nil {
		return err
	}
	r.verdict, r.nextSign, r.due = verdict, "", time.Time{}
	return s.exec(ctx, setVerdictQuery, r.eventID, string(text), verdict.SessionID, verdict.UserID, r.edits, r.editedAt.UnixMilli(), r.kind, r.answerID, r.sign)
}

func (s *records) nextDue(ctx context.Context, after time.Time) (time.Time, error) {
	var ms sql.NullInt64
	if err := s.QueryRow(ctx, getNextDueQuery, after.UnixMilli()).Scan(&ms); err != nil || !ms.Valid {
		return time.Time{}, err
	}
	return time.UnixMilli(ms.Int64), nil
}

// warning is what makes one spoken warning the same as another.
type warning struct {
	roomID    id.RoomID
	sender    id.UserID
	code      cryptohook.Code
	masterKey id.Ed25519
}

func (s *records) wasSaid(ctx context.Context, w warning) (said bool, err error) {
	err = s.QueryRow(ctx, wasSaidQuery, w.roomID, w.sender, w.code, w.masterKey).Scan(&said)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return said, err
}

func (s *records) noteSaid(ctx context.Context, w warning, at time.Time) error {
	return s.exec(ctx, insertSaidQuery, w.roomID, w.sender, w.code, w.masterKey, at.UnixMilli())
}

// forget drops what is older than that.
func (s *records) forget(ctx context.Context, before time.Time) error {
	return errors.Join(s.exec(ctx, forgetOldQuery, before.UnixMilli()), s.exec(ctx, forgetSaidQuery, before.UnixMilli()))
}
