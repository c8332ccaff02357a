package bot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
	"sendertrust/internal/faultpoint"
)

// annotationKey is where an answer carries its verdict for other programs.
const annotationKey = "dev.sendertrust.annotation"

// annotation is the verdict as other programs read it. Fields that are not known are absent.
type annotation struct {
	EventID   id.EventID        `json:"event_id"`
	Code      cryptohook.Code   `json:"code"`
	Shield    cryptohook.Shield `json:"shield"`
	State     cryptohook.State  `json:"state,omitempty"`
	UserID    id.UserID         `json:"user_id,omitempty"`
	DeviceID  id.DeviceID       `json:"device_id,omitempty"`
	MasterKey id.Ed25519        `json:"master_key,omitempty"`
	SessionID id.SessionID      `json:"session_id,omitempty"`
	Legacy    bool              `json:"legacy"`
}

func (b *Bot) annotate(v cryptohook.Verdict) annotation {
	return annotation{
		EventID: v.EventID, Code: v.Code, Shield: b.shield(v.Code), State: v.State,
		UserID: v.UserID, DeviceID: v.DeviceID, MasterKey: v.MasterKey, SessionID: v.SessionID, Legacy: v.Legacy,
	}
}

func (b *Bot) shield(code cryptohook.Code) cryptohook.Shield {
	if b.config.Annotate.Shields == ShieldsStrict {
		return code.StrictShield()
	}
	return code.LaxShield()
}

// answer replies to a person's message with what is known about its sender. The hook calls it for each room event, in the order
// of the room, and again after a crash: the transaction ID makes a second answer the same event. It calls it once more for a message
// whose key has come late: then the answer is corrected.
func (b *Bot) answer(ctx context.Context, evt *event.Event) {
	log := zerolog.Ctx(ctx)
	verdict, judged := cryptohook.VerdictOf(evt)
	if !judged || evt.Sender == b.client.UserID || b.isRequestToUs(evt) {
		return
	}
	if verdict, judged = b.whileTrusted(ctx, verdict, evt.Sender); !judged {
		return
	}
	if verdict.Late {
		answered, err := b.reviser.correctLate(ctx, evt, verdict)
		if err != nil {
			log.Err(err).Msg("Failed to correct the answer to a message whose key came late")
		}
		if answered || err != nil {
			return
		}
	}
	b.noteImpersonation(ctx, evt, verdict)
	if o := b.readOrder(evt, verdict); o != nil && !verdict.Late {
		if !b.wasDeleted(ctx, evt.ID) {
			b.obey(ctx, o)
		}
		return
	}
	b.answerMessage(ctx, evt, verdict)
}

// answerMessage answers what is no command, in the way that its room wants.
func (b *Bot) answerMessage(ctx context.Context, evt *event.Event, verdict cryptohook.Verdict) {
	if original := replacedBy(evt); original != "" {
		b.answerEdit(ctx, evt, verdict, original)
		return
	}
	kind, worth := b.kindFor(evt, verdict)
	if !worth || !b.isForUs(evt) || b.roomWasTold(ctx, evt, verdict) {
		return
	}
	if kind == kindQuiet || b.mayAnswer(ctx, evt, verdict) {
		b.reply(ctx, b.newRecord(evt, verdict, kind))
	}
}

// kindFor is how a message is answered. It says no to one that is not even to be remembered.
func (b *Bot) kindFor(evt *event.Event, verdict cryptohook.Verdict) (kind answerKind, worth bool) {
	if b.mode(evt.RoomID) == ModeCommand {
		return kindReply, b.asksUs(evt)
	}
	return b.kindOf(evt.RoomID, verdict), true
}

// newRecord is what is about to be told of a message.
func (b *Bot) newRecord(evt *event.Event, verdict cryptohook.Verdict, kind answerKind) *record {
	return &record{
		eventID: evt.ID, roomID: evt.RoomID, sender: evt.Sender, threadID: threadOf(evt), kind: kind, sign: b.sign(verdict), verdict: verdict,
		toldAt: b.clock(),
	}
}

// reply answers a message that is to be answered, and was not yet.
func (b *Bot) reply(ctx context.Context, told *record) {
	log := zerolog.Ctx(ctx)
	told, err := b.record(ctx, told)
	if err != nil {
		// Better an answer that cannot be corrected than none.
		log.Err(err).Msg("Failed to record an answer")
	}
	if told.answerID != "" || told.redactedBy != "" || told.kind == kindQuiet {
		return
	}
	answerID, sent := b.tell(ctx, told)
	if !sent {
		return
	}
	b.metrics.answers.WithLabelValues(string(told.verdict.Code)).Inc()
	log.Info().Str("code", string(told.verdict.Code)).Stringer("session_id", told.verdict.SessionID).Stringer("answer_id", answerID).Msg("Answered")
	b.noteAnswer(ctx, told, answerID)
}

// tell gives an answer for the first time: after a crash that is the same event.
func (b *Bot) tell(ctx context.Context, told *record) (answerID id.EventID, sent bool) {
	if told.kind == kindReaction {
		return b.react(ctx, told.roomID, told.about(), told.sign, transactionID(told.eventID))
	}
	words := b.speech(told.roomID).wordsOn(told, told.verdict)
	content := answerContent(words, b.annotate(told.verdict), replyTo(told.about(), told.threadID))
	return b.send(ctx, told.roomID, content, transactionID(told.eventID))
}

// roomWasTold says that nobody asks about a message in a room that is known not to be encrypted.
func (b *Bot) roomWasTold(ctx context.Context, evt *event.Event, verdict cryptohook.Verdict) bool {
	if verdict.Code != cryptohook.CodeNotEncrypted || b.asksUs(evt) {
		return false
	}
	said, err := b.hasSaidNotEncrypted(ctx, evt.RoomID)
	if err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to look up whether the room was told that it is not encrypted")
	}
	return said || err != nil
}

// record notes what is about to be told, and gives what is to be told: after a crash that is what was about to be told before. That a room is
// not encrypted is about no message, and is not noted.
func (b *Bot) record(ctx context.Context, told *record) (*record, error) {
	if told.verdict.Code == cryptohook.CodeNotEncrypted {
		return told, nil
	}
	noted, err := b.reviser.records.add(ctx, told)
	if err != nil || noted == nil {
		return told, err
	}
	unbound := noted.kind == kindQuiet && noted.answerID == "" && noted.redactedBy == ""
	if unbound && (told.kind != kindQuiet || b.annotate(told.verdict) != b.annotate(noted.verdict)) {
		// Nothing was said before, so nothing has to be said again.
		noted.kind, noted.sign = told.kind, told.sign
		err = b.reviser.records.setVerdict(ctx, noted, told.verdict)
	}
	b.reviser.noted(noted)
	return noted, err
}

// noteAnswer notes that the answer was given.
func (b *Bot) noteAnswer(ctx context.Context, told *record, answerID id.EventID) {
	log := zerolog.Ctx(ctx)
	if told.verdict.Code == cryptohook.CodeNotEncrypted {
		if err := b.noteSaidNotEncrypted(ctx, told.roomID); err != nil {
			log.Warn().Err(err).Msg("Failed to note that the room was told that it is not encrypted")
		}
		return
	}
	if err := b.reviser.records.setAnswer(ctx, told, answerID); err != nil {
		log.Err(err).Msg("Failed to record an answer")
	}
	b.reviser.noted(told)
}

// noticeContent is what the bot says to people.
func noticeContent(said words, relation *event.RelatesTo) *event.Content {
	return &event.Content{Parsed: &event.MessageEventContent{
		MsgType: event.MsgNotice, Body: said.plain(), Format: event.FormatHTML, FormattedBody: said.html(),
		RelatesTo: relation, Mentions: &event.Mentions{},
	}}
}

// answerContent is what the bot says about one message: words for people, and the verdict for programs.
func answerContent(words text, a annotation, relation *event.RelatesTo) *event.Content {
	content := noticeContent(words, relation)
	content.Raw = map[string]any{annotationKey: a}
	return content
}

// editContent replaces an answer. https://spec.matrix.org/v1.16/client-server-api/#event-replacements
func editContent(answerID id.EventID, words text, a annotation) *event.Content {
	message := &event.MessageEventContent{
		MsgType: event.MsgNotice, Body: words.plain(), Format: event.FormatHTML, FormattedBody: words.html(), Mentions: &event.Mentions{},
	}
	message.SetEdit(answerID)
	return &event.Content{Parsed: message, Raw: map[string]any{"m.new_content": map[string]any{annotationKey: a}}}
}

// isForUs says whether the event is a message of a person: not the bot's own, not another bot's notice, no edit, no reaction, and not deleted.
func (b *Bot) isForUs(evt *event.Event) bool {
	if evt.Sender == b.client.UserID || wasRedacted(evt) {
		return false
	}
	switch evt.Type {
	case event.EventMessage:
		content := evt.Content.AsMessage()
		return content.MsgType != event.MsgNotice && content.RelatesTo.GetReplaceID() == ""
	case event.EventSticker:
		return true
	case event.EventEncrypted:
		relation := evt.Content.AsEncrypted().RelatesTo
		return relation == nil || relation.Type != event.RelReplace && relation.Type != event.RelAnnotation && relation.Type != event.RelReference
	}
	return false
}

// asksUs says whether a message speaks to the bot.
func (b *Bot) asksUs(evt *event.Event) bool {
	content := evt.Content.AsMessage()
	if content.Mentions.Has(b.client.UserID) {
		return true
	}
	_, addressed := b.afterName(content.Body)
	return addressed || strings.HasPrefix(content.Body, prefix) || strings.Contains(content.Body, b.client.UserID.String())
}

// replyTo relates an answer to the message, within the same thread if there is one.
func replyTo(eventID, threadID id.EventID) *event.RelatesTo {
	reply := &event.RelatesTo{InReplyTo: &event.InReplyTo{EventID: eventID}}
	if threadID != "" {
		reply.Type, reply.EventID = event.RelThread, threadID
	}
	return reply
}

func threadOf(evt *event.Event) id.EventID { return relationOf(evt).GetThreadParent() }

// relationOf is how an event relates to another one. That is never encrypted. Nil: it does not.
// https://spec.matrix.org/v1.16/client-server-api/#forming-relationships-between-events
func relationOf(evt *event.Event) *event.RelatesTo {
	switch content := evt.Content.Parsed.(type) {
	case *event.EncryptedEventContent:
		return content.RelatesTo
	case event.Relatable:
		return content.OptionalGetRelatesTo()
	}
	return nil
}

// transactionID makes the answer to an event the same request whenever it is sent.
func transactionID(eventID id.EventID) string {
	hash := sha256.Sum256([]byte(eventID))
	return "sendertrust-" + hex.EncodeToString(hash[:16])
}

const (
	firstSendRetry = time.Second
	maxSendRetry   = time.Minute
)

// send sends a message; see insist.
func (b *Bot) send(ctx context.Context, roomID id.RoomID, content *event.Content, txnID string) (eventID id.EventID, sent bool) {
	return b.sendEvent(ctx, roomID, event.EventMessage, content, txnID)
}

func (b *Bot) sendEvent(ctx context.Context, roomID id.RoomID, eventType event.Type, content any, txnID string) (eventID id.EventID, sent bool) {
	return b.insist(ctx, func() (*mautrix.RespSendEvent, error) {
		faultpoint.Reach("answering")
		resp, err := b.client.SendMessageEvent(ctx, roomID, eventType, content, mautrix.ReqSendEvent{TransactionID: txnID})
		if err == nil {
			faultpoint.Reach("answered")
		}
		return resp, err
	})
}

// insist tries until the homeserver has the event, refuses it for good, or the context ends.
func (b *Bot) insist(ctx context.Context, try func() (*mautrix.RespSendEvent, error)) (eventID id.EventID, sent bool) {
	for wait := firstSendRetry; ; wait = min(2*wait, maxSendRetry) {
		if _, ok := b.self.hold(ctx); !ok {
			return "", false
		}
		resp, err := try()
		if err == nil {
			return resp.EventID, true
		}
		if ctx.Err() != nil {
			return "", false
		}
		pause, final := retryAfter(err, wait)
		if final {
			zerolog.Ctx(ctx).Warn().Err(err).Msg("The homeserver does not take the answer; leaving it")
			return "", false
		}
		b.metrics.retries.Inc()
		zerolog.Ctx(ctx).Warn().Err(err).Dur("retry_in", pause).Msg("Failed to send the answer, trying again")
		select {
		case <-ctx.Done():
			return "", false
		case <-time.After(pause):
		}
	}
}

// retryAfter says how long to wait before a request is tried again, or that trying again is no use.
// https://spec.matrix.org/v1.16/client-server-api/#rate-limiting
func retryAfter(err error, wait time.Duration) (pause time.Duration, final bool) {
	var httpError mautrix.HTTPError
	if !errors.As(err, &httpError) || httpError.Response == nil {
		return wait, false
	}
	if errors.Is(err, mautrix.MLimitExceeded) && httpError.RespError != nil {
		if ms, ok := httpError.RespError.ExtraData["retry_after_ms"].(float64); ok && ms > 0 {
			return time.Duration(ms) * time.Millisecond, false
		}
		return wait, false
	}
	status := httpError.Response.StatusCode
	return wait, status >= 400 && status < 500 && status != 401 && status != 408 && status != 429
}

// saidNotEncrypted is room account data of the bot: a room without encryption is told so once, also after a restart.
const saidNotEncrypted = "dev.sendertrust.said_not_encrypted"

func (b *Bot) hasSaidNotEncrypted(ctx context.Context, roomID id.RoomID) (bool, error) {
	if _, said := b.saidNotEncrypted.Load(roomID); said {
		return true, nil
	}
	err := b.client.GetRoomAccountData(ctx, roomID, saidNotEncrypted, new(struct{}))
	if errors.Is(err, mautrix.MNotFound) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	b.saidNotEncrypted.Store(roomID, true)
	return true, nil
}

func (b *Bot) noteSaidNotEncrypted(ctx context.Context, roomID id.RoomID) error {
	b.saidNotEncrypted.Store(roomID, true)
	return b.client.SetRoomAccountData(ctx, roomID, saidNotEncrypted, struct{}{})
}
