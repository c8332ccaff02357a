package bot

import (
	"context"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/verificationhelper"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// methods are what the bot's own requests offer: emojis, and a QR code that the person's app scans. The bot scans nothing.
var methods = []event.VerificationMethod{
	event.VerificationMethodSAS, event.VerificationMethodQRCodeShow, event.VerificationMethodReciprocate,
}

// startVerification asks a person to verify with the bot, for an operator: in the operator's room if the person is there, and else in an
// encrypted room that the bot shares with the person.
func (b *Bot) startVerification(ctx context.Context, o *order, userID id.UserID) response {
	v := b.verifications
	v.mu.Lock()
	defer v.mu.Unlock()
	put := vars{"Name": showUser(userID), "Odd": o.speech.lookAlike(userID), "Most": openAtMost}
	no := func(key string) response {
		return refuse(o.speech.text(signCaution, "verification.start."+key, put), key)
	}
	if userID == b.client.UserID {
		return no("myself")
	}
	if d := v.ofUser(userID); d != nil && !d.begunBy(o) {
		return no("one_open")
	} else if d != nil {
		return say(o.speech.text(signPlain, "verification.start.asked", v.names(o.speech, d)))
	}
	roomID := v.roomWith(ctx, o, userID)
	switch {
	case roomID == "":
		return no("no_room")
	case len(v.open) >= openAtMost:
		return no("busy")
	}
	report, err := v.person(ctx, userID)
	if err != nil {
		return o.failed(ctx, err)
	}
	if why := unfit(report); why != "" {
		return no(why)
	}
	d := newDialogue()
	d.userID, d.roomID, d.inRoom, d.masterKey, d.openedAt = userID, roomID, true, report.MasterKey, v.clock()
	d.asked, d.askedIn, d.stage = true, o.evt.ID, stageAsked
	if known, err := v.ask(ctx, o, d); err != nil {
		return o.failed(ctx, err)
	} else if known {
		return no("over")
	}
	return say(o.speech.text(signPlain, "verification.start.asked", v.names(o.speech, d)))
}

// begunBy says that a dialogue is the one that this very order has begun: after a crash orders come again.
func (d *dialogue) begunBy(o *order) bool { return d.asked && d.askedIn == o.evt.ID }

// roomWith is where a person is asked.
func (v *verifications) roomWith(ctx context.Context, o *order, userID id.UserID) id.RoomID {
	encrypted, err := v.bot.client.StateStore.IsEncrypted(ctx, o.evt.RoomID)
	if err == nil && encrypted && v.bot.client.StateStore.IsInRoom(ctx, o.evt.RoomID, userID) {
		return o.evt.RoomID
	}
	return v.sharedRoom(ctx, userID)
}

// ask sends the request, and opens the dialogue. It says that there was one by that order already, in a former process.
func (v *verifications) ask(ctx context.Context, o *order, d *dialogue) (known bool, err error) {
	content := &event.MessageEventContent{
		MsgType: event.MsgVerificationRequest, Body: v.bot.speech(d.roomID).phrase("verification.request_body", vars{"Name": showUser(v.bot.client.UserID)}),
		FromDevice: v.bot.client.DeviceID, Methods: methods, To: d.userID, Mentions: &event.Mentions{},
	}
	sent, err := v.bot.client.SendMessageEvent(ctx, d.roomID, event.EventMessage, &event.Content{Parsed: content},
		mautrix.ReqSendEvent{TransactionID: hashOf("verification request", o.evt.ID)})
	if err != nil {
		return false, err
	}
	d.txnID = id.VerificationTransactionID(sent.EventID)
	if known, err = v.bot.reviser.records.hadVerification(ctx, d.txnID); known || err != nil {
		return known, err
	}
	return false, v.begin(ctx, d, verificationhelper.VerificationTransaction{VerificationState: verificationhelper.VerificationStateRequested})
}
