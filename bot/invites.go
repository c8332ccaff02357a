package bot

import (
	"context"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

const (
	joinTimeout = 20 * time.Second
	joinRetries = 5
	joinBackoff = 5 * time.Second
)

// handleMember accepts invites of people who may invite the bot, and leaves rooms in which nobody else is left.
func (b *Bot) handleMember(ctx context.Context, evt *event.Event) {
	log := b.log.With().Stringer("room_id", evt.RoomID).Stringer("user_id", evt.Sender).Logger()
	ctx = log.WithContext(ctx)
	membership := evt.Content.AsMember().Membership
	switch {
	case evt.GetStateKey() == b.client.UserID.String() && membership == event.MembershipInvite:
		if !b.config.InviteAllowed(evt.Sender) {
			log.Info().Msg("Leaving an invite alone: its sender is not in invites.allow")
			return
		}
		b.join(ctx, evt.RoomID)
	case evt.GetStateKey() == b.client.UserID.String() && (membership == event.MembershipLeave || membership == event.MembershipBan):
		if err := b.reviser.forgetRoom(ctx, evt.RoomID); err != nil {
			log.Err(err).Msg("Failed to forget the answers in a room that the bot is no longer in")
		}
	case evt.GetStateKey() != b.client.UserID.String() && (membership == event.MembershipLeave || membership == event.MembershipBan):
		b.leaveIfAlone(ctx, evt.RoomID)
	}
}

// join tries once at once, so that a crash has the invite delivered again; if a server is slow, it goes on in the background.
func (b *Bot) join(ctx context.Context, roomID id.RoomID) {
	if b.tryJoin(ctx, roomID) {
		return
	}
	b.background.Go(func() {
		for wait, try := joinBackoff, 1; try <= joinRetries; wait, try = 2*wait, try+1 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			if b.tryJoin(ctx, roomID) {
				return
			}
		}
		zerolog.Ctx(ctx).Error().Msg("Giving up on an invite; invite the bot again")
	})
}

func (b *Bot) tryJoin(ctx context.Context, roomID id.RoomID) bool {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	if _, err := b.client.JoinRoomByID(ctx, roomID); err != nil {
		_, final := retryAfter(err, 0)
		zerolog.Ctx(ctx).Warn().Err(err).Bool("final", final).Msg("Failed to join a room")
		return final
	}
	zerolog.Ctx(ctx).Info().Msg("Joined a room")
	return true
}

func (b *Bot) leaveIfAlone(ctx context.Context, roomID id.RoomID) {
	log := zerolog.Ctx(ctx)
	members, err := b.client.StateStore.GetRoomJoinedOrInvitedMembers(ctx, roomID)
	if err != nil {
		log.Err(err).Msg("Failed to look up who is left in the room")
		return
	}
	if len(members) != 1 || members[0] != b.client.UserID {
		return
	}
	if _, err = b.client.LeaveRoom(ctx, roomID); err != nil {
		log.Warn().Err(err).Msg("Failed to leave a room in which nobody is left")
		return
	}
	log.Info().Msg("Left a room in which nobody else is left")
}
