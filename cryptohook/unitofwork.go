package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// unitOfWork is mautrix's crypto store with its writes held back: what one /sync brings (Olm ratchets, message hashes, the
// account, Megolm sessions, sender data, message indices, the inbox, the sync token) becomes durable in one short transaction,
// or not at all. It reads its own writes. A transaction is opened only when all it writes is at hand, so none ever waits for a lock
// of mautrix's.
//
// Two rules make that safe with encryptors at work beside the receiver:
//
//   - The gate. A message's hash and ratchet are staged before its Megolm session is. A flush in between would commit half a
//     message, whose redelivery is then refused as a duplicate. So the receiver holds the gate from GetOlmHash, which mautrix
//     calls first under its Olm lock, until the room key is staged; every flush takes it. Order of locks: mautrix's olmLock >
//     gate > mu > database. Who holds mautrix's Megolm decrypt lock never waits for the gate.
//   - The barrier. An encryptor's ratchets are held back too, and flushed before /sendToDevice leaves the client (see
//     transport). If that fails, the request is refused: no ratchet state is used twice.
//
// A failed flush keeps everything and may be tried again, for every write is an upsert. A failed read while receiving cannot
// be tried again, for mautrix only logs it and goes on: it breaks the unit of work for good, nothing of it is ever written, and
// the owner starts anew with another unitOfWork and OlmMachine; the homeserver delivers again.
type unitOfWork struct {
	*crypto.SQLCryptoStore

	gate sync.Mutex
	// gateHeld is touched by the receiving goroutine only.
	gateHeld bool
	// withoutGate takes the protection away, for the test that proves that it protects.
	withoutGate bool
	// putOther stores a session that did not come in an m.room_key.
	putOther func(ctx context.Context, session *crypto.InboundGroupSession) error
	// fault, if set, is called between the writes of a flush. Tests stop the world there.
	fault func(at string) error

	mu        sync.Mutex
	broken    error
	writes    []write
	hashes    map[[32]byte]time.Time
	groups    map[id.SessionID]*crypto.InboundGroupSession
	indices   map[messageIndex]indexedEvent
	account   *stagedAccount
	dirtyOlm  []*olmRecord
	olm       map[id.SenderKey][]*olmRecord
	byPointer map[*crypto.OlmSession]*olmRecord
}

var _ crypto.Store = (*unitOfWork)(nil)

// write is one staged statement; the context carries the transaction.
type write func(ctx context.Context) error

type stagedAccount struct {
	pickle           []byte
	shared           bool
	keyBackupVersion id.KeyBackupVersion
}

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

type messageIndex struct {
	sessionID id.SessionID
	index     uint
}

type indexedEvent struct {
	eventID   id.EventID
	timestamp int64
}

// ErrUnitOfWorkBroken says that the crypto store failed while a /sync was being received. Nothing of that /sync was stored; the
// hook has to be installed anew, and the homeserver delivers again.
var ErrUnitOfWorkBroken = errors.New("the crypto store failed while receiving")

// ErrHookBypassed says that a room key was stored as received directly, and did not come through the hook.
var ErrHookBypassed = errors.New("a room key has bypassed the hook")

// errStorage marks errors of the database among those that decrypting a room event can end with.
var errStorage = errors.New("the crypto store failed")

type contextKey int

const (
	// receivingKey marks the context of a message that is being received. It is given to HandleEncryptedEvent and to our own
	// storing only, for mautrix takes contexts along into goroutines.
	receivingKey contextKey = iota
	// decryptingKey marks the context of a room event that is being decrypted.
	decryptingKey
	// disputedKey marks the context of a room event whose session several devices claim.
	disputedKey
)

func withReceiving(ctx context.Context) context.Context {
	return context.WithValue(ctx, receivingKey, true)
}
func isReceiving(ctx context.Context) bool { return ctx.Value(receivingKey) != nil }
func withDecrypting(ctx context.Context) context.Context {
	return context.WithValue(ctx, decryptingKey, true)
}
func isDecrypting(ctx context.Context) bool { return ctx.Value(decryptingKey) != nil }
func withDisputed(ctx context.Context) context.Context {
	return context.WithValue(ctx, disputedKey, true)
}
func isDisputed(ctx context.Context) bool { return ctx.Value(disputedKey) != nil }

func newUnitOfWork(store *crypto.SQLCryptoStore) *unitOfWork {
	u := &unitOfWork{
		SQLCryptoStore: store,
		olm:            make(map[id.SenderKey][]*olmRecord),
		byPointer:      make(map[*crypto.OlmSession]*olmRecord),
	}
	u.clear()
	return u
}

func (u *unitOfWork) clear() {
	u.writes, u.dirtyOlm, u.account = nil, nil, nil
	u.hashes = make(map[[32]byte]time.Time)
	u.groups = make(map[id.SessionID]*crypto.InboundGroupSession)
	u.indices = make(map[messageIndex]indexedEvent)
}

// endMessage opens the gate: the message is staged whole, or was not understood.
func (u *unitOfWork) endMessage() {
	if u.gateHeld {
		u.gateHeld = false
		u.gate.Unlock()
	}
}

// stage holds a write back until the next flush.
func (u *unitOfWork) stage(w write) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.writes = append(u.writes, w)
}

// fail breaks the unit of work if a message is being received.
func (u *unitOfWork) fail(ctx context.Context, err error) error {
	if err != nil && isReceiving(ctx) && u.broken == nil {
		u.broken = fmt.Errorf("%w: %w", ErrUnitOfWorkBroken, err)
	}
	return err
}

// breakWith breaks the unit of work for an error of ours while receiving.
func (u *unitOfWork) breakWith(err error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.broken == nil {
		u.broken = fmt.Errorf("%w: %w", ErrUnitOfWorkBroken, err)
	}
	return u.broken
}

func (u *unitOfWork) failure() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.broken
}

// flush commits everything that is staged, in one transaction. On an error everything stays staged. The caller must not be
// within a message: it would wait for its own gate.
func (u *unitOfWork) flush(ctx context.Context) error {
	if !u.withoutGate {
		u.gate.Lock()
		defer u.gate.Unlock()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.broken != nil {
		return u.broken
	} else if len(u.writes) == 0 && len(u.dirtyOlm) == 0 && u.account == nil {
		return nil
	}
	err := u.DB.DoTxn(context.WithoutCancel(ctx), nil, u.writeAll)
	if err != nil {
		return fmt.Errorf("failed to commit the unit of work: %w", err)
	}
	for _, record := range u.dirtyOlm {
		record.pickle = nil
	}
	u.clear()
	return u.at("committed")
}

func (u *unitOfWork) at(point string) error {
	if u.fault == nil {
		return nil
	}
	return u.fault(point)
}

const upsertAccountQuery = `
	INSERT INTO crypto_account (account_id, device_id, shared, sync_token, account, key_backup_version)
	VALUES ($1, $2, $3, $4, $5, $6)
	ON CONFLICT (account_id) DO UPDATE
		SET shared=excluded.shared, account=excluded.account, key_backup_version=excluded.key_backup_version
`

const upsertOlmSessionQuery = `
	INSERT INTO crypto_olm_session (session_id, sender_key, session, created_at, last_encrypted, last_decrypted, account_id)
	VALUES ($1, $2, $3, $4, $5, $6, $7)
	ON CONFLICT (account_id, session_id) DO UPDATE
		SET session=excluded.session, last_encrypted=excluded.last_encrypted, last_decrypted=excluded.last_decrypted
`

func (u *unitOfWork) writeAll(ctx context.Context) error {
	if err := u.at("begun"); err != nil {
		return err
	}
	if u.account != nil {
		_, err := u.DB.Exec(ctx, upsertAccountQuery, u.AccountID, u.DeviceID, u.account.shared, u.SyncToken, u.account.pickle, u.account.keyBackupVersion)
		if err != nil {
			return fmt.Errorf("failed to store the Olm account: %w", err)
		}
	}
	if err := u.at("account"); err != nil {
		return err
	}
	for _, record := range u.dirtyOlm {
		_, err := u.DB.Exec(ctx, upsertOlmSessionQuery, record.sessionID, record.senderKey, record.pickle, record.created, record.encrypted, record.decrypted, u.AccountID)
		if err != nil {
			return fmt.Errorf("failed to store an Olm session: %w", err)
		}
	}
	if err := u.at("ratchets"); err != nil {
		return err
	}
	for _, write := range u.writes {
		if err := write(ctx); err != nil {
			return err
		}
	}
	return u.at("written")
}

// Flush implements [crypto.Store].
func (u *unitOfWork) Flush(ctx context.Context) error { return u.flush(ctx) }

// PutAccount stages the account while a message is received: it lacks the one-time keys of the Olm sessions that are staged
// with it. At any other time it is durable when PutAccount returns, since one-time keys are uploaded right after.
func (u *unitOfWork) PutAccount(ctx context.Context, account *crypto.OlmAccount) error {
	u.mu.Lock()
	pickle, err := account.Internal.Pickle(u.PickleKey)
	if err != nil {
		defer u.mu.Unlock()
		return u.fail(ctx, err)
	}
	u.Account = account
	u.account = &stagedAccount{pickle: pickle, shared: account.Shared, keyBackupVersion: account.KeyBackupVersion}
	u.mu.Unlock()
	if isReceiving(ctx) {
		return nil
	}
	return u.flush(ctx)
}

// GetOlmHash closes the gate: mautrix calls it first for every message, with its Olm lock held.
func (u *unitOfWork) GetOlmHash(ctx context.Context, hash [32]byte) (time.Time, error) {
	if isReceiving(ctx) && !u.gateHeld {
		u.gate.Lock()
		u.gateHeld = true
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if received, staged := u.hashes[hash]; staged {
		return received, nil
	}
	received, err := u.SQLCryptoStore.GetOlmHash(ctx, hash)
	return received, u.fail(ctx, err)
}

func (u *unitOfWork) PutOlmHash(_ context.Context, hash [32]byte, received time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hashes[hash] = received
	u.writes = append(u.writes, func(ctx context.Context) error {
		return u.SQLCryptoStore.PutOlmHash(ctx, hash, received)
	})
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
		return nil, u.fail(ctx, fmt.Errorf("failed to read the Olm sessions with %s: %w", senderKey, err))
	}
	records := make([]*olmRecord, len(sessions))
	for i, session := range sessions {
		records[i] = &olmRecord{
			senderKey: senderKey, session: session, sessionID: session.ID(),
			created: session.CreationTime, encrypted: session.LastEncryptedTime, decrypted: session.LastDecryptedTime,
		}
		u.byPointer[session] = records[i]
	}
	u.olm[senderKey] = records
	return records, nil
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
	pickle, err := session.Internal.Pickle(u.PickleKey)
	if err != nil {
		return u.breakWith(err)
	}
	u.mu.Lock()
	record := u.byPointer[session]
	if record != nil {
		u.stageRatchet(record, pickle)
	}
	u.mu.Unlock()
	if record == nil {
		return u.breakWith(fmt.Errorf("the Olm session %s was not loaded from this store", session.ID()))
	}
	return nil
}

func (u *unitOfWork) failLocked(ctx context.Context, err error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.fail(ctx, err)
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
	u.writes = append(u.writes, func(ctx context.Context) error {
		return u.SQLCryptoStore.DeleteSession(ctx, senderKey, session)
	})
	return nil
}

// GetGroupSession hands out copies of what is staged, for exporting or decrypting moves a session's ratchet.
func (u *unitOfWork) GetGroupSession(ctx context.Context, roomID id.RoomID, sessionID id.SessionID) (*crypto.InboundGroupSession, error) {
	if staged := u.stagedGroup(sessionID); staged != nil && staged.RoomID == roomID {
		return u.copyGroup(staged)
	}
	session, err := u.SQLCryptoStore.GetGroupSession(ctx, roomID, sessionID)
	if session == nil && err == nil && isDecrypting(ctx) {
		session, err = u.claimedGroupSession(ctx, roomID, sessionID)
	}
	if err != nil && !errors.Is(err, crypto.ErrGroupSessionWithheld) {
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
	internal := olm.NewBlankInboundGroupSession()
	if err = internal.Unpickle(pickle, u.PickleKey); err != nil {
		return nil, err
	}
	copied := *session
	copied.Internal = internal
	return &copied, nil
}

// putGroupSession stages the session while receiving. At any other time it writes at once, its own row only: the caller holds
// the Megolm decrypt lock and must not wait for the gate.
func (u *unitOfWork) putGroupSession(ctx context.Context, session *crypto.InboundGroupSession, with write) error {
	put := func(ctx context.Context) error {
		if err := u.SQLCryptoStore.PutGroupSession(ctx, session); err != nil {
			return fmt.Errorf("failed to store Megolm session %s: %w", session.ID(), err)
		}
		return with(ctx)
	}
	if !isReceiving(ctx) {
		return u.DB.DoTxn(ctx, nil, put)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.groups[session.ID()] = session
	u.writes = append(u.writes, put)
	return nil
}

// PutGroupSession stores a session, and what the way that it came says of its sender. Outside of receiving, that is not an
// m.room_key: the session is from a backup, an import or a bundle, or it is our own.
func (u *unitOfWork) PutGroupSession(ctx context.Context, session *crypto.InboundGroupSession) error {
	if isReceiving(ctx) {
		return u.putGroupSession(ctx, session, nothing)
	}
	return u.putOther(ctx, session)
}

// nothing is the write that writes nothing.
func nothing(context.Context) error { return nil }

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
	if known != (indexedEvent{}) {
		return known == seen, nil
	} else if isDisputed(ctx) {
		// Whoever comes first would take the index from whom it belongs to.
		return true, nil
	}
	u.indices[key] = seen
	u.writes = append(u.writes, func(ctx context.Context) error {
		_, err := u.SQLCryptoStore.ValidateMessageIndex(ctx, sessionID, eventID, index, timestamp)
		return err
	})
	return true, nil
}

const getMessageIndexQuery = `SELECT event_id, timestamp FROM crypto_message_index WHERE session_id=$1 AND "index"=$2`

func (u *unitOfWork) storedIndex(ctx context.Context, key messageIndex) (stored indexedEvent, err error) {
	err = u.DB.QueryRow(ctx, getMessageIndexQuery, key.sessionID, key.index).Scan(&stored.eventID, &stored.timestamp)
	return stored, ignoreNoRows(err)
}

// FindDeviceByKey hides the devices from mautrix's own judgement of room events, which we replace (see Verdict). Without a
// device it leaves trust alone, and looks nothing else up.
func (u *unitOfWork) FindDeviceByKey(ctx context.Context, userID id.UserID, identityKey id.IdentityKey) (*id.Device, error) {
	if isDecrypting(ctx) {
		return nil, nil
	}
	device, err := u.SQLCryptoStore.FindDeviceByKey(ctx, userID, identityKey)
	if err != nil {
		return nil, u.failLocked(ctx, err)
	}
	return device, nil
}
