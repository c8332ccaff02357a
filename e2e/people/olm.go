package people

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Device is another device, as the homeserver publishes it.
type Device = id.Device

// Devices asks the homeserver for the devices of users, this one left out.
func (p *Person) Devices(ctx context.Context, users ...id.UserID) ([]*Device, error) {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	return p.devices(ctx, users...)
}

func (p *Person) devices(ctx context.Context, users ...id.UserID) ([]*Device, error) {
	found, err := p.machine.FetchKeys(ctx, users, true)
	if err != nil {
		return nil, fmt.Errorf("%s failed to ask for devices of %v: %w", p.UserID, users, err)
	}
	var devices []*Device
	for _, ofUser := range found {
		for _, device := range ofUser {
			if device.IdentityKey != p.SenderKey() {
				devices = append(devices, device)
			}
		}
	}
	return devices, nil
}

// OlmPayload is what an honest client puts into an Olm message for a device, all fields of MSC4147 included.
func (p *Person) OlmPayload(device *Device, eventType string, content map[string]any) (map[string]any, error) {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	return p.olmPayload(device, eventType, content)
}

func (p *Person) olmPayload(device *Device, eventType string, content map[string]any) (map[string]any, error) {
	deviceKeys, err := p.deviceKeys()
	if err != nil {
		return nil, err
	}
	return clone(map[string]any{
		"type":               eventType,
		"content":            content,
		"sender":             p.UserID,
		"sender_device_keys": deviceKeys,
		"keys":               map[string]any{"ed25519": p.SigningKey()},
		"recipient":          device.UserID,
		"recipient_keys":     map[string]any{"ed25519": device.SigningKey},
	})
}

// SendOlm sends an Olm message to every device of a user. The forgeries change each payload before it is encrypted.
func (p *Person) SendOlm(ctx context.Context, to id.UserID, eventType string, content map[string]any, forgeries ...Forgery) error {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	devices, err := p.devices(ctx, to)
	if err != nil {
		return err
	}
	return p.sendOlm(ctx, devices, eventType, content, forgeries...)
}

func (p *Person) sendOlm(ctx context.Context, devices []*Device, eventType string, content map[string]any, forgeries ...Forgery) error {
	messages := make(map[id.UserID]map[id.DeviceID]any)
	for _, device := range devices {
		payload, err := p.olmPayload(device, eventType, content)
		if err != nil {
			return err
		}
		for _, forge := range forgeries {
			if err = forge(p, payload); err != nil {
				return fmt.Errorf("failed to forge: %w", err)
			}
		}
		plaintext, err := json.Marshal(payload)
		if err != nil {
			return fmt.Errorf("failed to write an Olm payload: %w", err)
		}
		encrypted, err := p.encryptOlm(ctx, device, plaintext)
		if err != nil {
			return err
		}
		if messages[device.UserID] == nil {
			messages[device.UserID] = make(map[id.DeviceID]any)
		}
		messages[device.UserID][device.DeviceID] = encrypted
	}
	return p.sendToDevices(ctx, event.ToDeviceEncrypted.Type, messages)
}

// EncryptOlm encrypts any bytes for a device, and gives the content of the m.room.encrypted event that carries them.
func (p *Person) EncryptOlm(ctx context.Context, device *Device, plaintext []byte) (map[string]any, error) {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	return p.encryptOlm(ctx, device, plaintext)
}

func (p *Person) encryptOlm(ctx context.Context, device *Device, plaintext []byte) (map[string]any, error) {
	session, err := p.olmSession(ctx, device)
	if err != nil {
		return nil, err
	}
	messageType, body, err := session.Encrypt(plaintext)
	if err != nil {
		return nil, fmt.Errorf("failed to encrypt for %s: %w", device.DeviceID, err)
	}
	return map[string]any{
		"algorithm":  id.AlgorithmOlmV1,
		"sender_key": p.SenderKey(),
		"ciphertext": map[string]any{device.IdentityKey.String(): map[string]any{"type": messageType, "body": string(body)}},
	}, nil
}

// olmSession gives the Olm session with a device, begun with a one-time key of the device if there is none.
func (p *Person) olmSession(ctx context.Context, device *Device) (*crypto.OlmSession, error) {
	session, err := p.machine.CryptoStore.GetLatestSession(ctx, device.IdentityKey)
	if err != nil || session != nil {
		return session, err
	}
	resp, err := p.Client.ClaimKeys(ctx, &mautrix.ReqClaimKeys{
		OneTimeKeys: mautrix.OneTimeKeysRequest{device.UserID: {device.DeviceID: id.KeyAlgorithmSignedCurve25519}},
		Timeout:     10_000,
	})
	if err != nil {
		return nil, fmt.Errorf("%s failed to claim a one-time key of %s: %w", p.UserID, device.DeviceID, err)
	}
	for _, oneTimeKey := range resp.OneTimeKeys[device.UserID][device.DeviceID] {
		valid, err := signatures.VerifySignatureJSON(oneTimeKey.RawData, device.UserID, device.DeviceID.String(), device.SigningKey)
		if err != nil || !valid {
			return nil, fmt.Errorf("the one-time key of %s %s is not signed by it: %w", device.UserID, device.DeviceID, err)
		}
		internal, err := p.machine.GetAccount().Internal.NewOutboundSession(device.IdentityKey, oneTimeKey.Key)
		if err != nil {
			return nil, fmt.Errorf("failed to begin an Olm session with %s: %w", device.DeviceID, err)
		}
		now := crypto.TimeMixin{CreationTime: time.Now(), LastEncryptedTime: time.Now(), LastDecryptedTime: time.Now()}
		session = &crypto.OlmSession{Internal: internal, ExpirationMixin: crypto.ExpirationMixin{TimeMixin: now}}
		return session, p.machine.CryptoStore.AddSession(ctx, device.IdentityKey, session)
	}
	return nil, fmt.Errorf("%s has no one-time key left for %s", device.UserID, device.DeviceID)
}

// SendToDevice sends a to-device event with any content to one device, in the clear. The content need not be an object.
func (p *Person) SendToDevice(ctx context.Context, eventType string, to id.UserID, device id.DeviceID, content any) error {
	return p.sendToDevices(ctx, eventType, map[id.UserID]map[id.DeviceID]any{to: {device: content}})
}

func (p *Person) sendToDevices(ctx context.Context, eventType string, messages map[id.UserID]map[id.DeviceID]any) error {
	if len(messages) == 0 {
		return nil
	}
	url := p.Client.BuildClientURL("v3", "sendToDevice", eventType, p.Client.TxnID())
	if _, err := p.Client.MakeRequest(ctx, "PUT", url, map[string]any{"messages": messages}, nil); err != nil {
		return fmt.Errorf("%s failed to send %s to devices: %w", p.UserID, eventType, err)
	}
	return nil
}
