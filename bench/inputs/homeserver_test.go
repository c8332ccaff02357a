package inputs

import (
	"encoding/json"
	"testing"

	"maunium.net/go/mautrix"
)

// What is said in a room that the same answer brings would be history to the bot, or lost: it comes with the next one.
func TestMessagesComeAfterTheirRoom(t *testing.T) {
	h := NewHomeserver(NewServer(NewPerson(Receiver, 0)), nil)
	h.BringRoom("!old:bench")
	h.takeNews()
	h.BringRoom("!new:bench")
	h.Bring("!new:bench", json.RawMessage(`{"event_id":"$new"}`))
	h.Bring("!old:bench", json.RawMessage(`{"event_id":"$old"}`))
	<-h.news
	for _, want := range []map[string]int{{"!new:bench": 0, "!old:bench": 1}, {"!new:bench": 1}} {
		var answer mautrix.RespSync
		Check(json.Unmarshal(h.takeNews(), &answer))
		if len(answer.Rooms.Join) != len(want) {
			t.Errorf("%d rooms, want %v", len(answer.Rooms.Join), want)
		}
		for roomID, room := range answer.Rooms.Join {
			if got := len(room.Timeline.Events); got != want[roomID.String()] {
				t.Errorf("%d messages in %s, want %v", got, roomID, want)
			}
		}
	}
	select {
	case <-h.news:
	default:
		t.Error("nobody is told that there is more")
	}
}
