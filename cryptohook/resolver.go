package cryptohook

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/id"
)

// resolver does what needs the network: it asks for the keys of users whose device lists are out of date, and of senders whose
// sessions wait for them (steps C and F, and every retry), then walks the steps again.
type resolver struct {
	hook *Hook
	wake chan struct{}

	mu sync.Mutex
	// outdated are the users whose keys are to be asked for, with the retries of those that failed.
	outdated map[id.UserID]*attempt
	// answered counts, for users whose sessions are not judged again yet, how often a key query, whoever made it, told something.
	answered map[id.UserID]int
}

type attempt struct {
	count int
	next  time.Time
}

const (
	usersPerQuery   = 250
	sessionsPerPass = 500
)

func newResolver(hook *Hook) *resolver {
	return &resolver{
		hook: hook, wake: make(chan struct{}, 1),
		outdated: make(map[id.UserID]*attempt), answered: make(map[id.UserID]int),
	}
}

func (r *resolver) signal() { notify(r.wake) }

// ask has the keys of these users asked for as soon as possible.
func (r *resolver) ask(users ...id.UserID) {
	r.mu.Lock()
	for _, userID := range users {
		r.outdated[userID] = &attempt{}
	}
	r.mu.Unlock()
	r.signal()
}

// judgeAgain has the unproven sessions of these users looked at again: something about them was learnt.
func (r *resolver) judgeAgain(users []id.UserID) {
	r.mu.Lock()
	for _, userID := range users {
		r.answered[userID]++
	}
	r.mu.Unlock()
	r.signal()
}

// pending says that the user's keys are about to be asked for, or that an answer is about to be judged.
func (r *resolver) pending(userID id.UserID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, outdated := r.outdated[userID]
	_, answered := r.answered[userID]
	return outdated || answered
}

// run works until the context ends.
func (r *resolver) run(ctx context.Context) {
	log := r.hook.log.With().Str("component", "resolver").Logger()
	ctx = log.WithContext(ctx)
	if err := r.begin(ctx); err != nil {
		log.Err(err).Msg("Failed to read which device lists are out of date")
	}
	for ctx.Err() == nil {
		worked, err := r.pass(ctx)
		if err != nil && ctx.Err() == nil {
			log.Err(err).Msg("Failed to resolve senders, trying again")
		}
		if worked && err == nil {
			continue
		}
		timer := time.NewTimer(r.untilNext(ctx, err != nil))
		select {
		case <-ctx.Done():
		case <-r.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// begin takes up what a former process left: outdated device lists, and pins that are not signed yet. What our own account
// publishes is always asked for: what we send is judged by it, too.
func (r *resolver) begin(ctx context.Context) error {
	r.ask(r.hook.client.UserID)
	for userID := range r.hook.options.VerifiedUsers {
		r.ask(userID)
	}
	users, err := r.hook.uow.GetOutdatedTrackedUsers(ctx)
	if err != nil {
		return err
	}
	r.ask(users...)
	return nil
}

const (
	longestSleep = time.Minute
	afterFailure = time.Second
)

func (r *resolver) untilNext(ctx context.Context, failed bool) time.Duration {
	if failed {
		return afterFailure
	}
	now := r.hook.clock()
	sleep := longestSleep
	if next, err := r.hook.store.nextRetry(ctx); err == nil && !next.IsZero() {
		sleep = min(sleep, next.Sub(now))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, attempt := range r.outdated {
		sleep = min(sleep, attempt.next.Sub(now))
	}
	// A session whose guard somebody else holds stays due until they are done; they wake us.
	return max(sleep, 100*time.Millisecond)
}

// pass resolves what is due now. It says whether there was anything.
func (r *resolver) pass(ctx context.Context) (worked bool, err error) {
	h := r.hook
	due, err := h.store.sessions(ctx, getDueQuery, h.clock().UnixMilli(), sessionsPerPass)
	if err != nil {
		return false, err
	}
	guards := make(map[id.SessionID]*SessionGuard, len(due))
	defer func() {
		for _, guard := range guards {
			guard.Unlock()
		}
		if worked {
			h.inbox.wakeRooms()
		}
	}()
	users := r.dueUsers()
	held := due[:0]
	for _, session := range due {
		if guards[session.SessionID] == nil {
			if guards[session.SessionID] = h.sessions.TryLock(session.SessionID); guards[session.SessionID] == nil {
				delete(guards, session.SessionID)
				continue
			}
		}
		held = append(held, session)
		if session.Sender != "" {
			users[session.Sender] = struct{}{}
		}
	}
	if len(users) > 0 {
		worked = true
		r.query(ctx, users)
	}
	for _, session := range held {
		worked = true
		if err = h.resume(ctx, session, true); err != nil {
			return worked, err
		}
	}
	for userID, count := range r.answeredUsers() {
		worked = true
		if err = r.judge(ctx, userID, guards); err != nil {
			return worked, err
		}
		r.judged(userID, count)
	}
	return worked, nil
}

func (r *resolver) dueUsers() map[id.UserID]struct{} {
	now := r.hook.clock()
	r.mu.Lock()
	defer r.mu.Unlock()
	users := make(map[id.UserID]struct{})
	for userID, attempt := range r.outdated {
		if !attempt.next.After(now) {
			users[userID] = struct{}{}
		}
	}
	return users
}

func (r *resolver) answeredUsers() map[id.UserID]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.answered)
}

// judged takes a user off whose sessions were judged again, unless something new was told meanwhile. Until then verdicts wait.
func (r *resolver) judged(userID id.UserID, count int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.answered[userID] == count {
		delete(r.answered, userID)
	}
}

// query asks for the keys of the users, in as few requests as there may be. What comes is stored by observeKeyQuery.
func (r *resolver) query(ctx context.Context, users map[id.UserID]struct{}) {
	batch := make([]id.UserID, 0, min(len(users), usersPerQuery))
	for userID := range users {
		if batch = append(batch, userID); len(batch) == usersPerQuery {
			r.queryBatch(ctx, batch)
			batch = batch[:0]
		}
	}
	if len(batch) > 0 {
		r.queryBatch(ctx, batch)
	}
}

func (r *resolver) queryBatch(ctx context.Context, users []id.UserID) {
	log := zerolog.Ctx(ctx)
	before := r.attempts(users)
	answered, err := r.hook.mach.FetchKeys(ctx, users, true)
	if err != nil && ctx.Err() == nil {
		log.Warn().Err(err).Int("users", len(users)).Msg("Failed to ask for keys")
	}
	changedMeanwhile := r.settle(users, before, func(userID id.UserID) bool { _, ok := answered[userID]; return ok })
	if len(changedMeanwhile) > 0 {
		// mautrix has just marked them as up to date, by an answer that may be older than the change.
		if err = r.hook.uow.MarkTrackedUsersOutdated(ctx, changedMeanwhile); err != nil {
			log.Err(err).Msg("Failed to mark device lists as outdated again")
		}
	}
	for userID := range answered {
		if err = r.hook.signPinned(ctx, userID); err != nil && ctx.Err() == nil {
			log.Err(err).Stringer("user_id", userID).Msg("Failed to sign a pinned master key")
		}
	}
}

func (r *resolver) attempts(users []id.UserID) map[id.UserID]*attempt {
	r.mu.Lock()
	defer r.mu.Unlock()
	attempts := make(map[id.UserID]*attempt, len(users))
	for _, userID := range users {
		attempts[userID] = r.outdated[userID]
	}
	return attempts
}

// settle takes the users off the list who were answered, and gives those whose list changed while the query was under way.
func (r *resolver) settle(users []id.UserID, before map[id.UserID]*attempt, answered func(id.UserID) bool) (changed []id.UserID) {
	now := r.hook.clock()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, userID := range users {
		attempt := r.outdated[userID]
		switch {
		case attempt == nil:
		case attempt != before[userID]:
			changed = append(changed, userID)
		case answered(userID):
			delete(r.outdated, userID)
		case attempt.count >= maxRetries:
			// Only another change, or a session that waits, leads on. The database keeps the mark.
			delete(r.outdated, userID)
		default:
			attempt.count++
			attempt.next = now.Add(min(firstBackoff<<(attempt.count-1), maxBackoff))
		}
	}
	return changed
}

// judge walks the steps again for the unproven sessions of a user of whom something was learnt.
func (r *resolver) judge(ctx context.Context, userID id.UserID, guards map[id.SessionID]*SessionGuard) error {
	sessions, err := r.hook.store.sessions(ctx, getUnprovenOfQuery, userID)
	if err != nil {
		return err
	}
	for _, session := range sessions {
		guard := guards[session.SessionID]
		if guard == nil {
			if guard = r.hook.sessions.TryLock(session.SessionID); guard == nil {
				continue
			}
			guards[session.SessionID] = guard
		}
		if err = r.hook.resume(ctx, session, false); err != nil {
			return err
		}
	}
	return nil
}

// resume walks the steps again for a stored session whose guard the caller holds. A retry counts; a look because something was
// learnt does not, and changes nothing if it leads nowhere.
func (h *Hook) resume(ctx context.Context, session *SenderData, retry bool) error {
	return h.store.write(ctx, func(ctx context.Context) error {
		// The room key may have come again since, bringing more.
		stored, err := h.store.claim(ctx, session.SessionID, session.SenderKey)
		if err != nil || stored == nil || stored.State.proven() || stored.State == StateRejected {
			return err
		}
		now := h.clock()
		d := derivation{
			caches: h.store, anchor: h.anchor(), now: now, queried: true, current: true,
			embedded: stored.DeviceKeys, data: *stored,
		}
		derived, err := d.derive(ctx)
		if err != nil {
			return err
		}
		learnt := derived.State != stored.State || derived.Reason != stored.Reason
		if !retry && !learnt {
			return nil
		}
		derived.UpdatedAt = now
		zerolog.Ctx(ctx).Debug().
			Stringer("session_id", stored.SessionID).Stringer("sender", stored.Sender).Bytes("steps", d.path).
			Str("old_state", string(stored.State)).Str("state", string(derived.State)).Msg("Looked at a session's sender again")
		if derived.State == StateRejected {
			if err = h.reject(ctx, derived); err != nil {
				return err
			}
		}
		return h.store.putClaim(ctx, derived)
	})
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

// signPinned signs the user's master key with our user-signing key if the configuration pins just that key.
func (h *Hook) signPinned(ctx context.Context, userID id.UserID) error {
	identity, err := h.store.identity(ctx, userID)
	if err != nil || !h.anchor().needsSignature(identity) {
		return err
	}
	if err = h.mach.SignUser(ctx, userID, identity.MasterKey); err != nil {
		return err
	}
	h.log.Info().Stringer("user_id", userID).Stringer("master_key", identity.MasterKey).Msg("Signed a pinned master key")
	return h.store.write(ctx, func(ctx context.Context) error {
		now, err := h.store.identity(ctx, userID)
		if err != nil || now == nil || now.MasterKey != identity.MasterKey {
			return err
		}
		anchor := h.anchor()
		now.VerifiedBy, now.WasVerified = anchor.userSigningKey, true
		if err = h.store.putIdentity(ctx, now, anchor, h.clock()); err != nil {
			return fmt.Errorf("failed to store our signature: %w", err)
		}
		return nil
	})
}
