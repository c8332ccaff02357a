package people

import (
	"context"
	"fmt"
	"slices"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// CreateRoom makes a private room, invites people, and waits until the own /sync shows it.
func (p *Person) CreateRoom(ctx context.Context, encrypted bool, invite ...id.UserID) (id.RoomID, error) {
	request := &mautrix.ReqCreateRoom{Preset: "private_chat", Invite: invite}
	if encrypted {
		request.InitialState = []*event.Event{{
			Type:    event.StateEncryption,
			Content: event.Content{Parsed: &event.EncryptionEventContent{Algorithm: id.AlgorithmMegolmV1}},
		}}
	}
	resp, err := p.Client.CreateRoom(ctx, request)
	if err != nil {
		return "", fmt.Errorf("%s failed to create a room: %w", p.UserID, err)
	}
	return resp.RoomID, p.WaitJoined(ctx, resp.RoomID, p.UserID)
}

// Invite invites somebody to a room.
func (p *Person) Invite(ctx context.Context, roomID id.RoomID, userID id.UserID) error {
	if _, err := p.Client.InviteUser(ctx, roomID, &mautrix.ReqInviteUser{UserID: userID}); err != nil {
		return fmt.Errorf("%s failed to invite %s to %s: %w", p.UserID, userID, roomID, err)
	}
	return nil
}

// Join joins a room, and waits until the own /sync shows it.
func (p *Person) Join(ctx context.Context, roomID id.RoomID) error {
	if _, err := p.Client.JoinRoomByID(ctx, roomID); err != nil {
		return fmt.Errorf("%s failed to join %s: %w", p.UserID, roomID, err)
	}
	return p.WaitJoined(ctx, roomID, p.UserID)
}

// Leave leaves a room.
func (p *Person) Leave(ctx context.Context, roomID id.RoomID) error {
	if _, err := p.Client.LeaveRoom(ctx, roomID); err != nil {
		return fmt.Errorf("%s failed to leave %s: %w", p.UserID, roomID, err)
	}
	return nil
}

// WaitJoined waits until a user is in a room, as this person's /sync shows it.
func (p *Person) WaitJoined(ctx context.Context, roomID id.RoomID, userID id.UserID) error {
	return p.wait(ctx, fmt.Sprintf("%s to join %s", userID, roomID), func(s *seen) bool { return s.joined[roomID][userID] })
}

// WaitLeft waits until a user who was in a room has left it.
func (p *Person) WaitLeft(ctx context.Context, roomID id.RoomID, userID id.UserID) error {
	return p.wait(ctx, fmt.Sprintf("%s to leave %s", userID, roomID), func(s *seen) bool {
		joined, known := s.joined[roomID][userID]
		return known && !joined
	})
}

// Members gives the users who are in a room, as this person's /sync shows it, in order.
func (p *Person) Members(roomID id.RoomID) []id.UserID {
	p.seenLock.Lock()
	defer p.seenLock.Unlock()
	var members []id.UserID
	for userID, joined := range p.seen.joined[roomID] {
		if joined {
			members = append(members, userID)
		}
	}
	slices.Sort(members)
	return members
}

// Event fetches an event from the homeserver, as it was sent.
func (p *Person) Event(ctx context.Context, roomID id.RoomID, eventID id.EventID) (*event.Event, error) {
	evt, err := p.Client.GetEvent(ctx, roomID, eventID)
	if err != nil {
		return nil, fmt.Errorf("%s failed to fetch %s: %w", p.UserID, eventID, err)
	}
	return evt, nil
}
