package people

import (
	"context"
	"encoding/json"
	"fmt"

	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Session is a Megolm session for sending into a room. Whoever has its key can read what is sent with it.
type Session struct {
	RoomID id.RoomID
	ID     id.SessionID
	// Key is the session's key from the first message on, as an m.room_key carries it.
	Key string

	outbound olm.OutboundGroupSession
	// sharedWith are the users whose devices got the key when [Person.Send] shared it.
	sharedWith map[id.UserID]bool
}

// CurrentKey is the session's key from the next message on: it does not read what was sent before.
func (s *Session) CurrentKey() string { return s.outbound.Key() }

// NewSession makes a Megolm session for a room, of which nobody has the key. [Person.Send] does not use it.
func (p *Person) NewSession(roomID id.RoomID) (*Session, error) {
	outbound, err := olm.NewOutboundGroupSession()
	if err != nil {
		return nil, fmt.Errorf("failed to make a Megolm session: %w", err)
	}
	return &Session{RoomID: roomID, ID: outbound.ID(), Key: outbound.Key(), outbound: outbound, sharedWith: make(map[id.UserID]bool)}, nil
}

// RotateSession lets the next [Person.Send] into the room use a fresh session.
func (p *Person) RotateSession(roomID id.RoomID) {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	delete(p.sessions, roomID)
}

// CurrentSession gives the session with which [Person.Send] sends into the room; it makes one, and shares it with the members who
// have not got it. It stays the same until [Person.RotateSession].
func (p *Person) CurrentSession(ctx context.Context, roomID id.RoomID) (*Session, error) {
	members := p.Members(roomID)
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	session := p.sessions[roomID]
	if session == nil {
		var err error
		if session, err = p.NewSession(roomID); err != nil {
			return nil, err
		}
		p.sessions[roomID] = session
	}
	var lacking []id.UserID
	for _, member := range members {
		if !session.sharedWith[member] {
			lacking = append(lacking, member)
		}
	}
	if len(lacking) == 0 {
		return session, nil
	}
	devices, err := p.devices(ctx, lacking...)
	if err != nil {
		return nil, err
	}
	if err = p.sendOlm(ctx, devices, event.ToDeviceRoomKey.Type, session.roomKey()); err != nil {
		return nil, err
	}
	for _, member := range lacking {
		session.sharedWith[member] = true
	}
	return session, nil
}

// roomKey is the content of the m.room_key that shares the session.
func (s *Session) roomKey() map[string]any {
	return map[string]any{"algorithm": id.AlgorithmMegolmV1, "room_id": s.RoomID, "session_id": s.ID, "session_key": s.Key}
}

// ShareKey sends the session's m.room_key to all devices of a user, as the forgeries want it. The session may be another
// person's: then this one claims to have made it.
func (p *Person) ShareKey(ctx context.Context, session *Session, to id.UserID, forgeries ...Forgery) error {
	return p.SendOlm(ctx, to, event.ToDeviceRoomKey.Type, session.roomKey(), forgeries...)
}

// Withhold tells all devices of a user, in the clear as the specification wants it, that they will not get the session's key.
// Code is one of the specification's, such as m.blacklisted.
func (p *Person) Withhold(ctx context.Context, session *Session, to id.UserID, code event.RoomKeyWithheldCode) error {
	devices, err := p.Devices(ctx, to)
	if err != nil {
		return err
	}
	messages := make(map[id.UserID]map[id.DeviceID]any)
	for _, device := range devices {
		content := map[string]any{"algorithm": id.AlgorithmMegolmV1, "sender_key": p.SenderKey(), "code": code}
		if code != event.RoomKeyWithheldNoOlmSession {
			content["room_id"], content["session_id"] = session.RoomID, session.ID
		}
		if messages[device.UserID] == nil {
			messages[device.UserID] = make(map[id.DeviceID]any)
		}
		messages[device.UserID][device.DeviceID] = content
	}
	return p.sendToDevices(ctx, event.ToDeviceRoomKeyWithheld.Type, messages)
}

// Encrypt encrypts an event with a session, and gives the content of the m.room.encrypted event that carries it.
func (p *Person) Encrypt(session *Session, eventType string, content map[string]any) (map[string]any, error) {
	plaintext, err := json.Marshal(map[string]any{"room_id": session.RoomID, "type": eventType, "content": content})
	if err != nil {
		return nil, fmt.Errorf("failed to write a Megolm payload: %w", err)
	}
	encrypted, err := p.EncryptBytes(session, plaintext)
	if relation, ok := content["m.relates_to"]; ok && err == nil {
		// The homeserver aggregates by it, so that it stays outside the ciphertext.
		encrypted["m.relates_to"] = relation
	}
	return encrypted, err
}

// EncryptBytes encrypts any bytes with a session, and gives the content of the m.room.encrypted event that carries them.
func (p *Person) EncryptBytes(session *Session, plaintext []byte) (map[string]any, error) {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	ciphertext, err := session.outbound.Encrypt(plaintext)
	if err != nil {
		return nil, fmt.Errorf("failed to encrypt with session %s: %w", session.ID, err)
	}
	return map[string]any{
		"algorithm":  id.AlgorithmMegolmV1,
		"sender_key": p.SenderKey(),
		"device_id":  p.DeviceID,
		"session_id": session.ID,
		"ciphertext": string(ciphertext),
	}, nil
}
