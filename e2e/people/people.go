// Package people provides Matrix users for tests against a real homeserver: honest ones, who talk in encrypted rooms as any
// client does, and hostile ones, who can say anything at every layer that a client controls.
//
// A [Person] is one device of one account. It is built on mautrix: an [crypto.OlmMachine] holds the account, receives keys and
// decrypts what others say. What a Person sends is encrypted by hand, by Olm and Megolm primitives, through one path: what
// the honest path puts into an Olm message ([Person.RoomKeyPayload]) is a plain map, and a [Forgery] may change any of it.
//
//	alice, err := people.Login(ctx, url, "alice", password, people.Options{})
//	…
//	defer alice.Close()
//	masterKey, err := alice.BootstrapCrossSigning(ctx)
//	room, err := alice.CreateRoom(ctx, true, bot)
//	err = alice.WaitJoined(ctx, room, bot)
//	eventID, err := alice.Send(ctx, room, "hello")
//	answer, err := alice.WaitForAnswer(ctx, eventID)
//
// Nothing here waits by sleeping: every wait ends when a /sync shows what it waits for, or with its context.
package people

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"
)

// Options are what a login may choose. The zero value is an ordinary client.
type Options struct {
	// DeviceName is the name that the device has in lists of devices.
	DeviceName string
	// Unpublished keeps the device's keys from the homeserver: nobody can look them up, and nobody can encrypt to it.
	Unpublished bool
}

// Person is one device of a Matrix account, with a goroutine that syncs until [Person.Close].
type Person struct {
	UserID   id.UserID
	DeviceID id.DeviceID
	// Client is the underlying client, for requests that have no method here. Its Crypto is unset: it never encrypts.
	Client *mautrix.Client

	password string

	// machineLock guards the machine, its Olm sessions and the outbound Megolm sessions: mautrix's own lock is private, and
	// messages are encrypted here with the same Olm sessions that the machine decrypts with.
	machineLock sync.Mutex
	machine     *crypto.OlmMachine
	state       *mautrix.MemoryStateStore
	sessions    map[id.RoomID]*Session

	stop    context.CancelFunc
	stopped chan struct{}

	seenLock sync.Mutex
	seen     seen
}

// Login makes a new device of the account, publishes its keys and begins to sync. User is a localpart or a whole user ID.
func Login(ctx context.Context, homeserverURL, user, password string, options Options) (*Person, error) {
	client, err := mautrix.NewClient(homeserverURL, "", "")
	if err != nil {
		return nil, fmt.Errorf("failed to make a client for %s: %w", homeserverURL, err)
	}
	client.DefaultHTTPRetries = 2
	client.DefaultHTTPBackoff = 200 * time.Millisecond
	client.Log = zerolog.Nop()
	_, err = client.Login(ctx, &mautrix.ReqLogin{
		Type:                     mautrix.AuthTypePassword,
		Identifier:               mautrix.UserIdentifier{Type: mautrix.IdentifierTypeUser, User: user},
		Password:                 password,
		InitialDeviceDisplayName: options.DeviceName,
		StoreCredentials:         true,
	})
	if err != nil {
		return nil, fmt.Errorf("failed to log in as %s: %w", user, err)
	}
	state := mautrix.NewMemoryStateStore().(*mautrix.MemoryStateStore)
	client.StateStore = state
	machine := crypto.NewOlmMachine(client, &client.Log, crypto.NewMemoryStore(nil), state)
	machine.DisableDecryptKeyFetching = true
	machine.IgnorePostDecryptionParseErrors = true
	machine.DisableRatchetTracking = true
	if err = machine.Load(ctx); err != nil {
		return nil, fmt.Errorf("failed to make an Olm account: %w", err)
	}
	if !options.Unpublished {
		if err = machine.ShareKeys(ctx, 0); err != nil {
			return nil, fmt.Errorf("failed to publish the device keys of %s: %w", client.UserID, err)
		}
	}
	person := &Person{
		UserID: client.UserID, DeviceID: client.DeviceID, Client: client,
		password: password, machine: machine, state: state, sessions: make(map[id.RoomID]*Session),
		stopped: make(chan struct{}), seen: newSeen(),
	}
	person.start(ctx, !options.Unpublished)
	return person, nil
}

// Close stops the syncing and waits until it has ended. The device stays logged in.
func (p *Person) Close() {
	p.stop()
	<-p.stopped
	p.machine.Destroy()
	p.Client.Client.CloseIdleConnections()
}

// Logout deletes the device and its keys from the homeserver, and closes the person.
func (p *Person) Logout(ctx context.Context) error {
	p.stop()
	<-p.stopped
	_, err := p.Client.Logout(ctx)
	p.Close()
	if err != nil {
		return fmt.Errorf("failed to log %s out: %w", p.UserID, err)
	}
	return nil
}

// ErrClosed is what waits end with when the person was closed meanwhile.
var ErrClosed = errors.New("the person is closed")

// SenderKey is the device's curve25519 key, unpadded base64.
func (p *Person) SenderKey() id.SenderKey { return p.machine.GetAccount().IdentityKey() }

// SigningKey is the device's ed25519 key, unpadded base64.
func (p *Person) SigningKey() id.Ed25519 { return p.machine.GetAccount().SigningKey() }
