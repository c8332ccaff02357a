package cryptohook

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

//go:embed upgrades/*.sql
var upgradeFiles embed.FS

const versionTable = "sendertrust_version"

var upgradeTable = dbutil.BuildUpgradeTable().WithFSPath(upgradeFiles, "upgrades").Finish()

// store is our tables, beside mautrix's own in the same database. Methods run in the transaction of their context, if any.
type store struct {
	*dbutil.Database
	// owner is the process's ownership of the database; nil in tests, and while the tables are made.
	owner *Ownership
}

func newStore(db *dbutil.Database, log dbutil.DatabaseLogger) *store {
	return &store{Database: db.Child(versionTable, upgradeTable, log)}
}

// write runs fn in a transaction of its own. Writers come one after the other, on PostgreSQL too: what one reads is what the one
// before it has committed. A process that does not own the database any more gets [ErrNotOwner].
func (s *store) write(ctx context.Context, fn func(ctx context.Context) error) error {
	return s.DoTxn(ctx, nil, func(ctx context.Context) error {
		if err := s.owner.fence(ctx, s.Database); err != nil {
			return err
		}
		return fn(ctx)
	})
}

func ignoreNoRows(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	return err
}

// Sender data.

const (
	selectSession = `
		SELECT session_id, sender_key, signing_key, room_id, sender, source, legacy_session, state, reason, device_id,
		       master_key, device_keys, retry_count, next_retry_time_ms, received_at_ms, updated_at_ms
		FROM sendertrust_session
	`
	getClaimsQuery     = selectSession + `WHERE session_id=$1 ORDER BY received_at_ms, sender_key`
	getClaimQuery      = selectSession + `WHERE session_id=$1 AND sender_key=$2`
	getDueSendersQuery = `SELECT DISTINCT sender FROM sendertrust_session WHERE next_retry_time_ms <= $1`
	// Only what came directly can be proven by what its sender publishes: anybody may have put any sender key into an export.
	getUnprovenOfQuery = selectSession + `WHERE sender=$1 AND state IN ('unknown_device', 'device_info') AND source='direct'`
	getDueOfQuery      = getUnprovenOfQuery + ` AND next_retry_time_ms <= $2`
	getNextRetryQuery  = `SELECT MIN(next_retry_time_ms) FROM sendertrust_session WHERE next_retry_time_ms > $1`
	upsertSessionQuery = `
		INSERT INTO sendertrust_session (
			session_id, sender_key, signing_key, room_id, sender, source, legacy_session, state, reason, device_id,
			master_key, device_keys, retry_count, next_retry_time_ms, received_at_ms, updated_at_ms
		) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
		ON CONFLICT (session_id, sender_key) DO UPDATE SET
			signing_key=excluded.signing_key, room_id=excluded.room_id, sender=excluded.sender, source=excluded.source,
			legacy_session=excluded.legacy_session, state=excluded.state, reason=excluded.reason, device_id=excluded.device_id,
			master_key=excluded.master_key, device_keys=excluded.device_keys, retry_count=excluded.retry_count,
			next_retry_time_ms=excluded.next_retry_time_ms, updated_at_ms=excluded.updated_at_ms
	`
	// What a signature of today's self-signing key ($3) proves, if $6 also of what another identity proved before.
	rejudgeSignedQuery = `
		UPDATE sendertrust_session SET state=$4, master_key=$2, updated_at_ms=$5
		WHERE sender=$1 AND state IN ('verification_violation', 'sender_unverified', 'sender_verified')
		  AND (state<>$4 OR master_key<>$2) AND (master_key=$2 OR $6) AND ` + signedToday + `
	`
	// What an identity proved that is not today's.
	rejudgeEarlierQuery = `
		UPDATE sendertrust_session SET state=$4, updated_at_ms=$5
		WHERE sender=$1 AND state IN ('verification_violation', 'sender_unverified', 'sender_verified')
		  AND master_key<>$2 AND state<>$4 AND NOT ($6 AND ` + signedToday + `)
	`
	// What today's identity proved by a self-signing key that it has replaced since, and does not prove by the new one.
	rejudgeRotatedQuery = `
		UPDATE sendertrust_session SET state='device_info', master_key='', retry_count=1, next_retry_time_ms=$4, updated_at_ms=$5
		WHERE sender=$1 AND state IN ('verification_violation', 'sender_unverified', 'sender_verified')
		  AND master_key=$2 AND NOT ` + signedToday + `
	`
	signedToday = `EXISTS (
		SELECT 1 FROM sendertrust_signature signed
		WHERE signed.user_id=sendertrust_session.sender AND signed.identity_key=sendertrust_session.sender_key
		  AND signed.signing_key=sendertrust_session.signing_key AND signed.self_signing_key=$3
	)`
)

func scanSession(row dbutil.Scannable) (*SenderData, error) {
	var sd SenderData
	var deviceKeys sql.NullString
	var nextRetry sql.NullInt64
	var received, updated int64
	err := row.Scan(
		&sd.SessionID, &sd.SenderKey, &sd.SigningKey, &sd.RoomID, &sd.Sender, &sd.Source, &sd.Legacy, &sd.State, &sd.Reason, &sd.DeviceID,
		&sd.MasterKey, &deviceKeys, &sd.RetryCount, &nextRetry, &received, &updated,
	)
	if err != nil {
		return nil, err
	}
	if deviceKeys.Valid {
		sd.DeviceKeys = json.RawMessage(deviceKeys.String)
	}
	if nextRetry.Valid {
		sd.NextRetry = time.UnixMilli(nextRetry.Int64)
	}
	sd.ReceivedAt, sd.UpdatedAt = time.UnixMilli(received), time.UnixMilli(updated)
	return &sd, nil
}

func (s *store) sessions(ctx context.Context, query string, args ...any) ([]*SenderData, error) {
	rows, err := s.Query(ctx, query, args...)
	list, err := dbutil.NewRowIterWithError(rows, scanSession, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read sender data: %w", err)
	}
	return list, nil
}

// claims gives every device's claim on the session, the first one first.
func (s *store) claims(ctx context.Context, sessionID id.SessionID) ([]*SenderData, error) {
	return s.sessions(ctx, getClaimsQuery, sessionID)
}

// claim gives one device's claim on the session, or nil.
func (s *store) claim(ctx context.Context, sessionID id.SessionID, senderKey id.SenderKey) (*SenderData, error) {
	sd, err := scanSession(s.QueryRow(ctx, getClaimQuery, sessionID, senderKey))
	if err = ignoreNoRows(err); err != nil {
		return nil, fmt.Errorf("failed to read sender data: %w", err)
	}
	return sd, nil
}

// putClaim stores a claim, and the signature that has proven it. The time at which it was first received stays.
func (s *store) putClaim(ctx context.Context, sd *SenderData) error {
	return s.putClaims(ctx, []*SenderData{sd})
}

// claimsPerStatement keeps a statement below the number of parameters that SQLite takes.
const claimsPerStatement = 500

var insertClaims = dbutil.NewMassInsertBuilder[*SenderData, [0]any](
	upsertSessionQuery, "($%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d)")

// GetMassInsertValues implements [dbutil.MassInsertable].
func (sd *SenderData) GetMassInsertValues() [16]any {
	return [16]any{
		sd.SessionID, sd.SenderKey, sd.SigningKey, sd.RoomID, sd.Sender, sd.Source, sd.Legacy, sd.State, sd.Reason, sd.DeviceID,
		sd.MasterKey, dbutil.StrPtr(string(sd.DeviceKeys)), sd.RetryCount, dbutil.UnixMilliPtr(sd.NextRetry), sd.ReceivedAt.UnixMilli(), sd.UpdatedAt.UnixMilli(),
	}
}

// putClaims stores claims of different sessions or devices.
func (s *store) putClaims(ctx context.Context, claims []*SenderData) error {
	signed := make(map[signature]struct{})
	for chunk := range slices.Chunk(claims, claimsPerStatement) {
		query, params := insertClaims.Build([0]any{}, chunk)
		if _, err := s.Exec(ctx, query, params...); err != nil {
			return fmt.Errorf("failed to store sender data: %w", err)
		}
		for _, sd := range chunk {
			for _, signer := range sd.signers {
				signed[signature{sd.Sender, sd.SenderKey, sd.SigningKey, signer}] = struct{}{}
			}
		}
	}
	for proof := range signed {
		if _, err := s.putSignature(ctx, proof); err != nil {
			return err
		}
	}
	return nil
}

// mergeClaim stores what a key that has just arrived says, unless more is known already. It returns what is stored now.
func (s *store) mergeClaim(ctx context.Context, arrived *SenderData) (*SenderData, error) {
	stored, err := s.claim(ctx, arrived.SessionID, arrived.SenderKey)
	if err != nil {
		return nil, err
	}
	merged := mergeSenderData(stored, arrived)
	if merged == stored {
		return stored, nil
	}
	return merged, s.putClaim(ctx, merged)
}

// claimForHolder gives the holder of a session a claim if it has none: it was stored before there were claims.
func (s *store) claimForHolder(ctx context.Context, sessionID id.SessionID, h *holder) error {
	stored, err := s.claim(ctx, sessionID, h.senderKey)
	if err != nil || stored != nil {
		return err
	}
	return s.putClaim(ctx, &SenderData{
		SessionID: sessionID, RoomID: h.roomID, SenderKey: h.senderKey, SigningKey: h.signingKey, Source: SourceImport, Legacy: true,
		State: StateUnknownDevice, ReceivedAt: time.UnixMilli(0), UpdatedAt: time.UnixMilli(0),
	})
}

// dueSenders gives whose sessions are to be looked at again before that time.
func (s *store) dueSenders(ctx context.Context, before time.Time) ([]id.UserID, error) {
	rows, err := s.Query(ctx, getDueSendersQuery, before.UnixMilli())
	senders, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[id.UserID], err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read whose sessions are due: %w", err)
	}
	return senders, nil
}

// nextRetry gives the time of the earliest retry that is scheduled after that time, or zero.
func (s *store) nextRetry(ctx context.Context, after time.Time) (time.Time, error) {
	var ms sql.NullInt64
	if err := s.QueryRow(ctx, getNextRetryQuery, after.UnixMilli()).Scan(&ms); err != nil || !ms.Valid {
		return time.Time{}, err
	}
	return time.UnixMilli(ms.Int64), nil
}

// Identities and devices.

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

// rejudge brings the proven sessions of a user in line with the user's identity of today, all in one pass: a statement each for
// what today's self-signing key has signed, for what an earlier identity proved, and for what nothing proves any more. The
// sessions that are not proven yet are walked through the steps again by the resolver.
func (s *store) rejudge(ctx context.Context, identity *Identity, anchor trustAnchor, now time.Time) error {
	today, earlier, at := anchor.stateOf(identity.MasterKey, identity), anchor.stateOf("", identity), now.UnixMilli()
	adopts := anchor.adopts(identity)
	for _, pass := range []struct {
		query  string
		params []any
	}{
		{rejudgeSignedQuery, []any{today, at, adopts}},
		{rejudgeEarlierQuery, []any{earlier, at, adopts}},
		{rejudgeRotatedQuery, []any{now.Add(firstBackoff).UnixMilli(), at}},
	} {
		params := append([]any{identity.UserID, identity.MasterKey, identity.SelfSigningKey}, pass.params...)
		if _, err := s.Exec(ctx, pass.query, params...); err != nil {
			return fmt.Errorf("failed to judge the sessions of %s anew: %w", identity.UserID, err)
		}
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

// signature is a fact: that key has signed the user's device with these keys, in the user's name. Whether it is the user's self-signing
// key is another matter.
type signature struct {
	userID         id.UserID
	senderKey      id.SenderKey
	signingKey     id.Ed25519
	selfSigningKey id.Ed25519
}

const (
	insertSignatureQuery = `
		INSERT INTO sendertrust_signature (user_id, identity_key, signing_key, self_signing_key) VALUES ($1, $2, $3, $4)
		ON CONFLICT (user_id, identity_key, signing_key, self_signing_key) DO NOTHING
	`
	getSignersQuery    = `SELECT self_signing_key FROM sendertrust_signature WHERE user_id=$1 AND identity_key=$2 AND signing_key=$3`
	getSignaturesQuery = `SELECT user_id, identity_key, signing_key, self_signing_key FROM sendertrust_signature WHERE user_id=$1`
)

// putSignature notes a signature that was checked, and says whether it is new.
func (s *store) putSignature(ctx context.Context, proof signature) (added bool, err error) {
	result, err := s.Exec(ctx, insertSignatureQuery, proof.userID, proof.senderKey, proof.signingKey, proof.selfSigningKey)
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

// noteSigners notes who has signed the device of a claim, and says whether any of it is news.
func (s *store) noteSigners(ctx context.Context, claim *SenderData) (news bool, err error) {
	for _, signer := range claim.signers {
		added, err := s.putSignature(ctx, signature{claim.Sender, claim.SenderKey, claim.SigningKey, signer})
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
	senderKey  id.SenderKey
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

// What mautrix stores, where its own methods do not say it.

const (
	getHolderQuery = `
		SELECT room_id, sender_key, signing_key FROM crypto_megolm_inbound_session
		WHERE account_id=$1 AND session_id=$2 AND session IS NOT NULL
	`
	isTrackedQuery  = `SELECT devices_outdated FROM crypto_tracked_user WHERE user_id=$1`
	getAccountQuery = `SELECT account_id, device_id FROM crypto_account`
	getTokenQuery   = `SELECT sync_token FROM crypto_account WHERE account_id=$1`
)

// holder is the device and the room that a stored Megolm session belongs to.
type holder struct {
	roomID     id.RoomID
	senderKey  id.SenderKey
	signingKey id.Ed25519
}

// holder gives who holds the session ID in mautrix's store, in whatever room; nil when there is no key of it.
func (s *store) holder(ctx context.Context, accountID string, sessionID id.SessionID) (*holder, error) {
	var h holder
	err := s.QueryRow(ctx, getHolderQuery, accountID, sessionID).Scan(&h.roomID, &h.senderKey, &h.signingKey)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("failed to look for another holder of session %s: %w", sessionID, err)
	}
	return &h, nil
}

// account gives what the database knows of the user's account, or nil for a new database. It refuses one that another account has used.
// mautrix's own crypto helper gives the account no name.
func (s *store) account(ctx context.Context, userID id.UserID) (*account, error) {
	rows, err := s.Query(ctx, getAccountQuery)
	accounts, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (a account, err error) {
		return a, row.Scan(&a.id, &a.deviceID)
	}, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read whose database it is: %w", err)
	}
	for _, stored := range accounts {
		if stored.id != "" && stored.id != userID.String() {
			return nil, fmt.Errorf("%w: it was made for %s, and the client is %s", ErrOtherAccount, stored.id, userID)
		}
	}
	switch len(accounts) {
	case 0:
		return nil, nil
	case 1:
		return &accounts[0], nil
	default:
		return nil, fmt.Errorf("%w: it was made for %d", ErrOtherAccount, len(accounts))
	}
}

type account struct {
	id       string
	deviceID id.DeviceID
}

// deviceListCurrent says whether mautrix tracks the user's devices and nothing was announced to have changed since.
func (s *store) deviceListCurrent(ctx context.Context, userID id.UserID) (bool, error) {
	var outdated bool
	err := s.QueryRow(ctx, isTrackedQuery, userID).Scan(&outdated)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return !outdated, err
}

// Withheld keys.

const (
	upsertWithheldQuery = `
		INSERT INTO sendertrust_withheld (session_id, sender, code, received_at_ms) VALUES ($1, $2, $3, $4)
		ON CONFLICT (sender, session_id) DO UPDATE SET code=excluded.code, received_at_ms=excluded.received_at_ms
	`
	getWithheldQuery   = `SELECT code FROM sendertrust_withheld WHERE sender=$1 AND session_id IN ($2, '') ORDER BY session_id DESC LIMIT 1`
	pruneWithheldQuery = `DELETE FROM sendertrust_withheld WHERE received_at_ms<$1`
)

func (s *store) putWithheld(ctx context.Context, sessionID id.SessionID, sender id.UserID, code event.RoomKeyWithheldCode, now time.Time) error {
	if _, err := s.Exec(ctx, upsertWithheldQuery, sessionID, sender, code, now.UnixMilli()); err != nil {
		return fmt.Errorf("failed to store why a key is withheld: %w", err)
	}
	return nil
}

// withheld gives the code by which that sender withholds the session's key from us, or nothing.
func (s *store) withheld(ctx context.Context, sessionID id.SessionID, sender id.UserID) (code event.RoomKeyWithheldCode, err error) {
	err = s.QueryRow(ctx, getWithheldQuery, sender, sessionID).Scan(&code)
	return code, ignoreNoRows(err)
}

// The inbox.

const (
	insertInboxQuery = `
		INSERT INTO sendertrust_inbox (event_id, seq, room_id, room_encrypted, received_at_ms, event, told)
		VALUES ($1, $2, $3, $4, $5, $6, false) ON CONFLICT (event_id) DO NOTHING
	`
	getInboxQuery    = `SELECT event_id, seq, room_id, room_encrypted, received_at_ms, event, told FROM sendertrust_inbox WHERE event IS NOT NULL AND late_session IS NULL AND seq>$1 ORDER BY seq LIMIT $2`
	markHandledQuery = `UPDATE sendertrust_inbox SET event=NULL WHERE event_id=$1`
	pruneInboxQuery  = `DELETE FROM sendertrust_inbox WHERE event IS NULL AND received_at_ms<$1`
	markLateQuery    = `UPDATE sendertrust_inbox SET told=true, late_session=$2 WHERE event_id=$1`
	getLateQuery     = `SELECT event_id FROM sendertrust_inbox WHERE late_session=$1 ORDER BY seq`
	wakeLateQuery    = `UPDATE sendertrust_inbox SET late_session=NULL, seq=$2 WHERE event_id=$1`
	giveUpLateQuery  = `UPDATE sendertrust_inbox SET event=NULL, late_session=NULL WHERE late_session IS NOT NULL AND received_at_ms<$1`
	lastSeqQuery     = `SELECT COALESCE(MAX(seq), 0) FROM sendertrust_inbox WHERE event IS NOT NULL AND late_session IS NULL`
)

// inboxEvent is a room event that handlers have yet to see.
type inboxEvent struct {
	eventID       id.EventID
	seq           int64
	roomID        id.RoomID
	roomEncrypted bool
	receivedAt    time.Time
	event         string
	// told: the handler was told that the event cannot be decrypted.
	told bool
	// retryAt is when an event that has to wait is tried again without being woken.
	retryAt time.Time
}

func scanInboxEvent(row dbutil.Scannable) (*inboxEvent, error) {
	var e inboxEvent
	var received int64
	err := row.Scan(&e.eventID, &e.seq, &e.roomID, &e.roomEncrypted, &received, &e.event, &e.told)
	e.receivedAt = time.UnixMilli(received)
	return &e, err
}

func (s *store) putInboxEvent(ctx context.Context, e *inboxEvent) error {
	_, err := s.Exec(ctx, insertInboxQuery, e.eventID, e.seq, e.roomID, e.roomEncrypted, e.receivedAt.UnixMilli(), e.event)
	if err != nil {
		return fmt.Errorf("failed to store event %s in the inbox: %w", e.eventID, err)
	}
	return nil
}

// pendingInbox gives the events after seq that wait for their handlers, in the order in which they came.
func (s *store) pendingInbox(ctx context.Context, seq int64, limit int) ([]*inboxEvent, error) {
	rows, err := s.Query(ctx, getInboxQuery, seq, limit)
	events, err := dbutil.NewRowIterWithError(rows, scanInboxEvent, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the inbox: %w", err)
	}
	return events, nil
}

func (s *store) markHandled(ctx context.Context, eventID id.EventID) error {
	_, err := s.Exec(ctx, markHandledQuery, eventID)
	return err
}

// markLate keeps an event whose handler was told that it cannot be decrypted, until the session's key comes.
func (s *store) markLate(ctx context.Context, eventID id.EventID, sessionID id.SessionID) error {
	_, err := s.Exec(ctx, markLateQuery, eventID, sessionID)
	return err
}

// wakeLate puts the events that wait for the session's key behind those that came meanwhile; next gives their new numbers.
func (s *store) wakeLate(ctx context.Context, sessionID id.SessionID, next func() int64) error {
	rows, err := s.Query(ctx, getLateQuery, sessionID)
	events, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[id.EventID], err).AsList()
	if err != nil {
		return fmt.Errorf("failed to look for events that wait for session %s: %w", sessionID, err)
	}
	for _, eventID := range events {
		if _, err = s.Exec(ctx, wakeLateQuery, eventID, next()); err != nil {
			return fmt.Errorf("failed to wake event %s: %w", eventID, err)
		}
	}
	return nil
}

// giveUpLate forgets events from before that time whose keys have not come.
func (s *store) giveUpLate(ctx context.Context, before time.Time) error {
	_, err := s.Exec(ctx, giveUpLateQuery, before.UnixMilli())
	return err
}

// prune forgets what nobody asks for any more: handled events and withheld notices from before that time.
func (s *store) prune(ctx context.Context, before time.Time) error {
	if _, err := s.Exec(ctx, pruneInboxQuery, before.UnixMilli()); err != nil {
		return err
	}
	_, err := s.Exec(ctx, pruneWithheldQuery, before.UnixMilli())
	return err
}

func (s *store) lastSeq(ctx context.Context) (seq int64, err error) {
	err = s.QueryRow(ctx, lastSeqQuery).Scan(&seq)
	return seq, err
}
