package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// The Olm sessions of the unit of work: all of a device's are in memory once one of them was asked for.

// olmRecord is an Olm session known to the store. The times are copies, for the session's own may change under olmLock while
// others sort by them.
type olmRecord struct {
	senderKey id.SenderKey
	session   *crypto.OlmSession
	// sessionID was worked out by session.ID() before anybody else had the session: that remembers it, without a lock.
	sessionID                     id.SessionID
	created, encrypted, decrypted time.Time
	pickle                        []byte // the newest state, while it waits to be written
}

const upsertOlmSessionQuery = `
	INSERT INTO crypto_olm_session (session_id, sender_key, session, created_at, last_encrypted, last_decrypted, account_id)
	VALUES ($1, $2, $3, $4, $5, $6, $7)
	ON CONFLICT (account_id, session_id) DO UPDATE
		SET session=excluded.session, last_encrypted=excluded.last_encrypted, last_decrypted=excluded.last_decrypted
`

var upsertOlmSessions = dbutil.NewMassInsertBuilder[olmRow, [0]any](upsertOlmSessionQuery, "($%d, $%d, $%d, $%d, $%d, $%d, $%d)")

// olmRow is the row of a record.
type olmRow struct {
	*olmRecord
	accountID string
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (r olmRow) GetMassInsertValues() [7]any {
	return [7]any{r.sessionID, r.senderKey, r.pickle, r.created, r.encrypted, r.decrypted, r.accountID}
}

// writeOlmSessions writes what is staged of Olm sessions, so many together by the function that is given. The caller holds mu.
func (u *unitOfWork) writeOlmSessions(ctx context.Context, each func(ctx context.Context, w write) error, together int) error {
	rows := make([]olmRow, len(u.dirtyOlm))
	for i, record := range u.dirtyOlm {
		rows[i] = olmRow{record, u.AccountID}
	}
	for some := range slices.Chunk(rows, together) {
		err := each(ctx, func(ctx context.Context) error {
			return insertAll(ctx, u.DB, upsertOlmSessions, some, func(r olmRow) id.SessionID { return r.sessionID })
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// records gives all Olm sessions with that device, loading them at first use. The caller holds mu.
func (u *unitOfWork) records(ctx context.Context, senderKey id.SenderKey) ([]*olmRecord, error) {
	if records, loaded := u.olm[senderKey]; loaded {
		return records, nil
	}
	rows, err := u.DB.Query(ctx, getOlmSessionsQuery, senderKey, u.AccountID)
	sessions, err := dbutil.NewRowIterWithError(rows, u.scanOlmSession, err).AsList()
	if err != nil {
		err = u.orUnreadable(ctx, err, "an Olm session with "+senderKey.String(), getOlmPicklesQuery, u.AccountID, senderKey)
		return nil, u.fail(ctx, fmt.Errorf("failed to read the Olm sessions with %s: %w", senderKey, err))
	}
	return u.loaded(senderKey, sessions), nil
}

// loaded takes in all Olm sessions with that device. The caller holds mu.
func (u *unitOfWork) loaded(senderKey id.SenderKey, sessions []*crypto.OlmSession) []*olmRecord {
	records := make([]*olmRecord, len(sessions))
	for i, session := range sessions {
		records[i] = &olmRecord{
			senderKey: senderKey, session: session, sessionID: session.ID(),
			created: session.CreationTime, encrypted: session.LastEncryptedTime, decrypted: session.LastDecryptedTime,
		}
		u.byPointer[session] = records[i]
	}
	u.olm[senderKey] = records
	return records
}

const getOlmSessionsOfSendersQuery = `
	SELECT sender_key, session, created_at, last_encrypted, last_decrypted FROM crypto_olm_session
	WHERE account_id IN (SELECT account_id FROM crypto_account) AND sender_key IN ($1)
`

// lookUpOlmSessions loads the Olm sessions with those devices, in one statement. What it fails about is loaded one by one when it is asked for.
func (u *unitOfWork) lookUpOlmSessions(ctx context.Context, senderKeys []id.SenderKey) {
	u.mu.Lock()
	defer u.mu.Unlock()
	senderKeys = slices.DeleteFunc(senderKeys, func(senderKey id.SenderKey) bool { _, loaded := u.olm[senderKey]; return loaded })
	if len(senderKeys) == 0 {
		return
	}
	query, params := withMany(getOlmSessionsOfSendersQuery, senderKeys)
	sessions := make(map[id.SenderKey][]*crypto.OlmSession)
	rows, err := u.DB.Query(ctx, query, params...)
	err = dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (senderKey id.SenderKey, err error) {
		session, err := u.scanOlmSession(rowAfter{row, &senderKey})
		sessions[senderKey] = append(sessions[senderKey], session)
		return senderKey, err
	}, err).Iter(func(id.SenderKey) (bool, error) { return true, nil })
	if err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to read the Olm sessions with many devices at once, reading them one by one")
		return
	}
	for _, senderKey := range senderKeys {
		u.loaded(senderKey, sessions[senderKey])
	}
}

// rowAfter is what follows in a row after its first column.
type rowAfter struct {
	dbutil.Scannable
	first any
}

func (r rowAfter) Scan(dest ...any) error {
	return r.Scannable.Scan(append([]any{r.first}, dest...)...)
}

// mautrix's own GetSessions takes rows that it fails to read for rows that are not there, and a peer without sessions is
// remembered as such.
const getOlmSessionsQuery = `
	SELECT session, created_at, last_encrypted, last_decrypted FROM crypto_olm_session
	WHERE sender_key=$1 AND account_id=$2
`

func (u *unitOfWork) scanOlmSession(row dbutil.Scannable) (*crypto.OlmSession, error) {
	session := &crypto.OlmSession{Internal: olm.NewBlankSession()}
	var pickle []byte
	if err := row.Scan(&pickle, &session.CreationTime, &session.LastEncryptedTime, &session.LastDecryptedTime); err != nil {
		return nil, err
	}
	return session, session.Internal.Unpickle(pickle, u.PickleKey)
}

func (u *unitOfWork) HasSession(ctx context.Context, senderKey id.SenderKey) bool {
	if lockHolderOf(ctx) != nil {
		return true
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	records, err := u.records(ctx, senderKey)
	return err == nil && len(records) > 0
}

// GetSessions gives the Olm sessions with that device, the last one to decrypt first.
func (u *unitOfWork) GetSessions(ctx context.Context, senderKey id.SenderKey) (crypto.OlmSessionList, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	records, err := u.records(ctx, senderKey)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(records, func(a, b *olmRecord) int { return b.decrypted.Compare(a.decrypted) })
	sessions := make(crypto.OlmSessionList, len(records))
	for i, record := range records {
		sessions[i] = record.session
	}
	return sessions, nil
}

func (u *unitOfWork) GetLatestSession(ctx context.Context, senderKey id.SenderKey) (*crypto.OlmSession, error) {
	if holder := lockHolderOf(ctx); holder != nil {
		return nil, holder.runLocked()
	}
	sessions, err := u.GetSessions(ctx, senderKey)
	if err != nil || len(sessions) == 0 {
		return nil, err
	}
	return sessions[0], nil
}

func (u *unitOfWork) GetNewestSessionCreationTS(ctx context.Context, senderKey id.SenderKey) (newest time.Time, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	records, err := u.records(ctx, senderKey)
	for _, record := range records {
		used := !record.encrypted.Equal(record.created) || !record.decrypted.Equal(record.created)
		if used && record.created.After(newest) {
			newest = record.created
		}
	}
	return newest, err
}

// AddSession stages a new Olm session. Nobody else has its pointer yet, so pickling it is safe.
func (u *unitOfWork) AddSession(ctx context.Context, senderKey id.SenderKey, session *crypto.OlmSession) error {
	pickle, err := session.Internal.Pickle(u.PickleKey)
	if err != nil {
		return u.failLocked(ctx, err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	records, err := u.records(ctx, senderKey)
	if err != nil {
		return err
	}
	record := &olmRecord{senderKey: senderKey, session: session, sessionID: session.ID(), created: session.CreationTime}
	u.stageRatchet(record, pickle)
	u.olm[senderKey] = append(records, record)
	u.byPointer[session] = record
	return nil
}

// UpdateSession stages an Olm session's new state. mautrix calls it with its Olm lock held, so pickling here, and not when
// flushing, is safe. mautrix only logs an error, and would send what it has encrypted: so an error breaks the unit of work.
func (u *unitOfWork) UpdateSession(_ context.Context, _ id.SenderKey, session *crypto.OlmSession) error {
	return u.updateSessions([]*crypto.OlmSession{session})
}

// updateSessions is UpdateSession for several.
func (u *unitOfWork) updateSessions(sessions []*crypto.OlmSession) error {
	pickles, errs := make([][]byte, len(sessions)), make([]error, len(sessions))
	sideBySide(len(sessions), func(i int) { pickles[i], errs[i] = sessions[i].Internal.Pickle(u.PickleKey) })
	if err := errors.Join(errs...); err != nil {
		return u.breakWith(err)
	}
	if err := u.stageRatchets(sessions, pickles); err != nil {
		return u.breakWith(err)
	}
	return nil
}

func (u *unitOfWork) stageRatchets(sessions []*crypto.OlmSession, pickles [][]byte) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, session := range sessions {
		record, err := u.recordOf(session)
		if err != nil {
			return err
		}
		u.stageRatchet(record, pickles[i])
	}
	return nil
}

// recordOf gives the record of a session. The caller holds mu.
func (u *unitOfWork) recordOf(session *crypto.OlmSession) (*olmRecord, error) {
	record := u.byPointer[session]
	if record == nil {
		return nil, fmt.Errorf("the Olm session %s was not loaded from this store", session.ID())
	}
	return record, nil
}

// triedSessions are Olm sessions with which somebody has tried to decrypt: they may have changed, and none of that is staged.
type triedSessions map[*crypto.OlmSession]struct{}

const getOlmPickleQuery = `SELECT session FROM crypto_olm_session WHERE account_id=$1 AND session_id=$2`

// restore brings Olm sessions back to what is staged of them, or stored. If that fails, the unit of work is broken. The caller holds mautrix's
// Olm lock.
func (u *unitOfWork) restore(ctx context.Context, tried triedSessions) error {
	for session := range tried {
		if err := u.restoreSession(ctx, session); err != nil {
			return u.breakWith(fmt.Errorf("failed to restore an Olm session: %w", err))
		}
	}
	return nil
}

func (u *unitOfWork) restoreSession(ctx context.Context, session *crypto.OlmSession) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	record, err := u.recordOf(session)
	if err != nil {
		return err
	}
	pickle := record.pickle
	if pickle == nil {
		if err = u.DB.QueryRow(ctx, getOlmPickleQuery, u.AccountID, record.sessionID).Scan(&pickle); err != nil {
			return err
		}
	}
	internal := olm.NewBlankSession()
	if err = internal.Unpickle(pickle, u.PickleKey); err != nil {
		return err
	}
	session.Internal, session.LastDecryptedTime = internal, record.decrypted
	return nil
}

func (u *unitOfWork) stageRatchet(record *olmRecord, pickle []byte) {
	if record.pickle == nil {
		u.dirtyOlm = append(u.dirtyOlm, record)
	}
	record.pickle = pickle
	record.encrypted, record.decrypted = record.session.LastEncryptedTime, record.session.LastDecryptedTime
}

func (u *unitOfWork) DeleteSession(_ context.Context, senderKey id.SenderKey, session *crypto.OlmSession) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.olm[senderKey] = slices.DeleteFunc(u.olm[senderKey], func(record *olmRecord) bool { return record.session == session })
	delete(u.byPointer, session)
	u.writes = append(u.writes, stagedWrite{write: func(ctx context.Context) error {
		return u.SQLCryptoStore.DeleteSession(ctx, senderKey, session)
	}})
	return nil
}
