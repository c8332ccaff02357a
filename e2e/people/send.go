package people

import (
	"context"
	"fmt"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Send sends a text into an encrypted room, encrypted, with the key shared to all members before.
func (p *Person) Send(ctx context.Context, roomID id.RoomID, text string) (id.EventID, error) {
	return p.sendEncrypted(ctx, roomID, event.EventMessage, textContent(text))
}

// SendContent sends a message of any content into an encrypted room, encrypted like [Person.Send].
func (p *Person) SendContent(ctx context.Context, roomID id.RoomID, content map[string]any) (id.EventID, error) {
	return p.sendEncrypted(ctx, roomID, event.EventMessage, content)
}

// SendReply sends a text as a reply to an event.
func (p *Person) SendReply(ctx context.Context, roomID id.RoomID, to id.EventID, text string) (id.EventID, error) {
	content := textContent(text)
	content["m.relates_to"] = map[string]any{"m.in_reply_to": map[string]any{"event_id": to}}
	return p.sendEncrypted(ctx, roomID, event.EventMessage, content)
}

// SendInThread sends a text into the thread of a root event.
func (p *Person) SendInThread(ctx context.Context, roomID id.RoomID, root id.EventID, text string) (id.EventID, error) {
	content := textContent(text)
	content["m.relates_to"] = map[string]any{
		"rel_type": event.RelThread, "event_id": root, "is_falling_back": true, "m.in_reply_to": map[string]any{"event_id": root},
	}
	return p.sendEncrypted(ctx, roomID, event.EventMessage, content)
}

// SendNotice sends an m.notice, as bots do.
func (p *Person) SendNotice(ctx context.Context, roomID id.RoomID, text string) (id.EventID, error) {
	content := textContent(text)
	content["msgtype"] = event.MsgNotice
	return p.sendEncrypted(ctx, roomID, event.EventMessage, content)
}

// SendEdit replaces the text of an earlier message.
func (p *Person) SendEdit(ctx context.Context, roomID id.RoomID, original id.EventID, text string) (id.EventID, error) {
	content := textContent("* " + text)
	content["m.new_content"] = textContent(text)
	content["m.relates_to"] = map[string]any{"rel_type": event.RelReplace, "event_id": original}
	return p.sendEncrypted(ctx, roomID, event.EventMessage, content)
}

// SendReaction puts an emoji to an event. Reactions go in the clear, as all clients send them.
func (p *Person) SendReaction(ctx context.Context, roomID id.RoomID, to id.EventID, key string) (id.EventID, error) {
	return p.SendRaw(ctx, roomID, event.EventReaction.Type, map[string]any{
		"m.relates_to": map[string]any{"rel_type": event.RelAnnotation, "event_id": to, "key": key},
	})
}

// SendClear sends a text in the clear, whether or not the room is encrypted.
func (p *Person) SendClear(ctx context.Context, roomID id.RoomID, text string) (id.EventID, error) {
	return p.SendRaw(ctx, roomID, event.EventMessage.Type, textContent(text))
}

// SendWith sends a text with a session of one's own choice, and shares no key.
func (p *Person) SendWith(ctx context.Context, session *Session, text string) (id.EventID, error) {
	encrypted, err := p.Encrypt(session, event.EventMessage.Type, textContent(text))
	if err != nil {
		return "", err
	}
	return p.SendRaw(ctx, session.RoomID, event.EventEncrypted.Type, encrypted)
}

// SendWithoutKey sends a text that nobody can read, with a session of its own. Its key can be shared later by [Person.ShareKey].
func (p *Person) SendWithoutKey(ctx context.Context, roomID id.RoomID, text string) (id.EventID, *Session, error) {
	session, err := p.NewSession(roomID)
	if err != nil {
		return "", nil, err
	}
	eventID, err := p.SendWith(ctx, session, text)
	return eventID, session, err
}

// SendRaw sends an event of any type and content, as it is.
func (p *Person) SendRaw(ctx context.Context, roomID id.RoomID, eventType string, content any) (id.EventID, error) {
	resp, err := p.Client.SendMessageEvent(ctx, roomID, event.Type{Type: eventType, Class: event.MessageEventType}, content)
	if err != nil {
		return "", fmt.Errorf("%s failed to send %s to %s: %w", p.UserID, eventType, roomID, err)
	}
	return resp.EventID, nil
}

// Resend sends the content of somebody's event again, as if it were this person's own, and the same if it is.
func (p *Person) Resend(ctx context.Context, roomID id.RoomID, eventID id.EventID) (id.EventID, error) {
	evt, err := p.Event(ctx, roomID, eventID)
	if err != nil {
		return "", err
	}
	return p.SendRaw(ctx, roomID, evt.Type.Type, evt.Content.VeryRaw)
}

func (p *Person) sendEncrypted(ctx context.Context, roomID id.RoomID, eventType event.Type, content map[string]any) (id.EventID, error) {
	session, err := p.CurrentSession(ctx, roomID)
	if err != nil {
		return "", err
	}
	encrypted, err := p.Encrypt(session, eventType.Type, content)
	if err != nil {
		return "", err
	}
	return p.SendRaw(ctx, roomID, event.EventEncrypted.Type, encrypted)
}

func textContent(text string) map[string]any {
	return map[string]any{"msgtype": event.MsgText, "body": text}
}
