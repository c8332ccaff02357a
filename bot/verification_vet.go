package bot

import (
	"context"
	"crypto/ecdh"
	"slices"

	"maunium.net/go/mautrix/crypto/verificationhelper"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// The events of the protocol, in a room and between devices.
var (
	inRoomTypes = []event.Type{
		event.InRoomVerificationReady, event.InRoomVerificationStart, event.InRoomVerificationAccept, event.InRoomVerificationKey,
		event.InRoomVerificationMAC, event.InRoomVerificationDone, event.InRoomVerificationCancel,
	}
	toDeviceTypes = []event.Type{
		event.ToDeviceVerificationRequest, event.ToDeviceVerificationReady, event.ToDeviceVerificationStart, event.ToDeviceVerificationAccept,
		event.ToDeviceVerificationKey, event.ToDeviceVerificationMAC, event.ToDeviceVerificationDone, event.ToDeviceVerificationCancel,
	}
)

// The most that an event of the protocol may hold.
const (
	mostChoices    = 20
	longestChoice  = 100
	mostCommitment = 64
	mostSecret     = 1024
)

// onRoomEvent takes an event of the protocol in a room. After a crash it comes again.
func (v *verifications) onRoomEvent(ctx context.Context, evt *event.Event) {
	verdict, judged := cryptohook.VerdictOf(evt)
	if !judged {
		return
	}
	if _, ok := v.bot.self.hold(ctx); !ok {
		return
	}
	v.onProtocol(ctx, evt, &verdict)
}

// onProtocol takes an event of a verification that is open. Others are those of other people, or late. Verdict is nil for events between
// devices, of which nothing is proven.
func (v *verifications) onProtocol(ctx context.Context, evt *event.Event, verdict *cryptohook.Verdict) {
	v.mu.Lock()
	defer v.mu.Unlock()
	d := v.open[transactionOf(evt, verdict != nil)]
	if d == nil || d.inRoom != (verdict != nil) || d.inRoom && evt.RoomID != d.roomID || evt.Sender == v.bot.client.UserID {
		return
	}
	ctx = v.log.With().Stringer("user_id", d.userID).Stringer("transaction_id", d.txnID).Str("type", evt.Type.Type).Logger().WithContext(ctx)
	if stranger := v.meddler(d, evt, verdict); stranger != "" {
		v.sayOnce(ctx, d, stranger, vars{"Sender": showUser(evt.Sender)})
		return
	}
	if verdict != nil && verdict.ContentWithheld {
		v.cancel(ctx, d, event.VerificationCancelCodeUser, ending{key: "withheld"})
		return
	}
	if evt.ID != "" && d.seen[evt.ID] {
		return
	}
	d.seen[evt.ID] = true
	txn, err := v.store.GetVerificationTransaction(ctx, d.txnID)
	if err != nil {
		return
	}
	if code, why := v.vet(ctx, d, txn, evt, verdict); why != "" {
		v.cancel(ctx, d, code, ending{key: why})
		return
	}
	if _, isMAC := evt.Content.Parsed.(*event.VerificationMACEventContent); isMAC && d.stage != stageConfirmed {
		d.mac = evt
		return
	}
	v.hand(ctx, d, evt)
}

// hand gives the helper an event, and does what follows.
func (v *verifications) hand(ctx context.Context, d *dialogue, evt *event.Event) {
	v.guarded(ctx, d, func() error {
		v.dispatch(ctx, d.txnID, evt)
		return nil
	})
	v.follow(ctx, d)
}

// transactionOf is the transaction that an event names: in a room by its relation, between devices by its ID. What the rest of the event says
// may be nonsense.
func transactionOf(evt *event.Event, inRoom bool) id.VerificationTransactionID {
	if !inRoom {
		named, _ := evt.Content.Raw["transaction_id"].(string)
		return id.VerificationTransactionID(named)
	}
	if content, ok := evt.Content.Parsed.(event.Relatable); ok {
		if named := content.OptionalGetRelatesTo().GetReferenceID(); named != "" {
			return id.VerificationTransactionID(named)
		}
	}
	relation, _ := evt.Content.Raw["m.relates_to"].(map[string]any)
	named, _ := relation["event_id"].(string)
	return id.VerificationTransactionID(named)
}

// meddler says that an event of a verification is not from the person who takes part, or not by the device that does. It is the key of what
// the room is told, and the event changes nothing: else anybody could end anybody's verification.
func (v *verifications) meddler(d *dialogue, evt *event.Event, verdict *cryptohook.Verdict) string {
	switch {
	case evt.Sender != d.userID:
		return "meddler"
	case verdict == nil, verdict.Code == cryptohook.CodeSentInClear:
		// See request.unproven.
		return ""
	case verdict.Code == cryptohook.CodeVerificationViolation && verdict.UserID == d.userID:
		// The identity has changed meanwhile: that ends the verification where it matters, see bound.
		return ""
	case !isProof(*verdict, d.userID):
		return "unproven"
	case d.deviceID != "" && verdict.DeviceID != d.deviceID:
		return "other_device"
	}
	return ""
}

// vet says why an event ends its verification; an empty key: it does not, and the helper may have it.
func (v *verifications) vet(
	ctx context.Context, d *dialogue, txn verificationhelper.VerificationTransaction, evt *event.Event, verdict *cryptohook.Verdict,
) (event.VerificationCancelCode, string) {
	switch content := evt.Content.Parsed.(type) {
	case *event.VerificationReadyEventContent:
		return v.vetReady(ctx, d, txn, content, verdict)
	case *event.VerificationStartEventContent:
		return vetStart(d, txn, content)
	case *event.VerificationAcceptEventContent:
		odd := len(content.Commitment) == 0 || len(content.Commitment) > mostCommitment || txn.StartEventContent == nil ||
			content.KeyAgreementProtocol != event.KeyAgreementProtocolCurve25519HKDFSHA256 || content.Hash != event.VerificationHashMethodSHA256 ||
			content.MessageAuthenticationCode != event.MACMethodHKDFHMACSHA256 && content.MessageAuthenticationCode != event.MACMethodHKDFHMACSHA256V2
		return expected(txn, verificationhelper.VerificationStateSASStarted, odd || !txn.StartedByUs)
	case *event.VerificationKeyEventContent:
		return expected(txn, verificationhelper.VerificationStateSASAccepted, !agreesWith(txn, content.Key))
	case *event.VerificationMACEventContent:
		return v.vetMAC(ctx, d, txn, content)
	case *event.VerificationDoneEventContent:
		if txn.VerificationState == verificationhelper.VerificationStateOurQRScanned {
			return "", ""
		}
		return expected(txn, verificationhelper.VerificationStateSASMACExchanged, false)
	case *event.VerificationCancelEventContent:
		return "", ""
	}
	return event.VerificationCancelCodeInvalidMessage, "odd_event"
}

// expected says that an event is not what comes next, or holds what it cannot.
func expected(txn verificationhelper.VerificationTransaction, state verificationhelper.VerificationState, odd bool) (event.VerificationCancelCode, string) {
	switch {
	case txn.VerificationState != state:
		return event.VerificationCancelCodeUnexpectedMessage, "out_of_turn"
	case odd:
		return event.VerificationCancelCodeInvalidMessage, "odd_event"
	}
	return "", ""
}

// agreesWith says that a key can be agreed upon with: it has the right length, and hides something.
func agreesWith(txn verificationhelper.VerificationTransaction, key []byte) bool {
	public, err := ecdh.X25519().NewPublicKey(key)
	if err != nil || txn.EphemeralKey == nil {
		return false
	}
	_, err = txn.EphemeralKey.ECDH(public)
	return err == nil
}

// vetReady looks at who accepts the bot's request: a device that the person's identity has signed.
func (v *verifications) vetReady(
	ctx context.Context, d *dialogue, txn verificationhelper.VerificationTransaction, content *event.VerificationReadyEventContent, verdict *cryptohook.Verdict,
) (event.VerificationCancelCode, string) {
	if d.stage != stageAsked || verdict == nil {
		return event.VerificationCancelCodeUnexpectedMessage, "out_of_turn"
	}
	answer := request{txnID: d.txnID, deviceID: content.FromDevice, methods: content.Methods}
	switch {
	case answer.isOdd(), verdict.Code != cryptohook.CodeSentInClear && answer.deviceID != verdict.DeviceID:
		return event.VerificationCancelCodeInvalidMessage, "odd_event"
	case !answer.canVerify():
		return event.VerificationCancelCodeUnknownMethod, "no_method"
	}
	if why := v.bound(ctx, d, content.FromDevice); why != "" {
		return event.VerificationCancelCodeKeyMismatch, why
	}
	d.deviceID = content.FromDevice
	if err := v.bot.reviser.records.putVerification(ctx, d); err != nil {
		v.log.Err(err).Msg("Failed to note with which device a verification is")
	}
	return expected(txn, verificationhelper.VerificationStateRequested, false)
}

func vetStart(d *dialogue, txn verificationhelper.VerificationTransaction, content *event.VerificationStartEventContent) (event.VerificationCancelCode, string) {
	choices := len(content.Hashes) + len(content.KeyAgreementProtocols) + len(content.MessageAuthenticationCodes) + len(content.ShortAuthenticationString)
	glare := txn.VerificationState == verificationhelper.VerificationStateSASStarted && txn.StartedByUs
	switch {
	case txn.VerificationState != verificationhelper.VerificationStateReady && !glare:
		return event.VerificationCancelCodeUnexpectedMessage, "out_of_turn"
	case content.FromDevice != d.deviceID, choices > mostChoices, len(content.Secret) > mostSecret, len(content.Method) > longestChoice:
		return event.VerificationCancelCodeInvalidMessage, "odd_event"
	case content.Method == event.VerificationMethodReciprocate && len(txn.QRCodeSharedSecret) == 0:
		// Else an empty secret would be the right one.
		return event.VerificationCancelCodeUnexpectedMessage, "out_of_turn"
	case content.Method != event.VerificationMethodReciprocate && content.Method != event.VerificationMethodSAS:
		return event.VerificationCancelCodeUnknownMethod, "no_method"
	case content.Method == event.VerificationMethodSAS && !speaksOurs(content):
		return event.VerificationCancelCodeUnknownMethod, "no_method"
	}
	return "", ""
}

// speaksOurs says that the helper can do one of what an app offers for comparing emojis, in each respect.
func speaksOurs(content *event.VerificationStartEventContent) bool {
	return slices.Contains(content.KeyAgreementProtocols, event.KeyAgreementProtocolCurve25519HKDFSHA256) &&
		slices.Contains(content.Hashes, event.VerificationHashMethodSHA256) &&
		(slices.Contains(content.MessageAuthenticationCodes, event.MACMethodHKDFHMACSHA256V2) ||
			slices.Contains(content.MessageAuthenticationCodes, event.MACMethodHKDFHMACSHA256)) &&
		(slices.Contains(content.ShortAuthenticationString, event.SASMethodEmoji) ||
			slices.Contains(content.ShortAuthenticationString, event.SASMethodDecimal))
}

// vetMAC looks at what a person's app vouches for: its device and the master key that is being verified, nothing less and nothing else. The
// helper would sign the person's master key even if the app did not name it.
func (v *verifications) vetMAC(
	ctx context.Context, d *dialogue, txn verificationhelper.VerificationTransaction, content *event.VerificationMACEventContent,
) (event.VerificationCancelCode, string) {
	if txn.ReceivedTheirMAC || d.mac != nil {
		return event.VerificationCancelCodeUnexpectedMessage, "out_of_turn"
	}
	if code, why := expected(txn, verificationhelper.VerificationStateSASKeysExchanged, len(content.Keys) == 0 || txn.OtherPublicKey == nil); why != "" {
		return code, why
	}
	_, device := content.MAC[id.NewKeyID(id.KeyAlgorithmEd25519, d.deviceID.String())]
	_, master := content.MAC[id.NewKeyID(id.KeyAlgorithmEd25519, d.masterKey.String())]
	switch {
	case device && !master && len(content.MAC) == 1:
		return event.VerificationCancelCodeKeyMismatch, "not_vouched"
	case !device || !master || len(content.MAC) != 2:
		return event.VerificationCancelCodeKeyMismatch, "wrong_keys"
	}
	if why := v.bound(ctx, d, d.deviceID); why != "" {
		return event.VerificationCancelCodeKeyMismatch, why
	}
	return "", ""
}

// bound says what has changed since a verification began, so that it must not be completed: the person's master key, or the device. What
// mautrix holds for the person's master key is what it would sign: that has to be the same key.
func (v *verifications) bound(ctx context.Context, d *dialogue, deviceID id.DeviceID) string {
	report, err := v.person(ctx, d.userID)
	if err != nil {
		v.log.Err(err).Stringer("user_id", d.userID).Msg("Failed to look whether a person's keys are the same as before")
		return "not_sure"
	}
	if report == nil || report.MasterKey != d.masterKey || unfit(report) != "" {
		return "identity_changed"
	}
	if !deviceIn(report, deviceID) {
		return "device_gone"
	}
	if cached, err := v.cached(ctx, d.userID); err != nil || cached != d.masterKey {
		v.log.Warn().Err(err).Stringer("user_id", d.userID).Msg("mautrix holds another master key of a person than the hook")
		return "identity_changed"
	}
	return ""
}
