package cryptohook

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// Sessions from before the hook: a database of mautrix's own has Megolm sessions of whose senders nothing was kept. Once, before
// anything else, each gets a claim of what is still known (matrix-rust-sdk #3547): how the key came, and for one that came directly
// whose device that was. Those are looked at once, when what their senders publish was asked for, and then whenever it is again; the
// others stay legacy.

const (
	migrationName      = "legacy_sessions"
	sessionsPerBatch   = 1000
	migrationLogsEvery = 5 * time.Second

	getMigrationQuery = `SELECT cursor, done FROM sendertrust_migration WHERE name=$1`
	putMigrationQuery = `
		INSERT INTO sendertrust_migration (name, cursor, done) VALUES ($1, $2, $3)
		ON CONFLICT (name) DO UPDATE SET cursor=excluded.cursor, done=excluded.done
	`
	// A session that somebody claims has its holder's claim, too: see claimForHolder.
	getUnclaimedQuery = `
		SELECT session_id, sender_key, COALESCE(signing_key, ''), room_id, key_source, source_user, received_at, EXISTS (
			SELECT 1 FROM sendertrust_claim claim WHERE claim.session_id=held.session_id
		)
		FROM crypto_megolm_inbound_session held
		WHERE account_id=$1 AND session_id>$2 AND session IS NOT NULL
		ORDER BY session_id LIMIT $3
	`
	countHeldQuery       = `SELECT COUNT(*) FROM crypto_megolm_inbound_session WHERE account_id=$1 AND session_id>$2`
	getDeviceOwnersQuery = `SELECT user_id, identity_key, signing_key FROM crypto_device`
	// What mautrix has kept of devices lacks their signatures.
	markAllOutdatedQuery = `UPDATE crypto_tracked_user SET devices_outdated=true WHERE devices_outdated=false`
)

// heldSession is a Megolm session as mautrix stores it.
type heldSession struct {
	claim      SenderData
	keySource  id.KeySource
	sourceUser id.UserID
	claimed    bool
}

func scanHeldSession(row dbutil.Scannable) (*heldSession, error) {
	var held heldSession
	var received sql.NullTime
	c := &held.claim
	err := row.Scan(&c.SessionID, &c.SenderKey, &c.SigningKey, &c.RoomID, &held.keySource, &held.sourceUser, &received, &held.claimed)
	c.ReceivedAt = received.Time
	return &held, err
}

// migrate gives every session from before the hook its claim. It goes on where a former process was stopped.
func (h *Hook) migrate(ctx context.Context) error {
	cursor, done, err := h.store.migration(ctx)
	if err != nil || done {
		return err
	}
	var left int
	if err = h.store.QueryRow(ctx, countHeldQuery, h.uow.AccountID, cursor).Scan(&left); err != nil {
		return fmt.Errorf("failed to count the sessions from before the hook: %w", err)
	}
	owners, err := h.store.deviceOwners(ctx)
	if err != nil {
		return err
	}
	log := h.log.With().Str("component", "migration").Logger()
	if err = h.store.write(ctx, h.store.markAllOutdated); err != nil {
		return fmt.Errorf("failed to have the device lists from before the hook asked for anew: %w", err)
	}
	if left > 0 {
		log.Info().Int("sessions", left).Msg("Noting what is known of the senders of sessions from before the hook")
	}
	logged, migrated, total := h.clock(), 0, left
	for !done {
		var batch int
		err = h.store.write(ctx, func(ctx context.Context) (err error) {
			cursor, batch, done, err = h.migrateBatch(ctx, cursor, owners)
			return err
		})
		if err != nil {
			return fmt.Errorf("failed to migrate the sessions from before the hook: %w", err)
		}
		migrated += batch
		if now := h.clock(); now.Sub(logged) >= migrationLogsEvery {
			logged = now
			log.Info().Int("migrated", migrated).Int("sessions", total).Msg("Still noting what is known of senders")
		}
	}
	if total > 0 {
		log.Info().Int("migrated", migrated).Int("sessions", total).Msg("Noted what is known of the senders of all sessions from before the hook")
	}
	return nil
}

// migrateBatch gives claims to the sessions after the cursor, and moves it on in the same transaction.
func (h *Hook) migrateBatch(ctx context.Context, cursor id.SessionID, owners map[deviceKeyPair]id.UserID) (next id.SessionID, migrated int, done bool, err error) {
	rows, err := h.store.Query(ctx, getUnclaimedQuery, h.uow.AccountID, cursor, sessionsPerBatch)
	batch, err := dbutil.NewRowIterWithError(rows, scanHeldSession, err).AsList()
	if err != nil {
		return cursor, 0, false, err
	}
	var claims []*SenderData
	for _, held := range batch {
		cursor = held.claim.SessionID
		if !held.claimed {
			claims = append(claims, h.legacyClaim(held, owners))
		}
	}
	if err = h.store.putClaims(ctx, claims); err != nil {
		return cursor, 0, false, err
	}
	done = len(batch) < sessionsPerBatch
	_, err = h.store.Exec(ctx, putMigrationQuery, migrationName, cursor, done)
	return cursor, len(claims), done, err
}

// legacyClaim is what is still known of a session from before the hook.
func (h *Hook) legacyClaim(held *heldSession, owners map[deviceKeyPair]id.UserID) *SenderData {
	now := h.clock()
	claim := &held.claim
	claim.Source, claim.Legacy, claim.State, claim.UpdatedAt = sourceOf(held.keySource), true, StateUnknownDevice, now
	if claim.ReceivedAt.IsZero() {
		claim.ReceivedAt = now
	}
	if claim.Source != SourceDirect {
		return claim
	}
	if claim.SenderKey == h.mach.GetAccount().IdentityKey() {
		h.claimOwn(claim)
		return claim
	}
	if claim.Sender = held.sourceUser; claim.Sender == "" {
		// A device that was deleted since still says whose it was. It proves nothing: only a device that lives does.
		claim.Sender = owners[deviceKeyPair{claim.SenderKey, claim.SigningKey}]
	}
	if claim.Sender != "" {
		// One try; most of the devices are long gone, and nobody is to ask for them twelve times.
		claim.RetryCount, claim.NextRetry = maxRetries, now
	}
	return claim
}

// claimOwn makes a claim that of a session which this very device has made.
func (h *Hook) claimOwn(claim *SenderData) {
	claim.Legacy, claim.Sender, claim.DeviceID, claim.State = false, h.client.UserID, h.client.DeviceID, StateDeviceInfo
	if anchor := h.anchor(); anchor.masterKey != "" {
		claim.State, claim.MasterKey, claim.signers = StateSenderVerified, anchor.masterKey, []signer{{key: anchor.selfSigningKey}}
	}
}

// markAllOutdated has verdicts wait for what users publish whom mautrix has asked for already.
func (s *store) markAllOutdated(ctx context.Context) error {
	_, err := s.Exec(ctx, markAllOutdatedQuery)
	return err
}

// migration gives how far the migration is.
func (s *store) migration(ctx context.Context) (cursor id.SessionID, done bool, err error) {
	err = s.QueryRow(ctx, getMigrationQuery, migrationName).Scan(&cursor, &done)
	if errors.Is(err, sql.ErrNoRows) {
		return "", false, nil
	} else if err != nil {
		return "", false, fmt.Errorf("failed to read how far the migration is: %w", err)
	}
	return cursor, done, nil
}

// deviceKeyPair is what tells devices apart in a Megolm session.
type deviceKeyPair struct {
	senderKey  id.SenderKey
	signingKey id.Ed25519
}

// deviceOwners gives whose devices mautrix knows, those that were deleted included.
func (s *store) deviceOwners(ctx context.Context) (map[deviceKeyPair]id.UserID, error) {
	owners := make(map[deviceKeyPair]id.UserID)
	rows, err := s.Query(ctx, getDeviceOwnersQuery)
	err = dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (owner id.UserID, err error) {
		var keys deviceKeyPair
		if err = row.Scan(&owner, &keys.senderKey, &keys.signingKey); err == nil {
			owners[keys] = owner
		}
		return owner, err
	}, err).Iter(func(id.UserID) (bool, error) { return true, nil })
	if err != nil {
		return nil, fmt.Errorf("failed to read the devices that mautrix knows: %w", err)
	}
	return owners, nil
}
