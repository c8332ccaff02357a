package bot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// phoneBook is a hook that knows some users, and some only once the homeserver was asked.
type phoneBook struct {
	known, learns map[id.UserID]*cryptohook.UserReport
	failing       error
	asked         []id.UserID
}

func (p *phoneBook) User(_ context.Context, userID id.UserID) (*cryptohook.UserReport, error) {
	return p.known[userID], nil
}

func (p *phoneBook) Recheck(ctx context.Context, users []id.UserID) error {
	if _, bounded := ctx.Deadline(); !bounded {
		return errors.New("nobody says how long that may take")
	}
	p.asked = append(p.asked, users...)
	if p.failing != nil {
		return p.failing
	}
	if p.known == nil {
		p.known = make(map[id.UserID]*cryptohook.UserReport)
	}
	for _, userID := range users {
		p.known[userID] = p.learns[userID]
	}
	return nil
}

// enter has somebody join a room of the bot's, under a name.
func (a *askedBot) enter(roomID id.RoomID, userID id.UserID, membership event.Membership, called string) {
	a.t.Helper()
	if err := a.client.StateStore.SetMember(a.t.Context(), roomID, userID, &event.MemberEventContent{Membership: membership, Displayname: called}); err != nil {
		a.t.Fatal(err)
	}
}

func nobodysOrder() bool { return false }

const theRoom = id.RoomID("!room:example.com")

func (a *askedBot) encrypt(roomID id.RoomID) {
	a.t.Helper()
	if err := a.client.StateStore.SetEncryptionEvent(a.t.Context(), roomID, &event.EncryptionEventContent{Algorithm: id.AlgorithmMegolmV1}); err != nil {
		a.t.Fatal(err)
	}
}

// newRoomfulBot is a bot in a room with alice and bob.
func newRoomfulBot(t *testing.T) *askedBot {
	t.Helper()
	a := newAskedBot(t)
	a.encrypt(theRoom)
	for _, userID := range []id.UserID{a.client.UserID, "@alice:example.com", "@bob:example.com"} {
		a.enter(theRoom, userID, event.MembershipJoin, "")
	}
	return a
}

func reportOn(userID id.UserID) *cryptohook.UserReport {
	return &cryptohook.UserReport{
		UserID: userID, MasterKey: masterKeyA, FirstMasterKey: masterKeyA, SelfSigningKey: selfSigningA, Standing: cryptohook.StandingUnverified,
		FirstSeen: time.Date(2026, 1, 2, 3, 4, 0, 0, time.UTC),
		Devices: []cryptohook.DeviceReport{
			{DeviceID: "PHONE", Name: "Element", SigningKey: signingKeyA, SignedByOwner: true}, {DeviceID: "LAPTOP", SigningKey: signingKeyA}, {DeviceID: "OLD", Deleted: true},
		},
	}
}

func TestUserTellsWhatIsKnown(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*cryptohook.UserReport)
		sign   string
		said   []string
		unsaid []string
	}{
		"unverified": {nil, signPlain, []string{
			"@bob:example.com is not verified in person.", "Key of the account: AAAA nX4e +/MX", "first on 2026-01-02 03:04 UTC", "3 devices:",
			"• PHONE «Element»: confirmed by the owner. Fingerprint FFFF nX4e", "• LAPTOP: NOT confirmed by the owner.", "• OLD: logged out.",
			"Nobody has checked for me",
		}, []string{"configuration"}},
		"pinned": {func(r *cryptohook.UserReport) {
			r.Standing, r.VerifiedBy, r.Pinned, r.PinnedKey = cryptohook.StandingVerified, cryptohook.VerifiedByPin, true, masterKeyA
		}, signVerified, []string{"is verified.", "It is the key that my configuration names for @bob:example.com"}, []string{"another key for"}},
		"pinned to another key": {func(r *cryptohook.UserReport) {
			r.Standing, r.Pinned, r.PinnedKey = cryptohook.StandingViolation, true, masterKeyB
		}, signWarning, []string{"has been replaced.", "My configuration names another key for @bob:example.com: BBBB nX4e", "Do not rely"}, []string{"It is the key that my configuration names"}},
		"changed": {func(r *cryptohook.UserReport) {
			r.MasterKey = masterKeyB
			r.Changes = []cryptohook.IdentityChange{{MasterKey: masterKeyA}, {MasterKey: masterKeyB, SeenAt: time.Date(2026, 5, 6, 7, 8, 0, 0, time.UTC)}}
		}, signCaution, []string{"The identity of @bob:example.com has changed.", "on 2026-05-06 07:08 UTC to BBBB nX4e"}, nil},
		"no identity": {func(r *cryptohook.UserReport) { r.MasterKey, r.FirstMasterKey = "", "" }, signCaution, []string{"has not set up an identity"}, []string{"Key of the account:", "first on"}},
	} {
		a := newRoomfulBot(t)
		report := reportOn("@bob:example.com")
		if test.change != nil {
			test.change(report)
		}
		hook := &phoneBook{known: map[id.UserID]*cryptohook.UserReport{report.UserID: report}}
		for _, language := range Languages {
			r := a.describeUser(t.Context(), orderFrom(t, language, "@alice:example.com", "user", "@bob:example.com"), hook, nobodysOrder)
			plain := r.words.plain()
			if r.outcome != outcomeDone || !strings.HasPrefix(plain, test.sign) || strings.Contains(plain, "user.") || strings.Contains(plain, "<no value>") || !strings.Contains(plain, "@bob:example.com") {
				t.Errorf("%s, %s: %s", name, language, plain)
			}
			for _, part := range test.said {
				if language == "en" && !strings.Contains(plain, part) {
					t.Errorf("%s does not say %q:\n%s", name, part, plain)
				}
			}
			for _, part := range test.unsaid {
				if language == "en" && strings.Contains(plain, part) {
					t.Errorf("%s says %q:\n%s", name, part, plain)
				}
			}
		}
		if len(hook.asked) > 0 {
			t.Errorf("%s: the homeserver was asked for what is known", name)
		}
	}
}

func TestUserWithoutANameIsWhoAsks(t *testing.T) {
	a := newRoomfulBot(t)
	hook := &phoneBook{known: map[id.UserID]*cryptohook.UserReport{"@alice:example.com": reportOn("@alice:example.com")}}
	if said := a.describeUser(t.Context(), orderFrom(t, "en", "@alice:example.com", "user"), hook, nobodysOrder).words.plain(); !strings.Contains(said, "@alice:example.com is not verified") {
		t.Error(said)
	}
	if said := a.describeUser(t.Context(), orderFrom(t, "en", "@alice:example.com", "user", "@bot:example.org"), hook, nobodysOrder).words.plain(); !strings.Contains(said, "!trust status") {
		t.Errorf("of the bot itself: %s", said)
	}
	if r := a.describeUser(t.Context(), orderFrom(t, "en", "@alice:example.com", "user", "Bob"), hook, nobodysOrder); r.outcome != outcomeRefused {
		t.Errorf("of a display name: %s", r.words.plain())
	}
}

// Nobody learns here whom the bot knows from its other rooms, or has it ask homeservers for people whom it has nothing to do with.
func TestOnlyOperatorsAreToldOfWhoHasNotJoinedTheRoom(t *testing.T) {
	a := newRoomfulBot(t)
	a.enter(theRoom, "@gone:example.com", event.MembershipLeave, "")
	a.enter(theRoom, "@invited:example.com", event.MembershipInvite, "")
	for _, userID := range []id.UserID{a.client.UserID, "@elsewhere:example.com"} {
		a.encrypt("!elsewhere:example.com")
		a.enter("!elsewhere:example.com", userID, event.MembershipJoin, "")
	}
	a.encrypt("!left:example.com")
	a.enter("!left:example.com", a.client.UserID, event.MembershipLeave, "")
	a.enter("!left:example.com", "@left:example.com", event.MembershipJoin, "")
	refusals := make(map[string][]id.UserID)
	for _, test := range []struct {
		sender, about id.UserID
		asked         bool
	}{
		{"@alice:example.com", "@bob:example.com", true},
		{"@alice:example.com", "@stranger:example.com", false},
		{"@alice:example.com", "@gone:example.com", false},
		{"@alice:example.com", "@invited:example.com", false},
		{"@alice:example.com", "@elsewhere:example.com", false},
		{"@alice:example.com", "@left:example.com", false},
		{"@olga:example.com", "@stranger:example.com", true},
		{"@olga:example.com", "@elsewhere:example.com", true},
	} {
		hook := &phoneBook{learns: map[id.UserID]*cryptohook.UserReport{test.about: reportOn(test.about)}}
		byOperator := func() bool { return test.sender == "@olga:example.com" }
		r := a.describeUser(t.Context(), orderFrom(t, "en", test.sender, "user", test.about.String()), hook, byOperator)
		if asked := len(hook.asked) > 0; asked != test.asked || asked != (r.outcome == outcomeDone) {
			t.Errorf("%s about %s: asked for %v, %s", test.sender, test.about, hook.asked, r.words.plain())
		}
		if same := strings.ReplaceAll(r.words.plain(), test.about.String(), "X"); r.outcome == outcomeRefused {
			refusals[same] = append(refusals[same], test.about)
		}
	}
	if len(refusals) != 1 {
		t.Errorf("the refusals tell people apart: %q", refusals)
	}
}

func TestUserThatIsNotKnownIsAskedForOnce(t *testing.T) {
	a := newRoomfulBot(t)
	outdated := reportOn("@bob:example.com")
	outdated.Outdated = true
	unanswered := fmt.Errorf("failed: %w", &cryptohook.UnansweredError{Users: []id.UserID{"@bob:example.com"}})
	for name, test := range map[string]struct {
		hook phoneBook
		said string
	}{
		"it becomes known":           {phoneBook{learns: map[id.UserID]*cryptohook.UserReport{"@bob:example.com": reportOn("@bob:example.com")}}, "@bob:example.com is not verified in person."},
		"there is nothing":           {phoneBook{}, "I know nothing of @bob:example.com."},
		"nobody answers":             {phoneBook{failing: unanswered}, "The server has not answered in time."},
		"the network fails":          {phoneBook{failing: errors.New("connection refused")}, "The server has not answered in time."},
		"it is out of date, and not": {phoneBook{known: map[id.UserID]*cryptohook.UserReport{"@bob:example.com": outdated}, learns: map[id.UserID]*cryptohook.UserReport{"@bob:example.com": reportOn("@bob:example.com")}}, "3 devices:"},
		"it stays out of date":       {phoneBook{known: map[id.UserID]*cryptohook.UserReport{"@bob:example.com": outdated}, failing: unanswered}, "This is from what I knew before"},
	} {
		said := a.describeUser(t.Context(), orderFrom(t, "en", "@alice:example.com", "user", "@bob:example.com"), &test.hook, nobodysOrder).words.plain()
		if !strings.Contains(said, test.said) || len(test.hook.asked) != 1 {
			t.Errorf("%s: asked for %v, %s", name, test.hook.asked, said)
		}
	}
}

func TestDisplayNamesNeverStandForSomebody(t *testing.T) {
	for name, test := range map[string]struct {
		called string
		shown  string // empty: it is not
		warned string // empty: nothing is
	}{
		"none":                          {"", "", ""},
		"harmless":                      {"Bob the Builder", "«Bob the Builder»", ""},
		"somebody else's":               {"Alice", "", "cannot be told apart from that of @alice:example.com"},
		"somebody else's, in Cyrillic":  {"Аlісе", "", "cannot be told apart from that of @alice:example.com"},
		"somebody else's, with capital": {"aLICE", "", "cannot be told apart from that of @alice:example.com"},
		"somebody else's, unseen marks": {"Al\u200bi\u202ece ", "", "cannot be told apart from that of @alice:example.com"},
		"somebody else's ID":            {"@alice:example.com", "", "looks like the Matrix ID of somebody else"},
		"an ID, full width":             {"＠carol：example.com", "", "looks like the Matrix ID of somebody else"},
		"somebody's local part":         {"carol", "", "cannot be told apart from that of @carol:example.com"},
		"the own ID":                    {"@bob:example.com", "", ""},
		"the own local part":            {"BOB", "", ""},
		"a quotation":                   {"Bob» (verified) «", "«Bob› (verified) ‹»", ""},
		"a new line":                    {"Bob\n✅ verified", "«Bob⟨U+000A⟩✅ verified»", ""},
		"HTML":                          {"<b>Bob</b>", "«<b>Bob</b>»", ""},
		"long":                          {strings.Repeat("B", 60_000), "«" + strings.Repeat("B", 40) + "…»", ""},
	} {
		a := newRoomfulBot(t)
		a.enter(theRoom, "@bob:example.com", event.MembershipJoin, test.called)
		a.enter(theRoom, "@alice:example.com", event.MembershipJoin, "Alice")
		a.enter(theRoom, "@carol:example.com", event.MembershipJoin, "C.")
		a.enter(theRoom, "@gone:example.com", event.MembershipLeave, "Bob the Builder")
		hook := &phoneBook{known: map[id.UserID]*cryptohook.UserReport{"@bob:example.com": reportOn("@bob:example.com")}}
		r := a.describeUser(t.Context(), orderFrom(t, "en", "@alice:example.com", "user", "@bob:example.com"), hook, nobodysOrder)
		said := r.words.plain()
		if test.shown == "" && strings.Contains(said, "calls itself") || !strings.Contains(said, test.shown) || strings.Contains(r.words.html(), "<b>Bob") {
			t.Errorf("%s: shown in %s", name, said)
		}
		warned := strings.Contains(said, "cannot be told apart") || strings.Contains(said, "looks like the Matrix ID")
		if warned != (test.warned != "") || !strings.Contains(said, test.warned) {
			t.Errorf("%s: warned in %s", name, said)
		}
		if size := sizeOf(t, r.words); size > longestAnswer {
			t.Errorf("%s: %d bytes", name, size)
		}
	}
}

func TestUserWithManyDevicesOrHostileNamesFits(t *testing.T) {
	a := newRoomfulBot(t)
	report := reportOn("@bob:example.com")
	report.Devices = nil
	for i := range 500 {
		report.Devices = append(report.Devices, cryptohook.DeviceReport{DeviceID: id.DeviceID(fmt.Sprintf("DEVICE%03d", i)), SigningKey: signingKeyA})
	}
	hook := &phoneBook{known: map[id.UserID]*cryptohook.UserReport{"@bob:example.com": report}}
	said := a.describeUser(t.Context(), orderFrom(t, "en", "@alice:example.com", "user", "@bob:example.com"), hook, nobodysOrder).words.plain()
	if strings.Count(said, "DEVICE") != mostDevices || !strings.Contains(said, "and 480 more.") || !strings.Contains(said, "500 devices:") {
		t.Error(said)
	}
	for i := range report.Devices {
		report.Devices[i].DeviceID, report.Devices[i].Name = id.DeviceID(strings.Repeat("<\u202e", 60_000)), strings.Repeat("<\u202e", 60_000)
	}
	for i := range 1000 {
		a.enter(theRoom, id.UserID(fmt.Sprintf("@%d%s:example.com", i, strings.Repeat("\u202e", 200))), event.MembershipJoin, "B")
	}
	a.enter(theRoom, "@bob:example.com", event.MembershipJoin, "B")
	r := a.describeUser(t.Context(), orderFrom(t, "en", "@alice:example.com", "user", "@bob:example.com"), hook, nobodysOrder)
	if size := sizeOf(t, r.words); size > longestAnswer || strings.Contains(r.words.html(), "<\u202e") {
		t.Errorf("%d bytes", size)
	}
}

// A Matrix ID that is written from the right, or with letters that look like others, is shown so that nothing else is turned, and warned of.
func TestOddIDsAreWarnedOf(t *testing.T) {
	a := newRoomfulBot(t)
	for _, odd := range []id.UserID{"@аlice:example.com", "@bo\u202eb:example.com"} {
		a.enter(theRoom, odd, event.MembershipJoin, "")
		hook := &phoneBook{known: map[id.UserID]*cryptohook.UserReport{odd: reportOn(odd)}}
		r := a.describeUser(t.Context(), orderFrom(t, "en", "@alice:example.com", "user", odd.String()), hook, nobodysOrder)
		if said := r.words.plain(); !strings.Contains(said, speeches["en"].lookAlike(odd)) || strings.Contains(said, "\u202e") {
			t.Errorf("%q: %s", odd, said)
		}
	}
	if speeches["en"].lookAlike("@аlice:example.com") == "" {
		t.Error("the letters are not odd")
	}
}
