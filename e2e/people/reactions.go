package people

import (
	"context"
	"fmt"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Reaction is a sign that somebody has put to an event.
type Reaction struct {
	EventID id.EventID
	Sender  id.UserID
	Key     string
	// Content is all that the homeserver sees of it.
	Content map[string]any
}

// Reactions asks the homeserver for the reactions to an event that are there now.
func (p *Person) Reactions(ctx context.Context, roomID id.RoomID, eventID id.EventID) ([]Reaction, error) {
	resp, err := p.Client.GetRelations(ctx, roomID, eventID, &mautrix.ReqGetRelations{RelationType: event.RelAnnotation, EventType: event.EventReaction})
	if err != nil {
		return nil, fmt.Errorf("%s failed to ask for the reactions to %s: %w", p.UserID, eventID, err)
	}
	var reactions []Reaction
	for _, evt := range resp.Chunk {
		relation, _ := evt.Content.Raw["m.relates_to"].(map[string]any)
		if key, there := relation["key"].(string); there {
			reactions = append(reactions, Reaction{evt.ID, evt.Sender, key, evt.Content.Raw})
		}
	}
	return reactions, nil
}

// WaitForReactions waits until the reactions to an event are as the caller wants them, and gives them.
func (p *Person) WaitForReactions(ctx context.Context, roomID id.RoomID, eventID id.EventID, wanted func([]Reaction) bool) ([]Reaction, error) {
	for {
		p.seenLock.Lock()
		syncs := p.seen.syncs
		p.seenLock.Unlock()
		reactions, err := p.Reactions(ctx, roomID, eventID)
		if err != nil || wanted(reactions) {
			return reactions, err
		}
		what := fmt.Sprintf("reactions to %s other than %v", eventID, reactions)
		if err = p.wait(ctx, what, func(s *seen) bool { return s.syncs > syncs }); err != nil {
			return reactions, err
		}
	}
}

// Redact deletes an event.
func (p *Person) Redact(ctx context.Context, roomID id.RoomID, eventID id.EventID) error {
	if _, err := p.Client.RedactEvent(ctx, roomID, eventID); err != nil {
		return fmt.Errorf("%s failed to redact %s: %w", p.UserID, eventID, err)
	}
	return nil
}

// SendState sets the state of a room, with the state key "".
func (p *Person) SendState(ctx context.Context, roomID id.RoomID, eventType string, content any) (id.EventID, error) {
	resp, err := p.Client.SendStateEvent(ctx, roomID, event.Type{Type: eventType, Class: event.StateEventType}, "", content)
	if err != nil {
		return "", fmt.Errorf("%s failed to send the state %s: %w", p.UserID, eventType, err)
	}
	return resp.EventID, nil
}

// State gives the content of a room's state event with the state key "".
func (p *Person) State(ctx context.Context, roomID id.RoomID, eventType string) (content map[string]any, err error) {
	err = p.Client.StateEvent(ctx, roomID, event.Type{Type: eventType, Class: event.StateEventType}, "", &content)
	if err != nil {
		return nil, fmt.Errorf("%s failed to ask for the state %s: %w", p.UserID, eventType, err)
	}
	return content, nil
}

// SetPower gives a user a power level in a room.
func (p *Person) SetPower(ctx context.Context, roomID id.RoomID, userID id.UserID, level int) error {
	var levels map[string]any
	err := p.Client.StateEvent(ctx, roomID, event.StatePowerLevels, "", &levels)
	if err == nil {
		users, _ := levels["users"].(map[string]any)
		users[userID.String()] = level
		_, err = p.Client.SendStateEvent(ctx, roomID, event.StatePowerLevels, "", levels)
	}
	if err != nil {
		return fmt.Errorf("%s failed to give %s the level %d: %w", p.UserID, userID, level, err)
	}
	return nil
}
