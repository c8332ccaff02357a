package people

import (
	"context"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Verification is a verification by emojis in an encrypted room, every step of which is made by hand, so that it can be made wrong. The person
// is the one who asks, and who chooses to compare emojis.
// https://spec.matrix.org/v1.16/client-server-api/#short-authentication-string-sas-verification
type Verification struct {
	ID   id.VerificationTransactionID
	Room id.RoomID
	// With is the other side, and WithDevice its device once it has accepted.
	With       id.UserID
	WithDevice id.DeviceID

	person *Person
	// secret is this side's key for the agreement, and theirs the other side's.
	secret *ecdh.PrivateKey
	theirs *ecdh.PublicKey
}

// verificationPrefix is what the types of all events of verifications begin with.
const verificationPrefix = "m.key.verification."

// VerificationRequest is the content of a request to verify, made from this device.
func (p *Person) VerificationRequest(to id.UserID) map[string]any {
	return map[string]any{
		"msgtype": event.MsgVerificationRequest, "body": "may I verify you?", "from_device": p.DeviceID, "to": to,
		"methods": []event.VerificationMethod{event.VerificationMethodSAS},
	}
}

// RequestVerification asks a user to verify, encrypted.
func (p *Person) RequestVerification(ctx context.Context, roomID id.RoomID, with id.UserID) (*Verification, error) {
	eventID, err := p.SendContent(ctx, roomID, p.VerificationRequest(with))
	if err != nil {
		return nil, err
	}
	secret, err := ecdh.X25519().GenerateKey(rand.Reader)
	return &Verification{ID: id.VerificationTransactionID(eventID), Room: roomID, With: with, person: p, secret: secret}, err
}

// Send sends an event of the verification, encrypted. Type is the part after "m.key.verification.".
func (v *Verification) Send(ctx context.Context, eventType string, content map[string]any) error {
	return v.SendAs(ctx, v.person, eventType, content)
}

// SendAs has somebody send an event of the verification.
func (v *Verification) SendAs(ctx context.Context, sender *Person, eventType string, content map[string]any) error {
	content["m.relates_to"] = map[string]any{"rel_type": event.RelReference, "event_id": v.ID}
	_, err := sender.sendEncrypted(ctx, v.Room, event.Type{Type: verificationPrefix + eventType, Class: event.MessageEventType}, content)
	return err
}

// Wait waits for an event of the other side's, and gives its content.
func (v *Verification) Wait(ctx context.Context, eventType string) (map[string]any, error) {
	return v.person.WaitForVerificationEvent(ctx, v.With, v.ID, eventType)
}

// WaitForVerificationEvent waits for an event of a verification, in a room or to this device, and gives its content.
func (p *Person) WaitForVerificationEvent(ctx context.Context, sender id.UserID, verification id.VerificationTransactionID, eventType string) (map[string]any, error) {
	var found map[string]any
	err := p.wait(ctx, fmt.Sprintf("%s of verification %s", eventType, verification), func(s *seen) bool {
		for _, evt := range s.verification {
			if content := verificationContent(evt, sender, verification, eventType); content != nil {
				found = content
				return true
			}
		}
		return false
	})
	return found, err
}

// verificationContent gives the content of an event if it is that one.
func verificationContent(evt *event.Event, sender id.UserID, verification id.VerificationTransactionID, eventType string) map[string]any {
	var content map[string]any
	if evt.Sender != sender || evt.Type.Type != verificationPrefix+eventType || json.Unmarshal(evt.Content.VeryRaw, &content) != nil {
		return nil
	}
	relation, _ := content["m.relates_to"].(map[string]any)
	if related, ok := evt.Content.Parsed.(event.Relatable); ok && relation == nil {
		relation = map[string]any{"event_id": related.OptionalGetRelatesTo().GetReferenceID().String()}
	}
	if content["transaction_id"] != verification.String() && relation["event_id"] != verification.String() {
		return nil
	}
	return content
}

// takeVerification remembers the events of verifications.
func (s *seen) takeVerification(events []*event.Event) {
	for _, evt := range events {
		if strings.HasPrefix(evt.Type.Type, verificationPrefix) {
			s.verification = append(s.verification, evt)
		}
	}
}

// Start waits until the other side has accepted, and chooses to compare emojis.
func (v *Verification) Start(ctx context.Context) error {
	ready, err := v.Wait(ctx, "ready")
	if err != nil {
		return err
	}
	device, _ := ready["from_device"].(string)
	v.WithDevice = id.DeviceID(device)
	return v.Send(ctx, "start", v.StartContent())
}

// StartContent is what chooses to compare emojis.
func (v *Verification) StartContent() map[string]any {
	return map[string]any{
		"from_device": v.person.DeviceID, "method": event.VerificationMethodSAS,
		"hashes": []string{"sha256"}, "key_agreement_protocols": []string{"curve25519-hkdf-sha256"},
		"message_authentication_codes": []string{"hkdf-hmac-sha256.v2"}, "short_authentication_string": []string{"decimal", "emoji"},
	}
}

// ExchangeKeys goes on after [Verification.Start] until both sides show emojis.
func (v *Verification) ExchangeKeys(ctx context.Context) error {
	if _, err := v.Wait(ctx, "accept"); err != nil {
		return err
	}
	if err := v.Send(ctx, "key", map[string]any{"key": base64.RawStdEncoding.EncodeToString(v.secret.PublicKey().Bytes())}); err != nil {
		return err
	}
	answer, err := v.Wait(ctx, "key")
	if err != nil {
		return err
	}
	text, _ := answer["key"].(string)
	raw, err := base64.RawStdEncoding.DecodeString(text)
	if err != nil {
		return fmt.Errorf("the other side's key is none: %w", err)
	}
	v.theirs, err = ecdh.X25519().NewPublicKey(raw)
	return err
}

// Reach makes all steps until both sides show emojis.
func (v *Verification) Reach(ctx context.Context) error {
	return errors.Join(v.Start(ctx), v.ExchangeKeys(ctx))
}

// Vouch is what the person's confirmation says: these keys, by their IDs, are right.
func (v *Verification) Vouch(keys map[id.KeyID]string) (map[string]any, error) {
	macs := make(map[string]string)
	var names []string
	for keyID, key := range keys {
		mac, err := v.mac(keyID.String(), key)
		if err != nil {
			return nil, err
		}
		macs[keyID.String()] = mac
		names = append(names, keyID.String())
	}
	slices.Sort(names)
	all, err := v.mac("KEY_IDS", strings.Join(names, ","))
	return map[string]any{"mac": macs, "keys": all}, err
}

// OwnKeys are the keys that an honest person vouches for: the device's, and the account's master key.
func (v *Verification) OwnKeys(masterKey id.Ed25519) map[id.KeyID]string {
	return map[id.KeyID]string{
		id.NewKeyID(id.KeyAlgorithmEd25519, v.person.DeviceID.String()): v.person.SigningKey().String(),
		id.NewKeyID(id.KeyAlgorithmEd25519, masterKey.String()):         masterKey.String(),
	}
}

// mac authenticates a text to the other side. https://spec.matrix.org/v1.16/client-server-api/#mac-calculation
func (v *Verification) mac(name, text string) (string, error) {
	shared, err := v.secret.ECDH(v.theirs)
	if err != nil {
		return "", err
	}
	info := strings.Join([]string{
		"MATRIX_KEY_VERIFICATION_MAC", v.person.UserID.String(), v.person.DeviceID.String(), v.With.String(), v.WithDevice.String(), v.ID.String(), name,
	}, "")
	key, err := hkdf.Key(sha256.New, shared, nil, info, sha256.Size)
	if err != nil {
		return "", err
	}
	hash := hmac.New(sha256.New, key)
	hash.Write([]byte(text))
	return base64.RawStdEncoding.EncodeToString(hash.Sum(nil)), nil
}

// RequestDeviceVerification asks a device to verify, between the devices, in the clear as clients do it.
func (p *Person) RequestDeviceVerification(ctx context.Context, to id.UserID, device id.DeviceID, verification id.VerificationTransactionID) error {
	return p.SendVerificationToDevice(ctx, to, device, "request", map[string]any{
		"transaction_id": verification, "from_device": p.DeviceID, "methods": []event.VerificationMethod{event.VerificationMethodSAS},
		"timestamp": time.Now().UnixMilli(),
	})
}

// SendVerificationToDevice sends an event of a verification to a device.
func (p *Person) SendVerificationToDevice(ctx context.Context, to id.UserID, device id.DeviceID, eventType string, content map[string]any) error {
	return p.sendToDevices(ctx, verificationPrefix+eventType, map[id.UserID]map[id.DeviceID]any{to: {device: content}})
}

// SendEncryptedReaction puts an emoji to an event, encrypted as no client does it.
func (p *Person) SendEncryptedReaction(ctx context.Context, roomID id.RoomID, to id.EventID, key string) (id.EventID, error) {
	return p.sendEncrypted(ctx, roomID, event.EventReaction, map[string]any{
		"m.relates_to": map[string]any{"rel_type": event.RelAnnotation, "event_id": to, "key": key},
	})
}

// WaitForWords waits until as many of a bot's messages, notices and answers, are as the caller wants them.
func (p *Person) WaitForWords(ctx context.Context, times int, wanted func(body string) bool) error {
	return p.wait(ctx, "words of a bot", func(s *seen) bool {
		found := 0
		for _, notice := range s.notices {
			if wanted(notice.Body) {
				found++
			}
		}
		for _, answer := range s.answer {
			if wanted(answer.Body) {
				found++
			}
		}
		return found >= times
	})
}
