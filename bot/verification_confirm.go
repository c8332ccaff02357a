package bot

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// orderConfirm completes a verification: an operator says that the person has told them what the bot shows.
func (b *Bot) orderConfirm(ctx context.Context, o *order) response {
	return b.verifications.decide(ctx, o, b.verifications.confirm)
}

// orderDeny ends a verification: an operator says that the person has told them something else.
func (b *Bot) orderDeny(ctx context.Context, o *order) response {
	return b.verifications.decide(ctx, o, b.verifications.deny)
}

// decide finds the verification that an operator means, and has it carried out what the operator says.
func (v *verifications) decide(ctx context.Context, o *order, what func(context.Context, *order, *dialogue) response) response {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.reply = &pendingReply{roomID: o.evt.RoomID}
	defer func() { v.reply = nil }()
	d, bad := v.meant(o)
	if bad != nil {
		return *bad
	}
	return what(v.log.WithContext(ctx), o, d)
}

// meant is the verification that an operator means: that of the person who is named, that of the notice that is replied to, or the only one.
// A relation alone chooses none to be confirmed: a server could have somebody else verified by it.
func (v *verifications) meant(o *order) (*dialogue, *response) {
	if len(o.args) > 0 && (!o.related || v.mayBeChosen(o)) {
		userID, bad := o.person()
		if bad != nil {
			return nil, bad
		}
		if d := v.ofUser(userID); d != nil {
			return d, nil
		}
		return nil, o.refusal("not_open", vars{"Name": showUser(userID)})
	}
	if repliedTo := o.evt.Content.AsMessage().RelatesTo.GetNonFallbackReplyTo(); repliedTo != "" && v.mayBeChosen(o) {
		if d := v.noticed(repliedTo); d != nil {
			return d, nil
		}
	}
	switch len(v.open) {
	case 0:
		return nil, o.refusal("none_open", nil)
	case 1:
		for _, d := range v.open {
			return d, nil
		}
	}
	var names []string
	for _, d := range v.open {
		names = append(names, showUser(d.userID))
	}
	slices.Sort(names)
	return nil, o.refusal("which", vars{"Names": strings.Join(names, ", ")})
}

// mayBeChosen says that a relation may say which verification an order is about.
func (v *verifications) mayBeChosen(o *order) bool { return o.name != "confirm" || len(v.open) == 1 }

// noticed is the verification that a message of the bot's is about, or nil.
func (v *verifications) noticed(eventID id.EventID) *dialogue {
	for _, d := range v.open {
		if d.notices[eventID] {
			return d
		}
	}
	return nil
}

// refusal is a response to an operator that changes nothing.
func (o *order) refusal(key string, put vars) *response {
	with := vars{"Command": o.name}
	maps.Copy(with, put)
	r := refuse(o.speech.text(signCaution, "verification.decide."+key, with), key)
	return &r
}

// confirm completes a verification, or says why not.
func (v *verifications) confirm(ctx context.Context, o *order, d *dialogue) response {
	put := v.names(o.speech, d)
	switch {
	case o.evt.Sender == d.userID && !v.mayConfirmThemselves(d):
		return *o.refusal("own", put)
	case d.stage == stageConfirmed:
		return *o.refusal("twice", put)
	case d.stage != stageEmojis && d.stage != stageScanned:
		return *o.refusal("early", put)
	}
	if why := v.bound(ctx, d, d.deviceID); why == "not_sure" {
		return *o.refusal("not_sure", put)
	} else if why != "" {
		v.cancel(ctx, d, event.VerificationCancelCodeKeyMismatch, ending{key: why})
		return v.replied(o, outcomeRefused, why)
	}
	scanned := d.stage == stageScanned
	d.stage, d.confirmedBy, d.confirmedIn = stageConfirmed, o.evt.Sender, o.evt.RoomID
	if scanned {
		v.completeScanned(ctx, d)
	} else {
		v.guarded(ctx, d, func() error { return v.helper.ConfirmSAS(ctx, d.txnID) })
		v.follow(ctx, d)
	}
	if mac := d.mac; mac != nil && v.isOpen(d) {
		v.hand(ctx, d, mac)
	}
	if v.isOpen(d) {
		return response{words: o.speech.text(signPlain, "verification.decide.thanks", put), detail: "waits for " + d.userID.String() + " " + d.masterKey.String()}
	}
	if !d.verified {
		return v.replied(o, outcomeFailed, "not verified: "+d.userID.String())
	}
	return v.replied(o, outcomeDone, verifiedDetail+d.userID.String()+" "+d.masterKey.String())
}

// deny ends a verification.
func (v *verifications) deny(ctx context.Context, o *order, d *dialogue) response {
	code, why := event.VerificationCancelCodeSASMismatch, "denied"
	if d.stage < stageEmojis {
		code, why = event.VerificationCancelCodeUser, "called_off"
	}
	v.cancel(ctx, d, code, ending{key: why})
	return v.replied(o, outcomeDone, why)
}

// replied is the response that was gathered while something was done: what was said of it in the operator's room, if anything was.
func (v *verifications) replied(o *order, outcome outcome, detail string) response {
	said := v.reply.words
	if said == nil {
		said = o.speech.text(signPlain, "verification.decide.ended", nil)
	}
	return response{words: said, outcome: outcome, detail: detail}
}

// verifiedDetail is what the audit table says of a verification that was completed: the person and the master key follow.
const verifiedDetail = "verified "

// completeScanned completes a verification by QR code. mautrix's helper would sign whatever master key it has for the person at that moment:
// here the one is signed that was in the code.
func (v *verifications) completeScanned(ctx context.Context, d *dialogue) {
	if err := v.verify(ctx, d); err != nil {
		v.cancel(ctx, d, event.VerificationCancelCodeKeyMismatch, ending{key: unverifiedBecause(err)})
		return
	}
	if err := v.sendDone(ctx, d); err != nil {
		v.log.Warn().Err(err).Stringer("user_id", d.userID).Msg("Failed to tell a person's app that a verification is done")
	}
	v.complete(ctx, d)
}

// verify signs the person's master key. That the configuration pins the same one is as good.
func (v *verifications) verify(ctx context.Context, d *dialogue) error {
	err := v.trust.Verify(ctx, d.userID, d.masterKey)
	if errors.Is(err, cryptohook.ErrPinned) && v.bot.config.Trust.VerifiedUsers[d.userID] == d.masterKey {
		return nil
	}
	return err
}

// unverifiedBecause is what people are told when a master key was not signed.
func unverifiedBecause(err error) string {
	for _, changed := range []error{cryptohook.ErrOtherMasterKey, cryptohook.ErrUnknownIdentity, cryptohook.ErrPinned} {
		if errors.Is(err, changed) {
			return "identity_changed"
		}
	}
	return "not_noted"
}

// complete verifies the person, after both sides have confirmed and the helper has checked what the person's app vouches for. The hook is
// told with the key that was verified: it lifts a withdrawal, and judges what the person has sent before anew.
func (v *verifications) complete(ctx context.Context, d *dialogue) {
	if err := v.verify(ctx, d); err != nil {
		v.log.Err(err).Stringer("user_id", d.userID).Msg("Failed to note that a person is verified")
		v.end(ctx, d, ending{key: unverifiedBecause(err)})
		return
	}
	d.verified = true
	v.close(ctx, d)
	v.log.Info().Stringer("user_id", d.userID).Stringer("master_key", d.masterKey).Stringer("confirmed_by", d.confirmedBy).
		Msg("A person was verified")
	v.tell(ctx, d, signVerified, "done", vars{"Operator": showUser(d.confirmedBy)})
}
