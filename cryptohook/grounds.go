package cryptohook

import (
	"context"
	"database/sql"
	"fmt"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// ground is a claim on a session with what else a verdict by it rests on, as all of it was at one moment.
type ground struct {
	*SenderData
	// identity is that of the claim's sender; nil if none is known.
	identity *Identity
	// tracked says that mautrix tracks the sender's devices, outdated that it was announced that they have changed since they were seen.
	tracked, outdated bool
}

const getGroundsQuery = `
	SELECT claim.session_id, claim.sender_key, claim.signing_key, claim.room_id, claim.sender, claim.source, claim.legacy_session, claim.state,
	       claim.reason, claim.device_id, claim.master_key, claim.device_keys, claim.embedded, claim.retry_count, claim.next_retry_time_ms,
	       claim.received_at_ms, claim.updated_at_ms, tracked.devices_outdated,
	       identity.user_id, identity.master_key, identity.first_master_key, identity.self_signing_key, identity.verified_by,
	       identity.was_verified, identity.pinned_key
	FROM sendertrust_session claim
	LEFT JOIN sendertrust_identity identity ON identity.user_id=claim.sender
	LEFT JOIN crypto_tracked_user tracked ON tracked.user_id=claim.sender
	WHERE claim.session_id=` + unguessed + ` ORDER BY claim.received_at_ms, claim.sender_key
`

// grounds gives every device's claim on the session, the first one first, with what is known of their senders.
func (s *store) grounds(ctx context.Context, sessionID id.SessionID) ([]ground, error) {
	rows, err := s.Query(ctx, getGroundsQuery, sessionID)
	list, err := dbutil.NewRowIterWithError(rows, scanGround, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read what the verdict on a session rests on: %w", err)
	}
	return list, nil
}

// groundsNow gives the living claims on the session with what else a verdict rests on, and says whether that may change at once: see awaitsKeys.
// What a key query stores after they were read, and before its end is known here, is read as well.
func (h *Hook) groundsNow(ctx context.Context, sessionID id.SessionID) (living []ground, awaits bool, err error) {
	for range 3 {
		learnt := h.learnt.Load()
		grounds, err := h.store.grounds(ctx, sessionID)
		if err != nil {
			return nil, false, err
		}
		living = livingClaims(grounds)
		if awaits = h.awaitsKeys(living); h.learnt.Load() == learnt {
			break
		}
	}
	return living, awaits, nil
}

func scanGround(row dbutil.Scannable) (g ground, err error) {
	var outdated, wasVerified sql.NullBool
	var userID, masterKey, firstMasterKey, selfSigningKey, verifiedBy, pinnedKey sql.NullString
	g.SenderData, err = scanSessionAnd(row, &outdated, &userID, &masterKey, &firstMasterKey, &selfSigningKey, &verifiedBy, &wasVerified, &pinnedKey)
	g.tracked, g.outdated = outdated.Valid, outdated.Bool
	if userID.Valid {
		g.identity = &Identity{
			UserID: id.UserID(userID.String), MasterKey: id.Ed25519(masterKey.String), FirstMasterKey: id.Ed25519(firstMasterKey.String),
			SelfSigningKey: id.Ed25519(selfSigningKey.String), VerifiedBy: id.Ed25519(verifiedBy.String), WasVerified: wasVerified.Bool,
			PinnedKey: id.Ed25519(pinnedKey.String),
		}
	}
	return g, err
}

// claimsOf gives the claims alone.
func claimsOf(grounds []ground) []*SenderData {
	claims := make([]*SenderData, len(grounds))
	for i, g := range grounds {
		claims[i] = g.SenderData
	}
	return claims
}
