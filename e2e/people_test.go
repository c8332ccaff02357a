package e2e

import (
	"testing"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/people"
)

// The other tests rely on people who can talk to each other as people do, so that what they forge is all that is wrong.
func TestPeopleReadEachOther(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	bob := w.newPerson(t, "bob")
	ctx := within(t, patience)
	room := must(alice.CreateRoom(ctx, true, bob.UserID))(t)
	ok(t, bob.Join(ctx, room))
	ok(t, alice.WaitJoined(ctx, room, bob.UserID))
	for sender, reader := range map[*people.Person]*people.Person{alice: bob, bob: alice} {
		var sent []id.EventID
		for range 3 {
			sent = append(sent, must(sender.Send(ctx, room, say("hello")))(t))
		}
		for _, eventID := range sent {
			ok(t, reader.WaitForEvent(ctx, eventID))
			if text := must(reader.ReadText(ctx, room, eventID))(t); text != say("hello") {
				t.Errorf("%s read %q", reader.UserID, text)
			}
		}
	}
	eventID, session, err := alice.SendWithoutKey(ctx, room, say("later"))
	ok(t, err)
	ok(t, bob.WaitForEvent(ctx, eventID))
	if text, err := bob.ReadText(ctx, room, eventID); err == nil {
		t.Errorf("%s read %q without a key", bob.UserID, text)
	}
	ok(t, alice.ShareKey(ctx, session, bob.UserID))
	settled := must(alice.Send(ctx, room, say("now")))(t)
	ok(t, bob.WaitForEvent(ctx, settled))
	if text := must(bob.ReadText(ctx, room, eventID))(t); text != say("later") {
		t.Errorf("%s read %q", bob.UserID, text)
	}
}
