package bot

import (
	"context"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

const modesRoom id.RoomID = "!room:example.org"

// modesOf is a room with a moderator, a member, and the bot.
func modesOf(t *testing.T, mode string) *fakeRooms {
	t.Helper()
	f := newFakeRooms(t, mode)
	f.bot.reviser.review = func(_ context.Context, told cryptohook.Verdict, _ id.UserID) (cryptohook.Verdict, error) {
		return told, nil
	}
	for _, userID := range []id.UserID{"@bot:example.org", "@alice:example.org", "@mod:example.org"} {
		f.join(userID)
	}
	f.levels(map[id.UserID]int{"@mod:example.org": 50, "@gone:example.org": 100})
	return f
}

func (f *fakeRooms) join(userID id.UserID) {
	f.t.Helper()
	if err := f.bot.client.StateStore.SetMembership(f.t.Context(), modesRoom, userID, event.MembershipJoin); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeRooms) levels(users map[id.UserID]int) {
	f.t.Helper()
	if err := f.bot.client.StateStore.SetPowerLevels(f.t.Context(), modesRoom, &event.PowerLevelsEventContent{Users: users}); err != nil {
		f.t.Fatal(err)
	}
}

// told is what a command gets.
func (f *fakeRooms) told(eventID id.EventID, sender id.UserID, code cryptohook.Code, args ...string) response {
	f.t.Helper()
	command := from(eventID, "PHONE", code).by(sender)
	command.verdict.UserID = sender
	return f.bot.orderMode(f.t.Context(), f.order(command, args...))
}

func (f *fakeRooms) order(command heard, args ...string) *order {
	return &order{evt: f.event(command), verdict: command.verdict, speech: f.bot.speech(command.roomID), name: "mode", args: args}
}

// audited are the lines of the audit table, the newest first.
func (f *fakeRooms) audited() []auditLine {
	f.t.Helper()
	return must(f.bot.reviser.records.lastAudits(f.t.Context(), 100))(f.t)
}

func stateEvent(eventID id.EventID, sender id.UserID, content map[string]any) *event.Event {
	key := ""
	evt := &event.Event{ID: eventID, RoomID: modesRoom, Sender: sender, Type: stateMode, StateKey: &key}
	evt.Content.Raw = content
	evt.Mautrix.EventSource = event.SourceJoin | event.SourceTimeline
	return evt
}

func TestModesAnswerWhatTheySay(t *testing.T) {
	mention := map[string]any{"user_ids": []string{"@bot:example.org"}}
	for _, tc := range []struct {
		mode           string
		fine, bad, ask string // what comes: words, a sign or nothing
	}{
		{ModeReply, "m.room.message", "m.room.message", "m.room.message"},
		{ModeWarnings, "", "m.room.message", ""},
		{ModeReaction, "m.reaction", "m.reaction", "m.reaction"},
		{ModeCommand, "", "", "m.room.message"},
	} {
		f := newFakeRooms(t, tc.mode)
		f.bot.displayName = "Trust Warden"
		expect := func(what, want string, m heard) {
			t.Helper()
			got := ""
			if said := f.says(f.hear(m)); len(said) > 0 {
				got = said[0].evtType
			}
			if got != want {
				t.Errorf("%s, %s: %q instead of %q", tc.mode, what, got, want)
			}
		}
		expect("fine", tc.fine, from("$fine", "PHONE", fine))
		expect("bad", tc.bad, from("$bad", "PHONE", bad))
		expect("a mention", tc.ask, from("$ask", "PHONE", fine).with("m.mentions", mention))
		expect("the ID", tc.ask, from("$ask2", "PHONE", fine).with("body", "is @bot:example.org here?"))
		expect("the name", tc.ask, from("$ask3", "PHONE", fine).with("body", "Trust Warden: is this me?"))
	}
}

// In a room that is not encrypted there is one thing to say, and no sign for it.
func TestReactionModeTellsARoomThatItIsNotEncrypted(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	if kind := f.bot.kindOf(modesRoom, cryptohook.Verdict{Code: cryptohook.CodeNotEncrypted}); kind != kindReply {
		t.Errorf("by %s", kind)
	}
}

func TestAnswerThatWasAskedForStaysTrueInCommandMode(t *testing.T) {
	f := newFakeRooms(t, ModeCommand)
	f.says(f.hear(from("$quiet", "PHONE", fine)))
	answer := f.only(f.hear(from("$ask", "PHONE", fine).with("body", "@bot:example.org?")))
	f.becomesOf("sPHONE", "PHONE", cryptohook.CodeVerified)
	if said := f.only(f.work); said.edits() != string(answer.id) {
		t.Errorf("said %v", said)
	}
}

// A room that changes to warnings, and back: what was answered stays true, and what was not stays so.
func TestModeMayChangeBetweenAnAnswerAndItsCorrection(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	one := f.only(f.hear(from("$one", "PHONE", fine)))
	f.bot.config.Annotate.Mode = ModeReaction
	f.says(f.hear(from("$two", "PHONE", fine)))
	f.bot.config.Annotate.Mode = ModeWarnings
	f.silence("quiet", f.hear(from("$three", "PHONE", fine)))
	f.bot.config.Annotate.Mode = ModeCommand
	f.becomesOf("sPHONE", "PHONE", cryptohook.CodeVerified)
	edits := 0
	for _, said := range f.says(f.work) {
		switch {
		case said.edits() == string(one.id):
			edits++
		case said.evtType == "m.reaction" && said.relation().EventID == "$two", said.redacts != "":
		default:
			t.Errorf("said %v", said)
		}
	}
	if edits != 1 {
		t.Errorf("%d edits", edits)
	}
	f.wantSign("$two", "✅")
}

func TestModeratorsCommandChangesTheMode(t *testing.T) {
	f := modesOf(t, ModeReply)
	for _, mode := range []string{ModeWarnings, "REACTION", ModeCommand, ModeReply} {
		r := f.told(id.EventID("$"+mode), "@mod:example.org", fine, mode)
		if want := strings.ToLower(mode); r.outcome != outcomeDone || f.bot.mode(modesRoom) != want {
			t.Errorf("%s: %s, %s", mode, f.bot.mode(modesRoom), r.words.plain())
		}
		if lines := f.audited(); lines[0].eventID != id.EventID("$"+mode) || lines[0].outcome != auditDone || lines[0].arguments != mode {
			t.Errorf("audited %+v", lines[0])
		}
		f.now = f.now.Add(1e9)
	}
	f.told("$x", "@mod:example.org", fine, ModeCommand)
	f.start()
	if f.bot.mode(modesRoom) != ModeCommand {
		t.Errorf("after a restart it is %s", f.bot.mode(modesRoom))
	}
	f.bot.config.Annotate.Mode = ModeWarnings
	f.told("$y", "@mod:example.org", fine, modeDefault)
	if f.bot.mode(modesRoom) != ModeWarnings || f.bot.mode("!other:example.org") != ModeWarnings {
		t.Errorf("by default it is %s", f.bot.mode(modesRoom))
	}
	if err := f.bot.modes.set(t.Context(), roomMode{modesRoom, ModeCommand, ""}); err != nil {
		t.Fatal(err)
	}
	if err := f.bot.forgetRoom(t.Context(), modesRoom); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if f.bot.mode(modesRoom) != ModeWarnings {
			t.Errorf("after leaving it is %s", f.bot.mode(modesRoom))
		}
		f.start()
	}
}

func TestModeIsChangedByNobodyElse(t *testing.T) {
	for name, tc := range map[string]struct {
		sender  id.UserID
		code    cryptohook.Code
		change  func(f *fakeRooms, command *heard)
		why     string
		sayings string
	}{
		"a member":             {"@alice:example.org", cryptohook.CodeVerified, nil, whyNotModerator, "may not change"},
		"a moderator who left": {"@gone:example.org", fine, nil, whyNotModerator, "may not change"},
		"an unsigned device":   {"@mod:example.org", bad, nil, whyNotProven, "not sure"},
		"in the clear":         {"@mod:example.org", cryptohook.CodeSentInClear, nil, whyNotProven, "not sure"},
		"a changed identity":   {"@mod:example.org", cryptohook.CodeIdentityChanged, nil, whyNotProven, "not sure"},
		"from a backup":        {"@mod:example.org", cryptohook.CodeAuthenticityNotGuaranteed, nil, whyNotProven, "not sure"},
		"not encrypted":        {"@mod:example.org", cryptohook.CodeNotEncrypted, nil, whyNotEncrypted, "dev.sendertrust.mode"},
		"another's session": {"@mod:example.org", fine, func(_ *fakeRooms, command *heard) {
			command.verdict.UserID = "@alice:example.org"
		}, whyNotProven, "not sure"},
		"late":     {"@mod:example.org", fine, func(_ *fakeRooms, command *heard) { command.verdict.Late = true }, whyLate, "too late"},
		"outdated": {"@mod:example.org", fine, func(_ *fakeRooms, command *heard) { command.verdict.Outdated = true }, whyNotSure, "cannot check"},
		"found out meanwhile": {"@mod:example.org", fine, func(f *fakeRooms, _ *heard) {
			f.bot.reviser.review = func(_ context.Context, told cryptohook.Verdict, _ id.UserID) (cryptohook.Verdict, error) {
				told.Code = cryptohook.CodeVerificationViolation
				return told, nil
			}
		}, whyNotProven, "has been replaced"},
		"strict": {"@mod:example.org", fine, func(f *fakeRooms, _ *heard) { f.bot.config.Annotate.Shields = ShieldsStrict }, whyNotProven, "not sure"},
		"a level for it": {"@mod:example.org", fine, func(f *fakeRooms, _ *heard) {
			levels := &event.PowerLevelsEventContent{Users: map[id.UserID]int{"@mod:example.org": 50}, Events: map[string]int{stateMode.Type: 60}}
			if err := f.bot.client.StateStore.SetPowerLevels(f.t.Context(), modesRoom, levels); err != nil {
				f.t.Fatal(err)
			}
		}, whyNotModerator, "may not change"},
	} {
		t.Run(name, func(t *testing.T) {
			f := modesOf(t, ModeReply)
			command := from("$command", "PHONE", tc.code).by(tc.sender)
			command.verdict.UserID = tc.sender
			if tc.change != nil {
				tc.change(f, &command)
			}
			r := f.bot.orderMode(t.Context(), f.order(command, ModeCommand))
			if r.outcome != outcomeRefused || r.detail != tc.why || !strings.Contains(r.words.plain(), tc.sayings) {
				t.Errorf("%s (%s): %s", r.outcome, r.detail, r.words.plain())
			}
			if f.bot.mode(modesRoom) != ModeReply {
				t.Errorf("it is %s now", f.bot.mode(modesRoom))
			}
			if lines := f.audited(); len(lines) != 1 || lines[0].outcome != string(outcomeRefused) || lines[0].detail != tc.why || lines[0].sender != tc.sender {
				t.Errorf("audited %+v", lines)
			}
		})
	}
}

func TestUnknownModeIsRefusedWithTheChoices(t *testing.T) {
	f := modesOf(t, ModeReply)
	r := f.told("$one", "@mod:example.org", fine, "<b>loud\u202e</b>")
	if r.outcome != outcomeRefused || !strings.Contains(r.words.plain(), "reply, warnings, reaction, command") || strings.Contains(r.words.html(), "<b>loud") {
		t.Errorf("%s: %s", r.outcome, r.words.html())
	}
}

func TestModeIsToldToWhoeverAsks(t *testing.T) {
	f := modesOf(t, ModeReaction)
	if said := f.told("$one", "@alice:example.org", fine).words.plain(); !strings.Contains(said, "a sign on every message") || !strings.Contains(said, "the configuration") {
		t.Errorf("says %s", said)
	}
	f.told("$two", "@mod:example.org", fine, ModeWarnings)
	if said := f.told("$three", "@alice:example.org", fine).words.plain(); !strings.Contains(said, "only messages that I warn about") || !strings.Contains(said, "told so") {
		t.Errorf("says %s", said)
	}
	for _, language := range Languages {
		f.bot.config.Annotate.Language = language
		for _, mode := range Modes {
			f.bot.config.Annotate.Mode = mode
			f.told("$four", "@mod:example.org", fine, modeDefault)
			for _, code := range []cryptohook.Code{fine, cryptohook.CodeNotEncrypted} {
				if said := f.told("$five", "@alice:example.org", code).words.plain(); strings.Contains(said, "mode.") && !strings.Contains(said, stateMode.Type) || strings.Contains(said, "mode.now") {
					t.Errorf("%s, %s: %s", language, mode, said)
				}
			}
		}
	}
}

// Who may, sees it in the room's state as well.
func TestModeIsWrittenIntoTheRoomIfTheBotMay(t *testing.T) {
	f := modesOf(t, ModeReply)
	f.silence("a bot that may not", func() { f.told("$one", "@mod:example.org", fine, ModeWarnings) })
	f.levels(map[id.UserID]int{"@mod:example.org": 50, "@bot:example.org": 50})
	said := f.only(func() { f.told("$two", "@mod:example.org", fine, ModeCommand) })
	if said.evtType != "state "+stateMode.Type || said.content["mode"] != ModeCommand {
		t.Errorf("said %v", said)
	}
	if said = f.only(func() { f.told("$three", "@mod:example.org", fine, modeDefault) }); len(said.content) != 0 {
		t.Errorf("said %v", said)
	}
}

func TestStateEventChangesTheMode(t *testing.T) {
	f := modesOf(t, ModeReply)
	take := func(evt *event.Event) { f.bot.handleMode(t.Context(), evt) }
	want := func(mode string) {
		t.Helper()
		if got := f.bot.mode(modesRoom); got != mode {
			t.Errorf("it is %s, not %s", got, mode)
		}
	}
	first := stateEvent("$state1", "@mod:example.org", map[string]any{"mode": ModeWarnings})
	take(first)
	want(ModeWarnings)
	f.start()
	want(ModeWarnings)
	// A command is newer; then the same state is shown again.
	f.told("$command", "@mod:example.org", fine, ModeReaction)
	take(first)
	want(ModeReaction)
	f.start()
	take(first)
	want(ModeReaction)
	take(stateEvent("$state2", "@mod:example.org", map[string]any{"mode": ModeCommand}))
	want(ModeCommand)
	for _, unknown := range []any{"loud", "", "REPLY", 1, nil, []any{ModeReply}} {
		take(stateEvent("$state3", "@mod:example.org", map[string]any{"mode": unknown}))
		want(ModeCommand)
	}
	otherKey := stateEvent("$state4", "@mod:example.org", map[string]any{"mode": ModeReply})
	*otherKey.StateKey = "@mod:example.org"
	invited := stateEvent("$state5", "@mod:example.org", map[string]any{"mode": ModeReply})
	invited.Mautrix.EventSource = event.SourceInvite | event.SourceState
	take(otherKey)
	take(invited)
	want(ModeCommand)
	take(stateEvent("$state6", "@mod:example.org", map[string]any{}))
	want(ModeReply)
}

// What the bot has written itself comes back later than what it was told next.
func TestOwnStateEventSaysNothingNew(t *testing.T) {
	f := modesOf(t, ModeReply)
	f.told("$one", "@mod:example.org", fine, ModeWarnings)
	f.told("$two", "@mod:example.org", fine, ModeCommand)
	echo := stateEvent("$echo", "@bot:example.org", map[string]any{"mode": ModeWarnings})
	f.bot.handleMode(t.Context(), echo)
	if f.bot.mode(modesRoom) != ModeCommand {
		t.Errorf("it is %s", f.bot.mode(modesRoom))
	}
	// With a new database it is all that is known.
	fresh := modesOf(t, ModeReply)
	fresh.bot.handleMode(t.Context(), echo)
	if fresh.bot.mode(modesRoom) != ModeWarnings {
		t.Errorf("it is %s", fresh.bot.mode(modesRoom))
	}
}
