package cryptohook

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/tidwall/gjson"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Withheld keys.

const (
	upsertWithheldQuery = `
		INSERT INTO sendertrust_withheld (session_id, sender, code, received_at_ms) VALUES ($1, $2, $3, $4)
		ON CONFLICT (sender, session_id) DO UPDATE SET code=excluded.code, received_at_ms=excluded.received_at_ms
	`
	getWithheldQuery   = `SELECT code FROM sendertrust_withheld WHERE sender=$1 AND session_id IN ($2, '') ORDER BY session_id DESC LIMIT 1`
	pruneWithheldQuery = `DELETE FROM sendertrust_withheld WHERE received_at_ms<$1`
)

func (s *store) putWithheld(ctx context.Context, sessionID id.SessionID, sender id.UserID, code event.RoomKeyWithheldCode, now time.Time) error {
	if _, err := s.Exec(ctx, upsertWithheldQuery, sessionID, sender, code, now.UnixMilli()); err != nil {
		return fmt.Errorf("failed to store why a key is withheld: %w", err)
	}
	return nil
}

// withheld gives the code by which that sender withholds the session's key from us, or nothing.
func (s *store) withheld(ctx context.Context, sessionID id.SessionID, sender id.UserID) (code event.RoomKeyWithheldCode, err error) {
	err = s.QueryRow(ctx, getWithheldQuery, sender, sessionID).Scan(&code)
	return code, ignoreNoRows(err)
}

// The inbox.

const (
	insertInboxQuery = `
		INSERT INTO sendertrust_inbox (event_id, seq, room_id, room_encrypted, received_at_ms, event, told)
		VALUES ($1, $2, $3, $4, $5, $6, false) ON CONFLICT (event_id) DO NOTHING
	`
	// CAST: see unguessed.
	getInboxQuery    = `SELECT event_id, seq, room_id, room_encrypted, received_at_ms, event, told FROM sendertrust_inbox WHERE event IS NOT NULL AND late_session IS NULL AND seq>CAST($1 AS BIGINT) ORDER BY seq LIMIT CAST($2 AS BIGINT)`
	getTextQuery     = `SELECT event FROM sendertrust_inbox WHERE event_id=$1 AND event IS NOT NULL`
	getAllLateQuery  = `SELECT event FROM sendertrust_inbox WHERE late_session IS NOT NULL AND event IS NOT NULL`
	markHandledQuery = `UPDATE sendertrust_inbox SET event=NULL WHERE event_id=$1`
	pruneInboxQuery  = `DELETE FROM sendertrust_inbox WHERE event IS NULL AND received_at_ms<$1`
	markLateQuery    = `UPDATE sendertrust_inbox SET told=true, late_session=$2 WHERE event_id=$1`
	getLateQuery     = `SELECT event_id FROM sendertrust_inbox WHERE late_session=` + unguessed + ` ORDER BY seq`
	wakeLateQuery    = `UPDATE sendertrust_inbox SET late_session=NULL, seq=$2 WHERE event_id=$1`
	giveUpLateQuery  = `UPDATE sendertrust_inbox SET event=NULL, late_session=NULL WHERE late_session IS NOT NULL AND received_at_ms<$1`
	lastSeqQuery     = `SELECT COALESCE(MAX(seq), 0) FROM sendertrust_inbox WHERE event IS NOT NULL AND late_session IS NULL`
)

// inboxEvent is a room event that handlers have yet to see.
type inboxEvent struct {
	eventID       id.EventID
	seq           int64
	roomID        id.RoomID
	roomEncrypted bool
	receivedAt    time.Time
	event         string
	// told: the handler was told that the event cannot be decrypted.
	told bool
	// sender and sessionID are as the event says; the session is empty if it is none.
	sender    id.UserID
	sessionID id.SessionID
	// retryAt is when an event that has to wait is tried again if nothing comes for it before; awaitsKey says that it waits for its key.
	retryAt   time.Time
	awaitsKey bool

	// The rest is for the inbox, and guarded by its lock.

	place eventPlace
	lap   int
	// lacksKey says that it is counted among those that wait for their keys.
	lacksKey bool
	// keysCame counts the keys that came for its session; stirs is how often it is to be tried for that; again, that it is as soon as it
	// is put back.
	keysCame, stirs int
	again           bool
}

func scanInboxEvent(row dbutil.Scannable) (*inboxEvent, error) {
	var e inboxEvent
	var received int64
	err := row.Scan(&e.eventID, &e.seq, &e.roomID, &e.roomEncrypted, &received, &e.event, &e.told)
	e.receivedAt = time.UnixMilli(received)
	e.sender, e.sessionID = senderAndSession(e.event)
	return &e, err
}

// senderAndSession reads who sent an event, and in which session. The copies do not keep the event's text in memory.
func senderAndSession(text string) (id.UserID, id.SessionID) {
	found := gjson.GetMany(text, "sender", "content.session_id")
	sessionID := found[1].Str
	if !isKey(sessionID) {
		sessionID = ""
	}
	return id.UserID(strings.Clone(found[0].Str)), id.SessionID(strings.Clone(sessionID))
}

func (s *store) putInboxEvent(ctx context.Context, e *inboxEvent) error {
	_, err := s.Exec(ctx, insertInboxQuery, e.eventID, e.seq, e.roomID, e.roomEncrypted, e.receivedAt.UnixMilli(), e.event)
	if err != nil {
		return fmt.Errorf("failed to store event %s in the inbox: %w", e.eventID, err)
	}
	return nil
}

// pendingInbox gives the events after seq that wait for their handlers, in the order in which they came.
func (s *store) pendingInbox(ctx context.Context, seq int64, limit int) ([]*inboxEvent, error) {
	rows, err := s.Query(ctx, getInboxQuery, seq, limit)
	events, err := dbutil.NewRowIterWithError(rows, scanInboxEvent, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the inbox: %w", err)
	}
	return events, nil
}

// inboxText gives an event as it came, or nothing if it was handled.
func (s *store) inboxText(ctx context.Context, eventID id.EventID) (text string, err error) {
	err = s.QueryRow(ctx, getTextQuery, eventID).Scan(&text)
	return text, ignoreNoRows(err)
}

// lateSenders counts for each sender the events that wait for keys that come late.
func (s *store) lateSenders(ctx context.Context) (map[id.UserID]int, error) {
	counts := make(map[id.UserID]int)
	rows, err := s.Query(ctx, getAllLateQuery)
	err = dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).Iter(func(text string) (bool, error) {
		sender, _ := senderAndSession(text)
		counts[sender]++
		return true, nil
	})
	if err != nil {
		return nil, fmt.Errorf("failed to read the inbox: %w", err)
	}
	return counts, nil
}

func (s *store) markHandled(ctx context.Context, eventID id.EventID) error {
	_, err := s.Exec(ctx, markHandledQuery, eventID)
	return err
}

// markLate keeps an event whose handler was told that it cannot be decrypted, until the session's key comes.
func (s *store) markLate(ctx context.Context, eventID id.EventID, sessionID id.SessionID) error {
	delete(foresightOf(ctx).unawaited, sessionID)
	_, err := s.Exec(ctx, markLateQuery, eventID, sessionID)
	return err
}

// wakeLate puts the events that wait for the session's key behind those that came meanwhile; next gives their new numbers.
func (s *store) wakeLate(ctx context.Context, sessionID id.SessionID, next func() int64) error {
	rows, err := s.Query(ctx, getLateQuery, sessionID)
	events, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[id.EventID], err).AsList()
	if err != nil {
		return fmt.Errorf("failed to look for events that wait for session %s: %w", sessionID, err)
	}
	for _, eventID := range events {
		if _, err = s.Exec(ctx, wakeLateQuery, eventID, next()); err != nil {
			return fmt.Errorf("failed to wake event %s: %w", eventID, err)
		}
	}
	return nil
}

// giveUpLate forgets events from before that time whose keys have not come.
func (s *store) giveUpLate(ctx context.Context, before time.Time) error {
	_, err := s.Exec(ctx, giveUpLateQuery, before.UnixMilli())
	return err
}

// prune forgets what nobody asks for any more: handled events and withheld notices from before that time.
func (s *store) prune(ctx context.Context, before time.Time) error {
	if _, err := s.Exec(ctx, pruneInboxQuery, before.UnixMilli()); err != nil {
		return err
	}
	_, err := s.Exec(ctx, pruneWithheldQuery, before.UnixMilli())
	return err
}

func (s *store) lastSeq(ctx context.Context) (seq int64, err error) {
	err = s.QueryRow(ctx, lastSeqQuery).Scan(&seq)
	return seq, err
}
