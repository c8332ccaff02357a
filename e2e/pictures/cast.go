package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/synapse"
)

const (
	// password is every account's: the homeserver is reachable only from this machine, and is gone afterwards.
	password = "sendertrust-pictures"
	botName  = "trustbot"
	roomName = "Our house"
	// oldMedia is for Debian's nheko, which asks for pictures in the way of before Matrix 1.11.
	oldMedia     = "enable_authenticated_media: false"
	castPatience = 10 * time.Minute
)

// cast is everything that runs while the pictures are taken.
type cast struct {
	// pictures is the directory that the pictures go to.
	pictures string
	server   *synapse.Server
	bot      *botproc.Bot
	desktop  *desktop

	// alice is who sits at the desktop; this client is logged in as the same device as hers, and only sends requests.
	alice *mautrix.Client
	// bob is the bot's operator, and his key is in its configuration. Nobody has verified carol. Somebody else uses bob's account: thief.
	bob, carol, thief *people.Person

	// room is everybody's, chat is alice's with the bot alone.
	room, chat id.RoomID
}

// start brings up the homeserver, the desktop, the people and the bot, and gets them into their rooms.
func (c *cast) start(ctx context.Context, root, scratch string) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, castPatience, errors.New("it took too long"))
	defer cancel()
	fmt.Println("Building the bot …")
	binary, err := botproc.Build(ctx, root, scratch)
	if err != nil {
		return err
	}
	fmt.Println("Starting a private Matrix homeserver …")
	if c.server, err = synapse.Start(ctx, synapse.Options{ProjectRoot: root, ExtraYAML: oldMedia}); err != nil {
		return err
	}
	bobsKey, err := c.register(ctx)
	if err != nil {
		return err
	}
	fmt.Println("Starting the client …")
	home := filepath.Join(scratch, "home")
	if err = os.Mkdir(home, 0o700); err != nil {
		return err
	}
	if c.desktop, err = startDesktop(ctx, home); err != nil {
		return err
	}
	if err = c.desktop.startNheko(ctx, c.alice); err != nil {
		return err
	}
	if err = c.awaitSigned(ctx); err != nil {
		return err
	}
	fmt.Println("Starting the bot …")
	c.bot, err = botproc.Start(ctx, botproc.Options{
		Binary: binary, Homeserver: c.server.URL, UserID: id.NewUserID(botName, synapse.ServerName), Password: password, Dir: scratch,
		Configure: func(config botproc.Config) {
			config["trust"] = botproc.Config{
				"operators":      []string{c.bob.UserID.String()},
				"verified_users": botproc.Config{c.bob.UserID.String(): bobsKey.String()},
			}
		},
	})
	if err != nil {
		return err
	}
	return c.meet(ctx)
}

// register makes the accounts, and logs everybody in who is there from the beginning. It gives Bob's master key.
func (c *cast) register(ctx context.Context) (bobsKey id.Ed25519, err error) {
	for _, name := range []string{"alice", "bob", "carol", botName} {
		if err = c.server.Register(ctx, name, password); err != nil {
			return "", err
		}
	}
	if c.alice, err = c.login(ctx, "alice"); err != nil {
		return "", err
	}
	if c.bob, bobsKey, err = c.person(ctx, "bob", "Bob"); err != nil {
		return "", err
	}
	c.carol, _, err = c.person(ctx, "carol", "Carol")
	return bobsKey, err
}

// login makes the device of the client on the desktop.
func (c *cast) login(ctx context.Context, name string) (*mautrix.Client, error) {
	client, err := mautrix.NewClient(c.server.URL, "", "")
	if err != nil {
		return nil, err
	}
	_, err = client.Login(ctx, &mautrix.ReqLogin{
		Type:       mautrix.AuthTypePassword,
		Identifier: mautrix.UserIdentifier{Type: mautrix.IdentifierTypeUser, User: name},
		Password:   password, InitialDeviceDisplayName: "Alice's computer", StoreCredentials: true,
	})
	if err != nil {
		return nil, fmt.Errorf("failed to log %s in: %w", name, err)
	}
	if err = client.SetAccountData(ctx, "im.nheko.hidden_events", map[string]any{"hidden_event_types": hidden}); err != nil {
		return nil, err
	}
	return client, client.SetDisplayName(ctx, "Alice")
}

// hidden are what the client does not show among the messages: the steps of a verification, which are for programs.
var hidden = []string{
	event.InRoomVerificationReady.Type, event.InRoomVerificationStart.Type, event.InRoomVerificationAccept.Type,
	event.InRoomVerificationKey.Type, event.InRoomVerificationMAC.Type, event.InRoomVerificationDone.Type,
}

// person logs somebody in and lets them set up encryption as they should.
func (c *cast) person(ctx context.Context, name, displayName string) (person *people.Person, masterKey id.Ed25519, err error) {
	if person, err = people.Login(ctx, c.server.URL, name, password, people.Options{DeviceName: displayName + "'s phone"}); err != nil {
		return nil, "", err
	}
	if err = person.Client.SetDisplayName(ctx, displayName); err != nil {
		return nil, "", err
	}
	masterKey, err = person.BootstrapCrossSigning(ctx)
	return person, masterKey, err
}

// awaitSigned waits until the client has signed its own device.
func (c *cast) awaitSigned(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("the client has not set up encryption"))
	defer cancel()
	user := c.alice.UserID
	return poll(ctx, func() (bool, error) {
		keys, err := c.bob.Client.QueryKeys(ctx, &mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{user: {}}})
		if err != nil {
			return false, err
		}
		return len(keys.DeviceKeys[user][c.alice.DeviceID].Signatures[user]) > 1, nil
	})
}

// poll asks again and again until the answer is yes.
func poll(ctx context.Context, ask func() (bool, error)) error {
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for {
		if yes, err := ask(); yes || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// meet makes the rooms and waits until everybody is in them.
func (c *cast) meet(ctx context.Context) (err error) {
	if c.chat, err = c.openRoom(ctx, "", c.bot.UserID); err != nil {
		return err
	}
	// The client finds out by this whose chat it is.
	direct := event.DirectChatsEventContent{c.bot.UserID: {c.chat}}
	if err = c.alice.SetAccountData(ctx, event.AccountDataDirectChats.Type, direct); err != nil {
		return err
	}
	if c.room, err = c.openRoom(ctx, roomName, c.bob.UserID, c.carol.UserID, c.bot.UserID); err != nil {
		return err
	}
	for _, person := range []*people.Person{c.bob, c.carol} {
		if err = person.Join(ctx, c.room); err != nil {
			return err
		}
	}
	for _, person := range []*people.Person{c.bob, c.carol} {
		for _, member := range []id.UserID{c.alice.UserID, c.bob.UserID, c.carol.UserID, c.bot.UserID} {
			if err = person.WaitJoined(ctx, c.room, member); err != nil {
				return err
			}
		}
	}
	return nil
}

// openRoom lets Alice make an encrypted room; without a name, a chat.
func (c *cast) openRoom(ctx context.Context, name string, invite ...id.UserID) (id.RoomID, error) {
	created, err := c.alice.CreateRoom(ctx, &mautrix.ReqCreateRoom{
		Name: name, Preset: "trusted_private_chat", IsDirect: name == "", Invite: invite,
		InitialState: []*event.Event{{
			Type:    event.StateEncryption,
			Content: event.Content{Parsed: &event.EncryptionEventContent{Algorithm: id.AlgorithmMegolmV1}},
		}},
	})
	if err != nil {
		return "", fmt.Errorf("failed to make a room: %w", err)
	}
	return created.RoomID, nil
}

// stop ends everything that was started, the last first.
func (c *cast) stop() (err error) {
	if c.bot != nil {
		ctx, cancel := context.WithTimeoutCause(context.Background(), patience, errors.New("it took too long"))
		defer cancel()
		if _, _, stopErr := c.bot.Stop(ctx); stopErr != nil {
			c.bot.Kill()
		}
	}
	if c.desktop != nil {
		err = c.desktop.stop()
	}
	for _, person := range []*people.Person{c.bob, c.carol, c.thief} {
		if person != nil {
			person.Close()
		}
	}
	if c.server != nil {
		err = errors.Join(err, c.server.Stop())
	}
	return err
}
