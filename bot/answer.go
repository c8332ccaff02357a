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
// of the room, and again after a crash: the transaction ID makes a second answer the same event.
func (b *Bot) answer(ctx context.Context, evt *event.Event) {
	log := zerolog.Ctx(ctx)
	verdict, judged := cryptohook.VerdictOf(evt)
	if !judged || !b.isForUs(evt) {
		return
	}
	if verdict.Code == cryptohook.CodeNotEncrypted && !b.asksUs(evt) {
		if said, err := b.hasSaidNotEncrypted(ctx, evt.RoomID); err != nil {
			log.Warn().Err(err).Msg("Failed to look up whether the room was told that it is not encrypted")
			return
		} else if said {
			return
		}
	}
	if b.config.Annotate.Mode == ModeWarnings && b.shield(verdict.Code) == cryptohook.ShieldNone {
		return
	}
	words := explain(verdict, evt.Sender)
	content := &event.Content{
		Parsed: &event.MessageEventContent{
			MsgType: event.MsgNotice, Body: words.plain(), Format: event.FormatHTML, FormattedBody: words.html(),
			RelatesTo: replyTo(evt), Mentions: &event.Mentions{},
		},
		Raw: map[string]any{annotationKey: b.annotate(verdict)},
	}
	answerID, sent := b.send(ctx, evt.RoomID, content, transactionID(evt.ID))
	if !sent {
		return
	}
	log.Info().Str("code", string(verdict.Code)).Stringer("session_id", verdict.SessionID).Stringer("answer_id", answerID).Msg("Answered")
	if verdict.Code == cryptohook.CodeNotEncrypted {
		if err := b.noteSaidNotEncrypted(ctx, evt.RoomID); err != nil {
			log.Warn().Err(err).Msg("Failed to note that the room was told that it is not encrypted")
		}
	}
}

// isForUs says whether the event is a message of a person: not the bot's own, not another bot's notice, no edit, no reaction.
func (b *Bot) isForUs(evt *event.Event) bool {
	if evt.Sender == b.client.UserID {
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
	return strings.HasPrefix(content.Body, "!trust") || strings.Contains(content.Body, b.client.UserID.String())
}

// replyTo relates an answer to the message, within the same thread if there is one.
func replyTo(evt *event.Event) *event.RelatesTo {
	reply := &event.RelatesTo{InReplyTo: &event.InReplyTo{EventID: evt.ID}}
	if root := threadOf(evt); root != "" {
		reply.Type, reply.EventID = event.RelThread, root
	}
	return reply
}

func threadOf(evt *event.Event) id.EventID {
	relatable, ok := evt.Content.Parsed.(event.Relatable)
	if !ok {
		return ""
	}
	return relatable.OptionalGetRelatesTo().GetThreadParent()
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

// send tries until the homeserver has the event, refuses it for good, or the context ends.
func (b *Bot) send(ctx context.Context, roomID id.RoomID, content *event.Content, txnID string) (eventID id.EventID, sent bool) {
	for wait := firstSendRetry; ; wait = min(2*wait, maxSendRetry) {
		resp, err := b.client.SendMessageEvent(ctx, roomID, event.EventMessage, content, mautrix.ReqSendEvent{TransactionID: txnID})
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
