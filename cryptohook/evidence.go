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
	// The statements about many users have as many parameters as there are users.
	getSigningKeysQuery = `SELECT user_id, device_id, signing_key FROM sendertrust_device WHERE user_id IN ($1) AND deleted=false`
	deleteDevicesQuery  = `UPDATE sendertrust_device SET deleted=true WHERE user_id IN ($1) AND deleted=false`
	keepDeviceQuery     = `UPDATE sendertrust_device SET deleted=false WHERE user_id=$1 AND device_id=$2`
	upsertDeviceQuery   = `
		INSERT INTO sendertrust_device (user_id, device_id, identity_key, signing_key, device_keys, deleted)
		VALUES ($1, $2, $3, $4, $5, $6)
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

var upsertIdentities = dbutil.NewMassInsertBuilder[identityRow, [0]any](upsertIdentityQuery, "($%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d)")

type identityRow struct {
	*Identity
	updatedAt time.Time
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (i identityRow) GetMassInsertValues() [8]any {
	return [8]any{i.UserID, i.MasterKey, i.FirstMasterKey, i.SelfSigningKey, i.VerifiedBy, i.WasVerified, i.PinnedKey, i.updatedAt.UnixMilli()}
}

// putIdentity stores what is known of a user's identity. See rejudge for what follows from it.
func (s *store) putIdentity(ctx context.Context, identity *Identity, now time.Time) error {
	return s.putIdentities(ctx, []*Identity{identity}, now)
}

// putIdentities is putIdentity for many users.
func (s *store) putIdentities(ctx context.Context, identities []*Identity, now time.Time) error {
	rows := make([]identityRow, len(identities))
	for i, identity := range identities {
		rows[i] = identityRow{identity, now}
	}
	err := insertAll(ctx, s.Database, upsertIdentities, rows, func(row identityRow) id.UserID { return stored(s.Database, row.UserID) })
	if err != nil {
		return fmt.Errorf("failed to store identities: %w", err)
	}
	return nil
}

// identities gives what is known of many users' identities, by the users' IDs as they are stored.
func (s *store) identities(ctx context.Context, users []id.UserID) (map[id.UserID]*Identity, error) {
	list, err := queryAll(ctx, s, getIdentitiesQuery, users, scanIdentity)
	if err != nil {
		return nil, fmt.Errorf("failed to read identities: %w", err)
	}
	known := make(map[id.UserID]*Identity, len(list))
	for _, identity := range list {
		known[identity.UserID] = identity
	}
	return known, nil
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
	getWithdrawalsQuery   = `SELECT user_id, master_key FROM sendertrust_withdrawal WHERE user_id IN ($1)`
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

// withdrawal is a master key of a user that our signature no longer counts for.
type withdrawal struct {
	userID    id.UserID
	masterKey id.Ed25519
}

// withdrawals gives whose verification was withdrawn, by the users' IDs as they are stored.
func (s *store) withdrawals(ctx context.Context, users []id.UserID) (map[withdrawal]bool, error) {
	list, err := queryAll(ctx, s, getWithdrawalsQuery, users, func(row dbutil.Scannable) (w withdrawal, err error) {
		return w, row.Scan(&w.userID, &w.masterKey)
	})
	if err != nil {
		return nil, fmt.Errorf("failed to read whose verification was withdrawn: %w", err)
	}
	withdrawn := make(map[withdrawal]bool, len(list))
	for _, w := range list {
		withdrawn[w] = true
	}
	return withdrawn, nil
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
		SELECT sender.id, column4, CASE
			WHEN EXISTS (SELECT 1 FROM sendertrust_identity WHERE user_id=column1 AND self_signing_key=column4) THEN column5
			WHEN (SELECT COUNT(*) FROM sendertrust_signature kept WHERE kept.sender_id=sender.id AND kept.device_keys IS NOT NULL)<8 THEN column5
		END
		FROM (VALUES ($1, $2, $3, $4, $5)) AS news
		JOIN sendertrust_sender sender ON sender.user_id=column1 AND sender.identity_key=column2 AND sender.signing_key=column3
		WHERE true
		ON CONFLICT (sender_id, self_signing_key) DO UPDATE SET device_keys=excluded.device_keys
			WHERE sendertrust_signature.device_keys IS NULL AND excluded.device_keys IS NOT NULL
	`
	getSignersQuery = `
		SELECT self_signing_key FROM sendertrust_signature
		WHERE sender_id=(SELECT id FROM sendertrust_sender WHERE user_id=$1 AND identity_key=$2 AND signing_key=$3)
	`
	getSignaturesQuery = `
		SELECT user_id, identity_key, signing_key, self_signing_key
		FROM sendertrust_sender JOIN sendertrust_signature ON sender_id=id WHERE user_id IN ($1)
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

// signatures gives all signatures on the users' devices that were checked.
func (s *store) signatures(ctx context.Context, users []id.UserID) (map[signature]bool, error) {
	seen := make(map[signature]bool)
	for some := range slices.Chunk(users, perStatement) {
		list, err := queryAll(ctx, s, getSignaturesQuery, some, func(row dbutil.Scannable) (proof signature, err error) {
			return proof, row.Scan(&proof.userID, &proof.senderKey, &proof.signingKey, &proof.selfSigningKey)
		})
		if err != nil {
			return nil, fmt.Errorf("failed to read the signatures on devices: %w", err)
		}
		for _, proof := range list {
			seen[proof] = true
		}
	}
	return seen, nil
}

var (
	insertSenders = dbutil.NewMassInsertBuilder[senderRow, [0]any](insertSenderQuery, "($%d, $%d, $%d)")

	insertSignatures = dbutil.NewMassInsertBuilder[signatureRow, [0]any](insertSignatureQuery, "($%d, $%d, $%d, $%d, $%d)")
)

// signatureRow is a signature with the device keys object that it is in.
type signatureRow struct {
	signature
	object json.RawMessage
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (r signatureRow) GetMassInsertValues() [5]any {
	return [5]any{r.userID, r.senderKey, r.signingKey, r.selfSigningKey, asKept(r.object)}
}

// senderRow is the device of a signature.
type senderRow struct{ signature }

// GetMassInsertValues implements [dbutil.MassInsertable].
func (r senderRow) GetMassInsertValues() [3]any { return [3]any{r.userID, r.senderKey, r.signingKey} }

// putSignatures notes signatures that were checked, and their devices. How many objects of a device are kept depends on those before: the
// first signature on each comes first, then the second ones, and no statement has two of one device.
func (s *store) putSignatures(ctx context.Context, news []signatureRow) error {
	device := func(r signature) signature {
		return signature{stored(s.Database, r.userID), r.senderKey, r.signingKey, ""}
	}
	var senders []senderRow
	var turns [][]signatureRow
	turn := make(map[signature]int)
	for _, row := range news {
		nth := turn[device(row.signature)]
		turn[device(row.signature)]++
		if nth == 0 {
			senders = append(senders, senderRow{row.signature})
		}
		if nth == len(turns) {
			turns = append(turns, nil)
		}
		turns[nth] = append(turns[nth], row)
	}
	err := insertAll(ctx, s.Database, insertSenders, senders, func(row senderRow) signature { return device(row.signature) })
	if err != nil {
		return fmt.Errorf("failed to store whose devices they are: %w", err)
	}
	err = insertAll(ctx, s.Database, insertSignatures, slices.Concat(turns...), func(row signatureRow) signature { return device(row.signature) })
	if err != nil {
		return fmt.Errorf("failed to store signatures: %w", err)
	}
	return nil
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

var upsertDevices = dbutil.NewMassInsertBuilder[*publishedDevice, [0]any](upsertDeviceQuery, "($%d, $%d, $%d, $%d, $%d, $%d)")

// GetMassInsertValues implements [dbutil.MassInsertable].
func (device *publishedDevice) GetMassInsertValues() [6]any {
	return [6]any{device.userID, device.deviceID, device.identityKey, device.signingKey, string(device.raw), false}
}

// putDevices stores devices' published keys. A device ID never changes its ed25519 key while it lives.
func (s *store) putDevices(ctx context.Context, devices []*publishedDevice) error {
	err := insertAll(ctx, s.Database, upsertDevices, devices, func(device *publishedDevice) storedDevice {
		return s.storedDevice(device.userID, device.deviceID)
	})
	if err != nil {
		return fmt.Errorf("failed to store devices: %w", err)
	}
	return nil
}

// signingKeys gives the ed25519 keys of the users' living devices.
func (s *store) signingKeys(ctx context.Context, users []id.UserID) (map[storedDevice]id.Ed25519, error) {
	type livingDevice struct {
		storedDevice
		signingKey id.Ed25519
	}
	living, err := queryAll(ctx, s, getSigningKeysQuery, users, func(row dbutil.Scannable) (d livingDevice, err error) {
		return d, row.Scan(&d.userID, &d.deviceID, &d.signingKey)
	})
	if err != nil {
		return nil, fmt.Errorf("failed to read the devices' signing keys: %w", err)
	}
	keys := make(map[storedDevice]id.Ed25519, len(living))
	for _, device := range living {
		keys[device.storedDevice] = device.signingKey
	}
	return keys, nil
}

// keepDevice undoes a device's deletion.
func (s *store) keepDevice(ctx context.Context, userID id.UserID, deviceID id.DeviceID) error {
	_, err := s.Exec(ctx, keepDeviceQuery, userID, deviceID)
	return err
}

// markDevicesDeleted marks all devices of the users as deleted.
func (s *store) markDevicesDeleted(ctx context.Context, users []id.UserID) error {
	if len(users) == 0 {
		return nil
	}
	return execAll(ctx, s, deleteDevicesQuery, users)
}
