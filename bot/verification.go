package bot

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/exsync"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/verificationhelper"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// Interactive verification: a person and the bot make sure that they have each other's keys, by emojis (SAS) or by a QR code.
// https://spec.matrix.org/v1.16/client-server-api/#key-verification-framework
//
// The bot is no eye: it cannot see what a person's app shows. So it shows its own emojis, or its QR code, in an encrypted room, and completes
// only when an operator confirms: somebody whose own message is verified, and who has been told over another channel what the person's app
// shows. The person's own word is never enough, for who pretends to be that person would give it, too. One case is different: an operator
// whose master key the configuration pins may confirm for themselves, since the pin has said already whose key it is.
//
// The protocol itself is mautrix's [verificationhelper.VerificationHelper]. Whatever comes from others is looked at here before it gets to it
// (verification_vet.go), and what it is to sign is checked here, too (verification_confirm.go).
type verifications struct {
	log   zerolog.Logger
	clock func() time.Time
	bot   *Bot
	// trust is what the hook knows of people.
	trust trust
	// helper speaks the protocol, of the transactions in store. It hears of events by router alone.
	helper protocol
	store  *verificationhelper.InMemoryVerificationStore
	router *mautrix.DefaultSyncer
	// arrived are events between devices that are still to be looked at.
	arrived chan *event.Event

	// mu guards all of it: one thing happens after the other, the helper's work included.
	mu   sync.Mutex
	open map[id.VerificationTransactionID]*dialogue
	// thoughts are what operators have to say again, by the code for it.
	thoughts map[string]*secondThought
	// known are the transactions in open, for those who do not hold mu.
	known *exsync.Set[id.VerificationTransactionID]
	// requests are when each person's last requests came, betweenDevices when all did that came between devices.
	requests       map[id.UserID][]time.Time
	betweenDevices []time.Time
	// cached gives the master key that mautrix holds for somebody: the one that the helper would sign.
	cached func(ctx context.Context, userID id.UserID) (id.Ed25519, error)
	// handed is the type of the event that the helper is at.
	handed string
	// reply is where an operator is about to be answered: that room is not told the same twice.
	reply *pendingReply
}

// trust is what the hook knows of people, and what verifies them. [cryptohook.Hook] has it.
type trust interface {
	directory
	Verify(ctx context.Context, userID id.UserID, masterKey id.Ed25519) error
}

// protocol is what [verificationhelper.VerificationHelper] does when it is told to.
type protocol interface {
	AcceptVerification(ctx context.Context, txnID id.VerificationTransactionID) error
	StartSAS(ctx context.Context, txnID id.VerificationTransactionID) error
	ConfirmSAS(ctx context.Context, txnID id.VerificationTransactionID) error
}

const (
	// verificationLasts is how long a verification may take, and openAtMost how many there may be at once.
	// https://spec.matrix.org/v1.16/client-server-api/#key-verification-framework says ten minutes.
	verificationLasts = 10 * time.Minute
	openAtMost        = 5
	// requestsAtMost is how many requests of one person are looked at within requestPeriod.
	requestsAtMost = 10
	requestPeriod  = time.Hour
	// betweenDevicesAtMost is how many requests between devices are looked at within requestPeriod, of everybody together: anybody who knows
	// the bot's name can send one, in the name of as many accounts as a homeserver likes to make.
	betweenDevicesAtMost = 100
	// requestEarly is how far in the future a request may have been sent: servers' clocks differ.
	requestEarly = 5 * time.Minute
	// arrivedAtMost is how many events between devices may wait.
	arrivedAtMost = 100
	// noticePatience is how long it is tried to say something.
	noticePatience = 10 * time.Second
	// expiryRound is how often it is looked at whether a verification has taken too long.
	expiryRound = 5 * time.Second
	// endedKept is how long it is remembered that there was a verification: a request that is delivered again is not begun again.
	endedKept = 24 * time.Hour

	limitVerifications = "verifications"
)

// newVerifications gives those of a bot, without a helper.
func (b *Bot) newVerifications(hook trust) *verifications {
	return &verifications{
		log: b.log.With().Str("component", "verification").Logger(), clock: b.clock, bot: b, trust: hook,
		store: verificationhelper.NewInMemoryVerificationStore(), router: mautrix.NewDefaultSyncer(),
		arrived: make(chan *event.Event, arrivedAtMost), known: exsync.NewSet[id.VerificationTransactionID](),
		open: make(map[id.VerificationTransactionID]*dialogue), requests: make(map[id.UserID][]time.Time), thoughts: make(map[string]*secondThought),
	}
}

// startVerifications has the bot take part in verifications. It is called once a session, before the sync begins.
func (b *Bot) startVerifications(ctx context.Context) error {
	v := b.newVerifications(b.hook)
	v.cached = v.keyOfMautrix
	helper := verificationhelper.NewVerificationHelper(v.protocolClient(), b.hook.Machine(), v.store, callbacks{v}, true, false, true)
	if err := helper.Init(ctx); err != nil {
		return fmt.Errorf("failed to prepare for verifications: %w", err)
	}
	v.helper = helper
	b.verifications = v
	handlers := b.client.Syncer.(mautrix.ExtensibleSyncer)
	handlers.OnEventType(event.EventMessage, v.onMessage)
	handlers.OnEventType(event.EventReaction, v.onReaction)
	for _, eventType := range inRoomTypes {
		handlers.OnEventType(eventType, v.onRoomEvent)
	}
	for _, eventType := range toDeviceTypes {
		handlers.OnEventType(eventType, v.onToDevice)
	}
	return nil
}

// protocolClient is a client like the bot's, for the helper: it registers its handlers with the router instead of the sync.
func (v *verifications) protocolClient() *mautrix.Client {
	client := v.bot.client
	return &mautrix.Client{
		HomeserverURL: client.HomeserverURL, UserID: client.UserID, DeviceID: client.DeviceID, AccessToken: client.AccessToken,
		UserAgent: client.UserAgent, Client: client.Client, Syncer: v.router, StateStore: client.StateStore, Crypto: client.Crypto,
		Log: zerolog.Nop(), RequestHook: client.RequestHook, SpecVersions: client.SpecVersions,
		DefaultHTTPRetries: client.DefaultHTTPRetries, DefaultHTTPBackoff: client.DefaultHTTPBackoff, ResponseSizeLimit: client.ResponseSizeLimit,
	}
}

// run works until the context ends: it ends what a former process has left open, takes what comes between devices, and ends what takes
// too long.
func (v *verifications) run(ctx context.Context) {
	ctx = v.log.WithContext(ctx)
	v.endLeftovers(ctx)
	rounds := time.NewTicker(expiryRound)
	defer rounds.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case evt := <-v.arrived:
			v.takeToDevice(ctx, evt)
		case <-rounds.C:
		}
		v.expire(ctx)
	}
}

// expire ends what takes too long.
func (v *verifications) expire(ctx context.Context) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := v.clock()
	for _, d := range v.open {
		if now.Sub(d.openedAt) >= verificationLasts {
			v.cancel(ctx, d, event.VerificationCancelCodeTimeout, ending{key: "timed_out"})
		}
	}
	v.forgetThoughts()
}

// endLeftovers ends the verifications that the former process was about. Their secrets were in its memory alone.
func (v *verifications) endLeftovers(ctx context.Context) {
	v.mu.Lock()
	defer v.mu.Unlock()
	records := v.bot.reviser.records
	left, err := records.openVerifications(ctx)
	if err != nil {
		v.log.Err(err).Msg("Failed to read which verifications were open")
		return
	}
	for _, d := range left {
		if v.open[d.txnID] == nil {
			v.cancel(ctx, d, event.VerificationCancelCodeUser, ending{key: "restarted"})
		}
	}
	if err = records.forgetVerifications(ctx, v.clock().Add(-endedKept)); err != nil {
		v.log.Err(err).Msg("Failed to forget old verifications")
	}
}

// guarded runs what the helper does for a dialogue. What it panics about ends that dialogue alone.
func (v *verifications) guarded(ctx context.Context, d *dialogue, work func() error) {
	defer func() {
		if reason := recover(); reason != nil {
			v.log.Error().Any("panic", reason).Stringer("user_id", d.userID).Msg("The verification helper panicked; ending that verification")
			v.breakOff(ctx, d)
		}
	}()
	if err := work(); err != nil && v.isOpen(d) && d.cancelled == nil {
		v.log.Err(err).Stringer("user_id", d.userID).Stringer("transaction_id", d.txnID).Msg("Failed to go on with a verification")
		v.breakOff(ctx, d)
	}
}

// breakOff ends a verification in which something went wrong. If an operator had confirmed, the helper may have signed the person's master key
// before: then the person is verified, whatever else went wrong.
func (v *verifications) breakOff(ctx context.Context, d *dialogue) {
	if d.stage != stageConfirmed {
		v.cancel(ctx, d, event.VerificationCancelCodeInternalError, ending{key: "broken"})
		return
	}
	signed, err := v.isSigned(ctx, d)
	switch {
	case err != nil:
		v.log.Err(err).Stringer("user_id", d.userID).Msg("Failed to ask whether a master key was signed before a verification broke off")
		v.cancel(ctx, d, event.VerificationCancelCodeInternalError, ending{key: "broken_late"})
	case signed:
		v.complete(ctx, d)
	default:
		v.cancel(ctx, d, event.VerificationCancelCodeInternalError, ending{key: "broken"})
	}
}

// isSigned asks the homeserver whether the person's master key, which was compared, bears the bot's signature.
func (v *verifications) isSigned(ctx context.Context, d *dialogue) (bool, error) {
	asking, cancel := context.WithTimeout(ctx, recheckPatience)
	defer cancel()
	if err := v.trust.Recheck(asking, []id.UserID{d.userID}); err != nil {
		return false, err
	}
	report, err := v.trust.User(ctx, d.userID)
	if err != nil || report == nil {
		return false, err
	}
	return report.MasterKey == d.masterKey && report.Standing == cryptohook.StandingVerified, nil
}

// person is what is known of a user whom somebody wants to verify.
func (v *verifications) person(ctx context.Context, userID id.UserID) (*cryptohook.UserReport, error) {
	report, answered, err := lookUp(ctx, v.trust, userID)
	if err == nil && !answered {
		err = errors.New("the homeserver has not said which keys the user has")
	}
	return report, err
}

func (v *verifications) keyOfMautrix(ctx context.Context, userID id.UserID) (id.Ed25519, error) {
	keys, err := v.bot.hook.Machine().GetCrossSigningPublicKeys(ctx, userID)
	if err != nil || keys == nil {
		return "", err
	}
	return keys.MasterKey, nil
}
