package inputs

import (
	"encoding/json"
	"fmt"

	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Session is a Megolm session that a device has made for a room.
type Session struct {
	RoomID id.RoomID
	Sender id.UserID

	outbound olm.OutboundGroupSession
	key      string
	written  int
}

// NewSession makes a session of the device for a room.
func (d *Device) NewSession(roomID id.RoomID) *Session {
	outbound := Must(olm.NewOutboundGroupSession())
	return &Session{RoomID: roomID, Sender: d.Owner.UserID, outbound: outbound, key: outbound.Key()}
}

// ID is the session's ID.
func (s *Session) ID() id.SessionID { return s.outbound.ID() }

// Message gives the next message of the session as an event of the room: a text of ordinary length.
func (s *Session) Message() json.RawMessage {
	s.written++
	plaintext := rawJSON(object{
		"room_id": s.RoomID.String(), "type": event.EventMessage.Type,
		"content": object{"msgtype": "m.text", "body": fmt.Sprintf("message %d in room %s, of ordinary length for a chat", s.written, s.RoomID)},
	})
	return rawJSON(object{
		"type": event.EventEncrypted.Type, "event_id": fmt.Sprintf("$%s%d", s.ID(), s.written), "room_id": s.RoomID.String(),
		"sender": s.Sender.String(), "origin_server_ts": 1_700_000_000_000 + s.written,
		"content": object{
			"algorithm": string(id.AlgorithmMegolmV1), "session_id": s.ID().String(), "ciphertext": string(Must(s.outbound.Encrypt(plaintext))),
		},
	})
}

// Meet begins an Olm session with the receiver, by one of its one-time keys. What the device sends before it has read an answer is a
// pre-key message.
func (d *Device) Meet(receiver *id.Device, oneTimeKey id.Curve25519) {
	d.olm = Must(d.account.Internal.NewOutboundSession(receiver.IdentityKey, oneTimeKey))
}

// Read decrypts a message of the receiver, given as the content of its event.
func (d *Device) Read(content json.RawMessage) {
	var encrypted event.EncryptedEventContent
	Check(json.Unmarshal(content, &encrypted))
	message := encrypted.OlmCiphertext[d.account.IdentityKey()]
	Must(d.olm.Decrypt(message.Body, message.Type))
}

// ShareKey gives the to-device event by which the device shares a session with the receiver, with its own keys in it.
// https://spec.matrix.org/v1.16/client-server-api/#mroom_key and MSC4147
func (d *Device) ShareKey(receiver *id.Device, s *Session) json.RawMessage {
	payload := rawJSON(object{
		"type": event.ToDeviceRoomKey.Type, "sender": d.Owner.UserID.String(), "recipient": receiver.UserID.String(),
		"keys": object{"ed25519": d.account.SigningKey().String()}, "recipient_keys": object{"ed25519": receiver.SigningKey.String()},
		"sender_device_keys": d.keys,
		"content": object{
			"algorithm": string(id.AlgorithmMegolmV1), "room_id": s.RoomID.String(), "session_id": s.ID().String(), "session_key": s.key,
		},
	})
	messageType, body, err := d.olm.Encrypt(payload)
	Check(err)
	return rawJSON(object{
		"type": event.ToDeviceEncrypted.Type, "sender": d.Owner.UserID.String(),
		"content": object{
			"algorithm": string(id.AlgorithmOlmV1), "sender_key": d.account.IdentityKey().String(),
			"ciphertext": object{receiver.IdentityKey.String(): object{"type": int(messageType), "body": string(body)}},
		},
	})
}
