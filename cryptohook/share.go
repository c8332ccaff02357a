package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"maunium.net/go/mautrix/id"
)

// share gives a room's session to its members. In a room of thousands that takes seconds, of which the log tells how far it is. Members about
// whom their homeserver does not answer get it when it does, for then they have a device more: see storeForMautrix.
func (h *Hook) share(ctx context.Context, roomID id.RoomID, members []id.UserID) error {
	large := len(members) > usersPerQuery
	log, begun := h.log.With().Stringer("room_id", roomID).Int("members", len(members)).Logger(), h.clock()
	if large {
		log.Info().Msg("Sharing the encryption key of a large room with its members: the first message there takes a while")
	}
	known, err := h.learnMembers(ctx, roomID, members)
	if err != nil {
		return err
	}
	if err = h.mach.ShareGroupSession(ctx, roomID, known); err != nil {
		return err
	}
	if large {
		log.Info().Dur("took_ms", h.clock().Sub(begun)).Msg("Shared the encryption key of a large room with its members")
	}
	return nil
}

// learnMembers asks for the keys of the members whose devices are not known, in several requests, and gives those whose devices are known then:
// mautrix would ask for those of all of them at once, and hold the answer in memory. As many are under way as the resolver allows, for each may
// wait for a homeserver that is silent.
func (h *Hook) learnMembers(ctx context.Context, roomID id.RoomID, members []id.UserID) (known []id.UserID, err error) {
	for some := range slices.Chunk(members, perStatement) {
		tracked, err := h.uow.FilterTrackedUsers(ctx, some)
		if err != nil {
			return nil, fmt.Errorf("failed to look up whose devices are known: %w", err)
		}
		known = append(known, tracked...)
	}
	tracked := make(map[id.UserID]struct{}, len(known))
	for _, userID := range known {
		tracked[userID] = struct{}{}
	}
	unknown := slices.DeleteFunc(slices.Clone(members), func(userID id.UserID) bool { _, ok := tracked[userID]; return ok })
	var queries sync.WaitGroup
	var mu sync.Mutex
	var asked int
	var faults []error
	for some := range slices.Chunk(unknown, usersPerQuery) {
		query := func() {
			answered, err := h.resolver.query(ctx, some)
			mu.Lock()
			defer mu.Unlock()
			known = slices.AppendSeq(known, maps.Keys(answered))
			faults = append(faults, err)
			if asked += len(some); len(unknown) > usersPerQuery {
				h.log.Info().Stringer("room_id", roomID).Int("asked_for", asked).Int("of", len(unknown)).Msg("Asking for the keys of a room's members")
			}
		}
		if len(unknown) <= usersPerQuery {
			query() // it need not wait for those that the resolver makes
			break
		}
		queries.Go(func() { h.resolver.inSlot(ctx, query) })
	}
	queries.Wait()
	if err = ctx.Err(); err == nil {
		err = errors.Join(faults...)
	}
	return known, err
}
