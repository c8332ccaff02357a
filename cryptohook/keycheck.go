package cryptohook

import (
	"context"
	"encoding/json"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// What a /keys/query answer has of a user is checked before the transaction that stores it: signatures take most of the time, and depend on
// nothing but what they are of. They are checked on all processors.

// publishedUser is what a /keys/query answer has of a user, checked.
type publishedUser struct {
	userID  id.UserID
	devices []*publishedDevice
	// complete: all devices were asked for.
	complete bool
	// identity is what trustAnchor.readIdentity reads with that user-signing key of ours.
	identity       *publishedIdentity
	identityFault  error
	userSigningKey id.Ed25519
}

// publishedDevice is a device in a /keys/query answer. Where it has a fault, nothing else of it counts.
type publishedDevice struct {
	userID      id.UserID
	deviceID    id.DeviceID
	raw         json.RawMessage
	fault       error
	identityKey id.IdentityKey
	signingKey  id.Ed25519
	// name is what its owner calls it, or what mautrix would.
	name string
	// signers are those whose signatures are valid, and were not noted before; noted are those that were.
	signers, noted []id.Ed25519
}

// checkPublished checks what is published of those who were asked about. The error is one of the database's.
func (h *Hook) checkPublished(ctx context.Context, asked *mautrix.ReqQueryKeys, answer *keyQuery) ([]*publishedUser, error) {
	var answered []id.UserID
	for userID := range asked.DeviceKeys {
		if _, ok := answer.DeviceKeys[userID]; ok {
			answered = append(answered, userID)
		}
	}
	// Nobody takes a signature away: what was noted is there when the answer is stored.
	noted, err := h.store.signatures(ctx, answered)
	if err != nil {
		return nil, err
	}
	users := make([]*publishedUser, len(answered))
	anchor := h.anchor()
	for i, userID := range answered {
		users[i] = &publishedUser{userID: userID, complete: len(asked.DeviceKeys[userID]) == 0}
	}
	sideBySide(len(users), func(i int) { users[i].checkIdentity(anchor, answer) })
	var checks []func()
	for _, user := range users {
		for deviceID, raw := range answer.DeviceKeys[user.userID] {
			device := &publishedDevice{userID: user.userID, deviceID: deviceID, raw: raw}
			user.devices = append(user.devices, device)
			checks = append(checks, func() { device.check(user.selfSigningKey(), noted) })
		}
	}
	sideBySide(len(checks), func(i int) { checks[i]() })
	return users, nil
}

// selfSigningKey is what the user publishes as such, or the empty key.
func (user *publishedUser) selfSigningKey() id.Ed25519 {
	if user.identity == nil {
		return ""
	}
	return user.identity.selfSigningKey
}

func (user *publishedUser) checkIdentity(anchor trustAnchor, answer *keyQuery) {
	user.userSigningKey = anchor.userSigningKey
	user.identity, user.identityFault = anchor.readIdentity(user.userID, answer.MasterKeys[user.userID], answer.SelfSigningKeys[user.userID])
}

func (device *publishedDevice) check(selfSigningKey id.Ed25519, noted map[signature]bool) {
	keys, err := parseDeviceKeys(device.raw, device.userID, device.deviceID)
	if err != nil {
		device.fault = err
		return
	}
	device.identityKey, device.signingKey = keys.Keys.GetCurve25519(device.deviceID), keys.Keys.GetEd25519(device.deviceID)
	device.name = nameOf(keys)
	device.signers = validSigners(device.raw, keys, selfSigningKey, func(signer id.Ed25519) bool {
		known := noted[signature{device.userID, device.identityKey, device.signingKey, signer}]
		if known {
			device.noted = append(device.noted, signer)
		}
		return !known
	})
}

// nameOf gives what mautrix calls a device.
func nameOf(keys *mautrix.DeviceKeys) string {
	name, named := keys.Unsigned["device_display_name"].(string)
	switch {
	case named:
		return name
	case keys.Dehydrated:
		return "Dehydrated device"
	}
	return keys.DeviceID.String()
}
