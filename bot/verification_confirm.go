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

// orderConfirm completes a verification, by the code that the bot has shown: an operator says that the person has told them what the bot
// shows. What an operator was asked to say again is confirmed in the same way.
func (b *Bot) orderConfirm(ctx context.Context, o *order) response {
	v := b.verifications
	if thought := v.takeThought(o); thought != nil {
		return b.verifyKey(ctx, o, thought.userID, thought.masterKey)
	}
	return v.decide(ctx, o, v.toConfirm, v.confirm)
}

// orderDeny ends a verification: an operator says that the person has told them something else.
func (b *Bot) orderDeny(ctx context.Context, o *order) response {
	return b.verifications.decide(ctx, o, b.verifications.toDeny, b.verifications.deny)
}

// decide finds the verification that an operator means, and has it carried out what the operator says.
func (v *verifications) decide(
	ctx context.Context, o *order, find func(*order) (*dialogue, *response), what func(context.Context, *order, *dialogue) response,
) response {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.reply = &pendingReply{roomID: o.evt.RoomID}
	defer func() { v.reply = nil }()
	d, bad := find(o)
	if bad != nil {
		return *bad
	}
	return what(v.log.WithContext(ctx), o, d)
}

// given splits what is behind confirm or deny: the person and the code, each of which may be missing.
func (o *order) given() (userID id.UserID, code string, bad *response) {
	for _, arg := range o.args {
		if word := strings.Trim(arg, quotes); isCode(word) {
			code = word
			continue
		}
		userID = mention(arg)
		if !isFullUserID(userID) {
			return "", "", o.refusal("not_a_code", vars{"Given": showUser(userID)})
		}
	}
	return userID, code, nil
}

// toConfirm is the verification whose code an operator has given. A name alone is not enough: see [verifications.newCode].
func (v *verifications) toConfirm(o *order) (*dialogue, *response) {
	userID, code, bad := o.given()
	if bad != nil {
		return nil, bad
	}
	d := v.coded(code)
	switch {
	case d != nil && userID != "" && d.userID != userID:
		return nil, o.refusal("other_person", vars{"Name": showUser(d.userID), "Given": showUser(userID)})
	case d != nil:
		return d, nil
	case userID != "" && v.ofUser(userID) == nil:
		return nil, o.refusal("not_open", vars{"Name": showUser(userID)})
	case len(v.open) == 0:
		return nil, o.refusal("none_open", nil)
	case code != "":
		return nil, o.refusal("other_code", vars{"Given": code})
	case !v.anythingToConfirm(userID):
		return nil, o.refusal("early", nil)
	}
	return nil, o.refusal("no_code", nil)
}

// anythingToConfirm says that a verification, that with somebody if one is named, has something to compare.
func (v *verifications) anythingToConfirm(userID id.UserID) bool {
	for _, d := range v.open {
		if d.code != "" && (userID == "" || d.userID == userID) {
			return true
		}
	}
	return false
}

// toDeny is the verification that an operator means: that of the person or the code that is named, that of the notice that is replied to, or
// the only one. To end the wrong one costs nobody anything but time.
func (v *verifications) toDeny(o *order) (*dialogue, *response) {
	userID, code, bad := o.given()
	switch {
	case bad != nil:
		return nil, bad
	case userID != "":
		if d := v.ofUser(userID); d != nil {
			return d, nil
		}
		return nil, o.refusal("not_open", vars{"Name": showUser(userID)})
	case code != "":
		if d := v.coded(code); d != nil {
			return d, nil
		}
		return nil, o.refusal("other_code", vars{"Given": code})
	}
	if d := v.noticed(o.evt.Content.AsMessage().RelatesTo.GetNonFallbackReplyTo()); d != nil {
		return d, nil
	}
	return v.only(o)
}

// only is the verification that is open if there is one alone.
func (v *verifications) only(o *order) (*dialogue, *response) {
	var names []string
	for _, d := range v.open {
		if len(v.open) == 1 {
			return d, nil
		}
		names = append(names, showUser(d.userID))
	}
	if len(names) == 0 {
		return nil, o.refusal("none_open", nil)
	}
	slices.Sort(names)
	return nil, o.refusal("which", vars{"Names": strings.Join(names, ", ")})
}

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
	}
	if why := v.bound(ctx, d, d.deviceID); why == "not_sure" {
		return *o.refusal("not_sure", put)
	} else if why != "" {
		v.cancel(ctx, d, event.VerificationCancelCodeKeyMismatch, ending{key: why})
		return v.replied(o, outcomeRefused, why)
	}
	scanned := d.stage == stageScanned
	d.stage, d.confirmedBy, d.confirmedIn, d.confirmation = stageConfirmed, o.evt.Sender, o.evt.RoomID, o.evt.ID
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
		return response{words: o.speech.text(signPlain, "verification.decide.thanks", put), detail: waitingDetail + d.userID.String() + " " + d.masterKey.String()}
	}
	if !d.verified {
		return v.replied(o, outcomeFailed, failedDetail+d.userID.String())
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

// What the audit table says of a verification that an operator has confirmed. The person follows, and, but for the last, the master key.
const (
	verifiedDetail = "verified "
	waitingDetail  = "waits for "
	failedDetail   = "not verified: "
)

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
	v.amend(ctx, d, auditDone, verifiedDetail+d.userID.String()+" "+d.masterKey.String())
	v.log.Info().Stringer("user_id", d.userID).Stringer("master_key", d.masterKey).Stringer("confirmed_by", d.confirmedBy).
		Msg("A person was verified")
	v.tell(ctx, d, signVerified, "done", vars{"Operator": showUser(d.confirmedBy)})
}
