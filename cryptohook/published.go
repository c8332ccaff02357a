package cryptohook

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// What users publish as it was signed, kept as evidence: the objects of every cross-signing identity that was seen, and when it was first
// seen. The device keys that a signature is in are with the signature.

const (
	// maxEvidence is how long an object may be that is kept as evidence, in bytes. Device keys take 1,000, a master key that a hundred
	// devices have signed 20,000. Of longer ones only what they prove is kept.
	maxEvidence = 32 << 10

	upsertIdentityKeyQuery = `
		INSERT INTO sendertrust_identity_key (user_id, master_key, seen_at_ms, master_object, self_signing_key, self_signing_object)
		VALUES ($1, $2, $3, $4, $5, $6)
		ON CONFLICT (user_id, master_key) DO UPDATE SET
			master_object=COALESCE(excluded.master_object, sendertrust_identity_key.master_object),
			self_signing_key=CASE WHEN excluded.self_signing_key<>'' THEN excluded.self_signing_key ELSE sendertrust_identity_key.self_signing_key END,
			self_signing_object=CASE
				WHEN excluded.self_signing_key IN ('', sendertrust_identity_key.self_signing_key)
				THEN COALESCE(excluded.self_signing_object, sendertrust_identity_key.self_signing_object)
				ELSE excluded.self_signing_object
			END
		WHERE COALESCE(excluded.master_object<>sendertrust_identity_key.master_object, excluded.master_object IS NOT NULL)
		   OR excluded.self_signing_key NOT IN ('', sendertrust_identity_key.self_signing_key)
		   OR COALESCE(excluded.self_signing_object<>sendertrust_identity_key.self_signing_object, excluded.self_signing_object IS NOT NULL)
		RETURNING user_id
	`
	countIdentityKeysQuery = `SELECT user_id, COUNT(*) FROM sendertrust_identity_key WHERE user_id IN ($1) GROUP BY user_id`
	// The first one that we saw and today's are kept whatever comes after them.
	trimIdentityKeysQuery = `
		DELETE FROM sendertrust_identity_key WHERE user_id=$1
			AND master_key NOT IN (SELECT master_key FROM sendertrust_identity WHERE user_id=$1)
			AND master_key NOT IN (SELECT first_master_key FROM sendertrust_identity WHERE user_id=$1)
			AND master_key NOT IN (SELECT master_key FROM sendertrust_identity_key WHERE user_id=$1 ORDER BY seen_at_ms DESC, master_key DESC LIMIT $2)
	`
	getIdentityKeysQuery = `
		SELECT master_key, seen_at_ms, master_object, self_signing_key, self_signing_object
		FROM sendertrust_identity_key WHERE user_id=$1 ORDER BY seen_at_ms, master_key
	`
	getSignedObjectsQuery = `
		SELECT self_signing_key, device_keys FROM sendertrust_signature
		WHERE device_keys IS NOT NULL AND sender_id=(SELECT id FROM sendertrust_sender WHERE user_id=$1 AND identity_key=$2 AND signing_key=$3)
	`
	getPublishedDevicesQuery = `SELECT device_keys FROM sendertrust_device WHERE user_id=$1 AND identity_key=$2 AND signing_key=$3 ORDER BY deleted, device_id`
)

// identityKey is a master key that a user was seen to publish, with the objects as they were signed, where they are kept.
type identityKey struct {
	userID                          id.UserID
	masterKey, selfSigningKey       id.Ed25519
	masterObject, selfSigningObject json.RawMessage
	// seenAt is when it was first seen; zero: before that was recorded.
	seenAt time.Time
}

// asKept gives an object as it is stored as evidence: nothing if it is too long.
func asKept(object json.RawMessage) *string {
	if len(object) > maxEvidence {
		return nil
	}
	return dbutil.StrPtr(string(object))
}

var upsertIdentityKeys = dbutil.NewMassInsertBuilder[identityKey, [0]any](upsertIdentityKeyQuery, "($%d, $%d, $%d, $%d, $%d, $%d)")

// GetMassInsertValues implements [dbutil.MassInsertable].
func (k identityKey) GetMassInsertValues() [6]any {
	return [6]any{k.userID, k.masterKey, k.seenAt.UnixMilli(), asKept(k.masterObject), k.selfSigningKey, asKept(k.selfSigningObject)}
}

// putIdentityKeys keeps the objects of identities that users publish now, one of each, and forgets the oldest ones that are too many. The
// identities themselves have to be stored.
func (s *store) putIdentityKeys(ctx context.Context, keys []identityKey) error {
	for some := range perInsert(keys, func(key identityKey) id.UserID { return stored(s.Database, key.userID) }) {
		query, params := upsertIdentityKeys.Build([0]any{}, some)
		rows, err := s.Query(ctx, query, params...)
		changed, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[id.UserID], err).AsList()
		if err != nil {
			return fmt.Errorf("failed to store the cross-signing keys of %d users: %w", len(some), err)
		}
		if err = s.trimIdentityKeys(ctx, changed); err != nil {
			return fmt.Errorf("failed to forget old cross-signing keys: %w", err)
		}
	}
	return nil
}

// trimIdentityKeys forgets the oldest identities of these users that are too many.
func (s *store) trimIdentityKeys(ctx context.Context, users []id.UserID) error {
	if len(users) == 0 {
		return nil
	}
	type keyCount struct {
		userID id.UserID
		keys   int
	}
	counts, err := queryAll(ctx, s, countIdentityKeysQuery, users, func(row dbutil.Scannable) (count keyCount, err error) {
		return count, row.Scan(&count.userID, &count.keys)
	})
	if err != nil {
		return err
	}
	for _, count := range counts {
		if count.keys <= MaxIdentityChanges {
			continue
		}
		if _, err = s.Exec(ctx, trimIdentityKeysQuery, count.userID, MaxIdentityChanges); err != nil {
			return err
		}
	}
	return nil
}

// identityKeys gives the identities that a user was seen to have, the oldest first.
func (s *store) identityKeys(ctx context.Context, userID id.UserID) ([]identityKey, error) {
	rows, err := s.Query(ctx, getIdentityKeysQuery, userID)
	keys, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (key identityKey, err error) {
		var seen int64
		var master, selfSigning sql.NullString
		err = row.Scan(&key.masterKey, &seen, &master, &key.selfSigningKey, &selfSigning)
		key.masterObject, key.selfSigningObject = rawObject(master), rawObject(selfSigning)
		if seen != 0 {
			key.seenAt = time.UnixMilli(seen)
		}
		return key, err
	}, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the cross-signing keys of %s: %w", userID, err)
	}
	return keys, nil
}

func rawObject(text sql.NullString) json.RawMessage {
	if !text.Valid {
		return nil
	}
	return json.RawMessage(text.String)
}

// signedObjects gives the device keys objects that are kept of a device, by the keys whose signatures in them were checked.
func (s *store) signedObjects(ctx context.Context, userID id.UserID, keys deviceKeyPair) (map[id.Ed25519]json.RawMessage, error) {
	signed := make(map[id.Ed25519]json.RawMessage)
	rows, err := s.Query(ctx, getSignedObjectsQuery, userID, keys.senderKey, keys.signingKey)
	err = dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (signer id.Ed25519, err error) {
		var text string
		err = row.Scan(&signer, &text)
		signed[signer] = json.RawMessage(text)
		return signer, err
	}, err).Iter(func(id.Ed25519) (bool, error) { return true, nil })
	if err != nil {
		return nil, fmt.Errorf("failed to read the signed keys of a device of %s: %w", userID, err)
	}
	return signed, nil
}

// publishedDevices gives what the user has published of a device with these keys, be it deleted or not.
func (s *store) publishedDevices(ctx context.Context, userID id.UserID, keys deviceKeyPair) ([]json.RawMessage, error) {
	rows, err := s.Query(ctx, getPublishedDevicesQuery, userID, keys.senderKey, keys.signingKey)
	objects, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (json.RawMessage, error) {
		var text string
		err := row.Scan(&text)
		return json.RawMessage(text), err
	}, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the published keys of a device of %s: %w", userID, err)
	}
	return objects, nil
}
