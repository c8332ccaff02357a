package cryptohook

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"

	"sendertrust/internal/faultpoint"
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
	// transaction runs the writes: see [store.write].
	transaction func(ctx context.Context, fn func(ctx context.Context) error) error
	// putOther stores a session that did not come in an m.room_key.
	putOther func(ctx context.Context, session *crypto.InboundGroupSession) error
	// foresee begins a transaction that stores these Megolm sessions, and gives the context for the rest of it.
	foresee func(ctx context.Context, sessions []id.SessionID) (context.Context, error)
	// stored is part of storing a Megolm session: events may wait for its key.
	stored func(ctx context.Context, sessionID id.SessionID) error
	// upsertClaims stores the claims on a pile.
	upsertClaims func(ctx context.Context, claims []*SenderData) error
	// undone is called when a part of a transaction was rolled back, and the rest goes on.
	undone func()
	// direct counts the sessions that are stored at once.
	direct directStores
	// fault, if set, is called between the writes of a flush. Tests stop the world there.
	fault func(at string) error

	mu        sync.Mutex
	broken    error
	writes    []stagedWrite
	hashes    map[[32]byte]time.Time
	groups    map[id.SessionID]*crypto.InboundGroupSession
	indices   map[messageIndex]indexedEvent
	account   *stagedAccount
	dirtyOlm  []*olmRecord
	olm       map[id.SenderKey][]*olmRecord
	byPointer map[*crypto.OlmSession]*olmRecord

	open *openGroups
}

var _ crypto.Store = (*unitOfWork)(nil)

// write is one staged statement; the context carries the transaction.
type write func(ctx context.Context) error

type stagedAccount struct {
	pickle           []byte
	shared           bool
	keyBackupVersion id.KeyBackupVersion
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
	// receivingKey marks the context of a message that is being received: see [receiving.context].
	receivingKey contextKey = iota
	// decryptingKey marks the context of a room event that is being decrypted.
	decryptingKey
	// disputedKey marks the context of a room event whose session several devices claim.
	disputedKey
	// lockingKey marks the context of a call that is made for mautrix's Olm lock.
	lockingKey
	// foresightKey is what goes with the context of a transaction: see [store.foresee].
	foresightKey
)

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
		transaction: func(ctx context.Context, fn func(ctx context.Context) error) error {
			return store.DB.DoTxn(ctx, nil, fn)
		},
		foresee:      func(ctx context.Context, _ []id.SessionID) (context.Context, error) { return ctx, nil },
		stored:       func(context.Context, id.SessionID) error { return nil },
		upsertClaims: func(context.Context, []*SenderData) error { return nil },
		undone:       func() {},
		open:         newOpenGroups(),
		olm:          make(map[id.SenderKey][]*olmRecord),
		byPointer:    make(map[*crypto.OlmSession]*olmRecord),
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

// closeGate has no flush come in between until endMessage. The caller holds mautrix's Olm lock.
func (u *unitOfWork) closeGate() {
	if !u.gateHeld {
		u.gate.Lock()
		u.gateHeld = true
	}
}

// endMessage opens the gate: the message is staged whole, or was not understood.
func (u *unitOfWork) endMessage() {
	if u.gateHeld {
		u.gateHeld = false
		u.gate.Unlock()
	}
}

// stage holds a write back until the next flush.
func (u *unitOfWork) stage(w write) { u.stageRow(stagedWrite{write: w}) }

func (u *unitOfWork) stageRow(s stagedWrite) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.writes = append(u.writes, s)
}

// fail breaks the unit of work if a message is being received.
func (u *unitOfWork) fail(ctx context.Context, err error) error {
	if err != nil && isReceiving(ctx) && u.broken == nil {
		u.broken = fmt.Errorf("%w: %w", ErrUnitOfWorkBroken, err)
	}
	return err
}

func (u *unitOfWork) failLocked(ctx context.Context, err error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.fail(ctx, err)
}

// breakWith breaks the unit of work for an error after which what is in memory is ahead of what can be stored.
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
	} else if len(u.writes) == 0 && len(u.hashes) == 0 && len(u.dirtyOlm) == 0 && u.account == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	err := u.transaction(ctx, func(ctx context.Context) error {
		ctx, err := u.foresee(ctx, slices.Collect(maps.Keys(u.groups)))
		if err != nil {
			return err
		}
		return u.writeAll(ctx, asItIs, insertSizes[0])
	})
	if isRefused(err) {
		err = u.transaction(ctx, func(ctx context.Context) error { return u.writeAll(ctx, u.leaveOutRefused, 1) })
	}
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
	faultpoint.Reach(point)
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

// asItIs runs one write.
func asItIs(ctx context.Context, w write) error { return w(ctx) }

// leaveOutRefused runs one write, and goes on without it if PostgreSQL does not take what is in it. Strangers' texts and numbers are
// checked where they come in; one that is overlooked must not keep everything else from being stored, for ever.
func (u *unitOfWork) leaveOutRefused(ctx context.Context, w write) error {
	if _, err := u.DB.Exec(ctx, "SAVEPOINT one_write"); err != nil {
		return err
	}
	refused := w(ctx)
	end := "RELEASE SAVEPOINT one_write"
	if isRefused(refused) {
		zerolog.Ctx(ctx).Err(refused).Msg("The database refuses something that a stranger has sent; going on without it")
		end, refused = "ROLLBACK TO SAVEPOINT one_write", nil
		u.undone()
	}
	if refused != nil {
		return refused
	}
	_, err := u.DB.Exec(ctx, end)
	return err
}

// writeAll writes everything that is staged, each thing that stands for itself by the function that is given; so many Olm sessions are one such thing.
func (u *unitOfWork) writeAll(ctx context.Context, each func(ctx context.Context, w write) error, together int) error {
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
	if err := u.writeOlmSessions(ctx, each, together); err != nil {
		return fmt.Errorf("failed to store Olm sessions: %w", err)
	}
	if err := u.writeHashes(ctx); err != nil {
		return fmt.Errorf("failed to store that Olm messages were received: %w", err)
	}
	if err := u.at("ratchets"); err != nil {
		return err
	}
	for _, s := range u.writes {
		if piled, err := s.putOnPile(ctx); err != nil {
			return err
		} else if piled {
			continue
		}
		if err := u.writePile(ctx); err != nil {
			return err
		}
		if err := each(ctx, s.write); err != nil {
			return err
		}
	}
	if err := u.writePile(ctx); err != nil {
		return err
	}
	return u.at("written")
}

// olmHash is a row that says that an Olm message was received.
type olmHash struct {
	accountID  string
	receivedAt time.Time
	hash       [sha256.Size]byte
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (h olmHash) GetMassInsertValues() [3]any {
	return [3]any{h.accountID, h.receivedAt.UnixMilli(), h.hash[:]}
}

// insertOlmHashes is mautrix's statement for one.
var insertOlmHashes = dbutil.NewMassInsertBuilder[olmHash, [0]any](insertOlmHashQuery, "($%d, $%d, $%d)")

const insertOlmHashQuery = `
	INSERT INTO crypto_olm_message_hash (account_id, received_at, message_hash) VALUES ($1, $2, $3) ON CONFLICT (message_hash) DO NOTHING
`

func (u *unitOfWork) writeHashes(ctx context.Context) error {
	hashes := make([]olmHash, 0, len(u.hashes))
	for hash, receivedAt := range u.hashes {
		hashes = append(hashes, olmHash{u.AccountID, receivedAt, hash})
	}
	return insertAll(ctx, u.DB, insertOlmHashes, hashes, func(h olmHash) [sha256.Size]byte { return h.hash })
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
	if isReceiving(ctx) {
		u.closeGate()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if received, staged := u.hashes[hash]; staged {
		return received, nil
	}
	if received, looked := receivingOf(ctx).receivedAt(hash); looked {
		return received, nil
	}
	received, err := u.SQLCryptoStore.GetOlmHash(ctx, hash)
	return received, u.fail(ctx, err)
}

func (u *unitOfWork) PutOlmHash(ctx context.Context, hash [32]byte, received time.Time) error {
	receivingOf(ctx).received(hash, received)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hashes[hash] = received
	return nil
}

// FindDeviceByKey hides the devices from mautrix's own judgement of room events, which we replace (see Verdict). Without a
// device it leaves trust alone, and looks nothing else up.
func (u *unitOfWork) FindDeviceByKey(ctx context.Context, userID id.UserID, identityKey id.IdentityKey) (*id.Device, error) {
	if isDecrypting(ctx) {
		return nil, nil
	}
	device, err := receivingOf(ctx).device(deviceOfKey{userID, identityKey}, func() (*id.Device, error) {
		return u.SQLCryptoStore.FindDeviceByKey(ctx, userID, identityKey)
	})
	if err != nil {
		return nil, u.failLocked(ctx, err)
	}
	return device, nil
}
