package people

import (
	"context"
	"encoding/json"
	"fmt"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// BootstrapCrossSigning makes a cross-signing identity for the account, publishes it and signs this device with it.
// It returns the master key, unpadded base64.
func (p *Person) BootstrapCrossSigning(ctx context.Context) (id.Ed25519, error) {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	keys, err := p.machine.GenerateCrossSigningKeys()
	if err != nil {
		return "", err
	}
	if err = p.machine.PublishCrossSigningKeys(ctx, keys, p.authorise); err != nil {
		return "", fmt.Errorf("%s failed to publish cross-signing keys: %w", p.UserID, err)
	}
	if err = p.machine.SignOwnDevice(ctx, p.machine.OwnIdentity()); err != nil {
		return "", fmt.Errorf("%s failed to sign the own device: %w", p.UserID, err)
	}
	return keys.MasterKey.PublicKey(), nil
}

// ResetIdentity replaces the account's cross-signing identity by a new one, as somebody does who lost the recovery key, or
// who took the account over. It returns the new master key.
func (p *Person) ResetIdentity(ctx context.Context) (id.Ed25519, error) {
	return p.BootstrapCrossSigning(ctx)
}

// authorise answers the homeserver's question for the password (user-interactive authentication).
func (p *Person) authorise(challenge *mautrix.RespUserInteractive) any {
	return &mautrix.ReqUIAuthLogin{
		BaseAuthData: mautrix.BaseAuthData{Type: mautrix.AuthTypePassword, Session: challenge.Session},
		User:         p.UserID.String(),
		Password:     p.password,
	}
}

// SelfSigningKey is the public self-signing key of the account, unpadded base64; empty when this device made none.
func (p *Person) SelfSigningKey() id.Ed25519 {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	return p.selfSigningKey()
}

func (p *Person) selfSigningKey() id.Ed25519 {
	if p.machine.CrossSigningKeys == nil {
		return ""
	}
	return p.machine.CrossSigningKeys.SelfSigningKey.PublicKey()
}

// deviceKeys makes this device's keys object with its signatures, as a client embeds it into Olm messages (MSC4147): signed by the
// device, and by the account's self-signing key where this device has it.
func (p *Person) deviceKeys() (map[string]any, error) {
	keys := map[string]any{
		"user_id":    p.UserID.String(),
		"device_id":  p.DeviceID.String(),
		"algorithms": []string{string(id.AlgorithmMegolmV1), string(id.AlgorithmOlmV1)},
		"keys": map[string]any{
			"curve25519:" + p.DeviceID.String(): p.SenderKey().String(),
			"ed25519:" + p.DeviceID.String():    p.SigningKey().String(),
		},
	}
	return p.signDeviceKeys(keys)
}

// signDeviceKeys gives the keys object with the device's signature, and that of the self-signing key if there is one.
func (p *Person) signDeviceKeys(keys map[string]any) (map[string]any, error) {
	signature, err := p.machine.GetAccount().SignJSON(keys)
	if err != nil {
		return nil, fmt.Errorf("failed to sign device keys: %w", err)
	}
	signatures := map[string]any{"ed25519:" + p.DeviceID.String(): signature}
	if p.machine.CrossSigningKeys != nil {
		if signature, err = p.machine.CrossSigningKeys.SelfSigningKey.SignJSON(keys); err != nil {
			return nil, fmt.Errorf("failed to cross-sign device keys: %w", err)
		}
		signatures["ed25519:"+p.selfSigningKey().String()] = signature
	}
	signed, err := clone(keys)
	if err != nil {
		return nil, err
	}
	signed["signatures"] = map[string]any{p.UserID.String(): signatures}
	return signed, nil
}

// clone copies a JSON object deeply.
func clone(object map[string]any) (copied map[string]any, err error) {
	raw, err := json.Marshal(object)
	if err != nil {
		return nil, fmt.Errorf("failed to copy a JSON object: %w", err)
	}
	return copied, json.Unmarshal(raw, &copied)
}
