package cryptohook

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// How stored sessions are judged again: those that are not proven by walking the steps, those that are by what today's identity proves.

// judgeUnproven walks the steps again for the unproven sessions of the users, in one transaction: a retry for the claims that were
// tried, whose counts go up; for the others a look because something was learnt, which changes nothing if it leads nowhere. Sessions
// of the same device share a walk.
func (h *Hook) judgeUnproven(ctx context.Context, users []id.UserID, tried map[claimKey]struct{}) (err error) {
	var change Change
	err = h.store.write(ctx, func(ctx context.Context) (err error) {
		change, err = h.judgeStored(ctx, users, tried)
		return err
	})
	if err == nil {
		h.changed(change)
	}
	return err
}

// judgeStored is judgeUnproven within a transaction. It gives what has changed.
func (h *Hook) judgeStored(ctx context.Context, users []id.UserID, tried map[claimKey]struct{}) (change Change, err error) {
	for _, userID := range users {
		if err = h.judgeUser(ctx, userID, tried, &change); err != nil {
			return change, err
		}
	}
	return change, nil
}

// judgeUser walks the steps again for a user's unproven sessions. What any copy of a device's keys proves was noted when it came, so the
// order of the sessions makes no difference.
func (h *Hook) judgeUser(ctx context.Context, userID id.UserID, tried map[claimKey]struct{}, change *Change) error {
	h.counters.judgedAgain.Add(1)
	unproven, err := h.store.sessions(ctx, getUnprovenOfQuery, userID)
	if err != nil {
		return err
	}
	var judged []*SenderData
	walks := make(map[walkKey]*derivation)
	for _, stored := range unproven {
		_, retry := tried[claimKey{stored.SessionID, stored.SenderKey}]
		derived, err := h.lookAgain(ctx, walks, stored)
		if err != nil {
			return err
		}
		learnt := derived.State != stored.State || derived.Reason != stored.Reason
		if !retry && !learnt {
			continue
		}
		if learnt {
			change.Sessions = append(change.Sessions, stored.SessionID)
		}
		if derived.State == StateRejected {
			if err = h.reject(ctx, derived); err != nil {
				return err
			}
		}
		judged = append(judged, derived)
	}
	return h.store.putClaims(ctx, judged)
}

// judgePending judges the user's sessions now if something was learnt that the resolver has yet to judge them by: what arrives is compared
// with what is known, not with what was. Within one transaction that is done once for what was learnt, not for each of a thousand keys.
func (h *Hook) judgePending(ctx context.Context, userID id.UserID) error {
	learnt := h.resolver.toJudge(userID)
	if learnt == 0 || h.judgedPending.done(h.store.Execable(ctx), userID, learnt) {
		return nil
	}
	change, err := h.judgeStored(ctx, []id.UserID{userID}, nil)
	h.tellAfterCommit(change)
	return err
}

// pendingJudged is what judgePending has done in the transaction that is open. Only that touches it.
type pendingJudged struct {
	transaction dbutil.Execable
	learnt      map[id.UserID]int
}

// done says whether it was done already in this transaction, and notes that it is now.
func (p *pendingJudged) done(transaction dbutil.Execable, userID id.UserID, learnt int) bool {
	if p.transaction != transaction {
		p.transaction, p.learnt = transaction, make(map[id.UserID]int)
	}
	if p.learnt[userID] == learnt {
		return true
	}
	p.learnt[userID] = learnt
	return false
}

// rejudgeProven brings a user's proven sessions in line with what is known now.
func (h *Hook) rejudgeProven(ctx context.Context, userID id.UserID) error {
	identity, err := h.store.identity(ctx, userID)
	if err != nil || identity == nil {
		return err
	}
	return h.store.rejudge(ctx, identity, h.anchor(), h.clock())
}

// walkKey is what a walk rests on besides the user: sessions that share it are judged alike.
type walkKey struct {
	senderKey  id.SenderKey
	signingKey id.Ed25519
	deviceKeys string
}

func (h *Hook) lookAgain(ctx context.Context, walks map[walkKey]*derivation, stored *SenderData) (*SenderData, error) {
	now := h.clock()
	key := walkKey{stored.SenderKey, stored.SigningKey, string(stored.deviceInfo())}
	walk := walks[key]
	if walk == nil {
		walk = &derivation{
			caches: h.store, anchor: h.anchor(), now: now, queried: true, current: true, embedded: stored.deviceInfo(), data: *stored,
		}
		if _, err := walk.derive(ctx); err != nil {
			return nil, err
		}
		walk.noteSigners()
		walks[key] = walk
		zerolog.Ctx(ctx).Debug().
			Stringer("session_id", stored.SessionID).Stringer("sender", stored.Sender).Bytes("steps", walk.path).
			Str("old_state", string(stored.State)).Str("state", string(walk.data.State)).Msg("Looked at a device's sessions again")
	}
	derived := walk.conclude(stored)
	derived.UpdatedAt = now
	return derived, nil
}

// reject takes the key of a session away whose device keys are forged (step H), unless it is another device's, too.
func (h *Hook) reject(ctx context.Context, rejected *SenderData) error {
	zerolog.Ctx(ctx).Error().
		Stringer("session_id", rejected.SessionID).Stringer("sender", rejected.Sender).Stringer("device_id", rejected.DeviceID).
		Msg("Rejecting a session: " + rejected.Reason)
	claims, err := h.store.claims(ctx, rejected.SessionID)
	if err != nil {
		return err
	}
	for _, claim := range claims {
		if claim.SenderKey != rejected.SenderKey && claim.State != StateRejected {
			return nil
		}
	}
	return h.uow.SQLCryptoStore.RedactGroupSession(ctx, rejected.RoomID, rejected.SessionID, rejected.Reason)
}

const (
	// What a signature of today's self-signing key ($3) proves, if $6 also of what another identity proved before.
	rejudgeSignedQuery = `
		UPDATE sendertrust_claim SET state=$4, master_key=$2, updated_at_ms=$5
		WHERE sender_id IN (SELECT id FROM sendertrust_sender WHERE user_id=$1) AND state IN ('verification_violation', 'sender_unverified', 'sender_verified')
		  AND (state<>$4 OR master_key<>$2) AND (master_key=$2 OR $6) AND ` + signedToday + `
	`
	// What an identity proved that is not today's.
	rejudgeEarlierQuery = `
		UPDATE sendertrust_claim SET state=$4, updated_at_ms=$5
		WHERE sender_id IN (SELECT id FROM sendertrust_sender WHERE user_id=$1) AND state IN ('verification_violation', 'sender_unverified', 'sender_verified')
		  AND master_key<>$2 AND state<>$4 AND NOT ($6 AND ` + signedToday + `)
	`
	// What today's identity proved by a self-signing key that it has replaced since, and does not prove by the new one.
	rejudgeRotatedQuery = `
		UPDATE sendertrust_claim SET state='device_info', master_key='', retry_count=1, next_retry_time_ms=$4, updated_at_ms=$5
		WHERE sender_id IN (SELECT id FROM sendertrust_sender WHERE user_id=$1) AND state IN ('verification_violation', 'sender_unverified', 'sender_verified')
		  AND master_key=$2 AND NOT ` + signedToday + `
	`
	getProvenQuery = `
		SELECT DISTINCT user_id FROM sendertrust_sender WHERE user_id IN ($1) AND EXISTS (
			SELECT 1 FROM sendertrust_claim WHERE sender_id=id AND state IN ('verification_violation', 'sender_unverified', 'sender_verified')
		)
	`
	signedToday = `EXISTS (
		SELECT 1 FROM sendertrust_signature signed
		WHERE signed.sender_id=sendertrust_claim.sender_id AND signed.self_signing_key=$3
	)`
)

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

// rejudgeAll is rejudge for many users, perStatement at most. Most have no proven sessions.
func (s *store) rejudgeAll(ctx context.Context, identities []*Identity, anchor trustAnchor, now time.Time) error {
	users := make([]id.UserID, len(identities))
	for i, identity := range identities {
		users[i] = identity.UserID
	}
	proven, err := queryAll(ctx, s, getProvenQuery, users, dbutil.ScanSingleColumn[id.UserID])
	if err != nil {
		return fmt.Errorf("failed to read whose sessions are proven: %w", err)
	}
	for _, identity := range identities {
		if !slices.Contains(proven, stored(s.Database, identity.UserID)) {
			continue
		}
		if err = s.rejudge(ctx, identity, anchor, now); err != nil {
			return err
		}
	}
	return nil
}
