package bot

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/crypto/verificationhelper"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// request is somebody's wish to verify the bot.
type request struct {
	txnID    id.VerificationTransactionID
	userID   id.UserID
	deviceID id.DeviceID
	methods  []event.VerificationMethod
	sentAt   time.Time
	// roomID is the room in which it was made; empty: it came from device to device.
	roomID id.RoomID
	// verdict is that on the message that made it, in a room.
	verdict cryptohook.Verdict
}

// The most that a request may hold. No client comes near.
const (
	longestTransactionID = 255
	longestDeviceID      = 255
	mostMethods          = 20
)

// isRequestToUs says that a message is a request to verify the bot. It is no message of the conversation.
func (b *Bot) isRequestToUs(evt *event.Event) bool {
	content, isMessage := evt.Content.Parsed.(*event.MessageEventContent)
	return isMessage && evt.Type == event.EventMessage && content.MsgType == event.MsgVerificationRequest && content.To == b.client.UserID
}

// onMessage takes the requests among a room's messages. After a crash they come again.
func (v *verifications) onMessage(ctx context.Context, evt *event.Event) {
	verdict, judged := cryptohook.VerdictOf(evt)
	if !judged || evt.Sender == v.bot.client.UserID || !v.bot.isRequestToUs(evt) {
		return
	}
	if verdict, judged = v.bot.whileTrusted(ctx, verdict, evt.Sender); !judged {
		return
	}
	content := evt.Content.AsMessage()
	v.take(ctx, &request{
		txnID: id.VerificationTransactionID(evt.ID), userID: evt.Sender, deviceID: content.FromDevice, methods: content.Methods,
		sentAt: time.UnixMilli(evt.Timestamp), roomID: evt.RoomID, verdict: verdict,
	})
}

// onToDevice notes an event between devices: the sync does not wait for what comes of it. Those of no verification that is open are nobody's.
func (v *verifications) onToDevice(ctx context.Context, evt *event.Event) {
	if evt.Type.Type != event.ToDeviceVerificationRequest.Type && !v.known.Has(transactionOf(evt, false)) {
		return
	}
	select {
	case v.arrived <- evt:
	default:
		v.bot.metrics.reached(limitVerifications)
		zerolog.Ctx(ctx).Warn().Stringer("sender", evt.Sender).Msg("Ignoring an event of a verification: too many wait")
	}
}

// takeToDevice looks at an event between devices.
func (v *verifications) takeToDevice(ctx context.Context, evt *event.Event) {
	if _, ok := v.bot.self.hold(ctx); !ok {
		return
	}
	content, isRequest := evt.Content.Parsed.(*event.VerificationRequestEventContent)
	if !isRequest {
		v.onProtocol(ctx, evt, nil)
		return
	}
	v.take(ctx, &request{
		txnID: content.TransactionID, userID: evt.Sender, deviceID: content.FromDevice, methods: content.Methods, sentAt: content.Timestamp.Time,
	})
}

// take accepts a request, or says why not.
func (v *verifications) take(ctx context.Context, r *request) {
	v.mu.Lock()
	defer v.mu.Unlock()
	log := v.log.With().Stringer("user_id", r.userID).Stringer("transaction_id", r.txnID).Stringer("room_id", r.roomID).Logger()
	ctx = log.WithContext(ctx)
	if r.isOdd() {
		log.Warn().Msg("Ignoring a request to verify that cannot be one")
		return
	}
	if age := v.clock().Sub(r.sentAt); age > verificationLasts || age < -requestEarly {
		log.Info().Dur("age", age).Msg("Ignoring a request to verify that is too old, or was made in the future")
		return
	}
	if v.isRepeat(ctx, r) {
		return
	}
	if !v.mayRequest(r) {
		v.bot.metrics.reached(limitVerifications)
		log.Info().Msg("Ignoring a request to verify: there were too many")
		return
	}
	d, refusal, err := v.consider(ctx, r)
	switch {
	case err != nil:
		log.Err(err).Msg("Failed to look at a request to verify")
		v.refuse(ctx, r, "not_sure", nil)
	case refusal != "":
		v.refuse(ctx, r, refusal, vars{"Headline": v.headline(r)})
	default:
		v.accept(ctx, d, r)
	}
}

// isOdd says that a request cannot have been made by a client.
func (r *request) isOdd() bool {
	return r.txnID == "" || len(r.txnID) > longestTransactionID || !isPlainASCII(string(r.txnID)) ||
		r.deviceID == "" || len(r.deviceID) > longestDeviceID || len(r.methods) > mostMethods
}

func isPlainASCII(text string) bool {
	return !strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c >= 0x7f })
}

// isRepeat says that there was such a request. In a room it is the same one, delivered again. Between devices it is a second one of the
// same name: nobody knows which of them is meant, so both end.
func (v *verifications) isRepeat(ctx context.Context, r *request) bool {
	if d := v.open[r.txnID]; d != nil {
		if d.userID == r.userID && !d.inRoom && r.roomID == "" {
			v.cancel(ctx, d, event.VerificationCancelCodeUnexpectedMessage, ending{key: "twice"})
		}
		return true
	}
	had, err := v.bot.reviser.records.hadVerification(ctx, r.txnID)
	if err != nil {
		v.log.Err(err).Msg("Failed to look up whether a verification is known")
	}
	return had || err != nil
}

// mayRequest counts the requests of a person, and those between devices.
func (v *verifications) mayRequest(r *request) bool {
	now := v.clock()
	if r.roomID == "" {
		v.betweenDevices = within(v.betweenDevices, now, requestPeriod)
		if len(v.betweenDevices) >= betweenDevicesAtMost {
			return false
		}
		v.betweenDevices = append(v.betweenDevices, now)
	}
	for userID, times := range v.requests {
		if times = within(times, now, requestPeriod); len(times) == 0 {
			delete(v.requests, userID)
		} else {
			v.requests[userID] = times
		}
	}
	if len(v.requests[r.userID]) >= requestsAtMost {
		return false
	}
	v.requests[r.userID] = append(v.requests[r.userID], now)
	return true
}

// consider says what a request is refused for, or gives the dialogue that is to begin.
func (v *verifications) consider(ctx context.Context, r *request) (d *dialogue, refusal string, err error) {
	if r.userID == v.bot.client.UserID {
		return nil, "own_account", nil
	}
	roomID := r.roomID
	if r.roomID == "" {
		roomID = v.sharedRoom(ctx, r.userID)
	} else if refusal = r.unproven(); refusal != "" {
		return nil, refusal, nil
	}
	switch {
	case roomID == "" && !v.bot.config.InviteAllowed(r.userID):
		return nil, "not_allowed", nil
	case roomID == "":
		return nil, "no_room", nil
	case !r.canVerify():
		return nil, "no_method", nil
	case v.ofUser(r.userID) != nil:
		return nil, "one_open", nil
	case len(v.open) >= openAtMost:
		return nil, "busy", nil
	}
	report, err := v.person(ctx, r.userID)
	if err != nil {
		return nil, "", err
	}
	if refusal = unfit(report); refusal != "" {
		return nil, refusal, nil
	}
	if !deviceIn(report, r.deviceID) {
		return nil, "not_signed", nil
	}
	d = newDialogue()
	d.txnID, d.userID, d.deviceID, d.roomID, d.inRoom = r.txnID, r.userID, r.deviceID, roomID, r.roomID != ""
	d.openedAt, d.masterKey, d.stage = v.clock(), report.MasterKey, stageReady
	return d, "", nil
}

// unproven says why a request in a room must not be taken for the person's. Element's apps send the events of the protocol in the clear, also
// in encrypted rooms: then the homeserver alone says whose they are, as between devices. That is what the protocol is made for: what both
// sides compare in the end shows whether somebody has meddled.
func (r *request) unproven() string {
	switch {
	case r.verdict.Code == cryptohook.CodeSentInClear:
		return ""
	case r.verdict.Code == cryptohook.CodeNotEncrypted:
		return "not_encrypted"
	case r.verdict.Code == cryptohook.CodeVerificationViolation:
		return "violation"
	case r.verdict.Code == cryptohook.CodeUnsignedDevice, r.verdict.Code == cryptohook.CodeUnknownDevice:
		return "not_signed"
	case !isProof(r.verdict, r.userID):
		return "unproven"
	case r.verdict.DeviceID != r.deviceID:
		return "other_device"
	}
	return ""
}

// isProof says that a message is a person's, as far as the person's own identity vouches for it.
func isProof(verdict cryptohook.Verdict, userID id.UserID) bool {
	switch verdict.Code {
	case cryptohook.CodeVerified, cryptohook.CodeUnverifiedIdentity, cryptohook.CodeIdentityChanged:
		return verdict.UserID == userID && verdict.DeviceID != ""
	}
	return false
}

// canVerify says that the person's app has a way to verify that the bot has, too.
func (r *request) canVerify() bool {
	has := func(method event.VerificationMethod) bool { return slices.Contains(r.methods, method) }
	return has(event.VerificationMethodSAS) || has(event.VerificationMethodQRCodeScan) && has(event.VerificationMethodReciprocate)
}

// unfit says why somebody cannot be verified; empty: they can be.
func unfit(report *cryptohook.UserReport) string {
	switch {
	case report == nil || report.MasterKey == "" || report.SelfSigningKey == "":
		return "no_identity"
	case report.Standing == cryptohook.StandingViolation:
		return "violation"
	}
	return ""
}

// accept takes part.
func (v *verifications) accept(ctx context.Context, d *dialogue, r *request) {
	txn := verificationhelper.VerificationTransaction{
		VerificationState: verificationhelper.VerificationStateRequested, TheirSupportedMethods: r.methods,
	}
	if err := v.begin(ctx, d, txn); err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to begin a verification")
		v.refuse(ctx, r, "not_sure", nil)
		return
	}
	v.guarded(ctx, d, func() error { return v.helper.AcceptVerification(ctx, d.txnID) })
	v.follow(ctx, d)
}

// refuse tells the person's app, and the room if there is one, why a request is not accepted.
func (v *verifications) refuse(ctx context.Context, r *request, key string, put vars) {
	zerolog.Ctx(ctx).Info().Str("why", key).Msg("Refused a request to verify")
	d := newDialogue()
	d.txnID, d.userID, d.deviceID, d.roomID, d.inRoom = r.txnID, r.userID, r.deviceID, r.roomID, r.roomID != ""
	v.sendCancel(ctx, d, event.VerificationCancelCodeUser, "refused."+key)
	if d.roomID == "" && key != "own_account" {
		d.roomID = v.sharedRoom(ctx, r.userID)
	}
	if d.roomID != "" {
		v.tell(ctx, d, signCaution, "refused."+key, put)
	}
}

// headline is what the message that made a request is worth.
func (v *verifications) headline(r *request) string {
	if r.roomID == "" {
		return ""
	}
	return v.bot.speech(r.roomID).explain(r.verdict, r.userID).headline
}
