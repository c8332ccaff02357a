package cryptohook

import (
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/id"
)

// resolver does what needs the network: it asks for the keys of users whose device lists are out of date, and of senders whose
// sessions wait for them (steps C and F, and every retry), then walks the steps again.
//
// Users are asked for in few requests, and one at a time for each. Who is on a homeserver that did not answer is asked for apart from
// the others, so that nobody waits for another's server.
type resolver struct {
	hook *Hook
	wake chan struct{}
	// queries are the requests that are under way; slots bounds them.
	queries sync.WaitGroup
	slots   chan struct{}

	mu sync.Mutex
	// outdated are the users whose keys are to be asked for, with the retries of those that failed.
	outdated map[id.UserID]*attempt
	// answered counts, for users whose sessions are not judged again yet, how often a key query, whoever made it, told something.
	answered map[id.UserID]int
	// asking are the users who are being asked for.
	asking map[id.UserID]struct{}
	// adopted are the guards of sessions that were received and wait for their senders' keys.
	adopted map[id.SessionID]keptGuard
	// silent are the homeservers that did not answer the last time.
	silent map[string]struct{}
	// stopped says that nobody is there to release a guard.
	stopped bool
	// failure is the last batch's error, if it had one.
	failure error
}

type attempt struct {
	count int
	next  time.Time
}

const (
	usersPerQuery = 250
	queriesAtOnce = 8
	// remoteBuckets is how many requests the users of other homeservers are spread over.
	remoteBuckets = 4
	// retrySlack is how much earlier than planned a retry may be made, so that those of a storm come together.
	retrySlack   = time.Second
	longestSleep = time.Minute
	afterFailure = time.Second
)

func newResolver(hook *Hook) *resolver {
	return &resolver{
		hook: hook, wake: make(chan struct{}, 1), slots: make(chan struct{}, queriesAtOnce),
		outdated: make(map[id.UserID]*attempt), answered: make(map[id.UserID]int), asking: make(map[id.UserID]struct{}),
		adopted: make(map[id.SessionID]keptGuard), silent: make(map[string]struct{}),
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

// adopt takes over the guard of a session that waits for its sender's keys. It says no when there is nobody to release it.
func (r *resolver) adopt(guard keptGuard) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return false
	}
	r.adopted[guard.sessionID] = guard
	return true
}

// pending says that the user's keys are about to be asked for, or that an answer is about to be judged.
func (r *resolver) pending(userID id.UserID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, outdated := r.outdated[userID]
	_, answered := r.answered[userID]
	return outdated || answered
}

// toJudge counts how often something about the user was learnt by which the user's sessions are about to be judged.
func (r *resolver) toJudge(userID id.UserID) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.answered[userID]
}

// length is how many users' keys are to be asked for.
func (r *resolver) length() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.outdated)
}

// run works until the context ends.
func (r *resolver) run(ctx context.Context) {
	log := r.hook.log.With().Str("component", "resolver").Logger()
	ctx = log.WithContext(ctx)
	defer r.stop()
	if err := r.begin(ctx); err != nil {
		log.Err(err).Msg("Failed to read which device lists are out of date")
	}
	for ctx.Err() == nil {
		err := r.round(ctx)
		if err != nil && ctx.Err() == nil {
			log.Err(err).Msg("Failed to resolve senders, trying again")
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

// stop waits for the requests that are under way, which end with their context, and releases every guard.
func (r *resolver) stop() {
	r.queries.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
	for sessionID, guard := range r.adopted {
		guard.Unlock()
		delete(r.adopted, sessionID)
	}
}

// begin takes up what a former process left: outdated device lists, and pins that are not signed yet. What our own account
// publishes is always asked for: what we send is judged by it, too.
func (r *resolver) begin(ctx context.Context) error {
	r.mu.Lock()
	r.stopped = false
	r.mu.Unlock()
	r.ask(r.hook.client.UserID)
	for userID := range r.hook.options.VerifiedUsers {
		r.ask(userID)
	}
	if err := r.hook.store.hasten(ctx, r.hook.clock()); err != nil {
		return fmt.Errorf("failed to read the schedule: %w", err)
	}
	users, err := r.hook.uow.GetOutdatedTrackedUsers(ctx)
	if err != nil {
		return err
	}
	r.ask(users...)
	return nil
}

// untilNext is how long there is nothing to do, unless somebody wakes us.
func (r *resolver) untilNext(ctx context.Context, failed bool) time.Duration {
	if failed {
		return afterFailure
	}
	now := r.hook.clock()
	sleep := min(longestSleep, r.hook.own.untilDue(now))
	if next, err := r.hook.store.nextRetry(ctx, now.Add(retrySlack)); err == nil && !next.IsZero() {
		sleep = min(sleep, next.Sub(now))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for userID, attempt := range r.outdated {
		if _, asking := r.asking[userID]; !asking {
			sleep = min(sleep, attempt.next.Sub(now))
		}
	}
	return max(sleep, retrySlack)
}

// pass resolves what is due now, and says whether there was anything.
func (r *resolver) pass(ctx context.Context) (worked bool, err error) {
	batches, err := r.plan(ctx)
	if err != nil {
		return false, err
	}
	r.start(ctx, batches)
	r.queries.Wait()
	judged, err := r.judgeAnswered(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		err, r.failure = r.failure, nil
	}
	return judged || len(batches) > 0, err
}

// round begins to ask for whom it is time, without waiting for the answers, and judges by those that came.
func (r *resolver) round(ctx context.Context) error {
	if r.hook.own.due(r.hook.clock()) {
		r.ask(r.hook.client.UserID)
	}
	batches, err := r.plan(ctx)
	if err != nil {
		return err
	}
	r.start(ctx, batches)
	_, err = r.judgeAnswered(ctx)
	return err
}

// batch is one request: its users, and the sessions that wait for it, locked.
type batch struct {
	users  []id.UserID
	guards map[id.SessionID]*SessionGuard
	// tried are the claims for which this is a try.
	tried map[claimKey]struct{}
}

type claimKey struct {
	sessionID id.SessionID
	senderKey id.SenderKey
}

func (b *batch) unlock() {
	for _, guard := range b.guards {
		guard.Unlock()
	}
}

// plan gives the requests that are to be made now. Their users count as being asked for, and their sessions are locked.
func (r *resolver) plan(ctx context.Context) ([]*batch, error) {
	h := r.hook
	// What is learnt while an answer is on its way is judged when it is there; whoever waits for it is not asked for twice.
	dueBefore := h.clock().Add(retrySlack)
	senders, err := h.store.dueSenders(ctx, dueBefore)
	if err != nil {
		return nil, err
	}
	taken := r.take(senders)
	guards, tried, err := r.lockSessions(ctx, taken, dueBefore)
	if err != nil {
		(&batch{guards: guards}).unlock()
		r.release(taken)
		return nil, err
	}
	r.releaseUnused()
	return r.batches(taken, guards, tried), nil
}

// take gives those who are due and not being asked for, who now are. It says of each whether the device list is outdated.
func (r *resolver) take(senders []id.UserID) map[id.UserID]bool {
	now := r.hook.clock()
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := make(map[id.UserID]bool, len(senders))
	for _, userID := range senders {
		if userID != "" {
			taken[userID] = false
		}
	}
	for userID, attempt := range r.outdated {
		if !attempt.next.After(now) {
			taken[userID] = true
		}
	}
	for userID := range taken {
		if _, asking := r.asking[userID]; asking {
			delete(taken, userID)
			continue
		}
		r.asking[userID] = struct{}{}
	}
	return taken
}

// lockSessions locks the sessions of these users that are due. Users whose sessions somebody else works on are left for later, unless
// their device lists are outdated.
func (r *resolver) lockSessions(ctx context.Context, taken map[id.UserID]bool, dueBefore time.Time) (
	guards map[id.SessionID]*SessionGuard, tried map[id.UserID][]claimKey, err error,
) {
	guards, tried = make(map[id.SessionID]*SessionGuard), make(map[id.UserID][]claimKey)
	for userID, outdated := range taken {
		due, err := r.hook.store.sessions(ctx, getDueOfQuery, userID, dueBefore.UnixMilli())
		if err != nil {
			return guards, nil, err
		}
		for _, claim := range due {
			if guards[claim.SessionID] != nil {
				continue // another user claims the same session, and comes next
			}
			if guard := r.lock(claim.SessionID); guard != nil {
				guards[claim.SessionID] = guard
				tried[userID] = append(tried[userID], claimKey{claim.SessionID, claim.SenderKey})
			}
		}
		if !outdated && len(tried[userID]) == 0 {
			delete(taken, userID)
			r.release(map[id.UserID]bool{userID: false})
		}
	}
	return guards, tried, nil
}

// batches spreads the users over requests.
func (r *resolver) batches(taken map[id.UserID]bool, guards map[id.SessionID]*SessionGuard, tried map[id.UserID][]claimKey) []*batch {
	groups := make(map[string][]id.UserID)
	r.mu.Lock()
	for userID := range taken {
		group := r.group(userID)
		groups[group] = append(groups[group], userID)
	}
	r.mu.Unlock()
	var batches []*batch
	for _, users := range groups {
		for chunk := range slices.Chunk(users, usersPerQuery) {
			b := &batch{users: chunk, guards: make(map[id.SessionID]*SessionGuard), tried: make(map[claimKey]struct{})}
			for _, userID := range chunk {
				for _, claim := range tried[userID] {
					b.guards[claim.sessionID], b.tried[claim] = guards[claim.sessionID], struct{}{}
				}
			}
			batches = append(batches, b)
		}
	}
	return batches
}

// group says whom a user is asked for with: our own homeserver's users together, those of silent ones apart by homeserver, and the
// others in a few groups.
func (r *resolver) group(userID id.UserID) string {
	server := userID.Homeserver()
	if server == r.hook.client.UserID.Homeserver() {
		return ""
	}
	if _, silent := r.silent[server]; silent {
		return server
	}
	hash := fnv.New32a()
	_, _ = hash.Write([]byte(server))
	return strconv.Itoa(int(hash.Sum32() % remoteBuckets))
}

// lock takes the guard that came with the session, or a new one.
func (r *resolver) lock(sessionID id.SessionID) *SessionGuard {
	r.mu.Lock()
	defer r.mu.Unlock()
	if adopted, ok := r.adopted[sessionID]; ok {
		delete(r.adopted, sessionID)
		return adopted.SessionGuard
	}
	return r.hook.sessions.TryLock(sessionID)
}

// releaseUnused releases the guards of sessions that were proven before they were asked for.
func (r *resolver) releaseUnused() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for sessionID, guard := range r.adopted {
		if _, asking := r.asking[guard.sender]; !asking {
			guard.Unlock()
			delete(r.adopted, sessionID)
		}
	}
}

// release has users no longer count as being asked for.
func (r *resolver) release(taken map[id.UserID]bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for userID := range taken {
		delete(r.asking, userID)
	}
}

// end ends a batch: its sessions are unlocked, and its users may be asked for again.
func (r *resolver) end(b *batch) {
	b.unlock()
	r.mu.Lock()
	for _, userID := range b.users {
		delete(r.asking, userID)
	}
	r.mu.Unlock()
	r.signal()
}

// start makes the requests, each in a goroutine of its own. Whatever becomes of one, its guards are released.
func (r *resolver) start(ctx context.Context, batches []*batch) {
	for _, b := range batches {
		r.queries.Go(func() {
			defer r.end(b)
			r.inSlot(ctx, func() {
				if err := r.work(ctx, b); err != nil && ctx.Err() == nil {
					zerolog.Ctx(ctx).Err(err).Msg("Failed to resolve senders, trying again")
					r.mu.Lock()
					r.failure = err
					r.mu.Unlock()
				}
			})
		})
	}
}

// inSlot asks for keys when no more than allowed are doing so, or not at all if the context ends before. What mautrix cannot bear is logged.
func (r *resolver) inSlot(ctx context.Context, ask func()) {
	defer func() {
		if reason := recover(); reason != nil {
			zerolog.Ctx(ctx).Error().Any("panic", reason).Bytes("stack", debug.Stack()).Msg("Failed to ask for keys")
		}
	}()
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
		ask()
	case <-ctx.Done():
	}
}

// work asks for the keys of the batch's users, and judges their sessions by the answer, or notes that there was none.
func (r *resolver) work(ctx context.Context, b *batch) error {
	// Verdicts wait until the answer, and what it says of the sessions, is taken in.
	defer r.hook.inbox.learnt(b.users)
	_, _ = r.query(ctx, b.users)
	if len(b.tried) == 0 || ctx.Err() != nil {
		return ctx.Err()
	}
	return r.hook.judgeUnproven(ctx, b.users, b.tried)
}

// judgeAnswered walks the steps again for the unproven sessions of the users of whom something was learnt.
func (r *resolver) judgeAnswered(ctx context.Context) (worked bool, err error) {
	r.mu.Lock()
	answered := maps.Clone(r.answered)
	r.mu.Unlock()
	for users := range slices.Chunk(slices.Collect(maps.Keys(answered)), usersPerQuery) {
		if err = r.hook.judgeUnproven(ctx, users, nil); err != nil {
			return worked, err
		}
		worked = true
		r.judged(users, answered)
		// Verdicts wait until all that was learnt is judged.
		r.hook.inbox.learnt(users)
	}
	return worked, nil
}

// judged takes users off whose sessions were judged again, unless something new was told meanwhile. Until then verdicts wait.
func (r *resolver) judged(users []id.UserID, counts map[id.UserID]int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, userID := range users {
		if r.answered[userID] == counts[userID] {
			delete(r.answered, userID)
		}
	}
}

// query asks for the keys of the users in one request. It gives those who were answered about. An error, of our own homeserver or of the
// database, is logged.
func (r *resolver) query(ctx context.Context, users []id.UserID) (answered map[id.UserID]struct{}, err error) {
	log := zerolog.Ctx(ctx)
	before := r.attempts(users)
	answered, err = r.hook.fetchKeys(ctx, users)
	if err != nil && ctx.Err() == nil {
		log.Warn().Err(err).Int("users", len(users)).Msg("Failed to ask for keys")
	}
	changedMeanwhile := r.settle(users, before, func(userID id.UserID) bool { _, ok := answered[userID]; return ok }, err == nil)
	if len(changedMeanwhile) > 0 {
		// They have just been marked as up to date, by an answer that may be older than the change.
		if err := r.hook.uow.MarkTrackedUsersOutdated(ctx, changedMeanwhile); err != nil {
			log.Err(err).Msg("Failed to mark device lists as outdated again")
		}
	}
	for userID := range answered {
		if err := r.hook.signPinned(ctx, userID); err != nil && ctx.Err() == nil {
			log.Err(err).Stringer("user_id", userID).Msg("Failed to sign a pinned master key")
		}
	}
	return answered, err
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

// settle takes the users off the list who were answered, and gives those whose list changed while the query was under way. ours says
// that our own homeserver answered, so that who is missing is missing since another one is silent.
func (r *resolver) settle(users []id.UserID, before map[id.UserID]*attempt, answered func(id.UserID) bool, ours bool) (changed []id.UserID) {
	now := r.hook.clock()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, userID := range users {
		if answered(userID) {
			delete(r.silent, userID.Homeserver())
		} else if ours {
			r.silent[userID.Homeserver()] = struct{}{}
		}
	}
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
