package cryptohook

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/tidwall/gjson"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// What is known of a user: for a bot that tells people who somebody is, and for the tables of a room's members.

// IdentityChange is a master key that a user came to publish.
type IdentityChange struct {
	MasterKey id.Ed25519
	// SeenAt is when we saw it first. Zero: before that was recorded.
	SeenAt time.Time
}

// DeviceReport is what is known of one device of a user.
type DeviceReport struct {
	DeviceID id.DeviceID
	// Name is what the user calls the device, empty if the homeserver does not say. Nobody has signed it.
	Name       string
	SigningKey id.Ed25519
	// SignedByOwner says that the user's self-signing key of today has signed the device.
	SignedByOwner bool
	// Deleted says that the homeserver no longer lists the device: it was logged out.
	Deleted bool
}

// What makes a user verified: see [UserReport].VerifiedBy.
const (
	VerifiedByPin       = "pin"       // the configuration pins today's master key, and our user-signing key has signed it
	VerifiedBySignature = "signature" // our user-signing key has signed today's master key
)

// UserReport is what is known of a user's identity and devices. Keys are unpadded base64, and empty when there are none.
type UserReport struct {
	UserID         id.UserID
	MasterKey      id.Ed25519
	FirstMasterKey id.Ed25519
	SelfSigningKey id.Ed25519
	Standing       Standing
	// VerifiedBy is [VerifiedByPin] or [VerifiedBySignature] for a user who is verified now, and empty for others.
	VerifiedBy string
	// Pinned says that the configuration pins a master key of this user: PinnedKey, be it today's or not.
	Pinned    bool
	PinnedKey id.Ed25519
	// Withdrawn says that the verification of today's master key was withdrawn.
	Withdrawn bool
	// WithdrawnKeys are the user's master keys, today's or former ones, whose verification was withdrawn and not renewed since.
	WithdrawnKeys []id.Ed25519
	// FirstSeen is when the first master key was seen. Zero: before that was recorded, or never.
	FirstSeen time.Time
	// Changes are the master keys that the user came to publish, the oldest first: the newest [MaxIdentityChanges] that were seen since
	// that is recorded. The first one is the first that was recorded, and no change.
	Changes []IdentityChange
	// Devices are sorted: living ones first, then by device ID.
	Devices []DeviceReport
	// Outdated says that the device list is known to be out of date, or that nobody has asked for it yet.
	Outdated bool
}

// MaxIdentityChanges is how many master keys of a user are remembered with the time when they were first seen.
const MaxIdentityChanges = 20

// UserStanding is a user's row in a table of a room's members.
type UserStanding struct {
	UserID id.UserID
	// Known says that the user's devices or identity were seen at some time.
	Known     bool
	Standing  Standing
	MasterKey id.Ed25519
	// Changed says that today's master key is not the first one that we saw of this user.
	Changed bool
	// Signed and Unsigned count the living devices that today's self-signing key has signed, and those that it has not.
	Signed, Unsigned int
	Outdated         bool
}

const (
	getDeviceReportsQuery = `
		SELECT device_id, signing_key, device_keys, deleted, EXISTS (
			SELECT 1 FROM sendertrust_sender sender JOIN sendertrust_signature signed ON signed.sender_id=sender.id AND signed.self_signing_key=$2
			WHERE sender.user_id=device.user_id AND sender.identity_key=device.identity_key AND sender.signing_key=device.signing_key
		)
		FROM sendertrust_device device WHERE user_id=$1 ORDER BY deleted, device_id
	`
	// The statements about many users have as many parameters in the place of the last one as there are users.
	getIdentitiesQuery = `
		SELECT user_id, master_key, first_master_key, self_signing_key, verified_by, was_verified, pinned_key
		FROM sendertrust_identity WHERE user_id IN ($1)
	`
	countDevicesQuery = `
		SELECT device.user_id, COUNT(*), COUNT(signed.sender_id) FROM sendertrust_device device
		LEFT JOIN sendertrust_identity identity ON identity.user_id=device.user_id
		LEFT JOIN sendertrust_sender sender
			ON sender.user_id=device.user_id AND sender.identity_key=device.identity_key AND sender.signing_key=device.signing_key
		LEFT JOIN sendertrust_signature signed ON signed.sender_id=sender.id AND signed.self_signing_key=identity.self_signing_key
		WHERE device.deleted=false AND device.user_id IN ($1) GROUP BY device.user_id
	`
	getOutdatedOfQuery = `SELECT user_id FROM crypto_tracked_user WHERE devices_outdated=true AND user_id IN ($1)`

	// perStatement keeps a statement below the number of parameters that databases take.
	perStatement = 500
)

// User gives what is known of a user, from what is stored: nobody is asked. It is nil if nothing is known.
func (h *Hook) User(ctx context.Context, userID id.UserID) (*UserReport, error) {
	identity, err := h.store.identity(ctx, userID)
	if err != nil {
		return nil, err
	}
	anchor := h.anchor()
	report := &UserReport{UserID: userID, Standing: anchor.judge(identity)}
	report.PinnedKey, report.Pinned = anchor.pins[userID]
	if identity != nil {
		report.MasterKey, report.FirstMasterKey, report.SelfSigningKey = identity.MasterKey, identity.FirstMasterKey, identity.SelfSigningKey
		report.VerifiedBy = anchor.verifiedBy(identity)
	}
	if report.WithdrawnKeys, err = h.store.withdrawnKeys(ctx, userID); err != nil {
		return nil, err
	}
	report.Withdrawn = slices.Contains(report.WithdrawnKeys, report.MasterKey)
	if report.Devices, err = h.store.deviceReports(ctx, userID, report.SelfSigningKey); err != nil {
		return nil, err
	}
	if identity == nil && len(report.Devices) == 0 && !report.Pinned {
		return nil, nil
	}
	keys, err := h.store.identityKeys(ctx, userID)
	if err != nil {
		return nil, err
	}
	for _, key := range keys {
		report.Changes = append(report.Changes, IdentityChange{key.masterKey, key.seenAt})
		if key.masterKey == report.FirstMasterKey {
			report.FirstSeen = key.seenAt
		}
	}
	_, outdated, err := h.store.deviceList(ctx, userID)
	report.Outdated = outdated || h.resolver.pending(userID)
	return report, err
}

// verifiedBy says by what an identity is verified, if it is. Our own is by its keys.
func (a trustAnchor) verifiedBy(identity *Identity) string {
	switch {
	case a.judge(identity) != StandingVerified || identity.UserID == a.userID:
		return ""
	case a.pins[identity.UserID] == identity.MasterKey:
		return VerifiedByPin
	default:
		return VerifiedBySignature
	}
}

func (s *store) deviceReports(ctx context.Context, userID id.UserID, selfSigningKey id.Ed25519) ([]DeviceReport, error) {
	rows, err := s.Query(ctx, getDeviceReportsQuery, userID, selfSigningKey)
	devices, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (device DeviceReport, err error) {
		var keys string
		err = row.Scan(&device.DeviceID, &device.SigningKey, &keys, &device.Deleted, &device.SignedByOwner)
		device.Name = gjson.Get(keys, "unsigned.device_display_name").Str
		return device, err
	}, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the devices of %s: %w", userID, err)
	}
	return devices, nil
}

// Standings gives what is known of many users, in a few statements for all of them. All users that are asked about are in the answer.
func (h *Hook) Standings(ctx context.Context, users []id.UserID) (map[id.UserID]UserStanding, error) {
	standings := make(map[id.UserID]UserStanding, len(users))
	for _, userID := range users {
		standings[userID] = UserStanding{UserID: userID, Standing: StandingUnverified, Outdated: h.resolver.pending(userID)}
	}
	for chunk := range slices.Chunk(slices.Collect(maps.Keys(standings)), perStatement) {
		if err := h.store.readStandings(ctx, h.anchor(), chunk, standings); err != nil {
			return nil, err
		}
	}
	return standings, nil
}

// readStandings puts into standings what is stored of these users.
func (s *store) readStandings(ctx context.Context, anchor trustAnchor, users []id.UserID, standings map[id.UserID]UserStanding) error {
	identities, err := queryAll(ctx, s, getIdentitiesQuery, users, scanIdentity)
	if err != nil {
		return err
	}
	for _, identity := range identities {
		standing := standings[identity.UserID]
		standing.Known, standing.MasterKey = true, identity.MasterKey
		standing.Standing, standing.Changed = anchor.judge(identity), identity.MasterKey != identity.FirstMasterKey
		standings[identity.UserID] = standing
	}
	counts, err := queryAll(ctx, s, countDevicesQuery, users, func(row dbutil.Scannable) (count UserStanding, err error) {
		var living int
		err = row.Scan(&count.UserID, &living, &count.Signed)
		count.Unsigned = living - count.Signed
		return count, err
	})
	if err != nil {
		return err
	}
	for _, count := range counts {
		standing := standings[count.UserID]
		standing.Known, standing.Signed, standing.Unsigned = true, count.Signed, count.Unsigned
		standings[count.UserID] = standing
	}
	outdated, err := queryAll(ctx, s, getOutdatedOfQuery, users, dbutil.ScanSingleColumn[id.UserID])
	if err != nil {
		return err
	}
	for _, userID := range outdated {
		standing := standings[userID]
		standing.Outdated = true
		standings[userID] = standing
	}
	return nil
}

// queryAll runs a statement whose only parameter stands for many values, perStatement at most.
func queryAll[V, T any](ctx context.Context, s *store, query string, values []V, scan dbutil.ConvertRowFn[T]) ([]T, error) {
	query, params := withMany(query, values)
	rows, err := s.Query(ctx, query, params...)
	list, err := dbutil.NewRowIterWithError(rows, scan, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to look %d up at once: %w", len(values), err)
	}
	return list, nil
}

// Recheck asks the homeserver for the keys that these users publish now, in one query for 250 of them, and returns when all their sessions
// were judged by the answer. It fails with [UnansweredError] when there was no answer about some; the others' sessions were judged.
func (h *Hook) Recheck(ctx context.Context, users []id.UserID) error {
	wanted := slices.Compact(slices.Sorted(slices.Values(users)))
	var unanswered []id.UserID
	for chunk := range slices.Chunk(wanted, usersPerQuery) {
		answered, _ := h.resolver.query(ctx, chunk)
		for _, userID := range chunk {
			if _, ok := answered[userID]; !ok {
				unanswered = append(unanswered, userID)
			}
		}
	}
	if _, err := h.resolver.judgeAnswered(ctx); err != nil {
		return fmt.Errorf("failed to judge sessions anew: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(unanswered) > 0 {
		return &UnansweredError{unanswered}
	}
	return nil
}

// UnansweredError is what [Hook.Recheck] fails with when there was no answer about some of the users.
type UnansweredError struct{ Users []id.UserID }

func (e *UnansweredError) Error() string {
	return fmt.Sprintf("there was no answer about the keys of %d users", len(e.Users))
}
