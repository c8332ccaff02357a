package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// corrected waits until the answer to an event was edited to that code, and looks at the edit.
func corrected(t *testing.T, observer *people.Person, eventID id.EventID, code string) people.Answer {
	t.Helper()
	begun := time.Now()
	answer := *must(observer.WaitForAnswerThat(within(t, patience), eventID, func(answer people.Answer) bool {
		return answer.Edits > 0 && answer.Annotation.Code == code
	}))(t)
	t.Logf("corrected from %s to %s after %s", answer.First, code, time.Since(begun).Round(time.Millisecond))
	if answer.Malformed != nil {
		t.Error(answer.Malformed)
	}
	if !answer.Encrypted || !strings.Contains(answer.Body, "Corrected") {
		t.Errorf("the edit says %q, encrypted: %v", answer.Body, answer.Encrypted)
	}
	return answer
}

// Without a word from anybody: the person sets up cross-signing, and the answer to the message of before is edited.
func TestAnswerIsCorrectedWhenElementSetsUpCrossSigning(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	observer, _ := w.newStranger(t, "observer")
	room := newRoom(t, true, w.bot, observer)
	alice := w.newElement(t, "alice")
	ctx := within(t, 2*patience)
	ok(t, observer.Invite(ctx, room, alice.UserID()))
	ok(t, alice.Join(ctx, room))
	ok(t, alice.WaitForMember(ctx, room, w.bot.UserID))
	eventID := must(alice.Send(ctx, room, say("nobody vouches for me yet")))(t)
	answer := *must(observer.WaitForAnswer(ctx, eventID))(t)
	if answer.Annotation.Code != "unsigned_device" {
		t.Fatalf("answered %s", answer.Annotation.Code)
	}
	masterKey := must(alice.BootstrapCrossSigning(ctx))(t)
	edited := corrected(t, observer, eventID, "unverified_identity")
	if edited.Annotation.MasterKey != masterKey || edited.Annotation.State != "sender_unverified" {
		t.Errorf("annotation %+v", edited.Annotation)
	}
	if notices := observer.Notices(room); len(notices) > 0 {
		t.Errorf("the room was told of something better: %v", notices)
	}
}

func TestRoomIsToldWhenAPinnedPersonResets(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	observer, _ := w.newStranger(t, "observer")
	carol, carolsKey := w.newStranger(t, "carol")
	bot := w.newBot(t, func(config botproc.Config) { pin(config, carol.UserID, carolsKey) })
	room := newRoom(t, true, bot, observer, carol)
	ctx := within(t, 2*patience)
	var sent []id.EventID
	for i := range 3 {
		sent = append(sent, must(carol.Send(ctx, room, say(fmt.Sprintf("it is me, %d", i))))(t))
	}
	for _, eventID := range sent {
		if answer := *must(observer.WaitForAnswer(ctx, eventID))(t); answer.Annotation.Code != "verified" {
			t.Fatalf("answered %s", answer.Annotation.Code)
		}
	}
	must(carol.ResetIdentity(ctx))(t)
	notice := must(observer.WaitForNotice(ctx, room))(t)
	if notice.Sender != bot.UserID || !notice.Encrypted || !strings.Contains(notice.Body, carol.UserID.String()) || !strings.Contains(notice.Body, "no longer holds") {
		t.Errorf("the room was told %+v", notice)
	}
	for _, eventID := range sent {
		corrected(t, observer, eventID, "verification_violation")
	}
	settle(t, observer, room)
	if notices := observer.Notices(room); len(notices) != 1 {
		t.Errorf("the room was told %d times: %v", len(notices), notices)
	}
}

func TestAnswerIsCorrectedWhenTheKeyComesAfterAll(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	bot := w.newBot(t, func(config botproc.Config) { config["encryption"].(botproc.Config)["wait"] = "2s" })
	room := newRoom(t, true, bot, alice)
	ctx := within(t, 2*patience)
	eventID, session, err := alice.SendWithoutKey(ctx, room, say("the key is late"))
	ok(t, err)
	answer := *must(alice.WaitForAnswer(ctx, eventID))(t)
	if answer.Annotation.Code != "unable_to_decrypt" {
		t.Fatalf("answered %s", answer.Annotation.Code)
	}
	ok(t, alice.ShareKey(ctx, session, bot.UserID))
	edited := corrected(t, alice, eventID, "unverified_identity")
	if edited.Annotation.MasterKey != masterKey {
		t.Errorf("annotation %+v", edited.Annotation)
	}
	expectOnlyAnswers(t, alice, room, eventID)
}

// What changes while the bot is away is corrected when it is back, also after a kill.
func TestKilledBotCorrectsItsAnswersWhenItIsBack(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	bot := w.newBot(t, nil)
	room := newRoom(t, true, bot, alice)
	ctx := within(t, 2*patience)
	eventID := must(alice.Send(ctx, room, say("me")))(t)
	if answer := *must(alice.WaitForAnswer(ctx, eventID))(t); answer.Annotation.Code != "unverified_identity" {
		t.Fatalf("answered %s", answer.Annotation.Code)
	}
	bot.Kill()
	must(alice.ResetIdentity(ctx))(t)
	ok(t, bot.Restart(ctx))
	corrected(t, alice, eventID, "identity_changed")
	expectOnlyAnswers(t, alice, room, eventID)
}
