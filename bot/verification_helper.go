package bot

import (
	"context"

	"maunium.net/go/mautrix/crypto/verificationhelper"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// dispatch gives mautrix's helper an event of a transaction. In mautrix 0.31 it takes the event's own ID for that of the transaction.
func (v *verifications) dispatch(ctx context.Context, txnID id.VerificationTransactionID, evt *event.Event) {
	handed := *evt
	handed.ID = id.EventID(txnID)
	v.handed = evt.Type.Type
	defer func() { v.handed = "" }()
	v.router.Dispatch(ctx, &handed)
}

// callbacks note what the helper has to say. It says it while it holds its lock, so nothing is done about it before it has returned.
type callbacks struct{ *verifications }

var (
	_ verificationhelper.RequiredCallbacks   = callbacks{}
	_ verificationhelper.ShowSASCallbacks    = callbacks{}
	_ verificationhelper.ShowQRCodeCallbacks = callbacks{}
)

// VerificationRequested implements [verificationhelper.RequiredCallbacks]. Requests are not given to the helper.
func (callbacks) VerificationRequested(context.Context, id.VerificationTransactionID, id.UserID, id.DeviceID) {
}

// VerificationReady implements [verificationhelper.RequiredCallbacks].
func (c callbacks) VerificationReady(_ context.Context, txnID id.VerificationTransactionID, _ id.DeviceID, sas, _ bool, qrCode *verificationhelper.QRCode) {
	if d := c.open[txnID]; d != nil {
		d.news.ready, d.canSAS, d.qrCode = true, sas, qrCode
	}
}

// VerificationCancelled implements [verificationhelper.RequiredCallbacks].
func (c callbacks) VerificationCancelled(_ context.Context, txnID id.VerificationTransactionID, code event.VerificationCancelCode, reason string) {
	if d := c.open[txnID]; d != nil {
		d.cancelled = &cancellation{code: code, byPerson: c.handed == event.ToDeviceVerificationCancel.Type}
		c.log.Info().Stringer("user_id", d.userID).Str("code", string(code)).Bool("by_person", d.cancelled.byPerson).Str("reason", clip(reason)).
			Msg("A verification was cancelled")
	}
}

// VerificationDone implements [verificationhelper.RequiredCallbacks].
func (c callbacks) VerificationDone(_ context.Context, txnID id.VerificationTransactionID, _ event.VerificationMethod) {
	if d := c.open[txnID]; d != nil {
		d.done = true
	}
}

// ShowSAS implements [verificationhelper.ShowSASCallbacks].
func (c callbacks) ShowSAS(_ context.Context, txnID id.VerificationTransactionID, emojis []rune, names []string, numbers []int) {
	if d := c.open[txnID]; d != nil {
		d.news.sas = &shortString{emojis: emojis, names: names, numbers: numbers}
	}
}

// QRCodeScanned implements [verificationhelper.ShowQRCodeCallbacks].
func (c callbacks) QRCodeScanned(_ context.Context, txnID id.VerificationTransactionID) {
	if d := c.open[txnID]; d != nil {
		d.news.scanned = true
	}
}
