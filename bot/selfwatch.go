package bot

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// What the bot does when the homeserver no longer publishes the bot's own device and identity as they are: see [cryptohook.OwnIdentity].
//
// Somebody may have taken the account over then, and may speak in the bot's name; or the device was deleted; or the server lies. The bot
// cannot tell which. What it knows of others is as true as before, but nobody can check any more that it is the bot who says so: a
// verdict that is given now looks like one that anybody with access to the account could give. So the bot
//
//   - holds every answer back, from the first moment, until the server shows again what the bot has. The messages stay in the inbox, also
//     over a restart, and are answered then, by what is known of their senders then;
//   - logs it as an error, with what to do, once an hour;
//   - tells each encrypted room, once, that nobody should rely on what is said in its name, as soon as the server says so for a few seconds:
//     one answer may be a slip. Rooms without encryption have no reason to rely on it anyway;
//   - signs its device again, if that is all that is missing, as it would do at its next start;
//   - says in the same rooms when it is over.
//
// It goes on receiving, so that no key is lost meanwhile. It does not end by itself: the server may be only faulty, and the next start
// would end with exit code 2 until somebody has looked. If the device is really deleted, the homeserver refuses the token: see
// [Bot.tokenRefused].
type selfWatch struct {
	log   zerolog.Logger
	clock func() time.Time
	user  id.UserID
	// own is what the homeserver publishes now.
	own     func() cryptohook.OwnIdentity
	records *records
	// rooms gives the encrypted rooms that the bot is in.
	rooms func(ctx context.Context) ([]id.RoomID, error)
	// speech is the language of a room.
	speech func(roomID id.RoomID) speech
	// send tries once to send a message. The error is final if trying again is no use.
	send func(ctx context.Context, roomID id.RoomID, content *event.Content, transactionID string) (final bool, err error)
	// sign signs the bot's device with its identity.
	sign func(ctx context.Context) error

	wake chan struct{}
	// signed says that the device was signed again since the server last published everything as it is; loggedAt is when it was last
	// logged that it does not, and cleared that the rooms know that it does.
	signed   bool
	loggedAt time.Time
	cleared  bool

	mu sync.Mutex
	// trust is closed when the bot may answer again; nil while it may.
	trust chan struct{}
}

const (
	// ownConfirm is how long the server has to say something else before rooms are told: longer than between two answers.
	ownConfirm   = 5 * time.Second
	ownRemind    = time.Hour
	ownLookAgain = time.Second
	ownRoomsAt   = time.Minute
)

func (b *Bot) newSelfWatch() *selfWatch {
	return &selfWatch{
		log: b.log.With().Str("component", "self watch").Logger(), clock: b.clock, user: b.config.Account.UserID,
		own:     func() cryptohook.OwnIdentity { return b.hook.OwnIdentity() },
		records: newRecords(b.db, b.owner, cryptohook.DatabaseLog(b.log)),
		rooms:   b.encryptedRooms, speech: b.speech, send: b.sendOnce, sign: b.signOwnDevice,
		wake: make(chan struct{}, 1),
	}
}

// changed is told what the homeserver publishes now. It does not wait.
func (w *selfWatch) changed(own cryptohook.OwnIdentity) {
	w.mu.Lock()
	switch {
	case own.Trusted() && w.trust != nil:
		close(w.trust)
		w.trust = nil
	case !own.Trusted() && w.trust == nil:
		w.trust = make(chan struct{})
	}
	w.mu.Unlock()
	notify(w.wake)
}

// hold waits while the bot may not answer. It says whether it had to, and no when the context ended. Nil never holds.
func (w *selfWatch) hold(ctx context.Context) (held, ok bool) {
	for w != nil {
		w.mu.Lock()
		trust := w.trust
		w.mu.Unlock()
		if trust == nil {
			break
		}
		held = true
		select {
		case <-trust:
		case <-ctx.Done():
			return held, false
		}
	}
	return held, true
}

// run works until the context ends.
func (w *selfWatch) run(ctx context.Context) {
	ctx = w.log.WithContext(ctx)
	for ctx.Err() == nil {
		next, err := w.round(ctx)
		if err != nil && ctx.Err() == nil {
			w.log.Err(err).Msg("Failed to tell the rooms about the bot's own identity, trying again")
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-w.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// round does what is due, and says how long there is nothing to do.
func (w *selfWatch) round(ctx context.Context) (next time.Duration, err error) {
	switch own := w.own(); {
	case own.State == cryptohook.OwnUnknown:
		return ownRemind, nil
	case own.Trusted():
		return w.allClear(ctx)
	default:
		return w.doubt(ctx, own)
	}
}

func (w *selfWatch) doubt(ctx context.Context, own cryptohook.OwnIdentity) (next time.Duration, err error) {
	w.cleared = false
	if now := w.clock(); w.loggedAt.IsZero() || now.Sub(w.loggedAt) >= ownRemind || now.Before(w.loggedAt) {
		w.loggedAt = now
		w.log.Error().Str("state", string(own.State)).Stringer("master_key", own.MasterKey).Stringer("published_master_key", own.PublishedMasterKey).
			Msg(adviceOn(own))
	}
	if own.State == cryptohook.OwnSignatureMissing && own.PublishedMasterKey == own.MasterKey && !w.signed {
		w.signed = true
		if err = w.sign(ctx); err != nil {
			w.log.Err(err).Msg("Failed to sign the bot's device again")
		}
		return 0, nil
	}
	if own.CheckedAt.Sub(own.Since) < ownConfirm {
		return ownLookAgain, nil
	}
	incident, err := w.records.beginDoubt(ctx, w.user, w.clock())
	if err != nil {
		return ownLookAgain, err
	}
	words := func(s speech) text { return s.doubtInMyself(own) }
	err = w.tell(ctx, words, "doubt", incident, func(told bool) bool { return !told }, func(doubt warning) error {
		return w.records.noteSaid(ctx, doubt, w.clock())
	})
	return ownRoomsAt, err
}

// allClear tells the rooms that know of a doubt that it is over: those that the former process told, too.
func (w *selfWatch) allClear(ctx context.Context) (next time.Duration, err error) {
	w.loggedAt, w.signed = time.Time{}, false
	if w.cleared {
		return ownRemind, nil
	}
	incident, err := w.records.saidAt(ctx, doubtOf("", w.user))
	if err != nil {
		return ownLookAgain, err
	}
	if !incident.IsZero() {
		w.log.Warn().Msg("The homeserver publishes the bot's own device and identity as they are; answering")
		err = w.tell(ctx, speech.trustInMyself, "trust", incident, func(told bool) bool { return told }, func(doubt warning) error {
			return w.records.unsay(ctx, doubt)
		})
		if err == nil {
			err = w.records.endDoubts(ctx, w.clock())
		}
		if err != nil {
			return ownRoomsAt, err
		}
	}
	w.cleared = true
	return ownRemind, nil
}

// tell sends the words, each room's in its language, to the rooms that are concerned, and notes it. What fails for a room is tried again in the next round; what the
// homeserver refuses for good is not.
func (w *selfWatch) tell(
	ctx context.Context, words func(s speech) text, what string, incident time.Time, concerned func(told bool) bool, note func(doubt warning) error,
) error {
	rooms, err := w.rooms(ctx)
	if err != nil {
		return fmt.Errorf("failed to ask for the bot's rooms: %w", err)
	}
	var faults []error
	for _, roomID := range rooms {
		doubt := doubtOf(roomID, w.user)
		said, err := w.records.wasSaid(ctx, doubt)
		if err != nil {
			return err
		} else if !concerned(said) {
			continue
		}
		final, err := w.send(ctx, roomID, noticeContent(words(w.speech(roomID)), nil), hashOf("own identity", what, roomID, incident.UnixMilli()))
		if err != nil && !final {
			faults = append(faults, err)
			continue
		} else if err != nil {
			w.log.Warn().Err(err).Stringer("room_id", roomID).Msg("The homeserver does not take a message about the bot's own identity; leaving it")
		}
		if err = note(doubt); err != nil {
			return err
		}
	}
	return errors.Join(faults...)
}

// adviceOn tells the operator what is wrong, and what to do.
func adviceOn(own cryptohook.OwnIdentity) string {
	advice := "The bot does not answer until the homeserver shows its own device and identity again. "
	switch own.State {
	case cryptohook.OwnOtherIdentity:
		advice += "The account now has another encryption identity than the bot's: somebody has reset it, perhaps somebody who has the account's password, or the homeserver is faulty or lies. " +
			"If it was you, write the new recovery key into account.recovery_key and start the bot again. If not: change the account's password, log out every device of it that is not yours, set account.reset_identity to true, start the bot again, and tell the people in its rooms"
	case cryptohook.OwnDeviceMissing:
		advice += "The bot's device is gone from the account: somebody has deleted it, or the homeserver is faulty or hides it. " +
			"Look at the account's list of devices. If it is gone there, change the password if it was not you, move the bot's database away, and start it again with its recovery key in account.recovery_key"
	case cryptohook.OwnDeviceChanged:
		advice += "The bot's device has other keys on the homeserver than the bot has: another program uses the same device, or the homeserver is faulty or lies. " +
			"Stop the other program. If there is none, move the bot's database away, and start it again with its recovery key in account.recovery_key and without account.device_id"
	case cryptohook.OwnSignatureMissing:
		advice += "The homeserver does not show that the bot's device belongs to its identity, so that nobody can check who answers. The bot signs its device again by itself; if this message comes back, ask the homeserver's administrator"
	}
	return advice
}

// ownIdentityCode is what a warning about the bot itself is noted by, beside the verdicts' codes.
const ownIdentityCode cryptohook.Code = "own_identity"

// doubtOf is the note that a room was told of a doubt; without a room, that there is one.
func doubtOf(roomID id.RoomID, user id.UserID) warning {
	return warning{roomID: roomID, sender: user, code: ownIdentityCode}
}

const (
	getSaidAtQuery  = `SELECT said_at_ms FROM bot_warning WHERE room_id=$1 AND sender=$2 AND code=$3 AND master_key=$4`
	deleteSaidQuery = `DELETE FROM bot_warning WHERE room_id=$1 AND sender=$2 AND code=$3 AND master_key=$4`
	// Rooms that the bot has left meanwhile have a note, too.
	endDoubtsQuery = `DELETE FROM bot_warning WHERE said_at_ms<=$1 AND code='own_identity'`
)

// saidAt is when a warning was given, or the zero time.
func (s *records) saidAt(ctx context.Context, w warning) (time.Time, error) {
	var ms int64
	err := s.QueryRow(ctx, getSaidAtQuery, w.roomID, w.sender, w.code, w.masterKey).Scan(&ms)
	if errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, nil
	} else if err != nil {
		return time.Time{}, fmt.Errorf("failed to read what rooms were told: %w", err)
	}
	return time.UnixMilli(ms), nil
}

func (s *records) unsay(ctx context.Context, w warning) error {
	return s.exec(ctx, deleteSaidQuery, w.roomID, w.sender, w.code, w.masterKey)
}

// beginDoubt notes that the rooms are being told of a doubt, and gives when that began: after a restart, when it began before.
func (s *records) beginDoubt(ctx context.Context, user id.UserID, now time.Time) (time.Time, error) {
	began, err := s.saidAt(ctx, doubtOf("", user))
	if err != nil || !began.IsZero() {
		return began, err
	}
	return now, s.noteSaid(ctx, doubtOf("", user), now)
}

func (s *records) endDoubts(ctx context.Context, now time.Time) error {
	return s.exec(ctx, endDoubtsQuery, now.UnixMilli())
}

// whileTrusted waits until people can check the bot again, and gives the verdict as it is then. It says no when the context ended.
func (b *Bot) whileTrusted(ctx context.Context, verdict cryptohook.Verdict, sender id.UserID) (cryptohook.Verdict, bool) {
	held, ok := b.self.hold(ctx)
	if !held || !ok {
		return verdict, ok
	}
	now, err := b.hook.Review(ctx, verdict, sender)
	if err != nil {
		// The answer is reviewed again once it is given.
		zerolog.Ctx(ctx).Err(err).Msg("Failed to look at a verdict again that was held back")
		return verdict, true
	}
	now.Late = verdict.Late
	return now, true
}

// encryptedRooms asks the homeserver for the rooms that the bot is in, and gives those that are encrypted.
func (b *Bot) encryptedRooms(ctx context.Context) (rooms []id.RoomID, err error) {
	joined, err := b.client.JoinedRooms(ctx)
	if err != nil {
		return nil, err
	}
	for _, roomID := range joined.JoinedRooms {
		encrypted, err := b.client.StateStore.IsEncrypted(ctx, roomID)
		if err != nil {
			return nil, err
		} else if encrypted {
			rooms = append(rooms, roomID)
		}
	}
	return rooms, nil
}

func (b *Bot) sendOnce(ctx context.Context, roomID id.RoomID, content *event.Content, transactionID string) (final bool, err error) {
	_, err = b.client.SendMessageEvent(ctx, roomID, event.EventMessage, content, mautrix.ReqSendEvent{TransactionID: transactionID})
	if err != nil {
		_, final = retryAfter(err, 0)
	}
	return final, err
}
