package cryptohook

import (
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"go.mau.fi/util/dbutil"
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
	// failures counts the transactions that failed.
	failures atomic.Uint64
	// noted are the devices and signatures that are noted, by [digestOfSigners]. With any failure it is forgotten: what was noted may have been
	// undone, or somebody has put another database in the place of this one.
	noted *digests
}

func newStore(db *dbutil.Database, log dbutil.DatabaseLogger) *store {
	return &store{Database: db.Child(versionTable, upgradeTable, log), noted: newDigests()}
}

// write runs fn in a transaction of its own. Writers come one after the other, on PostgreSQL too: what one reads is what the one
// before it has committed. A process that does not own the database any more gets [ErrNotOwner].
func (s *store) write(ctx context.Context, fn func(ctx context.Context) error) error {
	err := s.owner.Write(ctx, s.Database, fn)
	if err != nil {
		s.noted.clear()
	}
	if err != nil && ctx.Err() == nil {
		s.failures.Add(1)
	}
	return err
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
		       master_key, device_keys, embedded, retry_count, next_retry_time_ms, received_at_ms, updated_at_ms
		FROM sendertrust_session
	`
	getClaimsQuery     = selectSession + `WHERE session_id=` + unguessed + ` ORDER BY received_at_ms, sender_key`
	getDueSendersQuery = `SELECT DISTINCT sender FROM sendertrust_session WHERE next_retry_time_ms <= $1`
	// Only what came directly can be proven by what its sender publishes: anybody may have put any sender key into an export.
	getUnprovenOfQuery = selectSession + `WHERE sender=` + unguessed + ` AND state IN ('unknown_device', 'device_info') AND source='direct'`
	getDueOfQuery      = getUnprovenOfQuery + ` AND next_retry_time_ms <= $2`
	getNextRetryQuery  = `SELECT MIN(next_retry_time_ms) FROM sendertrust_claim WHERE next_retry_time_ms > $1`
	hastenQuery        = `UPDATE sendertrust_claim SET next_retry_time_ms=$1 WHERE next_retry_time_ms > $1 AND updated_at_ms > $1`
	insertSenderQuery  = `
		INSERT INTO sendertrust_sender (user_id, identity_key, signing_key) VALUES ($1, $2, $3)
		ON CONFLICT (user_id, identity_key, signing_key) DO NOTHING
	`
	upsertClaimQuery = `
		INSERT INTO sendertrust_claim (
			session_id, sender_id, room_id, source, legacy_session, state, reason, device_id,
			master_key, device_keys, embedded, retry_count, next_retry_time_ms, received_at_ms, updated_at_ms
		) VALUES ($1, ` + senderOfClaim + `, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
		ON CONFLICT (session_id, sender_id) DO UPDATE SET
			room_id=excluded.room_id, source=excluded.source, legacy_session=excluded.legacy_session, state=excluded.state,
			reason=excluded.reason, device_id=excluded.device_id, master_key=excluded.master_key, device_keys=excluded.device_keys,
			embedded=excluded.embedded, retry_count=excluded.retry_count,
			next_retry_time_ms=excluded.next_retry_time_ms, updated_at_ms=excluded.updated_at_ms
	`
	senderOfClaim    = `(SELECT id FROM sendertrust_sender WHERE user_id=$2 AND identity_key=$3 AND signing_key=$4)`
	deleteClaimQuery = `
		DELETE FROM sendertrust_claim WHERE session_id=$1 AND sender_id=` + senderOfClaim + `
	`
)

func scanSession(row dbutil.Scannable) (*SenderData, error) { return scanSessionAnd(row) }

// scanSessionAnd is scanSession for a row that has more after that.
func scanSessionAnd(row dbutil.Scannable, more ...any) (*SenderData, error) {
	var sd SenderData
	var deviceKeys sql.NullString
	var nextRetry sql.NullInt64
	var received, updated int64
	err := row.Scan(append([]any{
		&sd.SessionID, &sd.SenderKey, &sd.SigningKey, &sd.RoomID, &sd.Sender, &sd.Source, &sd.Legacy, &sd.State, &sd.Reason, &sd.DeviceID,
		&sd.MasterKey, &deviceKeys, &sd.Embedded, &sd.RetryCount, &nextRetry, &received, &updated,
	}, more...)...)
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
	claims, err := s.claims(ctx, sessionID)
	for _, claim := range claims {
		if claim.SenderKey == senderKey {
			return claim, nil
		}
	}
	return nil, err
}

// putClaim stores a claim, and the signature that has proven it. The time at which it was first received stays.
func (s *store) putClaim(ctx context.Context, sd *SenderData) error {
	return s.putClaims(ctx, []*SenderData{sd})
}

var insertClaims = dbutil.NewMassInsertBuilder[*SenderData, [0]any](
	strings.Replace(upsertClaimQuery, senderOfClaim, "$2, $3, $4", 1),
	"($%d, (SELECT id FROM sendertrust_sender WHERE user_id=$%d AND identity_key=$%d AND signing_key=$%d), $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d, $%d)")

// GetMassInsertValues implements [dbutil.MassInsertable].
func (sd *SenderData) GetMassInsertValues() [17]any {
	return [17]any{
		sd.SessionID, sd.Sender, sd.SenderKey, sd.SigningKey, sd.RoomID, sd.Source, sd.Legacy, sd.State, sd.Reason, sd.DeviceID,
		sd.MasterKey, dbutil.StrPtr(string(sd.DeviceKeys)), sd.Embedded, sd.RetryCount, dbutil.UnixMilliPtr(sd.NextRetry), sd.ReceivedAt.UnixMilli(), sd.UpdatedAt.UnixMilli(),
	}
}

// putClaims stores claims of different sessions or devices.
func (s *store) putClaims(ctx context.Context, claims []*SenderData) error {
	news := make(map[signature]json.RawMessage)
	for _, sd := range claims {
		news[signature{sd.Sender, sd.SenderKey, sd.SigningKey, ""}] = nil
		for _, signer := range sd.signers {
			news[signature{sd.Sender, sd.SenderKey, sd.SigningKey, signer.key}] = signer.object
		}
	}
	for proof, object := range news {
		if _, err := s.putSignature(ctx, proof, object); err != nil {
			return err
		}
	}
	return s.upsertClaims(ctx, claims)
}

// upsertClaims stores claims of devices that are noted.
func (s *store) upsertClaims(ctx context.Context, claims []*SenderData) error {
	for _, claim := range claims {
		delete(foresightOf(ctx).unclaimed, claim.SessionID)
	}
	err := insertAll(ctx, s.Database, insertClaims, claims, func(claim *SenderData) [4]string {
		return [4]string{claim.SessionID.String(), stored(s.Database, claim.Sender.String()), claim.SenderKey.String(), claim.SigningKey.String()}
	})
	if err != nil {
		return fmt.Errorf("failed to store sender data: %w", err)
	}
	return nil
}

// mergeClaim stores what a key that has just arrived says, unless more is known already. It returns what is stored now. The device, and who has
// signed it, are noted by the caller before: see noteSigners.
func (s *store) mergeClaim(ctx context.Context, arrived *SenderData) (merged *SenderData, err error) {
	var stored *SenderData
	if !foresightOf(ctx).unclaimed.has(arrived.SessionID) {
		if stored, err = s.claim(ctx, arrived.SessionID, arrived.SenderKey); err != nil {
			return nil, err
		}
	}
	merged = mergeSenderData(stored, arrived)
	if merged == stored {
		return stored, nil
	}
	if stored != nil && (stored.Sender != merged.Sender || stored.SigningKey != merged.SigningKey) {
		// It is known now whose device it is.
		if _, err = s.Exec(ctx, deleteClaimQuery, stored.SessionID, stored.Sender, stored.SenderKey, stored.SigningKey); err != nil {
			return nil, fmt.Errorf("failed to replace sender data: %w", err)
		}
		merged.ReceivedAt = stored.ReceivedAt
	}
	return merged, s.upsertClaims(ctx, []*SenderData{merged})
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

// hasten makes due what was scheduled by a clock that was ahead.
func (s *store) hasten(ctx context.Context, now time.Time) error {
	return s.write(ctx, func(ctx context.Context) error {
		_, err := s.Exec(ctx, hastenQuery, now.UnixMilli())
		return err
	})
}

// nextRetry gives the time of the earliest retry that is scheduled after that time, or zero.
func (s *store) nextRetry(ctx context.Context, after time.Time) (time.Time, error) {
	var ms sql.NullInt64
	if err := s.QueryRow(ctx, getNextRetryQuery, after.UnixMilli()).Scan(&ms); err != nil || !ms.Valid {
		return time.Time{}, err
	}
	return time.UnixMilli(ms.Int64), nil
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
	tracked, outdated, err := s.deviceList(ctx, userID)
	return tracked && !outdated, err
}

// deviceList says whether mautrix tracks the user's devices, and whether it was announced that they have changed since they were seen.
func (s *store) deviceList(ctx context.Context, userID id.UserID) (tracked, outdated bool, err error) {
	err = s.QueryRow(ctx, isTrackedQuery, userID).Scan(&outdated)
	if errors.Is(err, sql.ErrNoRows) {
		return false, false, nil
	}
	return err == nil, outdated, err
}
