package cryptohook

import (
	"fmt"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// crowdedRoom is a room with that many members besides the bot, who have no devices.
func crowdedRoom(t *testing.T, members int) *trustWorld {
	t.Helper()
	w := newTrustWorld(t)
	for i := range members {
		person := &actor{userID: id.UserID(fmt.Sprintf("@member%d:test", i)), hidden: true}
		w.server.add(person)
		if err := w.client.StateStore.SetMembership(w.ctx, trustRoom, person.userID, event.MembershipJoin); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *trustWorld) speak() {
	w.t.Helper()
	if _, err := w.hook.Encrypt(w.ctx, trustRoom, event.EventMessage, object{"msgtype": "m.text", "body": "hello"}); err != nil {
		w.t.Fatal(err)
	}
}

func TestKeysOfALargeRoomAreAskedForSomeAfterTheOther(t *testing.T) {
	w := crowdedRoom(t, 2*usersPerQuery+7)
	w.speak()
	if asked := w.server.count("keys/query"); asked != 3 {
		t.Errorf("the homeserver was asked for keys %d times", asked)
	}
	for _, line := range []string{`"of":507`, `"asked_for":507,"of":507`, "takes a while", "Shared the encryption key"} {
		if !strings.Contains(w.log.String(), line) {
			t.Errorf("the log does not say %s", line)
		}
	}
	// Their devices are known now.
	if err := w.hook.uow.RemoveOutboundGroupSession(w.ctx, trustRoom); err != nil {
		t.Fatal(err)
	}
	w.speak()
	if asked := w.server.count("keys/query"); asked != 3 {
		t.Errorf("the homeserver was asked for keys %d times, again", asked)
	}
}

func TestNothingIsLoggedOfASmallRoom(t *testing.T) {
	w := crowdedRoom(t, 3)
	w.speak()
	if log := w.log.String(); strings.Contains(log, "takes a while") || strings.Contains(log, "asked_for") {
		t.Error(log)
	}
}

func TestRoomOfNobodyGetsAKey(t *testing.T) {
	w := crowdedRoom(t, 0)
	asked := w.server.count("keys/query")
	w.speak()
	if w.server.count("keys/query") > asked {
		t.Error("keys were asked for")
	}
}
