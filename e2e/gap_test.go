package e2e

import (
	"fmt"
	"testing"

	"maunium.net/go/mautrix/id"
)

// After a long pause the homeserver shows the newest 50 events of a room only; the others have to be asked for.
func TestLongPauseLosesNoMessage(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	alice, _ := w.newStranger(t, "alice")
	bot := w.newBot(t, nil)
	room := newRoom(t, true, bot, alice)
	settle(t, alice, room)
	_, _, err := bot.Stop(within(t, patience))
	ok(t, err)
	ctx := within(t, 4*patience)
	var sent []id.EventID
	for i := range 70 {
		sent = append(sent, must(alice.Send(ctx, room, say(fmt.Sprint("message ", i))))(t))
	}
	ok(t, bot.Restart(within(t, patience)))
	for i, eventID := range sent {
		if code := must(alice.WaitForAnswer(ctx, eventID))(t).Annotation.Code; code != "unverified_identity" {
			t.Errorf("message %d was answered by %s", i, code)
		}
	}
	expectOnlyAnswers(t, alice, room, sent...)
}
