package cryptohook

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"maunium.net/go/mautrix/id"
)

// share gives a room's session to its members. In a room of thousands that takes seconds, of which the log tells how far it is.
func (h *Hook) share(ctx context.Context, roomID id.RoomID, members []id.UserID) error {
	if len(members) <= usersPerQuery {
		return h.mach.ShareGroupSession(ctx, roomID, members)
	}
	log, begun := h.log.With().Stringer("room_id", roomID).Int("members", len(members)).Logger(), h.clock()
	log.Info().Msg("Sharing the encryption key of a large room with its members: the first message there takes a while")
	if err := h.learnMembers(ctx, roomID, members); err != nil {
		return err
	}
	if err := h.mach.ShareGroupSession(ctx, roomID, members); err != nil {
		return err
	}
	log.Info().Dur("took_ms", h.clock().Sub(begun)).Msg("Shared the encryption key of a large room with its members")
	return nil
}

// learnMembers asks for the keys of the members whose devices are not known, in several requests: mautrix would ask for those of all of them at
// once, and hold the answer in memory. As many are under way as the resolver allows, for each may wait for a homeserver that is silent.
func (h *Hook) learnMembers(ctx context.Context, roomID id.RoomID, members []id.UserID) error {
	known, err := h.uow.FilterTrackedUsers(ctx, members)
	if err != nil {
		return fmt.Errorf("failed to look up whose devices are known: %w", err)
	}
	tracked := make(map[id.UserID]struct{}, len(known))
	for _, userID := range known {
		tracked[userID] = struct{}{}
	}
	unknown := slices.DeleteFunc(slices.Clone(members), func(userID id.UserID) bool { _, ok := tracked[userID]; return ok })
	var queries sync.WaitGroup
	var asked atomic.Int64
	for some := range slices.Chunk(unknown, usersPerQuery) {
		queries.Go(func() {
			h.resolver.inSlot(ctx, func() {
				h.resolver.query(ctx, some)
				h.log.Info().Stringer("room_id", roomID).Int64("asked_for", asked.Add(int64(len(some)))).Int("of", len(unknown)).
					Msg("Asking for the keys of a room's members")
			})
		})
	}
	queries.Wait()
	return ctx.Err()
}
