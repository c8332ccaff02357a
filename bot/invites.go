package bot

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

const (
	joinTimeout = 20 * time.Second
	joinRetries = 5
	joinBackoff = 5 * time.Second
	// joinsAtOnce is how many invitations are accepted at the same time, of different people.
	joinsAtOnce = 4
	// pendingAtMost is how many invitations are in memory. The others are found again when the bot starts anew.
	pendingAtMost = 10_000
	invitePeriod  = time.Hour
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
		if !b.invitations.add(cryptohook.Invitation{RoomID: evt.RoomID, Inviter: evt.Sender}) {
			b.metrics.reached(limitInvites)
			log.Warn().Msg("Leaving an invite for later: there are too many")
		}
	case evt.GetStateKey() == b.client.UserID.String() && (membership == event.MembershipLeave || membership == event.MembershipBan):
		if err := b.forgetRoom(ctx, evt.RoomID); err != nil {
			log.Err(err).Msg("Failed to forget the answers in a room that the bot is no longer in")
		}
	case evt.GetStateKey() != b.client.UserID.String() && (membership == event.MembershipLeave || membership == event.MembershipBan):
		b.leaveIfAlone(ctx, evt.RoomID)
	}
}

// invitations are those that are to be accepted, beside everything else: joining a room may take long. The inviters take turns, and
// whoever invites the bot to hundreds of rooms waits. A process takes up what the one before it has left.
type invitations struct {
	clock                 func() time.Time
	perInviter, perMinute int
	// join tries once, and says whether that is the end of it.
	join func(ctx context.Context, invitation cryptohook.Invitation) (done bool)
	log  zerolog.Logger
	// limited is called for each invitation that has to wait for a limit.
	limited func()
	wake    chan struct{}

	mu sync.Mutex
	// inviters are those with pending invitations, in turn.
	inviters []*inviter
	byName   map[id.UserID]*inviter
	pending  int
	joining  int
	// joined is when the last invitations were accepted.
	joined []time.Time
}

// inviter is somebody with pending invitations, or with some that were accepted lately.
type inviter struct {
	userID  id.UserID
	pending []*pendingInvitation
	// joined is when this inviter's last invitations were accepted; busy says that one is being accepted.
	joined []time.Time
	busy   bool
}

type pendingInvitation struct {
	cryptohook.Invitation
	tries int
	// next is when it may be tried again; limited says that it has been counted as having to wait.
	next    time.Time
	limited bool
}

func (b *Bot) newInvitations() *invitations {
	return &invitations{
		clock: b.clock, perInviter: b.config.Limits.InvitesPerSender, perMinute: b.config.Limits.Invites,
		join: func(ctx context.Context, invitation cryptohook.Invitation) bool {
			ctx = b.log.With().Stringer("room_id", invitation.RoomID).Stringer("user_id", invitation.Inviter).Logger().WithContext(ctx)
			return b.tryJoin(ctx, invitation.RoomID)
		},
		log: b.log.With().Str("component", "invitations").Logger(), limited: func() { b.metrics.reached(limitInvites) },
		wake: make(chan struct{}, 1), byName: make(map[id.UserID]*inviter),
	}
}

// add notes an invitation. It says no if there are too many.
func (i *invitations) add(invitation cryptohook.Invitation) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.pending >= pendingAtMost {
		return false
	}
	who := i.byName[invitation.Inviter]
	if who == nil {
		who = &inviter{userID: invitation.Inviter}
		i.byName[invitation.Inviter] = who
		i.inviters = append(i.inviters, who)
	}
	if slices.ContainsFunc(who.pending, func(p *pendingInvitation) bool { return p.RoomID == invitation.RoomID }) {
		return true
	}
	i.pending++
	who.pending = append(who.pending, &pendingInvitation{Invitation: invitation})
	notify(i.wake)
	return true
}

func (i *invitations) length() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.pending
}

// run accepts invitations until the context ends.
func (i *invitations) run(ctx context.Context) {
	var joins sync.WaitGroup
	defer joins.Wait()
	for ctx.Err() == nil {
		who, next, wait := i.take()
		if next != nil {
			joins.Go(func() { i.accept(ctx, who, next) })
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-i.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// take gives an invitation that may be accepted now, or how long there is none.
func (i *invitations) take() (who *inviter, next *pendingInvitation, wait time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.clock()
	wait = invitePeriod
	i.joined = within(i.joined, now, ratePeriod)
	i.forget(now)
	if i.joining >= joinsAtOnce {
		return nil, nil, wait
	}
	for turn, who := range i.inviters {
		if who.busy || len(who.pending) == 0 {
			continue
		}
		next := who.pending[0]
		at := i.earliest(who, next, now)
		if at.After(now) {
			wait = min(wait, at.Sub(now))
			continue
		}
		who.pending, who.busy = who.pending[1:], true
		who.joined = append(who.joined, now)
		i.joined = append(i.joined, now)
		i.joining++
		i.inviters = append(slices.Delete(i.inviters, turn, turn+1), who)
		return who, next, 0
	}
	return nil, nil, wait
}

// earliest is when an inviter's next invitation may be accepted. The first within a minute need not wait for what others have sent.
func (i *invitations) earliest(who *inviter, next *pendingInvitation, now time.Time) time.Time {
	at := next.next
	if len(who.joined) >= i.perInviter {
		at = later(at, who.joined[len(who.joined)-i.perInviter].Add(invitePeriod))
	}
	lately := len(within(slices.Clone(who.joined), now, ratePeriod)) > 0
	if lately && len(i.joined) >= i.perMinute {
		at = later(at, i.joined[len(i.joined)-i.perMinute].Add(ratePeriod))
	}
	if at.After(now) && at != next.next && !next.limited {
		next.limited = true
		i.limited()
		i.log.Info().Stringer("room_id", next.RoomID).Stringer("user_id", who.userID).Int("pending", len(who.pending)).
			Msg("Invitations wait: there are more than are accepted at a time")
	}
	return at
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// forget drops the inviters of whom there is nothing to remember.
func (i *invitations) forget(now time.Time) {
	i.inviters = slices.DeleteFunc(i.inviters, func(who *inviter) bool {
		who.joined = within(who.joined, now, invitePeriod)
		done := !who.busy && len(who.pending) == 0 && len(who.joined) == 0
		if done {
			delete(i.byName, who.userID)
		}
		return done
	})
}

// accept joins the room. If a server is slow, that is tried again later.
func (i *invitations) accept(ctx context.Context, who *inviter, next *pendingInvitation) {
	done := i.join(ctx, next.Invitation)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.joining--
	who.busy = false
	notify(i.wake)
	if !done && next.tries < joinRetries {
		next.next = i.clock().Add(joinBackoff << next.tries)
		next.tries++
		who.pending = append(who.pending, next)
		return
	}
	i.pending--
	if !done {
		i.log.Error().Stringer("room_id", next.RoomID).Stringer("user_id", who.userID).Msg("Giving up on an invite; invite the bot again")
	}
}

// resumeInvitations takes up the invitations that a former process has not accepted.
func (b *Bot) resumeInvitations(ctx context.Context) {
	pending, err := b.hook.Invitations(ctx)
	if err != nil {
		b.log.Err(err).Msg("Failed to look up which invites were not accepted yet")
	}
	for _, invitation := range pending {
		if b.config.InviteAllowed(invitation.Inviter) {
			b.invitations.add(invitation)
		}
	}
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
