package bot

import (
	"bytes"
	"context"
	"slices"
	"strconv"
	"strings"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// follow does what is to be done after the helper has taken a step.
func (v *verifications) follow(ctx context.Context, d *dialogue) {
	if !v.isOpen(d) {
		return
	}
	if d.cancelled != nil && d.stage == stageConfirmed && !d.cancelled.byPerson && d.cancelled.code == event.VerificationCancelCodeUser {
		v.breakOff(ctx, d)
		return
	} else if d.cancelled != nil {
		v.end(ctx, d, d.cancelled.ending())
		return
	}
	txn, err := v.store.GetVerificationTransaction(ctx, d.txnID)
	if err == nil && txn.SentOurDone || d.done {
		v.complete(ctx, d)
		return
	}
	told := d.news
	d.news = news{}
	switch {
	case told.ready:
		d.stage = stageReady
		v.ready(ctx, d)
	case told.sas != nil:
		d.stage, d.code = stageEmojis, v.newCode()
		v.showEmojis(ctx, d, told.sas)
	case told.scanned:
		d.stage, d.code = stageScanned, v.newCode()
		v.tell(ctx, d, signPlain, "scanned", nil)
	}
}

// ending says what it means that the person's app has cancelled, or else the helper.
func (c *cancellation) ending() ending {
	switch c.code {
	case event.VerificationCancelCodeSASMismatch:
		if c.byPerson {
			return ending{key: "mismatch"}
		}
		return ending{key: "wrong_keys"}
	case event.VerificationCancelCodeKeyMismatch, event.VerificationCancelCodeUserMismatch, event.VerificationCancelCodeCommitmentMismatch:
		return ending{key: "wrong_keys"}
	case event.VerificationCancelCodeUnexpectedMessage:
		return ending{key: "out_of_turn"}
	}
	if !c.byPerson {
		return ending{key: "broken"}
	}
	switch c.code {
	case event.VerificationCancelCodeUser:
		return ending{key: "cancelled"}
	case event.VerificationCancelCodeTimeout:
		return ending{key: "timed_out"}
	case event.VerificationCancelCodeAccepted:
		return ending{key: "elsewhere"}
	}
	return ending{key: "failed", put: vars{"Reason": showText(string(c.code))}}
}

// ready says how to go on, and shows the QR code if the person's app can scan one. What the bot itself has begun, it goes on with.
func (v *verifications) ready(ctx context.Context, d *dialogue) {
	if d.qrCode != nil && !bytes.Equal(d.qrCode.Key2[:], keyBytes(d.masterKey)) {
		v.cancel(ctx, d, event.VerificationCancelCodeKeyMismatch, ending{key: "identity_changed"})
		return
	}
	v.tell(ctx, d, signPlain, "ready."+readyKey(d), nil)
	if d.qrCode != nil {
		v.showQRCode(ctx, d)
		return
	}
	if txn, err := v.store.GetVerificationTransaction(ctx, d.txnID); err != nil || !d.asked || txn.StartEventContent != nil {
		return
	}
	v.guarded(ctx, d, func() error { return v.helper.StartSAS(ctx, d.txnID) })
	v.follow(ctx, d)
}

// readyKey is what the person's app can do.
func readyKey(d *dialogue) string {
	switch {
	case d.qrCode != nil && d.canSAS:
		return "both"
	case d.qrCode != nil:
		return "scan"
	case d.asked:
		return "wait"
	}
	return "emojis"
}

// showEmojis shows what the person's app has to show, too.
func (v *verifications) showEmojis(ctx context.Context, d *dialogue, sas *shortString) {
	if len(sas.emojis) == 0 && len(sas.numbers) == 0 {
		v.cancel(ctx, d, event.VerificationCancelCodeUnknownMethod, ending{key: "no_method"})
		return
	}
	v.sayIn(ctx, d, "emojis", func(s speech) words {
		put := v.names(s, d)
		shown := s.text(signCaution, "verification.emojis", put)
		advice := shown.advice
		shown.advice = ""
		return page{shown, remark(s.describeEmojis(sas)), remark(advice), remark(s.phrase("verification.emojis.person", put))}
	})
}

// describeEmojis writes the emojis with their names, and the numbers for those who cannot see them.
func (s speech) describeEmojis(sas *shortString) string {
	var lines []string
	if len(sas.emojis) > 0 {
		named := make([]string, len(sas.emojis))
		for i, emoji := range sas.emojis {
			named[i] = string(emoji) + "\ufe0f " + s.emojiName(sas.names[i])
		}
		lines = append(lines, strings.Join(named, "   "))
	}
	if len(sas.numbers) > 0 {
		written := make([]string, len(sas.numbers))
		for i, number := range sas.numbers {
			written[i] = strconv.Itoa(number)
		}
		lines = append(lines, s.phrase("verification.emojis.numbers", vars{"Numbers": strings.Join(written, " ")}))
	}
	return strings.Join(lines, "\n")
}

// emojiName is what the specification calls an emoji in that language, as far as it is known.
func (s speech) emojiName(name string) string {
	key := "verification.emoji." + strings.ToLower(strings.ReplaceAll(name, " ", "_"))
	if s.has(key) {
		return s.phrase(key, nil)
	}
	return name
}

// names are what the texts about a dialogue put in.
func (v *verifications) names(s speech, d *dialogue) vars {
	device := ""
	if d.deviceID != "" {
		device = s.describeDevice(d.deviceID)
	}
	who := s.phrase("verification.operators_word", nil)
	if operators := v.bot.describeOperators(); operators != "" {
		who = operators
	}
	return vars{
		"Name": showUser(d.userID), "Device": device, "Key": groups(d.masterKey), "Operators": who, "Most": openAtMost,
		"Until": d.openedAt.Add(verificationLasts).UTC().Format("15:04 UTC"), "Odd": s.lookAlike(d.userID),
		"Code": d.code,
	}
}

// tell says something about a dialogue where people can hear it.
func (v *verifications) tell(ctx context.Context, d *dialogue, sign, key string, put vars) {
	v.sayIn(ctx, d, key, func(s speech) words {
		with := v.names(s, d)
		for name, value := range put {
			with[name] = value
		}
		return s.text(sign, "verification."+key, with)
	})
}

// sayOnce says something about a dialogue that others could have it say again and again.
func (v *verifications) sayOnce(ctx context.Context, d *dialogue, key string, put vars) {
	if d.said[key] {
		return
	}
	d.said[key] = true
	v.tell(ctx, d, signCaution, "ignored."+key, put)
}

// sayIn says something in the person's room, and in the operators' if that is another one. A room with an operator who is about to be
// answered is told by the answer.
func (v *verifications) sayIn(ctx context.Context, d *dialogue, key string, word func(s speech) words) {
	rooms := []id.RoomID{d.roomID, d.operatorRoom, d.confirmedIn}
	for i, roomID := range rooms {
		if roomID == "" || slices.Contains(rooms[:i], roomID) {
			continue
		}
		said := word(v.bot.speech(roomID))
		if v.reply != nil && v.reply.roomID == roomID {
			v.reply.words = said
			continue
		}
		// A room that takes nothing is not to hold up everybody else's verifications.
		sending, cancel := context.WithTimeout(ctx, noticePatience)
		eventID, sent := v.bot.send(sending, roomID, noticeContent(said, nil), hashOf("verification", d.txnID, key, roomID))
		cancel()
		if sent {
			d.notices[eventID] = true
		}
	}
}

// pendingReply is an answer to an operator that is not given yet.
type pendingReply struct {
	roomID id.RoomID
	words  words
}
