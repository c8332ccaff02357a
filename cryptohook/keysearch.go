package cryptohook

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// keySearch looks for the keys that waiting events lack: in the server-side backup first, then by asking our own other devices. It does
// so once a session and hour, beside everything else: who waits is never held up by it.
//
// Anybody in a room can send any number of messages of sessions that do not exist. So few searches are made at a time, the senders taking
// turns, and no more than so many a sender, a room and hour.
type keySearch struct {
	hook *Hook
	wake chan struct{}

	mu sync.Mutex
	// wanted are the sessions that are searched for, or were lately.
	wanted map[id.SessionID]*missingKey
	// spentBy and spentIn count the searches for each sender and in each room since spentSince.
	spentBy    map[id.UserID]int
	spentIn    map[id.RoomID]int
	spentSince time.Time
	// open are the sessions that other devices were asked for and have not answered.
	open   map[id.SessionID]struct{}
	pruned time.Time
}

// missingKey is one session that is searched for.
type missingKey struct {
	sessionID id.SessionID
	roomID    id.RoomID
	// sender is whose message lacks the key.
	sender id.UserID
	// partial says that there is a key, for later messages only.
	partial bool
	// next is when to look again; rests says that this is when somebody wants it again only.
	next     time.Time
	rests    bool
	attempts int
}

const (
	// searchDelay is how long a key may take to come by itself: it mostly arrives together with its first message.
	searchDelay = 2 * time.Second
	// searchAgain is how often a session is searched for.
	searchAgain = time.Hour
	// keepRequests is how long an answer of another device is accepted.
	keepRequests   = 24 * time.Hour
	searchesAtOnce = 10
	searchPause    = time.Second
	searchesHeld   = 5000
)

func newKeySearch(hook *Hook) *keySearch {
	return &keySearch{
		hook: hook, wake: make(chan struct{}, 1),
		wanted: make(map[id.SessionID]*missingKey), open: make(map[id.SessionID]struct{}),
		spentBy: make(map[id.UserID]int), spentIn: make(map[id.RoomID]int),
	}
}

// committed has the search go on if what was committed may be an answer to it.
func (s *keySearch) committed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.open) > 0 {
		notify(s.wake)
	}
}

// load takes up what a former process asked for.
func (s *keySearch) load(ctx context.Context) error {
	asked, err := s.hook.store.askedSessions(ctx)
	for _, sessionID := range asked {
		s.open[sessionID] = struct{}{}
	}
	return err
}

// want has the key of a session searched for, unless it was lately. partial says that there is one, for later messages only. What is no
// session ID was made up.
func (s *keySearch) want(roomID id.RoomID, sender id.UserID, sessionID id.SessionID, partial bool) {
	if !isKey(sessionID.String()) {
		return
	}
	now := s.hook.clock()
	s.mu.Lock()
	defer s.mu.Unlock()
	key, known := s.wanted[sessionID]
	if known && (!key.rests || key.next.After(now)) {
		return
	}
	if now.Sub(s.spentSince) >= searchAgain {
		s.spentSince = now
		clear(s.spentBy)
		clear(s.spentIn)
	}
	limits := s.hook.options.Limits
	if s.spentBy[sender] >= limits.SearchesPerSender || s.spentIn[roomID] >= limits.SearchesPerRoom || !known && len(s.wanted) >= searchesHeld {
		s.hook.counters.reach(LimitSearches)
		return
	}
	s.spentBy[sender]++
	s.spentIn[roomID]++
	s.wanted[sessionID] = &missingKey{sessionID: sessionID, roomID: roomID, sender: sender, partial: partial, next: now.Add(searchDelay)}
	notify(s.wake)
}

// run searches until the context ends.
func (s *keySearch) run(ctx context.Context) {
	var failures int
	for ctx.Err() == nil {
		worked, err := s.pass(ctx)
		pause := s.untilNext()
		switch {
		case err != nil && ctx.Err() == nil:
			s.hook.log.Warn().Err(err).Msg("Failed to look for keys, trying again")
			pause = min(firstBackoff<<min(failures, maxRetries), longestSleep)
			failures++
		case worked:
			pause, failures = searchPause, 0
		}
		wake := s.wake
		if worked || err != nil {
			wake = nil // a storm must not make the pauses shorter
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (s *keySearch) untilNext() time.Duration {
	now, sleep := s.hook.clock(), longestSleep
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range s.wanted {
		if !key.rests {
			sleep = min(sleep, key.next.Sub(now))
		}
	}
	return max(sleep, 10*time.Millisecond)
}

// pass makes the searches that are due, a few, and says whether there were any.
func (s *keySearch) pass(ctx context.Context) (worked bool, err error) {
	ctx = s.hook.log.With().Str("component", "key search").Logger().WithContext(ctx)
	due := s.take()
	if len(due) > 0 {
		if err = s.search(ctx, due); err != nil {
			return true, err
		}
	}
	sent, err := s.sendDue(ctx)
	return len(due) > 0 || sent > 0, err
}

// take gives the sessions whose time has come, the senders taking turns, and forgets those that nobody has wanted for long.
func (s *keySearch) take() (due []*missingKey) {
	now := s.hook.clock()
	s.mu.Lock()
	defer s.mu.Unlock()
	bySender := make(map[id.UserID][]*missingKey)
	for sessionID, key := range s.wanted {
		switch {
		case key.next.After(now):
		case key.rests:
			delete(s.wanted, sessionID)
		default:
			bySender[key.sender] = append(bySender[key.sender], key)
		}
	}
	for turn := 0; len(bySender) > 0; turn++ {
		for sender, keys := range bySender {
			if len(due) == searchesAtOnce {
				return due
			}
			if turn == len(keys) {
				delete(bySender, sender)
				continue
			}
			due = append(due, keys[turn])
		}
	}
	return due
}

// length is how many keys are being looked for.
func (s *keySearch) length() (searched int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range s.wanted {
		if !key.rests {
			searched++
		}
	}
	return searched
}

// search looks for some sessions. Those that the backup could not be asked for are tried again by back-off.
func (s *keySearch) search(ctx context.Context, due []*missingKey) error {
	h := s.hook
	if now := h.clock(); now.Sub(s.pruned) > pruneEvery {
		s.pruned = now
		if err := s.prune(ctx, now.Add(-keepRequests)); err != nil {
			return err
		}
	}
	backup, backupErr := h.openBackup(ctx)
	if backupErr != nil {
		zerolog.Ctx(ctx).Warn().Err(backupErr).Msg("Failed to open the key backup, trying again")
	}
	var result ImportResult
	defer h.keysCame(&result)
	for _, key := range due {
		logger := zerolog.Ctx(ctx).With().Stringer("room_id", key.roomID).Stringer("session_id", key.sessionID).Logger()
		failure := backupErr
		err := s.searchOne(logger.WithContext(ctx), backup, key, &failure, &result)
		if err != nil {
			return err
		}
		s.settle(key, failure)
	}
	return nil
}

// searchOne looks for one session. failure is set if the backup is to be asked again; what is returned is an error of the store's.
func (s *keySearch) searchOne(ctx context.Context, backup *keyBackup, key *missingKey, failure *error, result *ImportResult) error {
	h := s.hook
	if has, err := h.hasKey(ctx, key); err != nil || has {
		*failure = nil
		return err
	}
	request, err := h.store.keyRequest(ctx, key.sessionID)
	if err != nil {
		return err
	}
	now := h.clock()
	if request == nil {
		request = &keyRequest{sessionID: key.sessionID, roomID: key.roomID}
	}
	request.wantedAt = now
	if *failure == nil && now.Sub(request.lookedUpAt) >= searchAgain {
		found, err := h.fetchFromBackup(ctx, backup, key, result)
		switch {
		case errors.Is(err, errStorage):
			return err
		case err != nil:
			zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to look a key up in the backup, trying again")
			*failure = err
		case found:
			return nil
		default:
			request.lookedUpAt = now
		}
	}
	if now.Sub(request.askedAt) >= searchAgain && !request.due {
		if request.due, err = h.othersMayAnswer(ctx); err != nil {
			return err
		}
		if request.due && request.requestID == "" {
			request.requestID = h.client.TxnID()
		}
	}
	if request.due {
		s.mu.Lock()
		s.open[key.sessionID] = struct{}{}
		s.mu.Unlock()
	}
	return h.store.write(ctx, func(ctx context.Context) error { return h.store.putKeyRequest(ctx, request) })
}

// settle says when a session is searched for again.
func (s *keySearch) settle(key *missingKey, failure error) {
	now := s.hook.clock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if failure == nil || key.attempts >= maxRetries {
		key.rests, key.next = true, now.Add(searchAgain)
		return
	}
	key.next = now.Add(min(firstBackoff<<key.attempts, maxBackoff))
	key.attempts++
}

// hasKey says whether the key has come by itself since it was wanted.
func (h *Hook) hasKey(ctx context.Context, key *missingKey) (bool, error) {
	if key.partial {
		return false, nil
	}
	current, err := h.holderOf(ctx, key.sessionID)
	return current != nil && current.roomID == key.roomID, err
}

// keyStored is part of storing a session: whoever waits for it, or was asked for it, is told.
func (h *Hook) keyStored(ctx context.Context, sessionID id.SessionID) error {
	if err := h.wakeLate(ctx, sessionID); err != nil {
		return err
	}
	notify(h.keeper.wake)
	h.search.mu.Lock()
	_, asked := h.search.open[sessionID]
	h.search.mu.Unlock()
	if !asked {
		return nil
	}
	return h.store.answerKeyRequest(ctx, sessionID)
}

func (s *keySearch) prune(ctx context.Context, before time.Time) error {
	err := s.hook.store.write(ctx, func(ctx context.Context) error { return s.hook.store.pruneKeyRequests(ctx, before) })
	if err != nil {
		return err
	}
	asked, err := s.hook.store.askedSessions(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.open)
	for _, sessionID := range asked {
		s.open[sessionID] = struct{}{}
	}
	return nil
}

// keyRequest is what was done to find one session's key. Only what was asked for is taken from other devices.
type keyRequest struct {
	sessionID id.SessionID
	roomID    id.RoomID
	// requestID is empty until other devices are asked.
	requestID string
	// wantedAt, lookedUpAt and askedAt are when the key was last wanted, looked up in the backup, and asked for.
	wantedAt, lookedUpAt, askedAt time.Time
	// due says that the request is to be sent, or its cancellation if it is answered.
	due, answered bool
}

const (
	selectKeyRequest = `
		SELECT session_id, room_id, request_id, wanted_at_ms, looked_up_at_ms, asked_at_ms, due, answered FROM sendertrust_key_request
	`
	getKeyRequestQuery    = selectKeyRequest + `WHERE session_id=$1`
	getDueRequestsQuery   = selectKeyRequest + `WHERE due ORDER BY session_id LIMIT $1`
	upsertKeyRequestQuery = `
		INSERT INTO sendertrust_key_request (session_id, room_id, request_id, wanted_at_ms, looked_up_at_ms, asked_at_ms, due, answered)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
		ON CONFLICT (session_id) DO UPDATE SET
			request_id=excluded.request_id, wanted_at_ms=excluded.wanted_at_ms, looked_up_at_ms=excluded.looked_up_at_ms,
			due=(excluded.due OR sendertrust_key_request.due)
	`
	sentKeyRequestQuery   = `UPDATE sendertrust_key_request SET asked_at_ms=$2, due=false WHERE session_id=$1 AND answered=false`
	answerKeyRequestQuery = `UPDATE sendertrust_key_request SET answered=true, due=true WHERE session_id=$1 AND request_id<>'' AND answered=false`
	deleteKeyRequestQuery = `DELETE FROM sendertrust_key_request WHERE session_id=$1`
	pruneKeyRequestsQuery = `DELETE FROM sendertrust_key_request WHERE wanted_at_ms<$1`
	getAskedQuery         = `SELECT session_id FROM sendertrust_key_request WHERE request_id<>'' AND answered=false`
)

func scanKeyRequest(row dbutil.Scannable) (*keyRequest, error) {
	var r keyRequest
	var wanted, lookedUp, asked int64
	err := row.Scan(&r.sessionID, &r.roomID, &r.requestID, &wanted, &lookedUp, &asked, &r.due, &r.answered)
	r.wantedAt, r.lookedUpAt, r.askedAt = time.UnixMilli(wanted), time.UnixMilli(lookedUp), time.UnixMilli(asked)
	return &r, err
}

// keyRequest gives what was done to find a session's key, or nil.
func (s *store) keyRequest(ctx context.Context, sessionID id.SessionID) (*keyRequest, error) {
	request, err := scanKeyRequest(s.QueryRow(ctx, getKeyRequestQuery, sessionID))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("failed to read the request for session %s: %w", sessionID, err)
	}
	return request, nil
}

// putKeyRequest stores what was done. That the key has come meanwhile stays noted.
func (s *store) putKeyRequest(ctx context.Context, r *keyRequest) error {
	_, err := s.Exec(ctx, upsertKeyRequestQuery,
		r.sessionID, r.roomID, r.requestID, millis(r.wantedAt), millis(r.lookedUpAt), millis(r.askedAt), r.due, r.answered)
	if err != nil {
		return fmt.Errorf("failed to store the request for session %s: %w", r.sessionID, err)
	}
	return nil
}

// millis is the time as it is stored, 0 for never.
func millis(at time.Time) int64 {
	if at.IsZero() {
		return 0
	}
	return at.UnixMilli()
}

// dueRequests gives the requests and cancellations that are to be sent.
func (s *store) dueRequests(ctx context.Context, limit int) ([]*keyRequest, error) {
	rows, err := s.Query(ctx, getDueRequestsQuery, limit)
	list, err := dbutil.NewRowIterWithError(rows, scanKeyRequest, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read which key requests are to be sent: %w", err)
	}
	return list, nil
}

// askedSessions gives the sessions that other devices were asked for and have not answered.
func (s *store) askedSessions(ctx context.Context) ([]id.SessionID, error) {
	rows, err := s.Query(ctx, getAskedQuery)
	list, err := dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[id.SessionID], err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read what was asked for: %w", err)
	}
	return list, nil
}

// answerKeyRequest notes that a key came that was asked for, so that nobody need answer any more.
func (s *store) answerKeyRequest(ctx context.Context, sessionID id.SessionID) error {
	_, err := s.Exec(ctx, answerKeyRequestQuery, sessionID)
	return err
}

// sentKeyRequest notes that a request was sent.
func (s *store) sentKeyRequest(ctx context.Context, sessionID id.SessionID, at time.Time) error {
	_, err := s.Exec(ctx, sentKeyRequestQuery, sessionID, at.UnixMilli())
	return err
}

func (s *store) deleteKeyRequest(ctx context.Context, sessionID id.SessionID) error {
	_, err := s.Exec(ctx, deleteKeyRequestQuery, sessionID)
	return err
}

func (s *store) pruneKeyRequests(ctx context.Context, before time.Time) error {
	_, err := s.Exec(ctx, pruneKeyRequestsQuery, before.UnixMilli())
	return err
}
