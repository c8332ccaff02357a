package bot

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// lobby is where invitations come in. Joining takes until the test lets it go on.
type lobby struct {
	*invitations
	clock *testClock

	mu      sync.Mutex
	joined  []cryptohook.Invitation
	waits   int
	failing map[id.RoomID]int
}

func newLobby(perInviter, perMinute int) *lobby {
	l := &lobby{clock: newTestClock(), failing: make(map[id.RoomID]int)}
	l.invitations = &invitations{
		clock: l.clock.Now, perInviter: perInviter, perMinute: perMinute, log: zerolog.Nop(),
		wake: make(chan struct{}, 1), byName: make(map[id.UserID]*inviter), limited: func() { l.waits++ },
	}
	l.join = func(_ context.Context, invitation cryptohook.Invitation) bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.joined = append(l.joined, invitation)
		l.failing[invitation.RoomID]--
		return l.failing[invitation.RoomID] < 0
	}
	return l
}

func (l *lobby) invite(who id.UserID, rooms int) {
	for n := range rooms {
		l.add(cryptohook.Invitation{RoomID: id.RoomID(fmt.Sprintf("!%d of %s", n, who)), Inviter: who})
	}
}

// work accepts all that may be accepted now, and gives how many that were.
func (l *lobby) work(t *testing.T) (accepted int) {
	t.Helper()
	for {
		who, next, _ := l.take()
		if next == nil {
			return accepted
		}
		l.accept(t.Context(), who, next)
		accepted++
	}
}

func TestInvitersTakeTurns(t *testing.T) {
	l := newLobby(1000, 1000)
	l.invite("@mallory:x", 200)
	l.invite("@alice:x", 1)
	for range 3 {
		who, next, _ := l.take()
		l.accept(t.Context(), who, next)
	}
	if second := l.joined[1].Inviter; second != "@alice:x" {
		t.Errorf("alice has to wait for %s", second)
	}
	if l.work(t) != 198 || l.length() != 0 {
		t.Errorf("%d were accepted, %d are left", len(l.joined), l.length())
	}
}

// One server that is slow holds up the rooms of one inviter only.
func TestSlowJoinHoldsUpItsInviterOnly(t *testing.T) {
	l := newLobby(1000, 1000)
	l.invite("@mallory:x", 10)
	l.invite("@alice:x", 1)
	busy, slow, _ := l.take()
	who, next, _ := l.take()
	if next == nil || who.userID != "@alice:x" {
		t.Fatalf("next is %+v", next)
	}
	l.accept(t.Context(), who, next)
	if _, next, _ = l.take(); next != nil {
		t.Errorf("%s is accepted while another of the same inviter is", next.RoomID)
	}
	l.accept(t.Context(), busy, slow)
	if l.work(t) != 9 {
		t.Error("the others were not accepted")
	}
}

func TestInvitationsWaitForTheirLimits(t *testing.T) {
	l := newLobby(30, 20)
	l.invite("@mallory:x", 100)
	if accepted := l.work(t); accepted != 20 {
		t.Fatalf("%d within a minute", accepted)
	}
	// Somebody else's first need not wait.
	l.invite("@alice:x", 2)
	if accepted := l.work(t); accepted != 1 || l.joined[20].Inviter != "@alice:x" {
		t.Fatalf("%d more, %v", accepted, l.joined[20:])
	}
	l.clock.advance(time.Minute)
	if accepted := l.work(t); accepted != 11 {
		t.Errorf("%d in the next minute, want mallory's last 10 within the hour, and alice's", accepted)
	}
	if _, _, wait := l.take(); wait != 59*time.Minute {
		t.Errorf("the next one in %s", wait)
	}
	l.clock.advance(59 * time.Minute)
	for range 5 {
		l.work(t)
		l.clock.advance(time.Hour)
	}
	if len(l.joined) != 102 || l.length() != 0 {
		t.Errorf("%d were accepted in the end, %d are left", len(l.joined), l.length())
	}
	if l.waits == 0 || l.waits > 100 {
		t.Errorf("%d are counted as having to wait", l.waits)
	}
	l.clock.advance(time.Hour)
	l.take()
	if len(l.inviters) != 0 || len(l.byName) != 0 {
		t.Error("inviters are remembered for ever")
	}
}

func TestFailedJoinIsTriedAgainAFewTimes(t *testing.T) {
	l := newLobby(1000, 1000)
	l.failing["!0 of @alice:x"], l.failing["!1 of @alice:x"] = 2, 100
	l.invite("@alice:x", 2)
	for range 100 {
		l.work(t)
		l.clock.advance(joinBackoff)
	}
	tries := make(map[id.RoomID]int)
	for _, invitation := range l.joined {
		tries[invitation.RoomID]++
	}
	if tries["!0 of @alice:x"] != 3 || tries["!1 of @alice:x"] != joinRetries+1 || l.length() != 0 {
		t.Errorf("tried %v, %d are left", tries, l.length())
	}
}

func TestInvitationIsNotedOnce(t *testing.T) {
	l := newLobby(1000, 1000)
	l.invite("@alice:x", 3)
	l.invite("@alice:x", 3)
	if l.length() != 3 {
		t.Errorf("%d are pending", l.length())
	}
	for n := range pendingAtMost {
		l.add(cryptohook.Invitation{RoomID: id.RoomID(fmt.Sprint("!", n)), Inviter: id.UserID(fmt.Sprint("@", n))})
	}
	if l.length() != pendingAtMost {
		t.Errorf("%d are pending", l.length())
	}
}

// The worker accepts what comes while it sleeps, and ends with its context.
func TestInvitationsAreAcceptedAsTheyCome(t *testing.T) {
	l := newLobby(1000, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { l.run(ctx) })
	for n := range 20 {
		l.invite(id.UserID(fmt.Sprint("@user", n)), 5)
	}
	for deadline := time.Now().Add(10 * time.Second); l.length() > 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	cancel()
	running.Wait()
	if len(l.joined) != 100 {
		t.Errorf("%d were accepted", len(l.joined))
	}
}
