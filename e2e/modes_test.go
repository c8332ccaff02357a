package e2e

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// The ways in which the bot answers, and what becomes of answers when messages are edited or deleted.

const modeType = "dev.sendertrust.mode"

// inMode gives a bot that answers in that way by its configuration.
func inMode(mode string) func(botproc.Config) {
	return func(config botproc.Config) { config["annotate"] = botproc.Config{"mode": mode, "shields": "lax"} }
}

// expectSign waits until the bot's reactions to an event are that one.
func expectSign(t *testing.T, bot *botproc.Bot, observer *people.Person, room id.RoomID, eventID id.EventID, sign string) people.Reaction {
	t.Helper()
	reactions := must(observer.WaitForReactions(within(t, patience), room, eventID, func(reactions []people.Reaction) bool {
		return len(reactions) == 1 && reactions[0].Key == sign
	}))(t)
	if reactions[0].Sender != bot.UserID || len(reactions[0].Content) != 1 {
		t.Errorf("the reaction is %+v", reactions[0])
	}
	return reactions[0]
}

// expectNoAnswer makes sure that nothing was said about an event, by a command that is answered after it.
func expectNoAnswer(t *testing.T, asker *people.Person, room id.RoomID, eventIDs ...id.EventID) {
	t.Helper()
	ask(t, asker, room, "", "!trust mode")
	for _, eventID := range eventIDs {
		if answers := asker.Answers(eventID); len(answers) > 0 {
			t.Errorf("%s was answered: %+v", eventID, answers)
		}
		if reactions := must(asker.Reactions(within(t, patience), room, eventID))(t); len(reactions) > 0 {
			t.Errorf("%s got reactions: %+v", eventID, reactions)
		}
	}
}

func TestReactionModePutsASignOnEachMessage(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	vera, verasKey := w.newStranger(t, "vera")
	bot := w.newBot(t, func(config botproc.Config) { inMode("reaction")(config); pin(config, vera.UserID, verasKey) })
	alice := w.newElement(t, "alice")
	room := newRoom(t, true, bot, vera)
	ctx := within(t, 3*patience)
	ok(t, vera.Invite(ctx, room, alice.UserID()))
	ok(t, alice.Join(ctx, room))
	ok(t, alice.WaitForMember(ctx, room, bot.UserID))

	verified := must(vera.Send(ctx, room, say("it is me")))(t)
	expectSign(t, bot, vera, room, verified, "✅")
	unsigned := must(alice.Send(ctx, room, say("nobody vouches for me yet")))(t)
	expectSign(t, bot, vera, room, unsigned, "⛔")
	clear := must(vera.SendClear(ctx, room, say("oops")))(t)
	expectSign(t, bot, vera, room, clear, "⛔")
	// It stays true.
	must(alice.BootstrapCrossSigning(ctx))(t)
	expectSign(t, bot, vera, room, unsigned, "ℹ️")
	must(vera.ResetIdentity(ctx))(t)
	expectSign(t, bot, vera, room, verified, "⛔")
	notice := must(vera.WaitForNotice(ctx, room))(t)
	if !notice.Encrypted || !strings.Contains(notice.Body, "no longer holds") {
		t.Errorf("the room was told %+v", notice)
	}
	for _, eventID := range []id.EventID{verified, unsigned, clear} {
		if answers := vera.Answers(eventID); len(answers) > 0 {
			t.Errorf("%s was answered in words: %+v", eventID, answers)
		}
	}
	// Whoever wants to know more asks.
	ask(t, vera, room, verified, "!trust explain", vera.UserID.String())
}

func TestReactionShowsTheWorstOfAMessageAndItsEdits(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newBot(t, inMode("reaction"))
	alice, _ := w.newStranger(t, "alice")
	stolen := w.login(t, alice.UserID.String(), people.Options{DeviceName: "stolen"})
	room := newRoom(t, true, bot, alice)
	ctx := within(t, 2*patience)
	ok(t, stolen.WaitJoined(ctx, room, bot.UserID))
	message := must(alice.Send(ctx, room, say("pay Bob")))(t)
	expectSign(t, bot, alice, room, message, "ℹ️")
	edit := must(stolen.SendEdit(ctx, room, message, say("pay Mallory")))(t)
	expectSign(t, bot, alice, room, message, "⛔")
	expectNoAnswer(t, alice, room, edit)
	ask(t, alice, room, message, "!trust explain", "was edited later", "put there later", stolen.DeviceID.String())
	second := must(alice.Send(ctx, room, say("delete me")))(t)
	expectSign(t, bot, alice, room, second, "ℹ️")
	ok(t, alice.Redact(ctx, room, second))
	must(alice.WaitForReactions(ctx, room, second, func(reactions []people.Reaction) bool { return len(reactions) == 0 }))(t)
}

// faultyBinary is the bot with its fault points.
var faultyBinary struct {
	once sync.Once
	path string
	err  error
}

func (w *world) withFaultPoints(t *testing.T) string {
	t.Helper()
	faultyBinary.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), startPatience)
		defer cancel()
		faultyBinary.path, faultyBinary.err = botproc.BuildWith(ctx, w.root, filepath.Join(w.dir, "sendertrust-faulty"), "-tags", "goolm,faultpoints")
	})
	ok(t, faultyBinary.err)
	return faultyBinary.path
}

// The process dies when the new reaction is there and the old one too, or when the old one is gone and nothing is noted.
func TestKillWhileAReactionIsCorrectedLeavesOne(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	for _, point := range []string{"reacted", "taken back"} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			ctx := within(t, 3*patience)
			alice := w.newPerson(t, "alice")
			dir := must(os.MkdirTemp(w.dir, "bot-"))(t)
			bot := must(botproc.Start(ctx, botproc.Options{
				Binary: w.withFaultPoints(t), Homeserver: w.server.URL, UserID: id.NewUserID(must(w.register(ctx, "bot"))(t), "localhost"), Password: password,
				Dir: dir, Configure: inMode("reaction"),
			}))(t)
			t.Cleanup(bot.Kill)
			room := newRoom(t, true, bot, alice)
			message := must(alice.Send(ctx, room, say("nobody vouches for me yet")))(t)
			expectSign(t, bot, alice, room, message, "⛔")
			bot.Kill()
			ok(t, bot.Launch("FAULTPOINT="+point))
			must(alice.BootstrapCrossSigning(ctx))(t)
			select {
			case <-bot.Exited():
			case <-ctx.Done():
				t.Fatal("the bot did not come to the point")
			}
			signs := []string{}
			for _, reaction := range must(alice.Reactions(ctx, room, message))(t) {
				signs = append(signs, reaction.Key)
			}
			t.Logf("killed with %v", signs)
			if !slices.Contains(signs, "ℹ️") || (len(signs) == 2) != (point == "reacted") {
				t.Errorf("when the bot was killed there were %v", signs)
			}
			ok(t, bot.Restart(ctx))
			expectSign(t, bot, alice, room, message, "ℹ️")
			next := must(alice.Send(ctx, room, say("one more")))(t)
			expectSign(t, bot, alice, room, next, "ℹ️")
			expectSign(t, bot, alice, room, message, "ℹ️")
		})
	}
}

func TestCommandModeAnswersWhoAsks(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newBot(t, inMode("command"))
	alice, masterKey := w.newStranger(t, "alice")
	stolen := w.login(t, alice.UserID.String(), people.Options{DeviceName: "stolen"})
	room := newRoom(t, true, bot, alice)
	ctx := within(t, 2*patience)
	ok(t, stolen.WaitJoined(ctx, room, bot.UserID))
	fine := must(alice.Send(ctx, room, say("all is well")))(t)
	wrong := must(alice.SendClear(ctx, room, say("oops")))(t)
	edit := must(stolen.SendEdit(ctx, room, fine, say("all is lost")))(t)
	asked := must(alice.Send(ctx, room, bot.UserID.String()+", is this me? "+say("")))(t)
	expect(t, bot, alice, asked, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
	mentioned := must(alice.SendContent(ctx, room, map[string]any{
		"msgtype": "m.text", "body": say("and this?"), "m.mentions": map[string]any{"user_ids": []id.UserID{bot.UserID}},
	}))(t)
	expect(t, bot, alice, mentioned, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
	expectNoAnswer(t, alice, room, fine, wrong, edit)
	ask(t, alice, room, fine, "!trust explain", alice.UserID.String())
}

// Who may say how a room is answered: an operator, a moderator from a device of theirs, the room's state; nobody else.
func TestModeOfARoomIsForThoseWhoMayChangeIt(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	olga, olgasKey := w.newStranger(t, "olga")
	bot := w.newBot(t, func(config botproc.Config) {
		pin(config, olga.UserID, olgasKey)
		config["trust"].(botproc.Config)["operators"] = []string{olga.UserID.String()}
	})
	mod, _ := w.newStranger(t, "mod")
	guest, _ := w.newStranger(t, "guest")
	room := newRoom(t, true, bot, mod, olga, guest)
	stolen := w.login(t, mod.UserID.String(), people.Options{DeviceName: "stolen"})
	ctx := within(t, 4*patience)
	ok(t, stolen.WaitJoined(ctx, room, bot.UserID))

	expectMode := func(mode string) {
		t.Helper()
		ask(t, guest, room, "", "!trust mode", map[string]string{
			"reply": "I answer every message", "warnings": "only messages that I warn about", "reaction": "a sign on every message", "command": "only when I am asked",
		}[mode])
	}
	expectMode("reply")
	ask(t, guest, room, "", "!trust mode command", "You may not change", guest.UserID.String())
	attempt := must(stolen.Send(ctx, room, "!trust mode command"))(t)
	if answer := *must(mod.WaitForAnswer(ctx, attempt))(t); answer.Annotation.Code != "unsigned_device" || !strings.Contains(answer.Body, "I am not sure that this came from") {
		t.Errorf("a device that nobody confirmed: %+v", answer)
	}
	inClear := must(mod.SendClear(ctx, room, "!trust mode command"))(t)
	if answer := *must(guest.WaitForAnswer(ctx, inClear))(t); !strings.Contains(answer.Body, "I am not sure that this came from") {
		t.Errorf("in the clear: %+v", answer)
	}
	expectMode("reply")

	ask(t, mod, room, "", "!trust mode warnings", "From now on I answer only messages in this room that I warn about")
	fine := must(guest.Send(ctx, room, say("all is well")))(t)
	expectNoAnswer(t, guest, room, fine)
	if _, err := guest.State(ctx, room, modeType); err == nil {
		t.Error("the bot has written into the room's state, for which it has no right")
	}

	ok(t, mod.SetPower(ctx, room, bot.UserID, 50))
	ask(t, olga, room, "", "!trust mode reaction", "From now on I put a sign on every message")
	if state := must(guest.State(ctx, room, modeType))(t); state["mode"] != "reaction" {
		t.Errorf("the room's state is %v", state)
	}
	signed := must(guest.Send(ctx, room, say("a sign, please")))(t)
	expectSign(t, bot, guest, room, signed, "ℹ️")

	must(mod.SendState(ctx, room, modeType, map[string]any{"mode": "command"}))(t)
	ok(t, bot.WaitForLog(ctx, "A room's state says", room.String(), "command"))
	unasked := must(guest.SendClear(ctx, room, say("oops")))(t)
	expectNoAnswer(t, guest, room, unasked)
	must(mod.SendState(ctx, room, modeType, map[string]any{"mode": "loudly"}))(t)
	ok(t, bot.WaitForLog(ctx, "Ignoring a state event", room.String()))
	if _, err := guest.SendState(ctx, room, modeType, map[string]any{"mode": "reply"}); err == nil {
		t.Error("the homeserver lets everybody change the room's state")
	}
	expectMode("command")

	_, _, err := bot.Stop(ctx)
	ok(t, err)
	ok(t, bot.Restart(ctx))
	expectMode("command")
	bot.Kill()
	ok(t, bot.Restart(ctx))
	expectMode("command")
	_, audit := ask(t, olga, room, "", "!trust audit 50", "mode command", "mode warnings", "mode reaction")
	for _, eventID := range []id.EventID{attempt, inClear} {
		if line := lineWith(audit.Body, eventID.String()); !contains(line, "refused", "not_proven") {
			t.Errorf("the audit table says %q of %s", line, eventID)
		}
	}

	ask(t, mod, room, "", "!trust mode default", "From now on I answer every message")
	answered := must(guest.Send(ctx, room, say("and now?")))(t)
	must(guest.WaitForAnswer(ctx, answered))(t)
}

// Where nothing is encrypted anybody could have written a command: the state event is checked by the homeserver.
func TestModeOfARoomThatIsNotEncryptedIsItsState(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	mod, _ := w.newStranger(t, "mod")
	room := newRoom(t, false, w.bot, mod)
	ctx := within(t, 2*patience)
	command := must(mod.SendClear(ctx, room, "!trust mode command"))(t)
	if answer := *must(mod.WaitForAnswer(ctx, command))(t); !strings.Contains(answer.Body, modeType) {
		t.Errorf("the answer is %+v", answer)
	}
	must(mod.SendState(ctx, room, modeType, map[string]any{"mode": "command"}))(t)
	ok(t, w.bot.WaitForLog(ctx, "A room's state says", room.String(), "command"))
	unasked := must(mod.SendClear(ctx, room, say("hello")))(t)
	shown := must(mod.SendClear(ctx, room, "!trust mode"))(t)
	if answer := *must(mod.WaitForAnswer(ctx, shown))(t); !strings.Contains(answer.Body, "only when I am asked") {
		t.Errorf("the answer is %+v", answer)
	}
	if answers := mod.Answers(unasked); len(answers) > 0 {
		t.Errorf("a message was answered: %+v", answers)
	}
}

// The room's state tells a bot that comes later, too.
func TestModeIsThereBeforeTheBot(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	ctx := within(t, 2*patience)
	room := must(alice.CreateRoom(ctx, true))(t)
	must(alice.SendState(ctx, room, modeType, map[string]any{"mode": "reaction"}))(t)
	ok(t, alice.Invite(ctx, room, w.bot.UserID))
	ok(t, alice.WaitJoined(ctx, room, w.bot.UserID))
	message := must(alice.Send(ctx, room, say("welcome")))(t)
	expectSign(t, w.bot, alice, room, message, "ℹ️")
}

func TestEditFromAnotherDeviceIsTold(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	observer, _ := w.newStranger(t, "observer")
	mallory, _ := w.newStranger(t, "mallory")
	stolen := w.login(t, alice.UserID.String(), people.Options{DeviceName: "stolen"})
	bot := w.newBot(t, nil)
	room := newRoom(t, true, bot, alice, observer, mallory)
	ctx := within(t, 3*patience)
	ok(t, stolen.WaitJoined(ctx, room, bot.UserID))
	root := must(observer.Send(ctx, room, say("a topic")))(t)
	message := must(alice.SendInThread(ctx, room, root, say("pay Bob")))(t)
	expect(t, bot, observer, message, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))

	own := must(alice.SendEdit(ctx, room, message, say("pay Bob now")))(t)
	foreign := must(mallory.SendEdit(ctx, room, message, say("pay Mallory")))(t)
	edit := must(stolen.SendEdit(ctx, room, message, say("pay Mallory")))(t)
	answer := *must(observer.WaitForAnswer(ctx, edit))(t)
	if a := answer.Annotation; answer.Malformed != nil || a.Code != "unsigned_device" || a.Shield != "red" || a.DeviceID != stolen.DeviceID || a.EventID != edit {
		t.Errorf("annotation %+v (%v)", a, answer.Malformed)
	}
	if answer.InReplyTo != message || answer.Thread != root || !answer.Encrypted || !contains(answer.Body, "Changed afterwards", stolen.DeviceID.String()) {
		t.Errorf("the answer is %+v", answer)
	}
	again := must(stolen.SendEdit(ctx, room, message, say("pay Mallory, please")))(t)
	settle(t, observer, room)
	for _, eventID := range []id.EventID{own, foreign, again} {
		if answers := observer.Answers(eventID); len(answers) > 0 {
			t.Errorf("%s was answered: %+v", eventID, answers)
		}
	}

	// It stays true, across a restart: the owner confirms the device after all.
	bot.Kill()
	must(stolen.ResetIdentity(ctx))(t)
	ok(t, bot.Restart(ctx))
	corrected(t, observer, edit, "identity_changed")

	ok(t, alice.Redact(ctx, room, message))
	for _, eventID := range []id.EventID{message, edit} {
		cleared := must(observer.WaitForAnswerThat(ctx, eventID, func(answer people.Answer) bool {
			return contains(answer.Body, "deleted by "+alice.UserID.String())
		}))(t)
		if a := cleared.Annotation; a.EventID != eventID || a.Code == "" || a.DeviceID != "" || a.MasterKey != "" || a.SessionID != "" || !cleared.Encrypted {
			t.Errorf("what is left of the answer is %+v", cleared)
		}
		if contains(cleared.Body, stolen.DeviceID.String()) || contains(cleared.FormattedBody, alice.DeviceID.String()) {
			t.Errorf("it repeats what was said: %s", cleared.Body)
		}
	}
	settle(t, observer, room)
	if answers := observer.Answers(message); len(answers) != 1 {
		t.Errorf("%d answers", len(answers))
	}
}

// An edit in the clear changes what people read in an encrypted room; and one of a message from before the bot came is judged by itself.
func TestEditsInTheClearAndOfOlderMessages(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	ctx := within(t, 2*patience)
	room := must(alice.CreateRoom(ctx, true))(t)
	old := must(alice.Send(ctx, room, say("among us")))(t)
	ok(t, alice.Invite(ctx, room, w.bot.UserID))
	ok(t, alice.WaitJoined(ctx, room, w.bot.UserID))
	stolen := w.login(t, alice.UserID.String(), people.Options{DeviceName: "stolen"})
	ok(t, stolen.WaitJoined(ctx, room, w.bot.UserID))
	message := must(alice.Send(ctx, room, say("pay Bob")))(t)
	must(alice.WaitForAnswer(ctx, message))(t)
	harmless := must(alice.SendEdit(ctx, room, old, say("among all of us")))(t)
	edits := map[id.EventID]id.EventID{
		must(alice.SendRaw(ctx, room, event.EventMessage.Type, map[string]any{
			"msgtype": "m.text", "body": say("* pay Mallory"), "m.new_content": map[string]any{"msgtype": "m.text", "body": say("pay Mallory")},
			"m.relates_to": map[string]any{"rel_type": "m.replace", "event_id": message},
		}))(t): message,
		must(stolen.SendEdit(ctx, room, old, say("I said nothing")))(t): old,
	}
	for edit, original := range edits {
		answer := *must(alice.WaitForAnswer(ctx, edit))(t)
		if answer.Annotation.Shield != "red" || answer.InReplyTo != original || !contains(answer.Body, "Changed afterwards") {
			t.Errorf("the answer is %+v", answer)
		}
	}
	settle(t, alice, room)
	if answers := alice.Answers(harmless); len(answers) > 0 {
		t.Errorf("an edit without a fault was answered: %+v", answers)
	}
}

// A moderator may delete what the bot says: then that is gone, and not edited.
func TestAnswerThatAModeratorDeletedIsLeftAlone(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	mod := w.newPerson(t, "mod")
	room := newRoom(t, true, w.bot, mod)
	ctx := within(t, 2*patience)
	message := must(mod.Send(ctx, room, say("nobody vouches for me yet")))(t)
	answer := *must(mod.WaitForAnswer(ctx, message))(t)
	ok(t, mod.Redact(ctx, room, answer.EventID))
	settle(t, mod, room)
	must(mod.BootstrapCrossSigning(ctx))(t)
	other := must(mod.Send(ctx, room, say("and now?")))(t)
	must(mod.WaitForAnswer(ctx, other))(t)
	settle(t, mod, room)
	if now := mod.Answers(message); len(now) != 1 || now[0].Edits > 0 {
		t.Errorf("the answer was edited: %+v", now)
	}
}
