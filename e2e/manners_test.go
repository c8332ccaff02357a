package e2e

import (
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

func TestAnswerStaysInTheThread(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	ctx := within(t, patience)
	root := must(alice.Send(ctx, room, say("a topic")))(t)
	inThread := must(alice.SendInThread(ctx, room, root, say("more on it")))(t)
	want := unverifiedIdentity(alice, masterKey, sessionID(t, alice, room))
	if answer := expect(t, w.bot, alice, root, want); answer.Thread != "" {
		t.Errorf("the answer to the root is in the thread of %s", answer.Thread)
	}
	if answer := expect(t, w.bot, alice, inThread, want); answer.Thread != root {
		t.Errorf("the answer is in the thread of %q, not of %s", answer.Thread, root)
	}
}

func TestNoticesEditsAndReactionsAreNotAnswered(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, true, w.bot, alice)
	ctx := within(t, patience)
	message := must(alice.Send(ctx, room, say("a mesage")))(t)
	quiet := []id.EventID{
		must(alice.SendNotice(ctx, room, say("I am a bot")))(t),
		must(alice.SendEdit(ctx, room, message, say("a message")))(t),
		must(alice.SendReaction(ctx, room, message, "👍"))(t),
	}
	expectOnlyAnswers(t, alice, room, message)
	for _, eventID := range append(quiet, must(alice.WaitForAnswer(ctx, message))(t).EventID) {
		if answers := alice.Answers(eventID); len(answers) > 0 {
			t.Errorf("%s was answered: %+v", eventID, answers)
		}
	}
}

func TestWhatWasSaidBeforeTheBotJoinedIsNotAnswered(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	ctx := within(t, patience)
	room := must(alice.CreateRoom(ctx, true))(t)
	before := []id.EventID{must(alice.Send(ctx, room, say("among us")))(t), must(alice.SendClear(ctx, room, say("in the clear")))(t)}
	ok(t, alice.Invite(ctx, room, w.bot.UserID))
	ok(t, alice.WaitJoined(ctx, room, w.bot.UserID))
	alice.RotateSession(room)
	after := must(alice.Send(ctx, room, say("welcome")))(t)
	expect(t, w.bot, alice, after, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
	for _, eventID := range before {
		if answers := alice.Answers(eventID); len(answers) > 0 {
			t.Errorf("%s was answered: %+v", eventID, answers)
		}
	}
}

func TestRoomWithoutEncryptionIsToldOnceUntilSomebodyAsks(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, false, w.bot, alice)
	ctx := within(t, patience)
	want := people.Annotation{Code: "not_encrypted", Shield: "none"}
	first := must(alice.SendClear(ctx, room, say("hello")))(t)
	second := must(alice.SendClear(ctx, room, say("anybody?")))(t)
	asked := must(alice.SendRaw(ctx, room, event.EventMessage.Type, map[string]any{
		"msgtype": event.MsgText, "body": say("what about us?"), "m.mentions": map[string]any{"user_ids": []id.UserID{w.bot.UserID}},
	}))(t)
	for _, eventID := range []id.EventID{first, asked} {
		if answer := expectAnswer(t, w.bot, alice, eventID, want); answer.Encrypted {
			t.Error("the answer is encrypted in a room that is not")
		}
	}
	if answers := alice.Answers(second); len(answers) > 0 {
		t.Errorf("the bot answered again, unasked: %+v", answers)
	}
}

func TestOnlyAllowedPeopleBringTheBotIntoRooms(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newBot(t, func(config botproc.Config) {
		config["invites"] = botproc.Config{"allow": []string{"@friend*:localhost"}}
	})
	friend, masterKey := w.newStranger(t, "friend")
	stranger, _ := w.newStranger(t, "stranger")
	ctx := within(t, patience)
	uninvited := must(stranger.CreateRoom(ctx, true, bot.UserID))(t)
	room := newRoom(t, true, bot, friend)
	eventID := must(friend.Send(ctx, room, say("welcome")))(t)
	expect(t, bot, friend, eventID, unverifiedIdentity(friend, masterKey, sessionID(t, friend, room)))
	ok(t, bot.WaitForLog(ctx, "invite", uninvited.String(), stranger.UserID.String()))
	if members := stranger.Members(uninvited); len(members) != 1 {
		t.Errorf("the room of somebody who is not allowed has %v in it", members)
	}
}

func TestBotLeavesRoomInWhichItIsAlone(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	bob, _ := w.newStranger(t, "bob")
	ctx := within(t, patience)
	room := newRoom(t, true, w.bot, alice, bob)
	ok(t, bob.Leave(ctx, room))
	ok(t, alice.WaitLeft(ctx, room, bob.UserID))
	settle(t, alice, room) // one is left with it: the bot stays
	ok(t, alice.Leave(ctx, room))
	ok(t, w.bot.WaitForLog(ctx, "Left a room", room.String()))
}

func TestWarningsModeAnswersOnlyWhatIsWrong(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newBot(t, func(config botproc.Config) { config["annotate"] = botproc.Config{"mode": "warnings", "shields": "lax"} })
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, true, bot, alice)
	ctx := within(t, patience)
	fine := must(alice.Send(ctx, room, say("all is well")))(t)
	wrong := must(alice.SendClear(ctx, room, say("oops")))(t)
	expect(t, bot, alice, wrong, people.Annotation{Code: "sent_in_clear", Shield: "red"})
	if answers := alice.Answers(fine); len(answers) > 0 {
		t.Errorf("a message without a fault was answered: %+v", answers)
	}
}
