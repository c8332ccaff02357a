package cryptohook

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// What users publish, and what it proves: identities, devices with their keys whole, and every signature on a device that was checked.

const (
	getIdentityQuery = `
		SELECT user_id, master_key, first_master_key, self_signing_key, verified_by, was_verified, pinned_key
		FROM sendertrust_identity WHERE user_id=$1
	`
	upsertIdentityQuery = `
		INSERT INTO sendertrust_identity (user_id, master_key, first_master_key, self_signing_key, verified_by, was_verified, pinned_key, updated_at_ms)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
		ON CONFLICT (user_id) DO UPDATE SET
			master_key=excluded.master_key, first_master_key=excluded.first_master_key, self_signing_key=excluded.self_signing_key,
			verified_by=excluded.verified_by, was_verified=excluded.was_verified, pinned_key=excluded.pinned_key,
			updated_at_ms=excluded.updated_at_ms
	`
	getDevicesByKeyQuery = `
		SELECT device_id, signing_key, device_keys FROM sendertrust_device
		WHERE user_id=$1 AND identity_key=$2 AND deleted=false
	`
	getSigningKeyQuery = `SELECT signing_key FROM sendertrust_device WHERE user_id=$1 AND device_id=$2 AND deleted=false`
	deleteDevicesQuery = `UPDATE sendertrust_device SET deleted=true WHERE user_id=$1`
	keepDeviceQuery    = `UPDATE sendertrust_device SET deleted=false WHERE user_id=$1 AND device_id=$2`
	upsertDeviceQuery  = `
		INSERT INTO sendertrust_device (user_id, device_id, identity_key, signing_key, device_keys, deleted)
		VALUES ($1, $2, $3, $4, $5, false)
		ON CONFLICT (user_id, device_id) DO UPDATE SET
			identity_key=excluded.identity_key, signing_key=excluded.signing_key, device_keys=excluded.device_keys, deleted=false
	`
)

// identity implements [caches].
func (s *store) identity(ctx context.Context, userID id.UserID) (*Identity, error) {
	identity, err := scanIdentity(s.QueryRow(ctx, getIdentityQuery, userID))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("failed to read the identity of %s: %w", userID, err)
	}
	return identity, nil
}

func scanIdentity(row dbutil.Scannable) (*Identity, error) {
	var i Identity
	return &i, row.Scan(&i.UserID, &i.MasterKey, &i.FirstMasterKey, &i.SelfSigningKey, &i.VerifiedBy, &i.WasVerified, &i.PinnedKey)
}

// putIdentity stores what is known of a user's identity. See rejudge for what follows from it.
func (s *store) putIdentity(ctx context.Context, identity *Identity, now time.Time) error {
	_, err := s.Exec(ctx, upsertIdentityQuery,
		identity.UserID, identity.MasterKey, identity.FirstMasterKey, identity.SelfSigningKey, identity.VerifiedBy, identity.WasVerified,
		identity.PinnedKey, now.UnixMilli())
	if err != nil {
		return fmt.Errorf("failed to store the identity of %s: %w", identity.UserID, err)
	}
	return nil
}

const (
	// Whose standing may have changed while the process was not there: by the configuration's pins, or by new keys of our own.
	getVerifiedQuery = `
		SELECT user_id, master_key, first_master_key, self_signing_key, verified_by, was_verified, pinned_key
		FROM sendertrust_identity WHERE verified_by<>'' OR pinned_key<>''
	`
	insertWithdrawalQuery = `INSERT INTO sendertrust_withdrawal (user_id, master_key) VALUES ($1, $2) ON CONFLICT (user_id, master_key) DO NOTHING`
	deleteWithdrawalQuery = `DELETE FROM sendertrust_withdrawal WHERE user_id=$1 AND master_key=$2`
	getWithdrawnQuery     = `SELECT master_key FROM sendertrust_withdrawal WHERE user_id=$1 ORDER BY master_key`
	isWithdrawnQuery      = `SELECT true FROM sendertrust_withdrawal WHERE user_id=$1 AND master_key=$2`
)

// verifiedIdentities gives those whom we have verified, or the configuration has pinned.
func (s *store) verifiedIdentities(ctx context.Context) ([]*Identity, error) {
	rows, err := s.Query(ctx, getVerifiedQuery)
	list, err := dbutil.NewRowIterWithError(rows, scanIdentity, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the verified identities: %w", err)
	}
	return list, nil
}

// withdraw has our signature on a master key no longer count; restore undoes it.
func (s *store) withdraw(ctx context.Context, userID id.UserID, masterKey id.Ed25519) error {
	_, err := s.Exec(ctx, insertWithdrawalQuery, userID, masterKey)
	return err
}

func (s *store) restore(ctx context.Context, userID id.UserID, masterKey id.Ed25519) error {
	_, err := s.Exec(ctx, deleteWithdrawalQuery, userID, masterKey)
	return err
}

func (s *store) isWithdrawn(ctx context.Context, userID id.UserID, masterKey id.Ed25519) (withdrawn bool, err error) {
	err = s.QueryRow(ctx, isWithdrawnQuery, userID, masterKey).Scan(&withdrawn)
	return withdrawn, ignoreNoRows(err)
}

// withdrawnKeys are the master keys of a user whose verification was withdrawn.
func (s *store) withdrawnKeys(ctx context.Context, userID id.UserID) ([]id.Ed25519, error) {
	rows, err := s.Query(ctx, getWithdrawnQuery, userID)
	keys, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[id.Ed25519], err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read whose verification was withdrawn: %w", err)
	}
	return keys, nil
}

// signature is a fact: that key has signed the user's device with these keys, in the user's name. Whether it is the user's self-signing
// key is another matter.
type signature struct {
	userID         id.UserID
	senderKey      id.SenderKey
	signingKey     id.Ed25519
	selfSigningKey id.Ed25519
}

const (
	// The object that a signature is in is kept for the user's self-signing key, and for eight others that may turn out to be the user's: a
	// sender can make up as many as there are messages.
	insertSignatureQuery = `
		INSERT INTO sendertrust_signature (sender_id, self_signing_key, device_keys)
		SELECT id, $4, CASE
			WHEN EXISTS (SELECT 1 FROM sendertrust_identity WHERE user_id=$1 AND self_signing_key=$4) THEN $5
			WHEN (SELECT COUNT(*) FROM sendertrust_signature kept WHERE kept.sender_id=sendertrust_sender.id AND kept.device_keys IS NOT NULL)<8 THEN $5
		END
		FROM sendertrust_sender WHERE user_id=$1 AND identity_key=$2 AND signing_key=$3
		ON CONFLICT (sender_id, self_signing_key) DO UPDATE SET device_keys=excluded.device_keys
			WHERE sendertrust_signature.device_keys IS NULL AND excluded.device_keys IS NOT NULL
	`
	getSignersQuery = `
		SELECT self_signing_key FROM sendertrust_signature
		WHERE sender_id=(SELECT id FROM sendertrust_sender WHERE user_id=$1 AND identity_key=$2 AND signing_key=$3)
	`
	// CAST: see withStatementCache.
	getSignaturesQuery = `
		SELECT user_id, identity_key, signing_key, self_signing_key
		FROM sendertrust_sender JOIN sendertrust_signature ON sender_id=id WHERE user_id=CAST($1 AS TEXT)
	`
)

// putSignature notes a device, and a signature on it that was checked if there is one, with the device keys object that it is in. It says
// whether anything of the signature is new.
func (s *store) putSignature(ctx context.Context, proof signature, object json.RawMessage) (added bool, err error) {
	if err = s.putSender(ctx, proof.userID, proof.senderKey, proof.signingKey); err != nil || proof.selfSigningKey == "" {
		return false, err
	}
	return s.addSignature(ctx, proof, object)
}

// putSender notes a device.
func (s *store) putSender(ctx context.Context, userID id.UserID, senderKey id.SenderKey, signingKey id.Ed25519) error {
	if _, err := s.Exec(ctx, insertSenderQuery, userID, senderKey, signingKey); err != nil {
		return fmt.Errorf("failed to store whose device it is: %w", err)
	}
	return nil
}

// addSignature is putSignature for a device that is noted.
func (s *store) addSignature(ctx context.Context, proof signature, object json.RawMessage) (added bool, err error) {
	result, err := s.Exec(ctx, insertSignatureQuery, proof.userID, proof.senderKey, proof.signingKey, proof.selfSigningKey, asKept(object))
	if err != nil {
		return false, fmt.Errorf("failed to store a signature: %w", err)
	}
	count, err := result.RowsAffected()
	return count > 0, err
}

// signers implements [caches].
func (s *store) signers(ctx context.Context, userID id.UserID, senderKey id.SenderKey, signingKey id.Ed25519) ([]id.Ed25519, error) {
	rows, err := s.Query(ctx, getSignersQuery, userID, senderKey, signingKey)
	list, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[id.Ed25519], err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the signatures on a device of %s: %w", userID, err)
	}
	return list, nil
}

// signatures gives all signatures on the user's devices that were checked.
func (s *store) signatures(ctx context.Context, userID id.UserID) (map[signature]bool, error) {
	rows, err := s.Query(ctx, getSignaturesQuery, userID)
	list, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (proof signature, err error) {
		return proof, row.Scan(&proof.userID, &proof.senderKey, &proof.signingKey, &proof.selfSigningKey)
	}, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the signatures on the devices of %s: %w", userID, err)
	}
	seen := make(map[signature]bool, len(list))
	for _, proof := range list {
		seen[proof] = true
	}
	return seen, nil
}

// noteSigners notes the device of a claim and who has signed it, and says whether any of the signatures is news.
func (s *store) noteSigners(ctx context.Context, claim *SenderData) (news bool, err error) {
	if err = s.putSender(ctx, claim.Sender, claim.SenderKey, claim.SigningKey); err != nil {
		return false, err
	}
	for _, signer := range claim.signers {
		added, err := s.addSignature(ctx, signature{claim.Sender, claim.SenderKey, claim.SigningKey, signer.key}, signer.object)
		if err != nil {
			return news, err
		}
		news = news || added
	}
	return news, nil
}

// deviceByKey implements [caches].
func (s *store) deviceByKey(ctx context.Context, userID id.UserID, senderKey id.SenderKey, signingKey id.Ed25519) (json.RawMessage, error) {
	rows, err := s.Query(ctx, getDevicesByKeyQuery, userID, senderKey)
	if err != nil {
		return nil, fmt.Errorf("failed to read the devices of %s: %w", userID, err)
	}
	devices, err := dbutil.NewRowIter(rows, func(row dbutil.Scannable) (d cachedDevice, err error) {
		return d, row.Scan(&d.deviceID, &d.signingKey, &d.keys)
	}).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the devices of %s: %w", userID, err)
	}
	if len(devices) == 0 {
		return nil, nil
	}
	// More than one is a device's copy of another one's key. Only one of them can have signed the session.
	best := slices.MinFunc(devices, func(a, b cachedDevice) int {
		switch {
		case a.signingKey == signingKey && b.signingKey != signingKey:
			return -1
		case a.signingKey != signingKey && b.signingKey == signingKey:
			return 1
		}
		return cmp.Compare(a.deviceID, b.deviceID)
	})
	return json.RawMessage(best.keys), nil
}

type cachedDevice struct {
	deviceID   id.DeviceID
	signingKey id.Ed25519
	keys       string
}

// putDevice stores a device's published keys. A device ID never changes its ed25519 key while it lives.
func (s *store) putDevice(ctx context.Context, userID id.UserID, deviceID id.DeviceID, identityKey id.IdentityKey, signingKey id.Ed25519, keys json.RawMessage) error {
	if _, err := s.Exec(ctx, upsertDeviceQuery, userID, deviceID, identityKey, signingKey, string(keys)); err != nil {
		return fmt.Errorf("failed to store device %s of %s: %w", deviceID, userID, err)
	}
	return nil
}

// signingKey gives the ed25519 key of a living device, or the empty one.
func (s *store) signingKey(ctx context.Context, userID id.UserID, deviceID id.DeviceID) (key id.Ed25519, err error) {
	err = s.QueryRow(ctx, getSigningKeyQuery, userID, deviceID).Scan(&key)
	return key, ignoreNoRows(err)
}

// keepDevice undoes a device's deletion.
func (s *store) keepDevice(ctx context.Context, userID id.UserID, deviceID id.DeviceID) error {
	_, err := s.Exec(ctx, keepDeviceQuery, userID, deviceID)
	return err
}

func (s *store) markDevicesDeleted(ctx context.Context, userID id.UserID) error {
	_, err := s.Exec(ctx, deleteDevicesQuery, userID)
	return err
}
