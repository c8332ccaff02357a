package people

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/crypto/signatures"
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

// RotateSelfSigningKey replaces the account's self-signing key by a new one that the same master key signs. With resign this device is
// signed with it; without, nothing is left that vouches for the device, and it can no longer sign itself.
func (p *Person) RotateSelfSigningKey(ctx context.Context, resign bool) error {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	fresh, err := olm.NewPKSigning()
	if err != nil {
		return fmt.Errorf("failed to make a self-signing key: %w", err)
	}
	if err = p.publishSelfSigningKey(ctx, fresh.PublicKey()); err != nil {
		return fmt.Errorf("%s failed to publish a self-signing key: %w", p.UserID, err)
	}
	if !resign {
		p.machine.CrossSigningKeys = nil
		return nil
	}
	p.machine.CrossSigningKeys.SelfSigningKey = fresh
	if err = p.machine.SignOwnDevice(ctx, p.machine.OwnIdentity()); err != nil {
		return fmt.Errorf("%s failed to sign the own device: %w", p.UserID, err)
	}
	return nil
}

// publishSelfSigningKey publishes that key alone: mautrix would publish the master key with it, and Synapse fails when it has that already.
func (p *Person) publishSelfSigningKey(ctx context.Context, key id.Ed25519) error {
	object := mautrix.CrossSigningKeys{
		UserID: p.UserID,
		Usage:  []id.CrossSigningUsage{id.XSUsageSelfSigning},
		Keys:   map[id.KeyID]id.Ed25519{id.NewKeyID(id.KeyAlgorithmEd25519, key.String()): key},
	}
	masterKey := p.machine.CrossSigningKeys.MasterKey
	signature, err := masterKey.SignJSON(object)
	if err != nil {
		return err
	}
	object.Signatures = signatures.NewSingleSignature(p.UserID, id.KeyAlgorithmEd25519, masterKey.PublicKey().String(), signature)
	body := map[string]any{"self_signing_key": object}
	url := p.Client.BuildClientURL("v3", "keys", "device_signing", "upload")
	answer, err := p.Client.MakeRequest(ctx, http.MethodPost, url, body, nil)
	var refused mautrix.HTTPError
	if !errors.As(err, &refused) || !refused.IsStatus(http.StatusUnauthorized) {
		return err
	}
	var challenge mautrix.RespUserInteractive
	if err = json.Unmarshal(answer, &challenge); err != nil {
		return fmt.Errorf("failed to read the question for the password: %w", err)
	}
	body["auth"] = p.authorise(&challenge)
	_, err = p.Client.MakeRequest(ctx, http.MethodPost, url, body, nil)
	return err
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
