package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	_ "go.mau.fi/util/dbutil/litestream" // registers the sqlite3-fk-wal drivers
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
	"maunium.net/go/mautrix/sqlstatestore"

	"sendertrust/internal/clock"
)

// Options are the settings of [Install]. DB and PickleKey are required.
type Options struct {
	// DB holds mautrix's crypto and state tables and the hook's own. It belongs to one process and one account. For SQLite use
	// the driver sqlite3-fk-wal-fullsync: without full sync a power failure may take the last messages' keys. For PostgreSQL use
	// [OpenPostgres].
	DB *dbutil.Database
	// Owner is this process's ownership of DB, if it was got before the login, as it should be where another process may stand by.
	// Without it [Install] calls [Own], and Run releases the database.
	Owner *Ownership
	// PickleKey encrypts the keys in DB.
	PickleKey []byte
	// KeyWait is how long an event waits for its key before its handler is told that it cannot be decrypted. 25 s by default.
	KeyWait time.Duration
	// Requirement is the trust below which content is withheld from handlers. [RequireNothing] by default.
	Requirement TrustRequirement
	// VerifiedUsers pins the master keys (unpadded base64) of users whom the operator has verified. The hook signs them with the
	// account's user-signing key as soon as it sees them; another key is a verification violation.
	VerifiedUsers map[id.UserID]id.Ed25519
	// OnChange, if set, is told what may have changed the verdicts that were given: see [Hook.Review]. It is called from the
	// hook's own goroutines and must not wait for anything.
	OnChange func(Change)
	// OnOwnIdentity, if set, is told when the homeserver no longer publishes our own device and identity as they are, and when it does
	// again: see [Hook.OwnIdentity]. Like OnChange it must not wait for anything.
	OnOwnIdentity func(OwnIdentity)
	// Limits bound what others can make the hook hold and do. Zero values are the defaults.
	Limits Limits
	// Clock is what waiting is measured by. By default it begins with the computer's time, and does not follow when that is set later.
	Clock func() time.Time
}

const defaultKeyWait = 25 * time.Second

// Errors of [Install] that the user of the program has to act upon.
var (
	// ErrNotLoggedIn: the client lacks user ID, device ID or access token.
	ErrNotLoggedIn = errors.New("the client is not logged in")
	// ErrOtherAccount: the database belongs to another account.
	ErrOtherAccount = errors.New("the database belongs to another account")
	// ErrOtherDevice: the database belongs to another device of this account.
	ErrOtherDevice = errors.New("the database belongs to another device")
	// ErrPickleKey: the keys in the database were encrypted with another pickle key.
	ErrPickleKey = errors.New("the pickle key does not fit the database")
	// ErrNoInterception: this version of mautrix handles room keys in a way that the hook does not know.
	ErrNoInterception = errors.New("room keys cannot be intercepted in this version of mautrix")
)

// Hook is the crypto helper of one client: see the package's documentation. It implements [mautrix.CryptoHelper].
type Hook struct {
	client    *mautrix.Client
	options   Options
	log       zerolog.Logger
	clock     func() time.Time
	mach      *crypto.OlmMachine
	uow       *unitOfWork
	store     *store
	owner     *Ownership
	rooms     crypto.StateStore
	sessions  *SessionManager
	resolver  *resolver
	inbox     *inbox
	search    *keySearch
	bundles   *keyBundles
	keeper    *backupKeeper
	syncer    *syncer
	transport *transport
	questions keyQuestions
	own       ownWatch
	counters  counters
	// judgedPending is written in the unit of work's transactions only.
	judgedPending pendingJudged
	signatures    *checkedSignatures
	sentKeys      sentKeys
	// oneByOne has nothing be received together, for tests that look at each message.
	oneByOne bool
	// background are goroutines that answer other devices' requests.
	background sync.WaitGroup
	// kept are the guards of the sessions in the unit of work; only the syncing goroutine touches them.
	kept []keptGuard
	// changes are what is to be told once it is durable.
	changesLock sync.Mutex
	changes     Change
	// learning and learnt count the times that storing something about users' keys began and ended: see knowledge.
	learning, learnt atomic.Uint64
}

// learn stores something about users' keys or their standing, in a transaction.
func (h *Hook) learn(ctx context.Context, fn func(ctx context.Context) error) error {
	h.learning.Add(1)
	defer h.learnt.Add(1)
	return h.store.write(ctx, fn)
}

// learntInPassing has everything derived anew that was derived before, and is stored after this.
func (h *Hook) learntInPassing() {
	h.learning.Add(1)
	h.learnt.Add(1)
}

// knowledge is what a derivation rested on that is stored only later: with something learnt in between, it has to be made again, for
// what was learnt was applied to the sessions that were stored by then.
type knowledge struct {
	learning uint64
	settled  bool
}

func (h *Hook) knowledge() knowledge {
	learnt := h.learnt.Load()
	learning := h.learning.Load()
	return knowledge{learning, learning == learnt}
}

func (k knowledge) outdated(h *Hook) bool { return !k.settled || h.learning.Load() != k.learning }

// keptGuard is held until its session is durable, and on until the sender's keys were asked for if it waits for them.
type keptGuard struct {
	*SessionGuard
	sender id.UserID
	waits  bool
}

var _ mautrix.CryptoHelper = (*Hook)(nil)

// Install takes over the encryption of a client that is logged in: its Crypto, Syncer, Store and HTTP transport, and its
// StateStore if it has none. Register handlers on client.Syncer after it. It makes no request.
//
// It proves by a self-test that room keys are intercepted, and fails with [ErrNoInterception] if not. See [ErrOtherAccount],
// [ErrOtherDevice] and [ErrPickleKey] for what a database may be refused for, and [Own] if the options have no owner of it.
func Install(ctx context.Context, client *mautrix.Client, options Options) (hook *Hook, err error) {
	if client.UserID == "" || client.DeviceID == "" || client.AccessToken == "" {
		return nil, ErrNotLoggedIn
	}
	if options.DB == nil || len(options.PickleKey) == 0 {
		return nil, errors.New("cryptohook: Options.DB and Options.PickleKey are required")
	}
	if err = options.Requirement.check(); err != nil {
		return nil, err
	}
	if options.KeyWait == 0 {
		options.KeyWait = defaultKeyWait
	}
	options.Limits = options.Limits.withDefaults()
	if options.Clock == nil {
		options.Clock = clock.Steady()
	}
	if err = selfTest(ctx); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoInterception, err)
	}
	owner := options.Owner
	if owner == nil {
		if owner, err = Own(client.Log.WithContext(ctx), options.DB); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, owner.Release())
			}
		}()
	}
	h := &Hook{
		client: client, options: options, clock: options.Clock, owner: owner, sessions: NewSessionManager(),
		log: client.Log, signatures: newCheckedSignatures(), sentKeys: newSentKeys(),
	}
	if h.rooms, err = h.openStores(ctx); err != nil {
		return nil, err
	}
	h.resolver, h.inbox, h.search, h.bundles = newResolver(h), newInbox(h), newKeySearch(h), newKeyBundles(h)
	h.keeper = newBackupKeeper(h)
	if err = h.search.load(ctx); err != nil {
		return nil, err
	}
	lastSeq, err := h.store.lastSeq(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to read the inbox: %w", err)
	}
	h.inbox.lastSeq.Store(lastSeq)
	h.mach = crypto.NewOlmMachine(client, &h.log, h.uow, patientState{h.rooms, h})
	// The hook asks for keys itself, beside decryption; and it has its own record of message indices.
	h.mach.DisableDecryptKeyFetching = true
	h.mach.DisableRatchetTracking = true
	// What is in a message does not change who sent it.
	h.mach.IgnorePostDecryptionParseErrors = true
	if err = h.mach.Load(ctx); err != nil {
		return nil, h.uow.whyNotLoaded(ctx, err)
	}
	// mautrix works these out at first use, without a lock.
	h.mach.GetAccount().Keys()
	h.takeOver()
	return h, nil
}

// openStores brings the tables up to date and checks whose they are.
func (h *Hook) openStores(ctx context.Context) (crypto.StateStore, error) {
	db := h.options.DB
	dbLog := DatabaseLog(h.log)
	if h.client.StateStore == nil {
		stateStore := sqlstatestore.NewSQLStateStore(db, dbLog, false)
		if err := stateStore.Upgrade(ctx); err != nil {
			return nil, fmt.Errorf("failed to upgrade the state store: %w", err)
		}
		h.client.StateStore = stateStore
	}
	stateStore, ok := h.client.StateStore.(crypto.StateStore)
	if !ok {
		return nil, errors.New("cryptohook: the client's StateStore has to implement crypto.StateStore")
	}
	cryptoStore := crypto.NewSQLCryptoStore(db, dbLog, h.client.UserID.String(), h.client.DeviceID, h.options.PickleKey)
	if err := cryptoStore.DB.Upgrade(ctx); err != nil {
		return nil, fmt.Errorf("failed to upgrade the crypto store: %w", err)
	}
	h.store = newStore(db, dbLog)
	h.store.owner = h.owner
	if err := h.store.Upgrade(ctx); err != nil {
		return nil, fmt.Errorf("failed to upgrade the sender data: %w", err)
	}
	stored, err := h.store.account(ctx, h.client.UserID)
	switch {
	case err != nil:
		return nil, err
	case stored != nil && stored.deviceID != h.client.DeviceID:
		return nil, fmt.Errorf("%w: it was made for %s, and the client is %s", ErrOtherDevice, stored.deviceID, h.client.DeviceID)
	case stored != nil:
		cryptoStore.AccountID = stored.id
	}
	h.uow = newUnitOfWork(cryptoStore)
	h.uow.transaction = h.store.write
	h.uow.foresee = h.store.foresee
	h.uow.putOther, h.uow.stored, h.uow.upsertClaims, h.uow.undone = h.storeOther, h.keyStored, h.store.upsertClaims, h.forgetTransaction
	return stateStore, nil
}

// takeOver puts the hook between the client and the network, and between the client and its handlers.
func (h *Hook) takeOver() {
	inner := mautrix.NewDefaultSyncer()
	if existing, ok := h.client.Syncer.(*mautrix.DefaultSyncer); ok {
		inner = existing
	}
	h.syncer = &syncer{DefaultSyncer: inner, hook: h}
	h.syncer.OnEvent(h.keepState)
	h.syncer.OnEventType(event.StateMember, h.mach.HandleMemberEvent)
	h.syncer.OnEventType(event.StateMember, h.noteInvite)
	h.syncer.OnEventType(event.StateHistoryVisibility, h.mach.HandleHistoryVisibility)

	base := h.client.Client.Transport
	if earlier, ok := base.(*transport); ok {
		base = earlier.base
	}
	h.transport = &transport{base: WithoutNulls(base), hook: h}
	httpClient := *h.client.Client
	httpClient.Transport = h.transport

	h.client.Client = &httpClient
	h.client.Syncer = h.syncer
	h.client.Store = tokenStore{h}
	h.client.Crypto = h
}

// Machine gives mautrix's machine, for what the hook does not do itself. Do not hand it events of a /sync.
func (h *Hook) Machine() *crypto.OlmMachine { return h.mach }

// Run syncs until the context ends or syncing fails for good, then waits for everything that the hook started. On a database that mautrix
// used without the hook it first notes, once, what is known of the senders of the sessions there. After [ErrUnitOfWorkBroken] a new Hook
// has to be installed; nothing is lost. After [ErrNotOwner] the database has to be owned again before that.
func (h *Hook) Run(ctx context.Context) (err error) {
	if h.options.Owner == nil {
		defer func() { err = errors.Join(err, h.owner.Release()) }()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(h.owner.losing, cancel)()
	if err = h.prepare(ctx); err != nil {
		return h.ending(err, ctx.Err() != nil)
	}
	h.own.begin(h.clock())
	var workers sync.WaitGroup
	workers.Go(func() { h.resolver.run(ctx) })
	workers.Go(func() { h.inbox.run(ctx) })
	workers.Go(func() { h.search.run(ctx) })
	workers.Go(func() { h.bundles.run(ctx) })
	workers.Go(func() { h.keeper.run(ctx) })
	err = h.syncer.sync(ctx)
	ended := ctx.Err() != nil
	cancel()
	workers.Wait()
	h.background.Wait()
	h.mach.Destroy()
	// What was handled last need not be handled again. If this fails, it is, and recognised.
	if flushErr := h.uow.flush(context.WithoutCancel(ctx)); flushErr != nil && err == nil {
		err = flushErr
	}
	return h.ending(err, ended)
}

// ending is what Run returns: why the database was lost, if it was, and nothing when it was told to end.
func (h *Hook) ending(err error, told bool) error {
	if lost := h.owner.Err(); lost != nil {
		return lost
	}
	if told && !errors.Is(err, ErrUnitOfWorkBroken) {
		return nil
	}
	return err
}

// anchor is what every verdict rests on now. The machine's private cross-signing keys are set before Run.
func (h *Hook) anchor() trustAnchor {
	anchor := trustAnchor{userID: h.client.UserID, pins: h.options.VerifiedUsers}
	if keys := h.mach.CrossSigningKeys; keys != nil {
		anchor.masterKey = keys.MasterKey.PublicKey()
		anchor.selfSigningKey, anchor.userSigningKey = keys.SelfSigningKey.PublicKey(), keys.UserSigningKey.PublicKey()
	}
	return anchor
}

// keepUntilCommit holds a guard until what was received is durable. A session that waits for its sender's keys keeps it until they
// were asked for.
func (h *Hook) keepUntilCommit(guard *SessionGuard, sender *SenderData) {
	if guard != nil {
		h.kept = append(h.kept, keptGuard{guard, sender.Sender, sender.awaitsFirstLook()})
	}
}

// unlockKept releases the guards of the unit of work, and hands those that wait on to the resolver if it is durable.
func (h *Hook) unlockKept(durable bool) {
	for _, guard := range h.kept {
		if !durable || !guard.waits || !h.resolver.adopt(guard) {
			guard.Unlock()
		}
	}
	if len(h.kept) > 0 {
		h.kept = nil
		h.resolver.signal()
	}
}

// Init implements [mautrix.CryptoHelper]; [Install] has done it all.
func (h *Hook) Init(context.Context) error { return nil }

// Encrypt implements [mautrix.CryptoHelper]. It shares the room's session first if need be.
func (h *Hook) Encrypt(ctx context.Context, roomID id.RoomID, evtType event.Type, content any) (*event.EncryptedEventContent, error) {
	encrypted, err := h.mach.EncryptMegolmEvent(ctx, roomID, evtType, content)
	if err == nil || !crypto.IsShareError(err) {
		return encrypted, err
	}
	members, err := h.client.StateStore.GetRoomJoinedOrInvitedMembers(ctx, roomID)
	if err != nil {
		return nil, fmt.Errorf("failed to get the members of %s: %w", roomID, err)
	}
	if err = h.share(ctx, roomID, members); err != nil {
		return nil, fmt.Errorf("failed to share the session of %s: %w", roomID, err)
	}
	return h.mach.EncryptMegolmEvent(ctx, roomID, evtType, content)
}

// Decrypt implements [mautrix.CryptoHelper], for events that did not come by /sync. It gives no verdict.
func (h *Hook) Decrypt(ctx context.Context, evt *event.Event) (*event.Event, error) {
	return h.decrypt(ctx, evt)
}

// WaitForSession implements [mautrix.CryptoHelper].
func (h *Hook) WaitForSession(ctx context.Context, roomID id.RoomID, senderKey id.SenderKey, sessionID id.SessionID, timeout time.Duration) bool {
	return h.mach.WaitForSession(ctx, roomID, senderKey, sessionID, timeout)
}

// RequestSession implements [mautrix.CryptoHelper].
func (h *Hook) RequestSession(ctx context.Context, roomID id.RoomID, senderKey id.SenderKey, sessionID id.SessionID, userID id.UserID, deviceID id.DeviceID) {
	if deviceID == "" {
		deviceID = "*"
	}
	users := map[id.UserID][]id.DeviceID{userID: {deviceID}, h.client.UserID: {"*"}}
	if err := h.mach.SendRoomKeyRequest(ctx, roomID, senderKey, sessionID, "", users); err != nil {
		h.log.Warn().Err(err).Stringer("session_id", sessionID).Msg("Failed to ask for a session")
	}
}

// StoredDevice gives the device that the database was made for, empty for a new one, so that a login can ask for the same
// again. It fails with [ErrOtherAccount] when the database belongs to somebody else.
func StoredDevice(ctx context.Context, db *dbutil.Database, userID id.UserID) (id.DeviceID, error) {
	cryptoStore := crypto.NewSQLCryptoStore(db, dbutil.NoopLogger, userID.String(), "", nil)
	if err := cryptoStore.DB.Upgrade(ctx); err != nil {
		return "", fmt.Errorf("failed to upgrade the crypto store: %w", err)
	}
	stored, err := newStore(db, dbutil.NoopLogger).account(ctx, userID)
	if err != nil || stored == nil {
		return "", err
	}
	return stored.deviceID, nil
}
