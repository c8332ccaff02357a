// Package bot is the Matrix bot: it is invited to rooms and answers each message with who really sent it. What it tells is
// derived by package cryptohook; this package knows rooms, people and words.
package bot

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"

	"sendertrust/cryptohook"
)

// Bot is one account at work.
type Bot struct {
	// Output is where the recovery key is printed, once. Standard error by default.
	Output io.Writer

	config *Config
	log    zerolog.Logger
	db     *dbutil.Database
	owner  *cryptohook.Ownership
	client *mautrix.Client
	hook   *cryptohook.Hook
	// reviser keeps the answers true.
	reviser *reviser
	clock   func() time.Time

	// background are the joins that a slow server holds up.
	background sync.WaitGroup
	// saidNotEncrypted remembers the rooms that were told; see noteSaidNotEncrypted.
	saidNotEncrypted sync.Map
}

// New makes a bot by its configuration. It does nothing until it runs.
func New(config *Config, log zerolog.Logger) *Bot {
	return &Bot{Output: os.Stderr, config: config, log: log, clock: time.Now}
}

const (
	firstRestart = time.Second
	maxRestart   = time.Minute
)

// Run works until the context ends. It returns [ErrSetup] when somebody has to change the configuration or the account first, and
// goes on by itself after everything else that time may mend: a homeserver that is away, a database that fails. While another process
// owns a database on PostgreSQL, it stands by.
func (b *Bot) Run(ctx context.Context) error {
	if err := b.openDatabase(); err != nil {
		return err
	}
	defer b.closeDatabase()
	defer b.release()
	for wait := firstRestart; ; wait = min(2*wait, maxRestart) {
		ready, err := b.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, ErrSetup) {
			return err
		}
		if ready {
			wait = firstRestart
		}
		b.log.Err(err).Dur("retry_in", wait).Msg("Starting anew; nothing is lost")
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// session owns the database, logs in, installs the hook and syncs. It says whether it got as far as syncing.
func (b *Bot) session(ctx context.Context) (ready bool, err error) {
	if err = b.own(ctx); err != nil {
		return false, err
	}
	if err = b.login(ctx); err != nil {
		return false, err
	}
	if err = b.install(ctx); err != nil {
		return false, err
	}
	if err = b.prepareIdentity(ctx); err != nil {
		return false, err
	}
	handlers := b.client.Syncer.(mautrix.ExtensibleSyncer)
	handlers.OnEventType(event.StateMember, b.handleMember)
	for _, answered := range []event.Type{event.EventMessage, event.EventSticker, event.EventEncrypted} {
		handlers.OnEventType(answered, b.answer)
	}
	b.log.Info().
		Stringer("user_id", b.client.UserID).Stringer("device_id", b.client.DeviceID).Stringer("master_key", b.ownMasterKey()).
		Str("fingerprint", b.hook.Machine().Fingerprint()).
		Msg("Bot is ready")
	err = b.work(ctx)
	if errors.Is(err, mautrix.MUnknownToken) {
		return true, b.tokenRefused(err)
	}
	return true, err
}

// work syncs, and corrects answers beside it.
func (b *Bot) work(ctx context.Context) error {
	revising, stop := context.WithCancel(ctx)
	b.background.Go(func() { b.reviser.run(revising) })
	err := b.hook.Run(ctx)
	stop()
	b.background.Wait()
	return err
}

// tokenRefused words what it means when the homeserver no longer knows the device. With a password the next session logs in again.
func (b *Bot) tokenRefused(err error) error {
	if b.config.Account.AccessToken == "" {
		return err
	}
	return setupError("account.access_token: the homeserver does not know it any more: the device was logged out or deleted; log in anew, with a new database")
}

// Check says whether the bot could start: the configuration is valid already, the database can be used, the homeserver answers, and the
// token, if there is one, is accepted. It gives what it has found, a line each, changes nothing and does not log in.
func (b *Bot) Check(ctx context.Context) (found []string, err error) {
	database, err := b.checkDatabase(ctx)
	if err != nil {
		return nil, err
	}
	found = append(found, "database: "+database)
	client, err := b.newClient()
	if err != nil {
		return found, err
	}
	client.DefaultHTTPRetries = 0
	client.Log = zerolog.Nop() // the error says it all
	if _, err = client.Versions(ctx); err != nil {
		return found, setupError("homeserver.address: no Matrix homeserver answers at %s (%w)", b.config.Homeserver.Address, err)
	}
	found = append(found, "homeserver: "+b.config.Homeserver.Address+" answers")
	if b.config.Account.AccessToken == "" {
		return found, nil
	}
	b.client = client
	return found, b.checkToken(ctx, b.config.Account.DeviceID)
}
