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

// sessionSet are sessions; nil are none.
type sessionSet map[id.SessionID]struct{}

func (s sessionSet) has(sessionID id.SessionID) bool {
	_, ok := s[sessionID]
	return ok
}

// foresight is what was looked up at the beginning of a transaction, and still holds in it: whoever writes of a session takes it out. It goes with
// the transaction's context; the zero one knows nothing.
type foresight struct {
	// unclaimed are the sessions that nobody claims, unawaited those for whose key no event waits.
	unclaimed, unawaited sessionSet
	pile                 *pile
}

func foresightOf(ctx context.Context) foresight {
	f, _ := ctx.Value(foresightKey).(foresight)
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
	f := foresight{pile: &pile{}}
	var err error
	if f.unclaimed, err = s.without(ctx, getClaimedQuery, sessions); err == nil {
		f.unawaited, err = s.without(ctx, getAwaitedQuery, sessions)
	}
	if err != nil {
		return nil, fmt.Errorf("failed to look up what is known of the sessions that are to be stored: %w", err)
	}
	return context.WithValue(ctx, foresightKey, f), nil
}

// without gives the sessions that a query does not find.
func (s *store) without(ctx context.Context, query string, sessions []id.SessionID) (sessionSet, error) {
	left := make(sessionSet, len(sessions))
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
