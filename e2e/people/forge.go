package people

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"

	"maunium.net/go/mautrix/id"
)

// Forgery changes the payload of an Olm message before it is encrypted. The fields are those of [Person.OlmPayload].
type Forgery func(p *Person, payload map[string]any) error

// errNoSuchField says that a forgery does not fit the payload.
var errNoSuchField = errors.New("the payload has no such field")

// Set puts a value where the path leads: Set("!other:localhost", "content", "room_id").
func Set(value any, path ...string) Forgery {
	return func(_ *Person, payload map[string]any) error {
		object, err := objectAt(payload, path[:len(path)-1])
		if err == nil {
			object[path[len(path)-1]] = value
		}
		return err
	}
}

// Remove takes away what the path leads to.
func Remove(path ...string) Forgery {
	return func(_ *Person, payload map[string]any) error {
		object, err := objectAt(payload, path[:len(path)-1])
		if err == nil {
			delete(object, path[len(path)-1])
		}
		return err
	}
}

// OmitDeviceKeys sends what clients sent before MSC4147: nothing that tells whose device it is.
func OmitDeviceKeys() Forgery { return Remove("sender_device_keys") }

// ForgeSelfSigningSignature puts a signature on the device keys that claims to be the account's self-signing key's. It has the
// form of one, but does not verify (seed, step H).
func ForgeSelfSigningSignature(selfSigningKey id.Ed25519) Forgery {
	return func(p *Person, payload map[string]any) error {
		return Set(randomBase64(64), "sender_device_keys", "signatures", p.UserID.String(), "ed25519:"+selfSigningKey.String())(p, payload)
	}
}

// BreakDeviceSignature spoils the device's own signature on its keys.
func BreakDeviceSignature() Forgery {
	return func(p *Person, payload map[string]any) error {
		return Set(randomBase64(64), "sender_device_keys", "signatures", p.UserID.String(), "ed25519:"+p.DeviceID.String())(p, payload)
	}
}

// DeviceKeysOf says that the message comes from a device of another user. The signature is right, and made by this device.
func DeviceKeysOf(userID id.UserID) Forgery {
	return resigned(func(p *Person, keys map[string]any) { keys["user_id"] = userID.String() })
}

// WrongCurve25519 puts another curve25519 key into the device keys. The signature is right.
func WrongCurve25519() Forgery {
	return resigned(func(p *Person, keys map[string]any) {
		keys["keys"].(map[string]any)["curve25519:"+p.DeviceID.String()] = randomBase64(32)
	})
}

// WrongEd25519 puts another ed25519 key into the device keys, so that the signature, by the device's real key, is wrong too.
func WrongEd25519() Forgery {
	return resigned(func(p *Person, keys map[string]any) {
		keys["keys"].(map[string]any)["ed25519:"+p.DeviceID.String()] = randomBase64(32)
	})
}

// resigned changes the device keys in a payload and signs them again with everything that this person can sign with.
func resigned(change func(*Person, map[string]any)) Forgery {
	return func(p *Person, payload map[string]any) error {
		keys, err := objectAt(payload, []string{"sender_device_keys"})
		if err != nil {
			return err
		}
		delete(keys, "signatures")
		change(p, keys)
		signed, err := p.signDeviceKeys(keys)
		payload["sender_device_keys"] = signed
		return err
	}
}

func objectAt(payload map[string]any, path []string) (map[string]any, error) {
	for _, key := range path {
		inner, ok := payload[key].(map[string]any)
		if !ok {
			return nil, fmt.Errorf("%w: %s", errNoSuchField, key)
		}
		payload = inner
	}
	return payload, nil
}

func randomBase64(length int) string {
	raw := make([]byte, length)
	rand.Read(raw) // never fails (Go 1.24)
	return base64.RawStdEncoding.EncodeToString(raw)
}
