package cryptohook

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"sync/atomic"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"
)

// The inbound Megolm sessions of the unit of work, and the message indices that were used.

// GetGroupSession hands out copies of what is staged, for exporting or decrypting moves a session's ratchet.
func (u *unitOfWork) GetGroupSession(ctx context.Context, roomID id.RoomID, sessionID id.SessionID) (*crypto.InboundGroupSession, error) {
	if importOf(ctx) != nil {
		return nil, nil
	}
	if staged := u.stagedGroup(sessionID); staged != nil && staged.RoomID == roomID {
		return u.copyGroup(staged)
	}
	if receivingOf(ctx).isAbsent(sessionID) {
		return nil, nil
	}
	get := u.SQLCryptoStore.GetGroupSession
	if isDecrypting(ctx) {
		get = u.groupToDecrypt
	}
	session, err := get(ctx, roomID, sessionID)
	if session == nil && err == nil && isDecrypting(ctx) {
		session, err = u.claimedGroupSession(ctx, roomID, sessionID)
	}
	if err != nil && !errors.Is(err, crypto.ErrGroupSessionWithheld) {
		err = u.orUnreadable(ctx, err, "the key of session "+sessionID.String(), getGroupPickleQuery, u.AccountID, sessionID)
		err = u.failLocked(ctx, fmt.Errorf("%w: %w", errStorage, err))
	}
	return session, err
}

const getHoldersRoomQuery = `
	SELECT held.room_id FROM crypto_megolm_inbound_session held
	JOIN sendertrust_session claim ON claim.session_id=held.session_id
	WHERE held.account_id=$1 AND held.session_id=$2 AND held.session IS NOT NULL AND claim.room_id=$3
	LIMIT 1
`

// claimedGroupSession gives a session that one device shared for this room and another one, who came first, for another room:
// mautrix has one place for both.
func (u *unitOfWork) claimedGroupSession(ctx context.Context, roomID id.RoomID, sessionID id.SessionID) (*crypto.InboundGroupSession, error) {
	var holdersRoom id.RoomID
	err := u.DB.QueryRow(ctx, getHoldersRoomQuery, u.AccountID, sessionID, roomID).Scan(&holdersRoom)
	if err != nil {
		return nil, ignoreNoRows(err)
	}
	session, err := u.SQLCryptoStore.GetGroupSession(ctx, holdersRoom, sessionID)
	if session != nil {
		session.RoomID = roomID
	}
	return session, err
}

func (u *unitOfWork) stagedGroup(sessionID id.SessionID) *crypto.InboundGroupSession {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.groups[sessionID]
}

func (u *unitOfWork) copyGroup(session *crypto.InboundGroupSession) (*crypto.InboundGroupSession, error) {
	pickle, err := session.Internal.Pickle(u.PickleKey)
	if err != nil {
		return nil, err
	}
	copied := *session
	if copied.Internal, err = unpickle(pickle, u.PickleKey); err != nil {
		return nil, err
	}
	return &copied, nil
}

// putGroupSession stages the session while receiving, and behind a staged state of the same session, which must not be written over
// it. At any other time it writes at once, its own row only: the caller holds the Megolm decrypt lock and must not wait for the gate.
func (u *unitOfWork) putGroupSession(ctx context.Context, session *crypto.InboundGroupSession, with write) error {
	put := func(ctx context.Context) error {
		if err := u.SQLCryptoStore.PutGroupSession(ctx, session); err != nil {
			return fmt.Errorf("failed to store Megolm session %s: %w", session.ID(), err)
		}
		if err := u.stored(ctx, session.ID()); err != nil || with == nil {
			return err
		}
		return with(ctx)
	}
	row := stagedWrite{write: put}
	if with == nil {
		row.pile = func(ctx context.Context, p *pile) (bool, error) {
			p.groups = append(p.groups, session)
			return true, u.stored(ctx, session.ID())
		}
	}
	if u.stageGroupSession(ctx, session, row) {
		return nil
	}
	u.direct.begun.Add(1)
	defer u.direct.ended.Add(1)
	return u.transaction(ctx, put)
}

// directStores counts the times that a session began to be stored, and was, at once and not with what is staged.
type directStores struct{ begun, ended atomic.Uint64 }

// now gives how many were begun, and says whether all of those have ended.
func (d *directStores) now() (begun uint64, settled bool) {
	ended := d.ended.Load()
	begun = d.begun.Load()
	return begun, begun == ended
}

func (u *unitOfWork) stageGroupSession(ctx context.Context, session *crypto.InboundGroupSession, s stagedWrite) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, staged := u.groups[session.ID()]; !staged && !isReceiving(ctx) {
		return false
	}
	u.groups[session.ID()] = session
	receivingOf(ctx).stored(session.ID())
	u.writes = append(u.writes, s)
	return true
}

// PutGroupSession stores a session, and what the way that it came says of its sender. What is not an m.room_key that is being received
// is from a backup, an import, a forwarder or a bundle, or it is our own.
func (u *unitOfWork) PutGroupSession(ctx context.Context, session *crypto.InboundGroupSession) error {
	if isReceiving(ctx) && importOf(ctx) == nil {
		return u.putGroupSession(ctx, session, nil)
	}
	return u.putOther(ctx, session)
}

// writeBehind writes what is said of a session at once, or behind its staged state.
func (u *unitOfWork) writeBehind(ctx context.Context, sessionID id.SessionID, w write) error {
	if isReceiving(ctx) || u.stagedGroup(sessionID) != nil {
		u.stage(w)
		return nil
	}
	return u.transaction(ctx, w)
}

func (u *unitOfWork) isOwn(session *crypto.InboundGroupSession) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.Account != nil && session.SenderKey == u.Account.IdentityKey()
}

// forget drops staged copies of sessions that a statement behind the buffer's back is about to change.
func (u *unitOfWork) forget(matches func(*crypto.InboundGroupSession) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for sessionID, session := range u.groups {
		if matches(session) {
			delete(u.groups, sessionID)
		}
	}
}

// RedactGroupSession takes the key away at once, and again after what is staged. It waits for nobody: mautrix may call it with the
// Megolm decrypt lock held.
func (u *unitOfWork) RedactGroupSession(ctx context.Context, roomID id.RoomID, sessionID id.SessionID, reason string) error {
	redact := func(ctx context.Context) error {
		return u.SQLCryptoStore.RedactGroupSession(ctx, roomID, sessionID, reason)
	}
	if isReceiving(ctx) || u.stagedGroup(sessionID) != nil {
		u.forget(func(session *crypto.InboundGroupSession) bool { return session.ID() == sessionID })
		u.stage(redact)
	}
	if isReceiving(ctx) {
		return nil
	}
	return redact(ctx)
}

func (u *unitOfWork) RedactGroupSessions(ctx context.Context, roomID id.RoomID, senderKey id.SenderKey, reason string) (redacted []id.SessionID, err error) {
	redact := func(ctx context.Context) (err error) {
		redacted, err = u.SQLCryptoStore.RedactGroupSessions(ctx, roomID, senderKey, reason)
		return err
	}
	u.forget(func(session *crypto.InboundGroupSession) bool {
		return (roomID == "" || session.RoomID == roomID) && (senderKey == "" || session.SenderKey == senderKey)
	})
	if isReceiving(ctx) {
		u.stage(redact)
		return nil, nil
	}
	err = u.afterFlush(ctx, redact)
	return redacted, err
}

func (u *unitOfWork) RedactExpiredGroupSessions(ctx context.Context) (redacted []id.SessionID, err error) {
	err = u.afterFlush(ctx, func(ctx context.Context) (err error) {
		redacted, err = u.SQLCryptoStore.RedactExpiredGroupSessions(ctx)
		return err
	})
	return redacted, err
}

func (u *unitOfWork) RedactOutdatedGroupSessions(ctx context.Context) (redacted []id.SessionID, err error) {
	err = u.afterFlush(ctx, func(ctx context.Context) (err error) {
		redacted, err = u.SQLCryptoStore.RedactOutdatedGroupSessions(ctx)
		return err
	})
	return redacted, err
}

// afterFlush runs a statement that must see everything that is staged.
func (u *unitOfWork) afterFlush(ctx context.Context, statement write) error {
	if err := u.flush(ctx); err != nil {
		return err
	}
	return statement(ctx)
}

func (u *unitOfWork) GetGroupSessionsForRoom(ctx context.Context, roomID id.RoomID) dbutil.RowIter[*crypto.InboundGroupSession] {
	if err := u.flush(ctx); err != nil {
		return failedIter(err)
	}
	return u.SQLCryptoStore.GetGroupSessionsForRoom(ctx, roomID)
}

func (u *unitOfWork) GetAllGroupSessions(ctx context.Context) dbutil.RowIter[*crypto.InboundGroupSession] {
	if err := u.flush(ctx); err != nil {
		return failedIter(err)
	}
	return u.SQLCryptoStore.GetAllGroupSessions(ctx)
}

func (u *unitOfWork) GetGroupSessionsWithoutKeyBackupVersion(ctx context.Context, version id.KeyBackupVersion) dbutil.RowIter[*crypto.InboundGroupSession] {
	if err := u.flush(ctx); err != nil {
		return failedIter(err)
	}
	return u.SQLCryptoStore.GetGroupSessionsWithoutKeyBackupVersion(ctx, version)
}

func failedIter(err error) dbutil.RowIter[*crypto.InboundGroupSession] {
	return dbutil.NewRowIterWithError[*crypto.InboundGroupSession](nil, nil, err)
}

type messageIndex struct {
	sessionID id.SessionID
	index     uint
}

type indexedEvent struct {
	eventID   id.EventID
	timestamp int64
}

// ValidateMessageIndex stages what it learns: the first event with an index is the one that has it for ever. The index is
// flushed before the event is handed on.
func (u *unitOfWork) ValidateMessageIndex(ctx context.Context, sessionID id.SessionID, eventID id.EventID, index uint, timestamp int64) (bool, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	key, seen := messageIndex{sessionID, index}, indexedEvent{eventID, timestamp}
	known, staged := u.indices[key]
	if !staged {
		var err error
		if known, err = u.storedIndex(ctx, key); err != nil {
			return false, fmt.Errorf("%w: %w", errStorage, err)
		}
	}
	switch {
	case known != indexedEvent{}:
		return known == seen, nil
	case seen == indexedEvent{}:
		// Nobody in particular asks whether the index was used.
		return true, nil
	case isDisputed(ctx):
		// Whoever comes first would take the index from whom it belongs to.
		return true, nil
	}
	u.indices[key] = seen
	if group, isOpen := u.open.look(sessionID); isOpen {
		group.highest = max(group.highest, int64(key.column()))
	}
	u.writes = append(u.writes, stagedWrite{write: func(ctx context.Context) error {
		_, err := u.DB.Exec(ctx, insertMessageIndexQuery, sessionID, key.column(), eventID, timestamp)
		return err
	}})
	return true, nil
}

const (
	// The CAST is for SQLite, as in unguessed, and to what PostgreSQL's column is.
	getHighestIndexQuery    = `SELECT MAX("index") FROM crypto_message_index WHERE session_id=CAST($1 AS CHAR(43))`
	getMessageIndexQuery    = `SELECT event_id, timestamp FROM crypto_message_index WHERE session_id=$1 AND "index"=$2`
	insertMessageIndexQuery = `
		INSERT INTO crypto_message_index (session_id, "index", event_id, timestamp) VALUES ($1, $2, $3, $4)
		ON CONFLICT (session_id, "index") DO NOTHING
	`
)

// column is what the index is stored as. Its column has 32 bits with a sign, and a sender may begin to count where it likes: mautrix's
// own statement fails there on PostgreSQL.
func (m messageIndex) column() int32 { return int32(uint32(m.index)) }

// storedIndex gives the event that has an index which is not staged; none if nobody has it. The caller holds mu.
func (u *unitOfWork) storedIndex(ctx context.Context, key messageIndex) (stored indexedEvent, err error) {
	if unused, err := u.isAboveAll(ctx, key); unused || err != nil {
		return indexedEvent{}, err
	}
	err = u.DB.QueryRow(ctx, getMessageIndexQuery, key.sessionID, key.column()).Scan(&stored.eventID, &stored.timestamp)
	return stored, ignoreNoRows(err)
}

// isAboveAll says that a message index is higher than all that are stored or staged for its session, as it is of all but repeated, late and
// disputed messages: higher as their column holds them, by which they are looked up. That is known without asking as long as the session is
// open, for nobody else stores any. The caller holds mu.
func (u *unitOfWork) isAboveAll(ctx context.Context, key messageIndex) (bool, error) {
	group, isOpen := u.open.look(key.sessionID)
	if !isOpen {
		return false, nil
	}
	if !group.highestKnown {
		var highest sql.NullInt64
		if err := u.DB.QueryRow(ctx, getHighestIndexQuery, key.sessionID).Scan(&highest); err != nil {
			return false, err
		}
		group.highestKnown, group.highest = true, math.MinInt64
		if highest.Valid {
			group.highest = highest.Int64
		}
		for staged := range u.indices {
			if staged.sessionID == key.sessionID {
				group.highest = max(group.highest, int64(staged.column()))
			}
		}
	}
	return int64(key.column()) > group.highest, nil
}
