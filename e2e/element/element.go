// Package element provides Matrix users whose client is Element's own crypto (matrix-js-sdk with matrix-sdk-crypto, on Node.js):
// members of rooms that behave as most people's clients do, and the reference for what a room sees of the bot.
//
// A [Client] is one device, in a process of its own (driver.mjs).
//
//	alice, err := element.Start(ctx, projectRoot, server.URL, "alice", password)
//	…
//	defer alice.Close()
//	masterKey, err := alice.BootstrapCrossSigning(ctx)
//	room, err := alice.CreateRoom(ctx, element.Room{Encrypted: true, Invite: []id.UserID{bot}})
//	err = alice.WaitForMember(ctx, room, bot)
//	eventID, err := alice.Send(ctx, room, "hello")
//	reply, err := alice.WaitForReply(ctx, eventID)
package element

import (
	"context"
	"encoding/json"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Room says which room [Client.CreateRoom] is to make.
type Room struct {
	Encrypted bool
	Invite    []id.UserID
	Name      string
}

// Shield is what Element shows beside an event. The zero value is that of an event that did not come encrypted.
type Shield struct {
	// Colour is none, grey or red.
	Colour string `json:"colour"`
	// Reason is the name that matrix-js-sdk has for it in lower case (unverified_identity, unsigned_device, unknown_device,
	// authenticity_not_guaranteed, verification_violation, mismatched_sender); empty when there is nothing to say.
	Reason string `json:"reason"`
}

// Shields are the two verdicts that Element's crypto has on one event.
type Shields struct {
	// Lax is the one that Element shows.
	Lax Shield `json:"lax"`
	// Strict is red for everything that is not verified. Its reason is unverified_identity where the lax one says
	// unsigned_device or verification_violation.
	Strict Shield `json:"strict"`
}

// Event is an event as the client sees it, decrypted where it could be. Its content is the one that was sent: edits are events
// of their own.
type Event struct {
	EventID id.EventID      `json:"event_id"`
	RoomID  id.RoomID       `json:"room_id"`
	Sender  id.UserID       `json:"sender"`
	Type    string          `json:"type"`
	Content json.RawMessage `json:"content"`
	// Encrypted says that it came encrypted.
	Encrypted bool `json:"encrypted"`
	// Failure is matrix-js-sdk's code for why it cannot be decrypted, as MEGOLM_UNKNOWN_INBOUND_SESSION_ID; empty when it can.
	Failure string `json:"failure"`
	// Shield is the lax shield.
	Shield Shield `json:"encryption_info"`
}

// UserID is the user's ID.
func (c *Client) UserID() id.UserID { return c.session.UserID }

// DeviceID is the ID of the device that this client is.
func (c *Client) DeviceID() id.DeviceID { return c.session.DeviceID }

// AccessToken is the device's access token, for requests that have no method here.
func (c *Client) AccessToken() string { return c.session.AccessToken }

// BootstrapCrossSigning gives the account a cross-signing identity, signs this device, and returns the public master key.
func (c *Client) BootstrapCrossSigning(ctx context.Context) (id.Ed25519, error) {
	return c.masterKey(ctx, "bootstrapCrossSigning", params{"password": c.password})
}

// ResetIdentity replaces the account's cross-signing identity by a new one, as somebody does who has lost all keys, signs this
// device, and returns the new public master key.
func (c *Client) ResetIdentity(ctx context.Context) (id.Ed25519, error) {
	return c.masterKey(ctx, "resetIdentity", params{"password": c.password})
}

// SetUpRecovery gives the account a cross-signing identity and a secret storage, and a key backup if it is to have one, as Element does
// for a new account. It returns the public master key and the recovery key.
func (c *Client) SetUpRecovery(ctx context.Context, backup bool) (masterKey id.Ed25519, recoveryKey string, err error) {
	var result struct {
		MasterKey   id.Ed25519 `json:"master_key"`
		RecoveryKey string     `json:"recovery_key"`
	}
	err = c.call(ctx, "setUpRecovery", params{"password": c.password, "backup": backup}, &result)
	return result.MasterKey, result.RecoveryKey, err
}

// UseRecovery takes the identity that the account has, and the key of its key backup, out of the secret storage, as Element does for a new
// device. It returns the public master key.
func (c *Client) UseRecovery(ctx context.Context, recoveryKey string) (id.Ed25519, error) {
	return c.masterKey(ctx, "useRecovery", params{"password": c.password, "recovery_key": recoveryKey})
}

// Invite invites a user to a room. With shareHistory it gives the keys of earlier messages (MSC4268), those that may be shared.
func (c *Client) Invite(ctx context.Context, room id.RoomID, user id.UserID, shareHistory bool) error {
	return c.call(ctx, "invite", params{"room": room, "user": user, "share_history": shareHistory}, nil)
}

// MasterKey asks the homeserver for the public master key of a user.
func (c *Client) MasterKey(ctx context.Context, user id.UserID) (id.Ed25519, error) {
	return c.masterKey(ctx, "masterKey", params{"user": user})
}

// Learn has the client ask the homeserver for all keys of a user, and returns the master key; empty when the user has none.
func (c *Client) Learn(ctx context.Context, user id.UserID) (id.Ed25519, error) {
	return c.masterKey(ctx, "learn", params{"user": user})
}

// NeedsApproval says whether the client holds that its user should look at a change of another's identity.
func (c *Client) NeedsApproval(ctx context.Context, user id.UserID) (bool, error) {
	var result struct {
		NeedsApproval bool `json:"needs_approval"`
	}
	err := c.call(ctx, "needsApproval", params{"user": user}, &result)
	return result.NeedsApproval, err
}

// WithdrawVerification takes back the demand that a user be verified. The signature that was made stays.
func (c *Client) WithdrawVerification(ctx context.Context, user id.UserID) error {
	return c.call(ctx, "withdrawVerification", params{"user": user}, nil)
}

// VerifyUser signs the master key that a user has now, without asking anybody, and returns it. Both need a cross-signing identity.
func (c *Client) VerifyUser(ctx context.Context, user id.UserID) (id.Ed25519, error) {
	return c.masterKey(ctx, "verifyUser", params{"user": user})
}

func (c *Client) masterKey(ctx context.Context, method string, parameters params) (id.Ed25519, error) {
	var result struct {
		MasterKey id.Ed25519 `json:"master_key"`
	}
	err := c.call(ctx, method, parameters, &result)
	return result.MasterKey, err
}

// CreateRoom makes a private room, and returns when the client knows it, and that it is encrypted if so.
func (c *Client) CreateRoom(ctx context.Context, room Room) (id.RoomID, error) {
	var result struct {
		RoomID id.RoomID `json:"room_id"`
	}
	invite := append([]id.UserID{}, room.Invite...)
	err := c.call(ctx, "createRoom", params{"encrypted": room.Encrypted, "invite": invite, "name": room.Name}, &result)
	return result.RoomID, err
}

// Join joins a room, and returns when the client knows it, and that it is encrypted if so.
func (c *Client) Join(ctx context.Context, room id.RoomID) error {
	return c.call(ctx, "join", params{"room": room}, nil)
}

// JoinInvited is Join that waits for the invitation, so that the keys of earlier messages that come with it (MSC4268) are taken.
func (c *Client) JoinInvited(ctx context.Context, room id.RoomID) error {
	return c.call(ctx, "join", params{"room": room, "invited": true}, nil)
}

// WaitForEncryption waits until the client knows that the room is encrypted.
func (c *Client) WaitForEncryption(ctx context.Context, room id.RoomID) error {
	return c.call(ctx, "waitForEncryption", params{"room": room}, nil)
}

// WaitForMember waits until the client knows that the user has joined the room. Who is not known to be there, and was not
// invited, gets no keys.
func (c *Client) WaitForMember(ctx context.Context, room id.RoomID, user id.UserID) error {
	return c.call(ctx, "waitForMember", params{"room": room, "user": user}, nil)
}

// Send sends a text, encrypted when the room is, and returns when the homeserver has it.
func (c *Client) Send(ctx context.Context, room id.RoomID, body string) (id.EventID, error) {
	return c.send(ctx, "send", params{"room": room, "body": body})
}

// SendInThread sends a text as part of the thread that has the given root.
func (c *Client) SendInThread(ctx context.Context, room id.RoomID, thread id.EventID, body string) (id.EventID, error) {
	return c.send(ctx, "send", params{"room": room, "body": body, "thread": thread})
}

// SendRaw sends any event, encrypted when the room is.
func (c *Client) SendRaw(ctx context.Context, room id.RoomID, eventType event.Type, content any) (id.EventID, error) {
	return c.send(ctx, "sendRaw", params{"room": room, "type": eventType.Type, "content": content})
}

func (c *Client) send(ctx context.Context, method string, parameters params) (id.EventID, error) {
	var result struct {
		EventID id.EventID `json:"event_id"`
	}
	err := c.call(ctx, method, parameters, &result)
	return result.EventID, err
}

// ForceDiscardSession makes the next event in the room the first of a new Megolm session.
func (c *Client) ForceDiscardSession(ctx context.Context, room id.RoomID) error {
	return c.call(ctx, "forceDiscardSession", params{"room": room}, nil)
}

// SetBlacklistUnverified says whether keys of new Megolm sessions are withheld (m.unverified) from devices that are not verified.
func (c *Client) SetBlacklistUnverified(ctx context.Context, value bool) error {
	return c.call(ctx, "setBlacklistUnverified", params{"value": value}, nil)
}

// Events gives what the client has seen of a room, in that order, its own events included.
func (c *Client) Events(ctx context.Context, room id.RoomID) ([]Event, error) {
	var events []Event
	err := c.call(ctx, "events", params{"room": room}, &events)
	return events, err
}

// WaitForEvent waits until an event has come and, if it was encrypted, could be decrypted.
func (c *Client) WaitForEvent(ctx context.Context, eventID id.EventID) (*Event, error) {
	return c.waitFor(ctx, "waitForEvent", eventID)
}

// WaitForUndecryptable waits until the client has failed to decrypt an event.
func (c *Client) WaitForUndecryptable(ctx context.Context, eventID id.EventID) (*Event, error) {
	return c.waitFor(ctx, "waitForUndecryptable", eventID)
}

// WaitForReply waits for the bot's answer to an event: one that the client can read, and whose annotation names the event.
func (c *Client) WaitForReply(ctx context.Context, eventID id.EventID) (*Event, error) {
	return c.waitFor(ctx, "waitForReply", eventID)
}

func (c *Client) waitFor(ctx context.Context, method string, eventID id.EventID) (*Event, error) {
	result := new(Event)
	if err := c.call(ctx, method, params{"event_id": eventID}, result); err != nil {
		return nil, err
	}
	return result, nil
}

// Shield waits until the client can read an event, and gives its shields as they are now.
func (c *Client) Shield(ctx context.Context, eventID id.EventID) (Shields, error) {
	var result Shields
	err := c.call(ctx, "shield", params{"event_id": eventID}, &result)
	return result, err
}

// View is how the client sees an event now.
type View struct {
	Shields
	// Failure is as in [Event]; there are no shields then.
	Failure string `json:"failure"`
}

// Look waits until an event has come, and tells how the client sees it now, whether or not it can be decrypted.
func (c *Client) Look(ctx context.Context, eventID id.EventID) (View, error) {
	var view View
	err := c.call(ctx, "look", params{"event_id": eventID}, &view)
	return view, err
}

// Logout deletes the device and its keys from the homeserver, and closes the client.
func (c *Client) Logout(ctx context.Context) error {
	if err := c.call(ctx, "logout", params{}, nil); err != nil {
		return err
	}
	return c.Close()
}
