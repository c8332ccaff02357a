package e2e

import (
	"fmt"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

func TestWhatIsSaidWhileTheBotIsStoppedIsAnsweredOnceAfterwards(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	pinned, pinnedKey := w.newStranger(t, "pinned")
	stranger, strangerKey := w.newStranger(t, "stranger")
	unsigned := w.newPerson(t, "unsigned")
	bot := w.newBot(t, func(config botproc.Config) { pin(config, pinned.UserID, pinnedKey) })
	room := newRoom(t, true, bot, stranger, pinned, unsigned)
	settle(t, stranger, room)

	exitCode, took, err := bot.Stop(within(t, patience))
	ok(t, err)
	if exitCode != 0 || took > 5*time.Second {
		t.Errorf("the bot ended with code %d after %v, not with 0 within 5 s", exitCode, took)
	}
	ctx := within(t, patience)
	senders := []*people.Person{stranger, pinned, unsigned}
	var sent []id.EventID
	var wanted []people.Annotation
	for i := range 20 {
		sender := senders[i%len(senders)]
		sent = append(sent, must(sender.Send(ctx, room, say(fmt.Sprint("message ", i))))(t))
		session := sessionID(t, sender, room)
		wanted = append(wanted, []people.Annotation{
			unverifiedIdentity(stranger, strangerKey, session),
			proven("verified", "none", "sender_verified", pinned, pinnedKey, session),
			unsignedDevice(unsigned, session),
		}[i%len(senders)])
	}
	ok(t, bot.Restart(within(t, patience)))
	for i, eventID := range sent {
		expect(t, bot, stranger, eventID, wanted[i])
	}
	expectOnlyAnswers(t, stranger, room, sent...)
}

func TestKilledBotAnswersEachMessageOnce(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	bot := w.newBot(t, nil)
	room := newRoom(t, true, bot, alice)
	ctx := within(t, 2*patience)
	var sent []id.EventID
	for round := range 3 {
		for i := range 5 {
			sent = append(sent, must(alice.Send(ctx, room, say(fmt.Sprint("message ", round, i))))(t))
		}
		// In the middle of its work.
		must(alice.WaitForAnswer(ctx, sent[len(sent)-4]))(t)
		bot.Kill()
		alice.RotateSession(room)
		sent = append(sent, must(alice.Send(ctx, room, say("are you dead?")))(t))
		ok(t, bot.Restart(within(t, patience)))
	}
	for _, eventID := range sent {
		if code := must(alice.WaitForAnswer(ctx, eventID))(t).Annotation.Code; code != "unverified_identity" {
			t.Errorf("%s was answered by %s", eventID, code)
		}
	}
	expectOnlyAnswers(t, alice, room, sent...)
	expect(t, bot, alice, sent[len(sent)-1], unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
}
