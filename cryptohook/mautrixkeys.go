package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/tidwall/gjson"
	"go.mau.fi/util/dbutil"
	"go.mau.fi/util/exgjson"
	"maunium.net/go/mautrix/id"
)

// mautrix's tables of other users' devices and identities, as its FetchKeys fills them: it encrypts to these devices, and asks who has signed
// what. Of the signatures it is told those that it looks for: a self-signing key's on a device, a master key's on a self-signing key, and ours
// on a master key.

const (
	// A user who is not tracked has no devices: so says mautrix's GetDevices.
	getMautrixDevicesQuery = `
		SELECT user_id, device_id, identity_key, signing_key, trust, name FROM crypto_device
		WHERE user_id IN ($1) AND deleted=false AND EXISTS (SELECT 1 FROM crypto_tracked_user tracked WHERE tracked.user_id=crypto_device.user_id)
	`
	trackUserQuery = `
		INSERT INTO crypto_tracked_user (user_id, devices_outdated) VALUES ($1, $2) ON CONFLICT (user_id) DO UPDATE SET devices_outdated=excluded.devices_outdated
	`
	deleteMautrixDevicesQuery = `UPDATE crypto_device SET deleted=true WHERE user_id IN ($1) AND deleted=false`
	upsertMautrixDeviceQuery  = `
		INSERT INTO crypto_device (user_id, device_id, identity_key, signing_key, trust, deleted, name) VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (user_id, device_id) DO UPDATE SET
			identity_key=excluded.identity_key, signing_key=excluded.signing_key, trust=excluded.trust, deleted=excluded.deleted, name=excluded.name
	`
	getCrossSigningKeysQuery   = `SELECT user_id, usage, key FROM crypto_cross_signing_keys WHERE user_id IN ($1)`
	upsertCrossSigningKeyQuery = `
		INSERT INTO crypto_cross_signing_keys (user_id, usage, key, first_seen_key) VALUES ($1, $2, $3, $4)
		ON CONFLICT (user_id, usage) DO UPDATE SET key=excluded.key
	`
	// By the user whose key was signed, for which there is an index: none of these keys has signed anybody else's.
	dropSignaturesQuery     = `DELETE FROM crypto_cross_signing_signatures WHERE signed_user_id=$1 AND signer_user_id=$1 AND signer_key=$2`
	getKeySignaturesQuery   = `SELECT signed_user_id, signed_key, signer_user_id, signer_key FROM crypto_cross_signing_signatures WHERE signed_user_id IN ($1)`
	upsertKeySignatureQuery = `
		INSERT INTO crypto_cross_signing_signatures (signed_user_id, signed_key, signer_user_id, signer_key, signature) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (signed_user_id, signed_key, signer_user_id, signer_key) DO UPDATE SET signature=excluded.signature
	`
)

var (
	trackUsers             = dbutil.NewMassInsertBuilder[trackedUser, [0]any](trackUserQuery, "($%d, $%d)")
	upsertMautrixDevices   = dbutil.NewMassInsertBuilder[mautrixDevice, [0]any](upsertMautrixDeviceQuery, "($%d, $%d, $%d, $%d, $%d, $%d, $%d)")
	upsertCrossSigningKeys = dbutil.NewMassInsertBuilder[crossSigningKey, [0]any](upsertCrossSigningKeyQuery, "($%d, $%d, $%d, $%d)")
	upsertKeySignatures    = dbutil.NewMassInsertBuilder[keySignature, [0]any](upsertKeySignatureQuery, "($%d, $%d, $%d, $%d, $%d)")
)

type trackedUser struct{ id.UserID }

// GetMassInsertValues implements [dbutil.MassInsertable].
func (u trackedUser) GetMassInsertValues() [2]any { return [2]any{u.UserID, false} }

// mautrixDevice is a living device as mautrix stores it.
type mautrixDevice struct {
	storedDevice
	identityKey id.IdentityKey
	signingKey  id.Ed25519
	trust       id.TrustState
	name        string
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (d mautrixDevice) GetMassInsertValues() [7]any {
	return [7]any{d.userID, d.deviceID, d.identityKey, d.signingKey, d.trust, false, d.name}
}

// keyOfUsage names what a user's cross-signing key is for.
type keyOfUsage struct {
	userID id.UserID
	usage  id.CrossSigningUsage
}

// crossSigningKey is a cross-signing key as mautrix stores it.
type crossSigningKey struct {
	keyOfUsage
	key id.Ed25519
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (k crossSigningKey) GetMassInsertValues() [4]any { return [4]any{k.userID, k.usage, k.key, k.key} }

// keySignature says that a key has signed another one, as mautrix stores it.
type keySignature struct {
	signedUserID id.UserID
	signedKey    id.Ed25519
	signerUserID id.UserID
	signerKey    id.Ed25519
	signature    string
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (k keySignature) GetMassInsertValues() [5]any {
	return [5]any{k.signedUserID, k.signedKey, k.signerUserID, k.signerKey, k.signature}
}

// signatureText gives the signature of a key in a signed object as it stands there.
func signatureText(object json.RawMessage, signer id.UserID, key id.Ed25519) string {
	return gjson.GetBytes(object, exgjson.Path("signatures", signer.String(), id.NewKeyID(id.KeyAlgorithmEd25519, key.String()).String())).Str
}

// storeForMautrix stores what was published of other users for mautrix. Its keys of rooms that one of them is in are not used any more if the
// user has a device less or more.
func (h *Hook) storeForMautrix(ctx context.Context, users []*publishedUser, answer *keyQuery) error {
	for some := range apart(users, perStatement, func(user *publishedUser) id.UserID { return stored(h.store.Database, user.userID) }) {
		userIDs := make([]id.UserID, len(some))
		for i, user := range some {
			userIDs[i] = user.userID
		}
		changed, err := h.store.putMautrixDevices(ctx, some, userIDs)
		if err != nil {
			return fmt.Errorf("failed to store devices for mautrix: %w", err)
		}
		if err = h.store.putCrossSigning(ctx, some, userIDs, answer, h.mach.Client.UserID); err != nil {
			return fmt.Errorf("failed to store identities for mautrix: %w", err)
		}
		if err = h.renewRoomKeys(ctx, changed); err != nil {
			return fmt.Errorf("failed to forget the keys of rooms: %w", err)
		}
	}
	return nil
}

// renewRoomKeys has the rooms that these users are in get new sessions of ours, as mautrix's OnDevicesChanged: a device that is gone is not to
// read on, and one that is new is.
func (h *Hook) renewRoomKeys(ctx context.Context, users []id.UserID) error {
	if h.mach.DisableDeviceChangeKeyRotation {
		return nil
	}
	renewed := make(map[id.RoomID]struct{})
	for _, userID := range users {
		rooms, err := h.rooms.FindSharedRooms(ctx, userID)
		if err != nil {
			return err
		}
		for _, roomID := range rooms {
			if _, done := renewed[roomID]; done {
				continue
			}
			if err = h.uow.SQLCryptoStore.RemoveOutboundGroupSession(ctx, roomID); err != nil {
				return err
			}
			renewed[roomID] = struct{}{}
		}
	}
	return nil
}

// putMautrixDevices replaces the devices of users, and gives those of whom a device has come or gone.
func (s *store) putMautrixDevices(ctx context.Context, users []*publishedUser, userIDs []id.UserID) (changed []id.UserID, err error) {
	list, err := queryAll(ctx, s, getMautrixDevicesQuery, userIDs, func(row dbutil.Scannable) (d mautrixDevice, err error) {
		return d, row.Scan(&d.userID, &d.deviceID, &d.identityKey, &d.signingKey, &d.trust, &d.name)
	})
	if err != nil {
		return nil, err
	}
	known := make(map[storedDevice]mautrixDevice, len(list))
	count := make(map[id.UserID]int)
	for _, device := range list {
		known[device.storedDevice] = device
		count[device.userID]++
	}
	var devices []mautrixDevice
	for _, user := range users {
		living, new := 0, false
		for _, published := range user.devices {
			former, existed := known[s.storedDevice(published.userID, published.deviceID)]
			device, ok := published.forMautrix(former, existed)
			if !ok {
				continue
			}
			devices = append(devices, device)
			living, new = living+1, new || !existed
		}
		if new || living != count[stored(s.Database, user.userID)] {
			changed = append(changed, user.userID)
		}
	}
	tracked := make([]trackedUser, len(userIDs))
	for i, userID := range userIDs {
		tracked[i] = trackedUser{userID}
	}
	if err = insertAll(ctx, s.Database, trackUsers, tracked, func(u trackedUser) id.UserID { return stored(s.Database, u.UserID) }); err != nil {
		return nil, err
	}
	if err = execAll(ctx, s, deleteMautrixDevicesQuery, userIDs); err != nil {
		return nil, err
	}
	return changed, insertAll(ctx, s.Database, upsertMautrixDevices, devices, func(d mautrixDevice) storedDevice {
		return s.storedDevice(d.userID, d.deviceID)
	})
}

// forMautrix gives what mautrix stores of a published device, if anything: former is what it has of it. A known device stays as it is when
// its new keys are another device's, or are not signed by it.
func (device *publishedDevice) forMautrix(former mautrixDevice, existed bool) (mautrixDevice, bool) {
	switch {
	case errors.Is(device.fault, errSignatureInvalid):
		return former, existed
	case device.fault != nil:
		return mautrixDevice{}, false
	case existed && former.signingKey != device.signingKey:
		former.trust = id.TrustStateDeviceKeyMismatch
		return former, true
	}
	trust := id.TrustStateUnset
	if existed && former.trust != id.TrustStateDeviceKeyMismatch {
		trust = former.trust
	}
	return mautrixDevice{storedDevice{device.userID, device.deviceID}, device.identityKey, device.signingKey, trust, device.name}, true
}

// putCrossSigning stores users' master and self-signing keys, and who has signed them and the devices. The signatures of a key that another
// one has taken the place of are forgotten.
func (s *store) putCrossSigning(ctx context.Context, users []*publishedUser, userIDs []id.UserID, answer *keyQuery, ourselves id.UserID) error {
	list, err := queryAll(ctx, s, getCrossSigningKeysQuery, userIDs, func(row dbutil.Scannable) (key crossSigningKey, err error) {
		return key, row.Scan(&key.userID, &key.usage, &key.key)
	})
	if err != nil {
		return err
	}
	known := make(map[keyOfUsage]id.Ed25519, len(list))
	for _, key := range list {
		known[key.keyOfUsage] = key.key
	}
	signatures, err := s.keySignatures(ctx, userIDs)
	if err != nil {
		return err
	}
	asStored := func(k keySignature) keySignature {
		return keySignature{stored(s.Database, k.signedUserID), k.signedKey, k.signerUserID, k.signerKey, ""}
	}
	var keys []crossSigningKey
	var signed []keySignature
	for _, user := range users {
		if user.identity == nil {
			continue
		}
		for _, key := range user.crossSigningKeys() {
			former := known[keyOfUsage{stored(s.Database, key.userID), key.usage}]
			if former == key.key {
				continue
			}
			keys = append(keys, key)
			if former == "" {
				continue
			}
			if _, err = s.Exec(ctx, dropSignaturesQuery, user.userID, former); err != nil {
				return err
			}
		}
		signed = append(signed, user.keySignatures(answer, ourselves, func(k keySignature) bool { return signatures[asStored(k)] })...)
	}
	err = insertAll(ctx, s.Database, upsertCrossSigningKeys, keys, func(key crossSigningKey) keyOfUsage {
		return keyOfUsage{stored(s.Database, key.userID), key.usage}
	})
	if err != nil {
		return err
	}
	return insertAll(ctx, s.Database, upsertKeySignatures, signed, asStored)
}

// keySignatures gives the signatures on users' keys that mautrix knows, without what they look like.
func (s *store) keySignatures(ctx context.Context, users []id.UserID) (map[keySignature]bool, error) {
	list, err := queryAll(ctx, s, getKeySignaturesQuery, users, func(row dbutil.Scannable) (k keySignature, err error) {
		return k, row.Scan(&k.signedUserID, &k.signedKey, &k.signerUserID, &k.signerKey)
	})
	if err != nil {
		return nil, err
	}
	known := make(map[keySignature]bool, len(list))
	for _, k := range list {
		known[k] = true
	}
	return known, nil
}

// crossSigningKeys gives the valid keys of the identity that a user publishes.
func (user *publishedUser) crossSigningKeys() []crossSigningKey {
	keys := []crossSigningKey{{keyOfUsage{user.userID, id.XSUsageMaster}, user.identity.masterKey}}
	if user.identity.selfSigningKey != "" {
		keys = append(keys, crossSigningKey{keyOfUsage{user.userID, id.XSUsageSelfSigning}, user.identity.selfSigningKey})
	}
	return keys
}

// keySignatures gives the valid signatures on the identity and the devices that a user publishes, those that are not known.
func (user *publishedUser) keySignatures(answer *keyQuery, ourselves id.UserID, known func(keySignature) bool) (news []keySignature) {
	userID, identity := user.userID, user.identity
	add := func(signedKey id.Ed25519, signer id.UserID, signerKey id.Ed25519, object json.RawMessage) {
		k := keySignature{userID, signedKey, signer, signerKey, ""}
		if !known(k) {
			k.signature = signatureText(object, signer, signerKey)
			news = append(news, k)
		}
	}
	if identity.verifiedBy != "" {
		add(identity.masterKey, ourselves, identity.verifiedBy, answer.MasterKeys[userID])
	}
	if identity.selfSigningKey == "" {
		return news
	}
	add(identity.selfSigningKey, userID, identity.masterKey, answer.SelfSigningKeys[userID])
	for _, device := range user.devices {
		k := keySignature{userID, device.signingKey, userID, identity.selfSigningKey, ""}
		// What was noted before may have been another signature of that key: this one is checked, once.
		if slices.Contains(device.signers, identity.selfSigningKey) ||
			slices.Contains(device.noted, identity.selfSigningKey) && !known(k) && signedBy(device.raw, userID, identity.selfSigningKey) {
			add(device.signingKey, userID, identity.selfSigningKey, device.raw)
		}
	}
	return news
}
