package bot

import (
	"context"
	"errors"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/verificationhelper"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// dialogue is one verification that is under way, or that was left by a former process.
type dialogue struct {
	txnID  id.VerificationTransactionID
	userID id.UserID
	// deviceID is the device of the person that takes part; empty until one has accepted the bot's request.
	deviceID id.DeviceID
	// roomID is where the bot talks about it. inRoom says that the protocol runs there, too, and not between devices.
	roomID   id.RoomID
	inRoom   bool
	openedAt time.Time
	// masterKey is what is being verified: the person's master key when it began.
	masterKey id.Ed25519
	// operatorRoom is where operators are told, if none is in roomID; empty: nowhere else.
	operatorRoom id.RoomID

	// asked says that the bot has begun it, for an operator.
	asked bool
	// askedIn is the operator's order.
	askedIn id.EventID
	stage   stage
	// code is what confirms it; empty until there is something to confirm.
	code string
	// canSAS says that the person's app can compare emojis; qrCode is what it can scan, nil if it cannot.
	canSAS bool
	qrCode *verificationhelper.QRCode
	// notices are the bot's messages that somebody can reply to, or react to.
	notices map[id.EventID]bool
	// seen are the events that were taken: they may be delivered again. said are the remarks that were made once.
	seen map[id.EventID]bool
	said map[string]bool
	// mac is what the person's app vouches for, once the person has confirmed. The helper gets it after an operator has: in mautrix 0.31 it
	// compares the person's master key with the bot's if it has theirs before it sends its own.
	mac *event.Event
	// confirmedBy is the operator who has confirmed, and confirmedIn the room where they did so.
	confirmedBy id.UserID
	confirmedIn id.RoomID
	// confirmation is the event that confirmed it: its line in the audit table says what became of it.
	confirmation id.EventID
	// verified says that it has ended well.
	verified bool

	// What the helper has told, and nobody has acted upon.
	news      news
	cancelled *cancellation
	done      bool
}

func newDialogue() *dialogue {
	return &dialogue{notices: make(map[id.EventID]bool), seen: make(map[id.EventID]bool), said: make(map[string]bool)}
}

// stage is how far a dialogue has come.
type stage int

const (
	stageAsked     stage = iota // the bot has asked the person
	stageReady                  // both sides take part, and nothing is there to compare
	stageEmojis                 // the emojis are shown
	stageScanned                // the person's app has scanned the QR code
	stageConfirmed              // an operator has confirmed
)

// news is what the helper has to say of one step.
type news struct {
	ready, scanned bool
	sas            *shortString
}

// shortString is what both sides show: seven emojis with their names, and three numbers. One of the two may be missing.
type shortString struct {
	emojis  []rune
	names   []string
	numbers []int
}

// cancellation is the end of a dialogue as the helper tells of it. byPerson says that the person's app has sent it.
type cancellation struct {
	code     event.VerificationCancelCode
	byPerson bool
}

func (v *verifications) isOpen(d *dialogue) bool { return v.open[d.txnID] == d }

// ofUser is the open dialogue with somebody, or nil.
func (v *verifications) ofUser(userID id.UserID) *dialogue {
	for _, d := range v.open {
		if d.userID == userID {
			return d
		}
	}
	return nil
}

// begin opens a dialogue, and remembers it over a crash.
func (v *verifications) begin(ctx context.Context, d *dialogue, txn verificationhelper.VerificationTransaction) error {
	if err := v.bot.reviser.records.putVerification(ctx, d); err != nil {
		return err
	}
	d.operatorRoom = v.roomOfOperators(ctx, d)
	v.open[d.txnID] = d
	v.known.Add(d.txnID)
	txn.TransactionID, txn.TheirUserID, txn.TheirDeviceID = d.txnID, d.userID, d.deviceID
	if d.inRoom {
		txn.RoomID = d.roomID
	}
	v.log.Info().Stringer("user_id", d.userID).Stringer("device_id", d.deviceID).Stringer("room_id", d.roomID).Bool("in_room", d.inRoom).
		Stringer("transaction_id", d.txnID).Msg("A verification begins")
	return v.store.SaveVerificationTransaction(ctx, txn)
}

// close forgets a dialogue.
func (v *verifications) close(ctx context.Context, d *dialogue) {
	delete(v.open, d.txnID)
	v.known.Remove(d.txnID)
	if err := v.store.DeleteVerification(ctx, d.txnID); err != nil && !errors.Is(err, verificationhelper.ErrUnknownVerificationTransaction) {
		v.log.Err(err).Msg("Failed to forget a verification")
	}
	if err := v.bot.reviser.records.endVerification(ctx, d.txnID, v.clock()); err != nil {
		v.log.Err(err).Msg("Failed to note that a verification has ended")
	}
}

// ending is why a dialogue ends: the section of the texts, and what is put in besides the names.
type ending struct {
	key string
	put vars
}

// end closes a dialogue and says why.
func (v *verifications) end(ctx context.Context, d *dialogue, why ending) {
	if v.open[d.txnID] != nil && !v.isOpen(d) {
		return
	}
	v.close(ctx, d)
	v.amend(ctx, d, string(outcomeFailed), failedDetail+d.userID.String())
	v.log.Info().Stringer("user_id", d.userID).Stringer("transaction_id", d.txnID).Str("why", why.key).Msg("A verification has ended")
	sign := signCaution
	if alarming[why.key] {
		sign = signWarning
	}
	v.tell(ctx, d, sign, "ended."+why.key, why.put)
}

// alarming are the endings that may mean that somebody sits in between.
var alarming = map[string]bool{"denied": true, "mismatch": true, "wrong_keys": true, "identity_changed": true}

// amend has the audit table say what became of what an operator had confirmed before the end.
func (v *verifications) amend(ctx context.Context, d *dialogue, outcome, detail string) {
	if d.confirmation == "" {
		return
	}
	if err := v.bot.reviser.records.amendAudit(ctx, d.confirmation, outcome, detail); err != nil {
		v.log.Err(err).Msg("Failed to write into the audit table what became of a verification")
	}
}

// cancel ends a dialogue from the bot's side.
func (v *verifications) cancel(ctx context.Context, d *dialogue, code event.VerificationCancelCode, why ending) {
	v.sendCancel(ctx, d, code, "ended."+why.key)
	v.end(ctx, d, why)
}

// sendCancel tells the person's app, with the headline of what people read. If the homeserver does not take it, the app finds out when the
// time is up.
func (v *verifications) sendCancel(ctx context.Context, d *dialogue, code event.VerificationCancelCode, key string) {
	s := v.bot.speech(d.roomID)
	content := &event.VerificationCancelEventContent{Code: code, Reason: s.phrase("verification."+key+".headline", v.names(s, d))}
	err := v.sendProtocol(ctx, d, event.InRoomVerificationCancel, event.ToDeviceVerificationCancel, content)
	if err != nil {
		v.log.Warn().Err(err).Stringer("user_id", d.userID).Msg("Failed to tell a person's app that a verification has ended")
	}
}

// sendDone tells the person's app that the bot's side is done.
func (v *verifications) sendDone(ctx context.Context, d *dialogue) error {
	return v.sendProtocol(ctx, d, event.InRoomVerificationDone, event.ToDeviceVerificationDone, &event.VerificationDoneEventContent{})
}

// sendProtocol sends an event of the protocol, in the room or to the person's device; again, if it is sent again.
func (v *verifications) sendProtocol(ctx context.Context, d *dialogue, inRoom, toDevice event.Type, content interface {
	event.Relatable
	event.VerificationTransactionable
}) error {
	if d.inRoom {
		content.SetRelatesTo(&event.RelatesTo{Type: event.RelReference, EventID: id.EventID(d.txnID)})
		_, err := v.bot.client.SendMessageEvent(ctx, d.roomID, inRoom, &event.Content{Parsed: content},
			mautrix.ReqSendEvent{TransactionID: hashOf("verification", inRoom.Type, d.txnID)})
		return err
	}
	content.SetTransactionID(d.txnID)
	_, err := v.bot.client.SendToDevice(ctx, toDevice, &mautrix.ReqSendToDevice{
		Messages: map[id.UserID]map[id.DeviceID]*event.Content{d.userID: {d.deviceID: {Parsed: content}}},
	})
	return err
}

// roomOfOperators is an encrypted room with an operator, for a dialogue in whose room there is none besides the person; empty: there is one,
// or no such room.
func (v *verifications) roomOfOperators(ctx context.Context, d *dialogue) id.RoomID {
	var found id.RoomID
	for _, operator := range v.bot.config.Trust.Operators {
		if operator == d.userID && !v.mayConfirmThemselves(d) {
			continue
		}
		if v.bot.client.StateStore.IsInRoom(ctx, d.roomID, operator) {
			return ""
		}
		if found == "" {
			found = v.sharedRoom(ctx, operator)
		}
	}
	return found
}

// mayConfirmThemselves says that the person's own confirmation counts: an operator whose master key the configuration pins.
func (v *verifications) mayConfirmThemselves(d *dialogue) bool {
	return d.masterKey != "" && v.bot.config.Trust.VerifiedUsers[d.userID] == d.masterKey
}

// sharedRoom is the encrypted room with the fewest members that the bot shares with somebody; empty: there is none.
func (v *verifications) sharedRoom(ctx context.Context, userID id.UserID) id.RoomID {
	shared, err := v.sharedRooms(ctx, userID)
	if err != nil {
		v.log.Err(err).Stringer("user_id", userID).Msg("Failed to look up which rooms are shared with somebody")
		return ""
	}
	var best id.RoomID
	fewest := 0
	for _, roomID := range shared {
		members, err := v.bot.client.StateStore.GetRoomJoinedOrInvitedMembers(ctx, roomID)
		if err != nil || best != "" && len(members) >= fewest {
			continue
		}
		best, fewest = roomID, len(members)
	}
	return best
}

// sharedRooms are the encrypted rooms that both the bot and somebody have joined.
func (v *verifications) sharedRooms(ctx context.Context, userID id.UserID) (rooms []id.RoomID, err error) {
	encrypted, err := v.bot.encryptedRooms(ctx)
	for _, roomID := range encrypted {
		if v.bot.client.StateStore.IsInRoom(ctx, roomID, userID) {
			rooms = append(rooms, roomID)
		}
	}
	return rooms, err
}

// deviceIn says whether a person's identity has signed a device that is still there.
func deviceIn(report *cryptohook.UserReport, deviceID id.DeviceID) bool {
	for _, device := range report.Devices {
		if device.DeviceID == deviceID {
			return device.SignedByOwner && !device.Deleted
		}
	}
	return false
}
