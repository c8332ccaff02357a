package stock

import (
	"context"
	"fmt"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// PickleKey encrypts the keys in the database.
const PickleKey = "a pickle key"

// Send sends a text into an encrypted room, with a session of its own.
func (c *Client) Send(ctx context.Context, room id.RoomID, text string) error {
	_, err := c.client.SendMessageEvent(ctx, room, event.EventMessage, &event.MessageEventContent{MsgType: event.MsgText, Body: text})
	return err
}

// OwnSession gives the session with which [Client.Send] sends into a room.
func (c *Client) OwnSession(ctx context.Context, room id.RoomID) (id.SessionID, error) {
	session, err := c.helper.Machine().CryptoStore.GetOutboundGroupSession(ctx, room)
	if err != nil || session == nil {
		return "", fmt.Errorf("mautrix has no session of its own for %s: %w", room, err)
	}
	return session.ID(), nil
}

// ImportKeys imports a key export.
func (c *Client) ImportKeys(ctx context.Context, passphrase string, file []byte) error {
	_, _, err := c.helper.Machine().ImportKeys(ctx, passphrase, file)
	return err
}
