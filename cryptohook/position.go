package cryptohook

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// A homeserver may lose the position in its stream up to which a client has synced: after a restore from a backup, or since it remembers
// positions for some time only. It refuses the token then, for ever, and the client has to begin anew, without one. What the first /sync
// shows of a room is history to a client that is new, and has to be sorted here: what came before it was lost is in the inbox, and known
// there by its event ID; what is not came meanwhile, and wants an answer. Room keys that were not received yet come with that /sync, and
// those that were are recognised; whose devices changed meanwhile it does not say, so everybody's are looked up again.

var (
	errPositionLost = errors.New("the homeserver does not know any more what was synced")
	// errUnknownPosition is what a homeserver says that has lost the position: [MSC4186], and for /sync some homeservers.
	//
	// [MSC4186]: https://github.com/matrix-org/matrix-spec-proposals/pull/4186
	errUnknownPosition = mautrix.RespError{ErrCode: "M_UNKNOWN_POS"}
	errNoPosition      = errors.New("the homeserver's answer has no next_batch: not believing it")
)

const (
	// refusalsAtMost is how often the same position is asked from when a homeserver calls the question itself wrong, as Synapse does for
	// a token that it cannot read. Nothing else in it has changed since it was answered.
	refusalsAtMost = 3
	// keepPositions is how long before the newest event that was received everything that came is known: see keepHandled.
	keepPositions = keepHandled - 24*time.Hour
)

// isPositionLost says whether a failed /sync means that the position is lost.
func (s *syncer) isPositionLost(err error) (lost bool) {
	var httpError mautrix.HTTPError
	refused := errors.As(err, &httpError) && httpError.RespError != nil && httpError.IsStatus(http.StatusBadRequest)
	if refused {
		s.refusals++
	} else {
		s.refusals = 0
	}
	return !s.positionLost && (errors.Is(err, errUnknownPosition) || s.refusals >= refusalsAtMost)
}

// losePosition has the next /sync be like the first.
func (s *syncer) losePosition(err error) {
	s.positionLost, s.refusals = true, 0
	s.filterID = "" // it may have forgotten that, too
	s.hook.log.Warn().Err(err).Msg("Syncing anew, and looking for what came meanwhile; nothing is lost")
}

// stageAllOutdated has everybody's devices looked up again: their changes since the lost position are not told any more.
func (h *Hook) stageAllOutdated() {
	h.uow.stage(h.store.markAllOutdated)
}

func (h *Hook) askAllOutdated(ctx context.Context) {
	users, err := h.uow.GetOutdatedTrackedUsers(ctx)
	if err != nil {
		h.log.Err(err).Msg("Failed to look up which device lists are out of date")
	}
	h.resolver.ask(users...)
}

const (
	isKnownQuery       = `SELECT true FROM sendertrust_inbox WHERE event_id=$1`
	newestEventQuery   = `SELECT MAX(received_at_ms) FROM sendertrust_inbox`
	insertHistoryQuery = `
		INSERT INTO sendertrust_inbox (event_id, seq, room_id, room_encrypted, received_at_ms, event, told)
		VALUES ($1, 0, $2, $3, $4, NULL, false) ON CONFLICT (event_id) DO NOTHING
	`
)

func (s *store) isKnown(ctx context.Context, eventID id.EventID) (known bool, err error) {
	err = s.QueryRow(ctx, isKnownQuery, eventID).Scan(&known)
	return known, ignoreNoRows(err)
}

// newestEvent is when the newest event was received that is known; zero: none is.
func (s *store) newestEvent(ctx context.Context) (time.Time, error) {
	var ms sql.NullInt64
	if err := s.QueryRow(ctx, newestEventQuery).Scan(&ms); err != nil || !ms.Valid {
		return time.Time{}, err
	}
	return time.UnixMilli(ms.Int64), nil
}

// noteHistory notes that an event was there before the first /sync, so that it is known when the position is lost.
func (h *Hook) noteHistory(roomID id.RoomID, encrypted bool, eventID id.EventID, now time.Time) {
	h.uow.stage(func(ctx context.Context) error {
		if _, err := h.store.Exec(ctx, insertHistoryQuery, eventID, roomID, encrypted, now.UnixMilli()); err != nil {
			return fmt.Errorf("failed to note an earlier event: %w", err)
		}
		return nil
	})
}

// afterKnown gives what comes after the last event of a timeline that is known, and whether there is one. Without one, where a room
// was silent for longer than events are remembered, or the bot is new, it is what was sent since not everything is known.
func (h *Hook) afterKnown(ctx context.Context, timeline []*event.Event) (missed []*event.Event, found bool, err error) {
	for i := len(timeline) - 1; i >= 0; i-- {
		known, err := h.store.isKnown(ctx, timeline[i].ID)
		if err != nil {
			return nil, false, fmt.Errorf("failed to look up whether %s is known: %w", timeline[i].ID, err)
		} else if known {
			return timeline[i+1:], true, nil
		}
	}
	newest, err := h.store.newestEvent(ctx)
	if err != nil {
		return nil, false, fmt.Errorf("failed to look up what is known: %w", err)
	}
	for i, evt := range timeline {
		if sent := time.UnixMilli(evt.Timestamp); !newest.IsZero() && sent.After(newest.Add(-keepPositions)) {
			return timeline[i:], i > 0, nil
		}
	}
	return nil, len(timeline) > 0, nil
}

// messages gives a page of a room's events. It tries until the homeserver gives it, or refuses it for good; an error of the token or the
// context is returned at once.
func (h *Hook) messages(ctx context.Context, roomID id.RoomID, from, to string) (*mautrix.RespMessages, error) {
	for wait := firstSyncRetry; ; wait = min(2*wait, maxSyncRetry) {
		page, err := h.client.Messages(ctx, roomID, from, to, mautrix.DirectionBackward, nil, gapPage)
		if err == nil || ctx.Err() != nil || !mayPassOver(err) {
			return page, err
		}
		zerolog.Ctx(ctx).Warn().Err(err).Stringer("room_id", roomID).Dur("retry_in", wait).
			Msg("Failed to fetch messages that came during a long pause, trying again")
		if err = await(ctx, wait); err != nil {
			return nil, err
		}
	}
}

// mayPassOver says that a request may go right the next time.
func mayPassOver(err error) bool {
	var httpError mautrix.HTTPError
	if !errors.As(err, &httpError) || httpError.Response == nil {
		return true
	}
	status := httpError.Response.StatusCode
	return status < 400 || status >= 500 || status == http.StatusRequestTimeout || status == http.StatusTooManyRequests
}
