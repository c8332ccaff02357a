package bot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// census is a hook that knows what members are worth. It is asked for some at a time.
type census struct {
	of      func(userID id.UserID) cryptohook.UserStanding
	asked   int
	largest int
	err     error
}

func (c *census) Standings(_ context.Context, users []id.UserID) (map[id.UserID]cryptohook.UserStanding, error) {
	c.asked++
	c.largest = max(c.largest, len(users))
	found := make(map[id.UserID]cryptohook.UserStanding)
	for _, userID := range users {
		found[userID] = c.of(userID)
	}
	return found, c.err
}

// standingByName gives a user the standing that the local part names.
func standingByName(userID id.UserID) cryptohook.UserStanding {
	known := cryptohook.UserStanding{UserID: userID, Known: true, MasterKey: masterKeyA, Standing: cryptohook.StandingUnverified, Signed: 1}
	switch localpart, _, _ := userID.Parse(); strings.TrimRight(localpart, "0123456789") {
	case "verified":
		known.Standing = cryptohook.StandingVerified
	case "replaced":
		known.Standing = cryptohook.StandingViolation
	case "changed":
		known.Changed = true
	case "without":
		known.MasterKey, known.Signed, known.Unsigned = "", 0, 1
	case "unknown":
		known = cryptohook.UserStanding{UserID: userID, Standing: cryptohook.StandingUnverified, Outdated: true}
	case "messy":
		known.Unsigned = 2
	}
	return known
}

func TestRoomListsTheMostWorryingFirst(t *testing.T) {
	a := newAskedBot(t)
	a.encrypt(theRoom)
	for _, userID := range []id.UserID{a.client.UserID, "@verified:x", "@another:x", "@messy:x", "@unknown:x", "@without:x", "@changed:x", "@replaced:x"} {
		a.enter(theRoom, userID, event.MembershipJoin, "")
	}
	a.enter(theRoom, "@gone:x", event.MembershipLeave, "")
	a.enter(theRoom, "@invited:x", event.MembershipInvite, "")
	want := `⛔ There are 8 members in this room.
The room is encrypted.

• Who joins later may read what was written before.
• 1 × ⛔ verified identity replaced, 1 × ⚠️ identity has changed, 1 × ⚠️ no identity set up, 1 × ⚠️ not known yet, 2 × ℹ️ not verified in person, 1 × ✅ verified
• Of 2 members I cannot check which devices are theirs: I know no keys of the accounts.
• What I know of one member may be out of date: the server has not answered yet.

⛔ @replaced:x · verified identity replaced · 1 confirmed, 0 not
⚠️ @changed:x · identity has changed · 1 confirmed, 0 not
⚠️ @without:x · no identity set up · 0 confirmed, 1 not
⚠️ @unknown:x · not known yet · 0 confirmed, 0 not (may be out of date)
ℹ️ @messy:x · not verified in person · 1 confirmed, 2 not
ℹ️ @another:x · not verified in person · 1 confirmed, 0 not
✅ @verified:x · verified · 1 confirmed, 0 not
ℹ️ @bot:example.org · me, this bot · 1 confirmed, 0 not

More about one of them: !trust user @name:server`
	said := a.describeRoom(t.Context(), orderFrom(t, "en", "@plain:x", "room"), &census{of: standingByName}).words
	if said.plain() != want {
		t.Errorf("got\n%s\nwant\n%s", said.plain(), want)
	}
	if html := said.html(); strings.Count(html, "<tr>") != 9 || strings.Count(html, "<td>") != 24 || strings.Count(html, "<th>") != 3 {
		t.Error(html)
	}
	if said := a.describeRoom(t.Context(), orderFrom(t, "de", "@plain:x", "room"), &census{of: standingByName}).words.plain(); strings.Contains(said, "room.") || !strings.Contains(said, "8 Mitglieder") {
		t.Error(said)
	}
}

func TestRoomSaysWhoMayRead(t *testing.T) {
	for visibility, want := range map[event.HistoryVisibility]string{
		"": "Who joins later may read", event.HistoryVisibilityShared: "Who joins later may read", event.HistoryVisibilityInvited: "since they were invited",
		event.HistoryVisibilityJoined: "since they joined", event.HistoryVisibilityWorldReadable: "without being a member", "org.example.<new>": "Who joins later may read",
	} {
		a := newAskedBot(t)
		a.enter(theRoom, a.client.UserID, event.MembershipJoin, "")
		if visibility != "" {
			if err := a.client.StateStore.SetHistoryVisibility(t.Context(), theRoom, &event.HistoryVisibilityEventContent{HistoryVisibility: visibility}); err != nil {
				t.Fatal(err)
			}
		}
		said := a.describeRoom(t.Context(), orderFrom(t, "en", "@plain:x", "room"), &census{of: standingByName}).words.plain()
		if !strings.Contains(said, want) || !strings.Contains(said, "The room is NOT encrypted") || !strings.Contains(said, "Nobody is here but me.") {
			t.Errorf("%s: %s", visibility, said)
		}
	}
}

// Of a big room the most worrying are listed, and all are counted; they are looked up in a few goes.
func TestBigRoomIsSummarised(t *testing.T) {
	a := newAskedBot(t)
	a.encrypt(theRoom)
	for i := range 3000 {
		a.enter(theRoom, id.UserID(fmt.Sprintf("@plain%d:x", i)), event.MembershipJoin, "")
	}
	for i := range 3 {
		a.enter(theRoom, id.UserID(fmt.Sprintf("@replaced%d:x", i)), event.MembershipJoin, "")
	}
	hook := &census{of: standingByName}
	r := a.describeRoom(t.Context(), orderFrom(t, "en", "@plain1:x", "room"), hook)
	said := r.words.plain()
	if rows := strings.Count(said, " · ") / 2; rows != mostRows || !strings.Contains(said, "There are 3003 members") ||
		!strings.Contains(said, "3 × ⛔ verified identity replaced, 3000 × ℹ️") || !strings.Contains(said, "And 2973 more: 2973 × ℹ️ not verified in person") {
		t.Error(said)
	}
	if first := strings.Index(said, "@replaced2:x"); first < 0 || first > strings.Index(said, "@plain") {
		t.Errorf("the most worrying are not first: %s", said)
	}
	if hook.largest > standingsAtOnce || hook.asked > 7 {
		t.Errorf("asked %d times, for %d at once", hook.asked, hook.largest)
	}
	if size := sizeOf(t, r.words); size > longestAnswer {
		t.Errorf("%d bytes", size)
	}
}

func TestRoomOfHostileNamesFits(t *testing.T) {
	a := newAskedBot(t)
	for i := range 100 {
		a.enter(theRoom, id.UserID(fmt.Sprintf("@%02d<b>%s:x", i, strings.Repeat("\u202e", 230))), event.MembershipJoin, "")
	}
	r := a.describeRoom(t.Context(), orderFrom(t, "en", "@plain1:x", "room"), &census{of: standingByName})
	if size := sizeOf(t, r.words); size > longestAnswer || size < longestAnswer/2 {
		t.Errorf("%d bytes", size)
	}
	if html := r.words.html(); strings.Contains(html, "<b>") || strings.Contains(html, "\u202e") || !strings.Contains(html, "@00") {
		t.Errorf("%.3000s", html)
	}
}

func TestRoomThatCannotBeLookedUpFails(t *testing.T) {
	a := newRoomfulBot(t)
	if r := a.describeRoom(t.Context(), orderFrom(t, "en", "@plain:x", "room"), &census{of: standingByName, err: errors.New("the database is away")}); r.outcome != outcomeFailed {
		t.Errorf("%+v", r)
	}
}
