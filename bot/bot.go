// Package bot is the Matrix bot: it is invited to rooms and answers each message with who really sent it. What it tells is
// derived by package cryptohook; this package knows rooms, people and words.
package bot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"

	"sendertrust/cryptohook"
	"sendertrust/internal/clock"
)

// Bot is one account at work.
type Bot struct {
	// Output is where the recovery key is printed, once. Standard error by default.
	Output io.Writer
	// Mask learns the secrets that the bot gets while it works. Nil: nobody wants to know them.
	Mask *Mask

	config *Config
	log    zerolog.Logger
	db     *dbutil.Database
	owner  *cryptohook.Ownership
	client *mautrix.Client
	hook   *cryptohook.Hook
	// reviser keeps the answers true; modes are how rooms want them.
	reviser *reviser
	modes   *roomModes
	// limiter decides what is answered, invitations what is joined.
	limiter     *limiter
	invitations *invitations
	metrics     *metrics
	clock       func() time.Time
	// startedAt is when the process began.
	startedAt time.Time
	// tokenRefusedAt is since when the homeserver refuses the configured token; zero: it does not.
	tokenRefusedAt time.Time
	// self holds answers back while nobody can check that they are the bot's.
	self *selfWatch
	// verifications are those with people that are under way.
	verifications *verifications

	// background are the joins that a slow server holds up.
	background sync.WaitGroup
	// backupAdvice is what the log last said of the account's key backup.
	backupAdvice string
	// displayName is the bot's when the session began; empty: it has none.
	displayName string
	// refusals counts the commands that were refused as not an operator's.
	refusals atomic.Int64
	// saidNotEncrypted remembers the rooms that were told; see noteSaidNotEncrypted.
	saidNotEncrypted sync.Map
}

// New makes a bot by its configuration. It does nothing until it runs.
func New(config *Config, log zerolog.Logger) *Bot {
	steady := clock.Steady()
	return &Bot{
		Output: os.Stderr, config: config, log: log, clock: steady, startedAt: steady(), metrics: newMetrics(), limiter: newLimiter(config, steady),
	}
}

const (
	firstRestart = time.Second
	maxRestart   = time.Minute
	// tokenPatience is how long a token may be refused that was accepted before.
	tokenPatience = 30 * time.Second
)

// Run works until the context ends. It returns [ErrSetup] when somebody has to change the configuration or the account first, and
// goes on by itself after everything else that time may mend: a homeserver that is away, a database that fails. While another process
// owns a database on PostgreSQL, it stands by.
func (b *Bot) Run(ctx context.Context) error {
	b.warnOfExposedFiles()
	stopServing, err := b.serveMetrics(ctx)
	if err != nil {
		return err
	}
	defer stopServing()
	if err := b.openDatabase(); err != nil {
		return err
	}
	defer b.closeDatabase()
	defer b.release()
	worked := false
	for wait := firstRestart; ; wait = min(2*wait, maxRestart) {
		ready, err := b.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		err = databaseError(err)
		if errors.Is(err, ErrSetup) {
			if worked {
				b.log.Error().Err(err).Msg("Ending: somebody has to change something first")
			}
			return err
		}
		worked = worked || ready
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

// session owns the database, logs in, installs the hook and syncs. It says whether a /sync went through: then, what went wrong is no reason
// to wait longer than the last time.
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
	if err = b.loadModes(ctx); err != nil {
		return false, err
	}
	b.learnDisplayName(ctx)
	handlers := b.client.Syncer.(mautrix.ExtensibleSyncer)
	handlers.OnEventType(event.StateMember, b.handleMember)
	handlers.OnEventType(stateMode, b.handleMode)
	handlers.OnEventType(event.EventRedaction, b.handleRedaction)
	for _, answered := range []event.Type{event.EventMessage, event.EventSticker, event.EventEncrypted} {
		handlers.OnEventType(answered, b.answer)
	}
	if err = b.startVerifications(ctx); err != nil {
		return false, err
	}
	b.log.Info().
		Stringer("user_id", b.client.UserID).Stringer("device_id", b.client.DeviceID).Stringer("master_key", b.ownMasterKey()).
		Str("fingerprint", b.hook.Machine().Fingerprint()).
		Msg("Bot is ready")
	err = b.work(ctx)
	if ready = !b.hook.Stats().SyncedAt.IsZero(); ready {
		b.tokenRefusedAt = time.Time{}
	}
	if errors.Is(err, mautrix.MUnknownToken) {
		err = b.tokenRefused(err)
	}
	return ready, err
}

// work syncs, and corrects answers beside it.
func (b *Bot) work(ctx context.Context) error {
	revising, stop := context.WithCancel(ctx)
	b.background.Go(func() { b.reviser.run(revising) })
	b.background.Go(func() { b.self.run(revising) })
	b.background.Go(func() { b.verifications.run(revising) })
	b.resumeInvitations(revising)
	b.background.Go(func() { b.invitations.run(revising) })
	b.metrics.observe(b.hook, b.invitations)
	defer b.metrics.observe(nil, nil)
	err := b.hook.Run(ctx)
	stop()
	b.background.Wait()
	return err
}

// notify wakes whoever waits for something to do.
func notify(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// tokenRefused words what it means when the homeserver no longer knows the token: it has expired, or somebody has logged the device out,
// which deletes it and its keys.
//
// With a password the next session logs in again, with the same device ID: an expired token, or one that the homeserver has lost, is no
// reason to stop. If the device was deleted, that login finds it without its keys, and the bot ends with [ErrSetup]: whoever deleted it
// may have meant to, and a new device of the bot's is for its operator to decide. The keys are never published again: everybody has seen
// that device go. The login that this took is left alone: that the keys are not shown is too little to delete a device for.
//
// Without a password the token has to be right again within [tokenPatience]: a homeserver that has lost its database, or is moving it, may
// refuse all tokens for some moments.
func (b *Bot) tokenRefused(err error) error {
	if b.config.Account.AccessToken == "" {
		b.log.Error().Err(err).Stringer("device_id", b.client.DeviceID).
			Msg("The homeserver has logged the bot out: logging in again to see whether its device is still there")
		return err
	}
	if b.tokenRefusedAt.IsZero() {
		b.tokenRefusedAt = b.clock()
		b.log.Error().Err(err).Stringer("device_id", b.client.DeviceID).Dur("believed_after", tokenPatience).
			Msg("The homeserver refuses the token that it has accepted before: trying for a while whether it is again")
	}
	return b.believeRefusal(err)
}

// believeRefusal says that the token is no good any more, once it was refused for long enough.
func (b *Bot) believeRefusal(err error) error {
	if !b.tokenRefusedAt.IsZero() && b.clock().Sub(b.tokenRefusedAt) < tokenPatience {
		return fmt.Errorf("the homeserver refuses the token: %w", err)
	}
	return setupError("account.access_token: the homeserver does not know it (any more): the device was logged out or deleted; log in anew, with a new database")
}

// Check says whether the bot could start: the configuration is valid already, the database can be used, the homeserver answers, and the
// token, if there is one, is accepted. It gives what it has found, a line each, changes nothing and does not log in.
func (b *Bot) Check(ctx context.Context) (found []string, err error) {
	database, err := b.checkDatabase(ctx)
	if err != nil {
		return nil, err
	}
	found = append(found, "database: "+database)
	for _, line := range b.exposedFiles() {
		found = append(found, "warning: "+line)
	}
	client, err := b.newClient()
	if err != nil {
		return found, err
	}
	client.DefaultHTTPRetries = 0
	client.Log = zerolog.Nop() // the error says it all
	client.AccessToken = ""    // anybody may ask for the versions; whether the token is known is asked for below
	if _, err = client.Versions(ctx); err != nil {
		return found, setupError("homeserver.address: no Matrix homeserver answers at %s (%w)", b.config.Homeserver.Address, err)
	}
	found = append(found, "homeserver: "+b.config.Homeserver.Address+" answers")
	if b.config.Account.AccessToken == "" {
		return found, nil
	}
	client.AccessToken = b.config.Account.AccessToken.Reveal()
	b.client = client
	return found, b.checkToken(ctx, b.config.Account.DeviceID)
}
