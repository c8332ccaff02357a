// Package stock provides a bot as anybody writes one with mautrix: its client and its crypto helper as they come, with goolm, on an
// SQLite file. It says nothing to anybody; it remembers what mautrix tells it of each message.
package stock

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/crypto/cryptohelper"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Clear is what [Client.Trust] says of a message that came unencrypted: mautrix hands it to the handlers like any other.
const Clear = "not encrypted"

// Client is one device of an account, with a goroutine that syncs until [Client.Close].
type Client struct {
	UserID id.UserID

	client *mautrix.Client
	helper *cryptohelper.CryptoHelper
	stop   context.CancelFunc
	done   chan struct{}

	lock sync.Mutex
	// trust is what was told of each message; raw are the encrypted events as they came.
	trust map[id.EventID]string
	raw   map[id.EventID]*event.Event
	// changed is closed, and replaced, whenever there is more.
	changed chan struct{}
}

// Login makes a new device of the account and begins to sync. The database is a file that does not exist yet. User is a localpart or a
// whole user ID.
func Login(ctx context.Context, homeserverURL, user, password, database string) (*Client, error) {
	client, err := mautrix.NewClient(homeserverURL, "", "")
	if err != nil {
		return nil, fmt.Errorf("failed to make a client for %s: %w", homeserverURL, err)
	}
	client.Log = zerolog.Nop()
	helper, err := cryptohelper.NewCryptoHelper(client, []byte("a pickle key"), database)
	if err != nil {
		return nil, fmt.Errorf("failed to make a crypto helper: %w", err)
	}
	helper.LoginAs = &mautrix.ReqLogin{
		Type:       mautrix.AuthTypePassword,
		Identifier: mautrix.UserIdentifier{Type: mautrix.IdentifierTypeUser, User: user},
		Password:   password,
	}
	c := &Client{
		client: client, helper: helper, done: make(chan struct{}),
		trust: make(map[id.EventID]string), raw: make(map[id.EventID]*event.Event), changed: make(chan struct{}),
	}
	syncer := client.Syncer.(*mautrix.DefaultSyncer)
	syncer.OnEventType(event.EventEncrypted, func(_ context.Context, evt *event.Event) {
		c.note(func() { c.raw[evt.ID] = evt })
	})
	syncer.OnEventType(event.EventMessage, func(_ context.Context, evt *event.Event) {
		c.note(func() { c.trust[evt.ID] = wordOf(evt, nil) })
	})
	helper.DecryptErrorCallback = func(evt *event.Event, err error) {
		c.note(func() { c.trust[evt.ID] = wordOf(nil, err) })
	}
	if err = helper.Init(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("failed to log in as %s with mautrix: %w", user, err), helper.Close())
	}
	client.Crypto = helper
	c.UserID = client.UserID
	c.Start(ctx)
	return c, nil
}

// Start begins to sync, where it was left off. It outlives the context, but not [Client.Pause] and [Client.Close].
func (c *Client) Start(ctx context.Context) {
	ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	c.done = make(chan struct{})
	go func() {
		defer close(c.done)
		for ctx.Err() == nil {
			// What goes wrong shows in what is missing.
			_ = c.client.SyncWithContext(ctx)
		}
	}()
}

// Pause stops the syncing and waits until it has ended.
func (c *Client) Pause() {
	c.stop()
	<-c.done
}

// Close stops the syncing and closes the database. The device stays logged in.
func (c *Client) Close() error {
	c.Pause()
	c.client.Client.CloseIdleConnections()
	return c.helper.Close()
}

// note changes what is remembered and wakes everybody who waits.
func (c *Client) note(change func()) {
	c.lock.Lock()
	defer c.lock.Unlock()
	change()
	close(c.changed)
	c.changed = make(chan struct{})
}

// BootstrapCrossSigning gives the account a cross-signing identity, with which this device can verify others.
func (c *Client) BootstrapCrossSigning(ctx context.Context) error {
	_, err := c.helper.Machine().GenerateAndVerifyWithRecoveryKey(ctx)
	return err
}

// UseRecoveryKey takes the account's cross-signing identity out of its secret storage.
func (c *Client) UseRecoveryKey(ctx context.Context, recoveryKey string) error {
	return c.helper.Machine().VerifyWithRecoveryKey(ctx, recoveryKey)
}

// RestoreBackup imports the account's key backup.
func (c *Client) RestoreBackup(ctx context.Context, recoveryKey string) error {
	mach := c.helper.Machine()
	keyID, keyData, err := mach.SSSS.GetDefaultKeyData(ctx)
	if err != nil {
		return fmt.Errorf("failed to look at the secret storage: %w", err)
	}
	key, err := keyData.VerifyRecoveryKey(keyID, recoveryKey)
	if err != nil {
		return fmt.Errorf("the recovery key does not fit: %w", err)
	}
	secret, err := mach.SSSS.GetDecryptedAccountData(ctx, event.AccountDataMegolmBackupKey, key)
	if err != nil {
		return fmt.Errorf("failed to get the backup's key: %w", err)
	}
	backupKey, err := backup.MegolmBackupKeyFromBytes(secret)
	if err != nil {
		return fmt.Errorf("failed to get the backup's key: %w", err)
	}
	_, err = mach.DownloadAndStoreLatestKeyBackup(ctx, backupKey)
	return err
}

// Learn has the client ask the homeserver for all keys of a user, and returns the master key; empty when the user has none.
func (c *Client) Learn(ctx context.Context, user id.UserID) (id.Ed25519, error) {
	mach := c.helper.Machine()
	if _, err := mach.FetchKeys(ctx, []id.UserID{user}, true); err != nil {
		return "", fmt.Errorf("mautrix failed to learn the keys of %s: %w", user, err)
	}
	keys, err := mach.CryptoStore.GetCrossSigningKeys(ctx, user)
	return keys[id.XSUsageMaster].Key, err
}

// VerifyUser signs the master key that a user has now, without asking anybody.
func (c *Client) VerifyUser(ctx context.Context, user id.UserID) error {
	masterKey, err := c.Learn(ctx, user)
	if err != nil {
		return err
	}
	return c.helper.Machine().SignUser(ctx, user, masterKey)
}

// Join joins a room.
func (c *Client) Join(ctx context.Context, room id.RoomID) error {
	_, err := c.client.JoinRoomByID(ctx, room)
	return err
}

// Trust waits until mautrix has said something of a message, and gives the name of its trust state; or, in brackets, why it could not be
// decrypted.
func (c *Client) Trust(ctx context.Context, eventID id.EventID) (string, error) {
	return c.wait(ctx, eventID, func(_ *event.Event, told string) string { return told })
}

// TrustNow waits until a message has come, decrypts it once more, and says what comes of it now. Of a message whose key has not come it
// does not wait for it, as [Client.Trust] does for 25 s.
func (c *Client) TrustNow(ctx context.Context, eventID id.EventID) (string, error) {
	return c.wait(ctx, eventID, func(raw *event.Event, told string) string {
		if raw == nil {
			return told
		}
		return wordOf(c.helper.Decrypt(ctx, raw))
	})
}

func (c *Client) wait(ctx context.Context, eventID id.EventID, look func(raw *event.Event, told string) string) (string, error) {
	for {
		c.lock.Lock()
		raw, told, changed := c.raw[eventID], c.trust[eventID], c.changed
		c.lock.Unlock()
		if found := look(raw, told); found != "" {
			return found, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", fmt.Errorf("mautrix has said nothing of %s: %w", eventID, context.Cause(ctx))
		}
	}
}

// failures are the errors of mautrix that have a name here.
var failures = []struct {
	err  error
	name string
}{
	{crypto.ErrNoSessionFound, "no session found"},
	{crypto.ErrGroupSessionWithheld, "withheld"},
	{crypto.ErrDuplicateMessageIndex, "duplicate message index"},
	{crypto.ErrWrongRoom, "wrong room"},
	{olm.ErrUnknownMessageIndex, "unknown message index"},
}

func wordOf(evt *event.Event, err error) string {
	if err != nil {
		for _, failure := range failures {
			if errors.Is(err, failure.err) {
				return "(" + failure.name + ")"
			}
		}
		return "(" + err.Error() + ")"
	}
	if !evt.Mautrix.WasEncrypted {
		return Clear
	}
	state := evt.Mautrix.TrustState
	return state.String()
}
