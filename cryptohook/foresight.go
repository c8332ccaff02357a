package cryptohook

import (
	"context"
	"fmt"
	"slices"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// What a transaction that stores many room keys would ask the database for each of them is asked for all of them at its beginning. Nearly
// always the answer is that there is nothing, so that is all that is remembered.

// foresight is what was looked up at the beginning of a transaction, and still holds in it. It goes with the transaction's context; nil knows nothing.
type foresight struct {
	// unclaimed are the sessions that nobody claims, unawaited those for whose key no event waits.
	unclaimed, unawaited map[id.SessionID]struct{}
}

func foresightOf(ctx context.Context) *foresight {
	f, _ := ctx.Value(foresightKey).(*foresight)
	return f
}

const (
	getClaimedQuery = `SELECT DISTINCT session_id FROM sendertrust_claim WHERE session_id IN ($1)`
	getAwaitedQuery = `SELECT DISTINCT late_session FROM sendertrust_inbox WHERE late_session IN ($1)`
)

// foresee looks up what is asked of these sessions in the transaction of the context, and gives the context to go on with.
func (s *store) foresee(ctx context.Context, sessions []id.SessionID) (context.Context, error) {
	if len(sessions) < 2 {
		return ctx, nil
	}
	var f foresight
	var err error
	if f.unclaimed, err = s.without(ctx, getClaimedQuery, sessions); err == nil {
		f.unawaited, err = s.without(ctx, getAwaitedQuery, sessions)
	}
	if err != nil {
		return nil, fmt.Errorf("failed to look up what is known of the sessions that are to be stored: %w", err)
	}
	return context.WithValue(ctx, foresightKey, &f), nil
}

// without gives the sessions that a query does not find.
func (s *store) without(ctx context.Context, query string, sessions []id.SessionID) (map[id.SessionID]struct{}, error) {
	left := make(map[id.SessionID]struct{}, len(sessions))
	for _, sessionID := range sessions {
		left[sessionID] = struct{}{}
	}
	for some := range slices.Chunk(sessions, perStatement) {
		found, err := queryAll(ctx, s, query, some, dbutil.ScanSingleColumn[id.SessionID])
		if err != nil {
			return nil, err
		}
		for _, sessionID := range found {
			delete(left, sessionID)
		}
	}
	return left, nil
}

// isUnclaimed says that it is known that nobody claims the session.
func (f *foresight) isUnclaimed(sessionID id.SessionID) bool {
	if f == nil {
		return false
	}
	_, unclaimed := f.unclaimed[sessionID]
	return unclaimed
}

// claimed notes that the transaction stores a claim.
func (f *foresight) claimed(sessionID id.SessionID) {
	if f != nil {
		delete(f.unclaimed, sessionID)
	}
}

// isUnawaited says that it is known that no event waits for the session's key.
func (f *foresight) isUnawaited(sessionID id.SessionID) bool {
	if f == nil {
		return false
	}
	_, unawaited := f.unawaited[sessionID]
	return unawaited
}

// awaited notes that the transaction has an event wait.
func (f *foresight) awaited(sessionID id.SessionID) {
	if f != nil {
		delete(f.unawaited, sessionID)
	}
}
