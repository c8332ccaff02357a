package bot

import (
	"context"
	"slices"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
	"sendertrust/internal/faultpoint"
)

// How a message is answered by a sign on it. Reactions are never encrypted: the homeservers of the room see them, and could make them up or
// keep them from people. So a reaction holds the sign and nothing else, no annotation either. A reaction cannot be edited: to correct it
// another one is sent, and then it is taken back. A crash in between leaves both, until the next process goes on.

// react puts a sign to a message; see insist.
func (b *Bot) react(ctx context.Context, roomID id.RoomID, to id.EventID, sign, txnID string) (reactionID id.EventID, sent bool) {
	content := &event.ReactionEventContent{RelatesTo: event.RelatesTo{Type: event.RelAnnotation, EventID: to, Key: sign}}
	return b.sendEvent(ctx, roomID, event.EventReaction, content, txnID)
}

// takeBack redacts an event of the bot's own; see insist. What the homeserver refuses for good is gone already, or stays.
func (b *Bot) takeBack(ctx context.Context, roomID id.RoomID, eventID id.EventID) {
	b.insist(ctx, func() (*mautrix.RespSendEvent, error) {
		return b.client.RedactEvent(ctx, roomID, eventID, mautrix.ReqRedact{TxnID: hashOf("redaction", eventID)})
	})
}

// fromBestSign orders the signs by what they say.
var fromBestSign = []string{signVerified, signPlain, signCaution, signWarning}

// signNow is the reaction that a message should have: what it is worth, or the worst of its edits. Its text may be any of theirs.
func (r *reviser) signNow(ctx context.Context, rec *record, verdict cryptohook.Verdict) (string, error) {
	edits, err := r.records.list(ctx, getEditsQuery, rec.eventID)
	if err != nil {
		return "", err
	}
	worst := r.sign(verdict)
	for _, edit := range edits {
		if edit.redactedBy != "" {
			continue
		}
		now, err := r.review(ctx, edit.verdict, edit.sender)
		if err != nil {
			return "", err
		}
		if sign := r.sign(now); slices.Index(fromBestSign, sign) > slices.Index(fromBestSign, worst) {
			worst = sign
		}
	}
	return worst, nil
}

// correctReaction puts another sign in the place of the one that a message has. Which one is noted before, so that a process after a crash
// knows what may be there.
func (r *reviser) correctReaction(ctx context.Context, rec *record, verdict cryptohook.Verdict) error {
	resumed := rec.nextSign != ""
	if !resumed {
		sign, err := r.signNow(ctx, rec, verdict)
		if err != nil {
			return err
		}
		if err = r.records.setNextSign(ctx, rec, sign); err != nil {
			return err
		}
	}
	former := rec.answerID
	reactionID, sent := r.reactNext(ctx, rec)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !sent {
		return r.records.exec(ctx, deleteRecordQuery, rec.eventID)
	}
	faultpoint.Reach("reacted")
	if former != "" && former != reactionID {
		r.takeBack(ctx, rec.roomID, former)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	faultpoint.Reach("taken back")
	r.metrics.edits.Inc()
	r.log.Info().Stringer("room_id", rec.roomID).Stringer("event_id", rec.eventID).Stringer("reaction_id", reactionID).
		Str("code", string(verdict.Code)).Msg("Corrected a reaction")
	rec.answerID, rec.sign, rec.editedAt = reactionID, rec.nextSign, r.clock()
	rec.edits++
	if err := r.records.setVerdict(ctx, rec, verdict); err != nil || !resumed {
		return err
	}
	return r.plan(ctx, rec, verdict)
}

// reactNext sends the sign that is to come; if it was sent before, that is the same event.
func (r *reviser) reactNext(ctx context.Context, rec *record) (reactionID id.EventID, sent bool) {
	return r.react(ctx, rec.roomID, rec.about(), rec.nextSign, hashOf("reaction", rec.eventID, rec.edits))
}

// lookAgain has the reaction to a message looked at, since there is something new about its text.
func (r *reviser) lookAgain(ctx context.Context, eventID id.EventID) error {
	r.working.Lock()
	defer r.working.Unlock()
	return r.lookAgainNow(ctx, eventID)
}

// lookAgainNow is lookAgain for who holds working.
func (r *reviser) lookAgainNow(ctx context.Context, eventID id.EventID) error {
	rec, err := r.records.get(ctx, eventID)
	if err != nil || rec == nil || rec.kind != kindReaction || rec.redactedBy != "" {
		return err
	}
	verdict, err := r.review(ctx, rec.verdict, rec.sender)
	if err != nil {
		return err
	}
	notify(r.wake)
	return r.plan(ctx, rec, verdict)
}
