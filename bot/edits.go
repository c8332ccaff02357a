package bot

import (
	"cmp"
	"context"
	"slices"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// What becomes of a message after it was sent: its text is changed, or it is deleted.
//
// An edit is an event of its own, perhaps from another device, and takes the place of the text that was judged. It is judged, too; if it
// comes from the same device and is worth the same, there is nothing to say. A deletion is an event that nobody encrypts: a server
// that makes one up has an answer cleared, and nothing more.

// replacedBy is the message that an event is an edit of; empty: it is none.
// https://spec.matrix.org/v1.16/client-server-api/#event-replacements
func replacedBy(evt *event.Event) id.EventID { return relationOf(evt).GetReplaceID() }

// wasRedacted says that the event came when its content was deleted already. That is the server's word; what is there is there.
func wasRedacted(evt *event.Event) bool {
	content := len(evt.Content.Raw)
	if _, judged := cryptohook.VerdictOf(evt); judged {
		content-- // the verdict hangs there
	}
	return evt.Unsigned.RedactedBecause != nil && content <= 0
}

// answerEdit judges the new text of a message, and tells the room if it is another's, or worth less.
func (b *Bot) answerEdit(ctx context.Context, evt *event.Event, verdict cryptohook.Verdict, originalID id.EventID) {
	log := zerolog.Ctx(ctx)
	if verdict.Code == cryptohook.CodeNotEncrypted {
		return
	}
	original, err := b.reviser.records.get(ctx, originalID)
	if err != nil {
		log.Err(err).Msg("Failed to look up what was told of a message that was edited")
	}
	if original == nil {
		b.answerEditOfUnseen(ctx, evt, verdict, originalID)
		return
	}
	if original.roomID != evt.RoomID || original.sender != evt.Sender || original.editOf != "" || original.redactedBy != "" {
		log.Debug().Stringer("original_id", originalID).Msg("Ignoring an edit that no client applies")
		return
	}
	edit := b.newRecord(evt, verdict, kindQuiet)
	edit.editOf, edit.threadID = originalID, original.threadID
	told, err := b.reviser.alreadyTold(ctx, edit, verdict)
	if err != nil {
		log.Err(err).Msg("Failed to compare an edit with what was told of the message")
	}
	if !told && b.tellsOfEdits(evt.RoomID, verdict) {
		edit.kind = kindReply
	}
	if edit.kind == kindQuiet || b.mayAnswer(ctx, evt, verdict) {
		b.reply(ctx, edit)
	}
	if original.kind != kindReaction {
		return
	}
	if err = b.reviser.lookAgain(ctx, originalID); err != nil {
		log.Err(err).Msg("Failed to look at a reaction again after an edit")
	}
}

// tellsOfEdits says whether a room wants to know that a text comes from elsewhere than the one before.
func (b *Bot) tellsOfEdits(roomID id.RoomID, verdict cryptohook.Verdict) bool {
	return b.mode(roomID) == ModeReply || b.shield(verdict.Code) != cryptohook.ShieldNone
}

// answerEditOfUnseen judges an edit of a message that the bot has not answered, or not lately: by itself, if there is something to warn of.
func (b *Bot) answerEditOfUnseen(ctx context.Context, evt *event.Event, verdict cryptohook.Verdict, originalID id.EventID) {
	content, isMessage := evt.Content.Parsed.(*event.MessageEventContent)
	kind := b.kindOf(evt.RoomID, verdict)
	if kind == kindQuiet || b.shield(verdict.Code) == cryptohook.ShieldNone || isMessage && content.MsgType == event.MsgNotice {
		return
	}
	edit := b.newRecord(evt, verdict, kind)
	edit.editOf = originalID
	told, err := b.reviser.alreadyTold(ctx, edit, verdict)
	if err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to compare an edit with those before it")
	}
	if told || !b.mayAnswer(ctx, evt, verdict) {
		return
	}
	original, err := b.fetchEvent(ctx, evt.RoomID, originalID)
	switch {
	case err != nil:
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to fetch a message that was edited")
	case original != nil && (original.Sender != evt.Sender || replacedBy(original) != ""):
		return
	case original != nil:
		edit.threadID = threadOf(original)
	}
	b.reply(ctx, edit)
}

// alreadyTold says that what is known of an edit is what the room knows of the message: from its answer, or from that to another edit.
func (r *reviser) alreadyTold(ctx context.Context, edit *record, verdict cryptohook.Verdict) (bool, error) {
	texts, err := r.records.list(ctx, getEditsQuery, edit.editOf)
	if err != nil {
		return false, err
	}
	original, err := r.records.get(ctx, edit.editOf)
	if err != nil {
		return false, err
	}
	if original != nil && original.kind == kindReaction {
		return true, nil // its sign says so
	}
	if original != nil {
		texts = append(texts, original)
	}
	for _, text := range texts {
		if text.eventID == edit.eventID || text.kind == kindQuiet && text.editOf != "" {
			continue
		}
		now, err := r.review(ctx, text.verdict, text.sender)
		if err != nil {
			return false, err
		}
		if fromTheSame(now, verdict) {
			return true, nil
		}
	}
	return false, nil
}

// fromTheSame says that two texts are worth the same, and come from the same device of the same identity.
func fromTheSame(a, b cryptohook.Verdict) bool {
	return a.Code == b.Code && a.UserID == b.UserID && a.DeviceID == b.DeviceID && a.MasterKey == b.MasterKey
}

// wordsOn words the verdict on a message, or on its new text.
func (s speech) wordsOn(rec *record, verdict cryptohook.Verdict) text {
	return s.aboutEdit(rec, s.explain(verdict, rec.sender))
}

// correctedWords are wordsOn for an answer that said something else before.
func (s speech) correctedWords(rec *record, verdict cryptohook.Verdict) text {
	return s.aboutEdit(rec, s.corrected(rec.verdict, verdict, rec.sender))
}

// aboutEdit says that an answer is about a text that has taken the place of another.
func (s speech) aboutEdit(rec *record, words text) text {
	if rec.editOf == "" {
		return words
	}
	words.headline = s.phrase("edit.headline", vars{"Headline": words.headline})
	words.known = s.phrase("edit.known", vars{"Known": words.known})
	return words
}

// mostEditsTold is how many edits of a message are explained with it.
const mostEditsTold = 5

// editsInWords says of the edits of a message in the last day what they are worth, if that is something else than the message.
func (b *Bot) editsInWords(ctx context.Context, s speech, evt *event.Event, verdict cryptohook.Verdict) (said []words) {
	edits, err := b.reviser.records.list(ctx, getEditsQuery, evt.ID)
	if err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to look up the edits of a message")
	}
	known := []cryptohook.Verdict{verdict}
	for _, edit := range edits {
		now, err := b.reviser.review(ctx, edit.verdict, edit.sender)
		if err != nil {
			zerolog.Ctx(ctx).Err(err).Msg("Failed to look at the verdict on an edit again")
			now = edit.verdict
		}
		repeats := slices.ContainsFunc(known, func(v cryptohook.Verdict) bool { return fromTheSame(v, now) })
		if repeats || edit.redactedBy != "" || len(said) == mostEditsTold {
			continue
		}
		known = append(known, now)
		about := s.explain(now, edit.sender)
		said = append(said, remark(s.phrase("edit.explained", vars{"Sign": about.sign, "Headline": about.headline, "Known": about.known})))
	}
	return said
}

// wasDeleted says that a message was deleted before its turn came.
func (b *Bot) wasDeleted(ctx context.Context, eventID id.EventID) bool {
	rec, err := b.reviser.records.get(ctx, eventID)
	if err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to look up whether a message was deleted")
	}
	return rec != nil && rec.redactedBy != ""
}

// noteAnsweredCommand remembers what is to be cleared if a command is deleted.
func (b *Bot) noteAnsweredCommand(ctx context.Context, o *order, answerID id.EventID) {
	told, err := b.reviser.records.add(ctx, b.newRecord(o.evt, o.verdict, kindCommand))
	if err == nil && told != nil {
		err = b.reviser.records.setAnswer(ctx, told, answerID)
	}
	if err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to record the answer to a command")
	}
}

// handleRedaction clears what the bot has said of a message that was deleted.
func (b *Bot) handleRedaction(ctx context.Context, evt *event.Event) {
	if _, judged := cryptohook.VerdictOf(evt); !judged || evt.Sender == b.client.UserID {
		return
	}
	log := zerolog.Ctx(ctx)
	redacted := redactedBy(evt)
	if redacted == "" {
		log.Debug().Msg("Ignoring a redaction that does not say of what")
		return
	}
	if err := b.reviser.redacted(ctx, evt.RoomID, redacted, evt.Sender); err != nil {
		log.Err(err).Msg("Failed to note that a message was deleted")
	}
}

// redactedBy is the event that a redaction deletes. Where it stands depends on the version of the room, and homeservers write it into the
// other place as well. If the two differ, the server has checked one of them, and nobody knows which.
// https://spec.matrix.org/v1.16/client-server-api/#mroomredaction
func redactedBy(evt *event.Event) id.EventID {
	within := evt.Content.AsRedaction().Redacts
	if within != "" && evt.Redacts != "" && within != evt.Redacts {
		return ""
	}
	return cmp.Or(within, evt.Redacts)
}

// redacted notes that a message was deleted, and its answers with it. An answer that was deleted is left alone from then on.
func (r *reviser) redacted(ctx context.Context, roomID id.RoomID, eventID id.EventID, by id.UserID) error {
	r.working.Lock()
	defer r.working.Unlock()
	defer notify(r.wake)
	rec, err := r.records.get(ctx, eventID)
	if err != nil {
		return err
	}
	if rec == nil {
		return r.redactedUnanswered(ctx, roomID, eventID, by)
	}
	if rec.roomID != roomID || rec.redactedBy != "" {
		return nil
	}
	edits, err := r.records.list(ctx, getEditsQuery, eventID)
	if err != nil {
		return err
	}
	// The message itself comes last: after a crash it is all done again.
	for _, gone := range append(edits, rec) {
		if err = r.records.setRedacted(ctx, gone, by, r.clock()); err != nil {
			return err
		}
	}
	if rec.editOf == "" {
		return nil
	}
	return r.lookAgainNow(ctx, rec.editOf)
}

// redactedUnanswered forgets an answer that was deleted itself, or notes that a message is not to be answered any more.
func (r *reviser) redactedUnanswered(ctx context.Context, roomID id.RoomID, eventID id.EventID, by id.UserID) error {
	answered, err := r.records.list(ctx, getOfAnswerQuery, eventID)
	if err != nil {
		return err
	}
	for _, rec := range answered {
		if rec.roomID == roomID {
			return r.records.exec(ctx, deleteRecordQuery, rec.eventID)
		}
	}
	_, err = r.records.add(ctx, &record{eventID: eventID, roomID: roomID, kind: kindQuiet, toldAt: r.clock(), redactedBy: by})
	return err
}

// clear takes back what was said of a message that was deleted: a reaction altogether, and of an answer all but what programs may want to
// know, and the headline.
func (r *reviser) clear(ctx context.Context, rec *record) error {
	switch {
	case rec.kind == kindReaction:
		r.clearReaction(ctx, rec)
	case rec.answerID != "":
		told := r.annotate(rec.verdict)
		content := editContent(rec.answerID, r.speech(rec.roomID).deleted(rec), annotation{EventID: told.EventID, Code: told.Code, Shield: told.Shield, Legacy: told.Legacy})
		r.send(ctx, rec.roomID, content, hashOf("cleared", rec.eventID))
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	r.log.Info().Stringer("room_id", rec.roomID).Stringer("event_id", rec.eventID).Msg("Cleared the answer to a message that was deleted")
	return r.records.exec(ctx, clearRecordQuery, rec.eventID)
}

// clearReaction takes back the reaction to a message, and one that a crash has left beside it.
func (r *reviser) clearReaction(ctx context.Context, rec *record) {
	if rec.nextSign != "" {
		if reactionID, sent := r.reactNext(ctx, rec); sent && reactionID != rec.answerID {
			r.takeBack(ctx, rec.roomID, reactionID)
		}
	}
	if rec.answerID != "" {
		r.takeBack(ctx, rec.roomID, rec.answerID)
	}
}

// deleted words what is left of an answer to a message that was deleted.
func (s speech) deleted(rec *record) text {
	put := vars{"Name": showUser(rec.redactedBy), "Headline": s.explain(rec.verdict, rec.sender).headline}
	if rec.kind == kindCommand {
		return text{sign: signPlain, headline: s.phrase("redaction.headline", put), known: s.phrase("redaction.command", nil)}
	}
	return s.text(signPlain, "redaction", put)
}
