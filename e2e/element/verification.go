package element

import (
	"context"
	"encoding/base64"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Verification is an interactive verification as the client sees it.
type Verification struct {
	ID       id.VerificationTransactionID `json:"transaction_id"`
	UserID   id.UserID                    `json:"user_id"`
	DeviceID id.DeviceID                  `json:"device_id"`
	// Phase is requested, ready, started, cancelled or done.
	Phase  string                   `json:"phase"`
	Method event.VerificationMethod `json:"method"`
	// CancelCode and CancelledBy are empty unless it was cancelled.
	CancelCode  event.VerificationCancelCode `json:"cancel_code"`
	CancelledBy id.UserID                    `json:"cancelled_by"`
}

// Emojis are what the client shows for comparison: seven emojis, with their names in English, and three numbers.
type Emojis struct {
	Emojis  []string `json:"emojis"`
	Names   []string `json:"names"`
	Numbers []int    `json:"numbers"`
}

// RequestVerification asks a user to verify, in a room.
func (c *Client) RequestVerification(ctx context.Context, user id.UserID, room id.RoomID) (id.VerificationTransactionID, error) {
	return c.verification(ctx, params{"user": user, "room": room})
}

// RequestDeviceVerification asks a device of a user to verify, between the devices.
func (c *Client) RequestDeviceVerification(ctx context.Context, user id.UserID, device id.DeviceID) (id.VerificationTransactionID, error) {
	return c.verification(ctx, params{"user": user, "device": device})
}

func (c *Client) verification(ctx context.Context, parameters params) (id.VerificationTransactionID, error) {
	var result Verification
	err := c.call(ctx, "requestVerification", parameters, &result)
	return result.ID, err
}

// WaitForVerification waits until a user asks the client to verify, or a verification with that user is under way.
func (c *Client) WaitForVerification(ctx context.Context, user id.UserID) (Verification, error) {
	var result Verification
	err := c.call(ctx, "waitForVerification", params{"user": user}, &result)
	return result, err
}

// WaitForPhase waits until a verification is in one of the phases, or has ended, and tells how it is.
func (c *Client) WaitForPhase(ctx context.Context, verification id.VerificationTransactionID, phases ...string) (Verification, error) {
	var result Verification
	err := c.call(ctx, "waitForPhase", params{"verification": verification, "phases": phases}, &result)
	return result, err
}

// AcceptVerification accepts what another has asked for.
func (c *Client) AcceptVerification(ctx context.Context, verification id.VerificationTransactionID) error {
	return c.call(ctx, "acceptVerification", params{"verification": verification}, nil)
}

// StartSAS chooses to compare emojis.
func (c *Client) StartSAS(ctx context.Context, verification id.VerificationTransactionID) error {
	return c.call(ctx, "startSAS", params{"verification": verification}, nil)
}

// Emojis waits until the client shows emojis, accepting that they are compared if the other side has chosen so.
func (c *Client) Emojis(ctx context.Context, verification id.VerificationTransactionID) (Emojis, error) {
	var result Emojis
	err := c.call(ctx, "emojis", params{"verification": verification}, &result)
	return result, err
}

// ConfirmEmojis says that the other side shows the same.
func (c *Client) ConfirmEmojis(ctx context.Context, verification id.VerificationTransactionID) error {
	return c.call(ctx, "confirmEmojis", params{"verification": verification}, nil)
}

// DenyEmojis says that the other side shows something else.
func (c *Client) DenyEmojis(ctx context.Context, verification id.VerificationTransactionID) error {
	return c.call(ctx, "denyEmojis", params{"verification": verification}, nil)
}

// CancelVerification ends it.
func (c *Client) CancelVerification(ctx context.Context, verification id.VerificationTransactionID) error {
	return c.call(ctx, "cancelVerification", params{"verification": verification}, nil)
}

// ScanQRCode gives the client what its camera would have read from the other side's QR code.
func (c *Client) ScanQRCode(ctx context.Context, verification id.VerificationTransactionID, data []byte) error {
	return c.call(ctx, "scanQRCode", params{"verification": verification, "data": base64.StdEncoding.EncodeToString(data)}, nil)
}

// VerificationStatus says whether the client shows a user as verified, now and at some time before.
func (c *Client) VerificationStatus(ctx context.Context, user id.UserID) (verified, wasVerified bool, err error) {
	var result struct {
		Verified    bool `json:"verified"`
		WasVerified bool `json:"was_verified"`
	}
	err = c.call(ctx, "verificationStatus", params{"user": user}, &result)
	return result.Verified, result.WasVerified, err
}

// WaitVerified waits until the client shows a user as verified. It notes its own signature some time after a verification is done.
func (c *Client) WaitVerified(ctx context.Context, user id.UserID) error {
	return c.call(ctx, "waitVerified", params{"user": user}, nil)
}

// SetVerificationMethods says what the client can do in verifications from now on. By default it can do everything.
func (c *Client) SetVerificationMethods(ctx context.Context, methods ...event.VerificationMethod) error {
	return c.call(ctx, "setVerificationMethods", params{"methods": methods}, nil)
}

// WaitForMessage waits until a member of a room has sent a message of a type that the client can read, and gives the first.
func (c *Client) WaitForMessage(ctx context.Context, room id.RoomID, sender id.UserID, msgType event.MessageType) (*Event, error) {
	result := new(Event)
	if err := c.call(ctx, "waitForMessage", params{"room": room, "sender": sender, "msgtype": msgType}, result); err != nil {
		return nil, err
	}
	return result, nil
}
