// Package receiver provides the subjects of the benchmarks: a client with the hook, and one with mautrix's own crypto helper as it comes.
// Both sync with a homeserver in the same process, and are used by their public API only.
package receiver

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	_ "go.mau.fi/util/dbutil/litestream" // registers the sqlite3-fk-wal drivers
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/cryptohelper"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/bench/inputs"
	"sendertrust/cryptohook"
)

// Side is whose code is measured.
type Side string

const (
	// Hook is ours.
	Hook Side = "hook"
	// Stock is mautrix without the hook.
	Stock Side = "stock"
)

// Store is where the keys are kept.
type Store string

const (
	// SQLiteFull is a file that survives a power failure, SQLiteNormal one that may lose the last commits then.
	SQLiteFull   Store = "sqlite-full"
	SQLiteNormal Store = "sqlite-normal"
	Postgres     Store = "postgres"
)

// drivers are dbutil's.
var drivers = map[Store]string{SQLiteFull: "sqlite3-fk-wal-fullsync", SQLiteNormal: "sqlite3-fk-wal"}

// connections is what the bot has.
const connections = 5

var pickleKey = []byte("a pickle key of the usual length")

// Receiver is a client that is logged in, and syncs.
type Receiver struct {
	Server  *inputs.Server
	Client  *mautrix.Client
	Machine *crypto.OlmMachine
	DB      *dbutil.Database
	// Hook is nil without it.
	Hook *cryptohook.Hook

	side  Side
	stop  context.CancelFunc
	ended chan error
}

// Options say which receiver [Open] makes.
type Options struct {
	Side  Side
	Store Store
	// At is the database: a file's path, or PostgreSQL's URI. It is made if there is none.
	At string
	// Account is the receiver's own, with its private cross-signing keys.
	Account *inputs.Person
	Server  *inputs.Server
	// OnMessage, if set, is called for every decrypted message that came by /sync.
	OnMessage func(ctx context.Context, evt *event.Event)
}

// Open opens the database, and begins to sync.
func Open(ctx context.Context, o Options) (*Receiver, error) {
	db, err := openDatabase(o)
	if err != nil {
		return nil, err
	}
	client, err := mautrix.NewClient("http://server.bench", inputs.Receiver, "token")
	if err != nil {
		return nil, err
	}
	client.DeviceID, client.Log, client.Client = inputs.ReceiverDevice, zerolog.Nop(), &http.Client{Transport: o.Server}
	r := &Receiver{Server: o.Server, Client: client, DB: db, side: o.Side}
	if o.Side == Hook {
		err = r.installHook(ctx)
	} else {
		err = r.installStock(ctx)
	}
	if err == nil {
		err = r.Machine.ImportCrossSigningKeys(o.Account.Seeds())
	}
	if err != nil {
		return nil, err
	}
	if o.OnMessage != nil {
		client.Syncer.(mautrix.ExtensibleSyncer).OnEventType(event.EventMessage, o.OnMessage)
	}
	r.begin(ctx)
	return r, nil
}

func openDatabase(o Options) (db *dbutil.Database, err error) {
	switch {
	case o.Store == Postgres:
		// For stock mautrix too: without it pgx and mautrix's columns disagree about times.
		db, err = cryptohook.OpenPostgres(o.At)
	case o.Side == Hook:
		db, err = cryptohook.OpenSQLite(cryptohook.SQLiteOptions{Driver: drivers[o.Store], URI: uriOf(o.At), File: o.At, Log: zerolog.Nop()})
	default:
		db, err = dbutil.NewWithDialect(uriOf(o.At), drivers[o.Store])
	}
	if err != nil {
		return nil, err
	}
	db.Log = dbutil.NoopLogger
	return db, db.Configure(dbutil.Config{PoolConfig: dbutil.PoolConfig{MaxOpenConns: connections, MaxIdleConns: connections}})
}

func uriOf(file string) string { return "file:" + file + "?_txlock=immediate" }

func (r *Receiver) installHook(ctx context.Context) (err error) {
	r.Hook, err = cryptohook.Install(ctx, r.Client, cryptohook.Options{DB: r.DB, PickleKey: pickleKey})
	if err != nil {
		return err
	}
	r.Machine = r.Hook.Machine()
	if r.Machine.GetAccount().Shared {
		return nil
	}
	return r.Machine.ShareKeys(ctx, -1)
}

// installStock does what the documentation of mautrix's crypto helper says.
func (r *Receiver) installStock(ctx context.Context) error {
	helper, err := cryptohelper.NewCryptoHelper(r.Client, pickleKey, r.DB)
	if err != nil {
		return err
	}
	if err = helper.Init(ctx); err != nil {
		return err
	}
	r.Client.Crypto = helper
	r.Machine = helper.Machine()
	return nil
}

func (r *Receiver) begin(ctx context.Context) {
	ctx, r.stop = context.WithCancel(ctx)
	r.ended = make(chan error, 1)
	go func() {
		if r.Hook != nil {
			r.ended <- r.Hook.Run(ctx)
		} else {
			r.ended <- r.Client.SyncWithContext(ctx)
		}
	}()
	r.Server.AwaitReceiver()
}

// Close ends syncing and closes the database.
func (r *Receiver) Close() error {
	r.stop()
	<-r.ended
	if r.Hook == nil {
		r.Machine.Destroy()
	}
	return r.DB.Close()
}

// Learn has the receiver ask for what these people publish, and take it in.
func (r *Receiver) Learn(ctx context.Context, people ...*inputs.Person) error {
	for chunk := range slices.Chunk(people, inputs.UsersPerQuery) {
		users := make([]id.UserID, len(chunk))
		for i, p := range chunk {
			users[i] = p.UserID
		}
		if err := r.Fetch(ctx, users); err != nil {
			return err
		}
	}
	return nil
}

// Fetch has the receiver ask for what these users publish, in one request, and take it in.
func (r *Receiver) Fetch(ctx context.Context, users []id.UserID) error {
	if r.Hook != nil {
		return r.Hook.Recheck(ctx, users)
	}
	_, err := r.Machine.FetchKeys(ctx, users, true)
	return err
}

// Settle waits until nothing is left that the hook does beside.
func (r *Receiver) Settle() {
	if r.Hook == nil {
		return
	}
	const quiet = 300 * time.Millisecond
	last := r.Hook.Stats()
	for since := time.Now(); time.Since(since) < quiet; {
		time.Sleep(quiet / 10)
		now := r.Hook.Stats()
		if now.JudgedAgain != last.JudgedAgain || now.PendingUsers > 0 || now.KeyQueries != last.KeyQueries {
			since = time.Now()
		}
		last = now
	}
}

// Own is the receiver's device.
func (r *Receiver) Own() *id.Device { return r.Machine.OwnIdentity() }

// Greet sends a message to a device, so that what the device sends from now on are no pre-key messages.
func (r *Receiver) Greet(ctx context.Context, device *inputs.Device) error {
	dummy := event.Type{Type: "m.dummy", Class: event.ToDeviceEventType}
	if err := r.Machine.SendEncryptedToDevice(ctx, device.Device(), dummy, event.Content{Raw: map[string]any{}}); err != nil {
		return err
	}
	for _, content := range r.Server.Sent(device) {
		device.Read(content)
	}
	return nil
}

// Decrypt decrypts one room event and says who sent it. What that leaves to be stored is durable after [Receiver.Flush].
func (r *Receiver) Decrypt(ctx context.Context, raw json.RawMessage) error {
	var evt event.Event
	if err := json.Unmarshal(raw, &evt); err != nil {
		return err
	}
	evt.Type.Class = event.MessageEventType
	if err := evt.Content.ParseRaw(evt.Type); err != nil {
		return err
	}
	decrypted, err := r.Client.Crypto.Decrypt(ctx, &evt)
	if err != nil {
		return err
	}
	if r.Hook == nil {
		if decrypted.Mautrix.TrustState != id.TrustStateCrossSignedTOFU {
			return fmt.Errorf("mautrix says %s of %s", decrypted.Mautrix.TrustState, evt.ID)
		}
		return nil
	}
	verdict, err := r.Hook.Review(ctx, cryptohook.Verdict{EventID: evt.ID, SessionID: evt.Content.AsEncrypted().SessionID}, evt.Sender)
	if err == nil && (verdict.Code != cryptohook.CodeUnverifiedIdentity || verdict.Outdated) {
		err = fmt.Errorf("the hook says %s of %s", verdict.Code, evt.ID)
	}
	return err
}

// Flush makes what was learnt by decrypting durable.
func (r *Receiver) Flush(ctx context.Context) error { return r.Machine.FlushStore(ctx) }

// Sessions is how many Megolm sessions are stored.
func (r *Receiver) Sessions(ctx context.Context) (count int, err error) {
	err = r.DB.QueryRow(ctx, "SELECT COUNT(*) FROM crypto_megolm_inbound_session").Scan(&count)
	return count, err
}
