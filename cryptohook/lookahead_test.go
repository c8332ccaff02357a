package cryptohook

import (
	"fmt"
	"reflect"
	"slices"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// crowdOf has so many people known, with a device each.
func (w *trustWorld) crowdOf(count int) (people []*actorDevice) {
	w.t.Helper()
	var users []id.UserID
	for i := range count {
		device := newActor(id.NewUserID(fmt.Sprint("user", i), "test")).addDevice("PHONE")
		w.server.add(device.owner)
		people, users = append(people, device), append(users, device.owner.userID)
	}
	w.mustFetch(users...)
	w.resolve()
	return people
}

// lookingUp gives what is looked up when messages of these devices come.
func (w *trustWorld) lookingUp(devices ...deviceOfKey) *receiving {
	w.t.Helper()
	r := newReceiving(w.hook)
	for _, device := range devices {
		evt := &event.Event{Sender: device.userID}
		r.messages[evt] = &olmMessage{evt: evt, senderKey: device.key}
	}
	if err := r.lookUpSenders(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	return r
}

func ofKey(device *actorDevice) deviceOfKey {
	return deviceOfKey{device.owner.userID, device.senderKey()}
}

// What is asked about the senders of one /sync is asked in a few statements, and each key is judged as if it had come alone.
func TestSendersOfASyncAreLookedUpTogether(t *testing.T) {
	w := newTrustWorld(t)
	people := w.crowdOf(30)
	for _, round := range []string{"new Olm sessions", "known ones", "after a restart"} {
		for table, most := range map[string]int64{
			"FROM crypto_device": 2, "first_master_key": 2, "FROM crypto_tracked_user": 2, "FROM crypto_olm_session": 2, "INTO crypto_olm_session": 6,
			// A key in a new Olm session comes alone: what is stored under its ID is asked for by itself.
			"FROM crypto_megolm_inbound_session": int64(len(people)),
		} {
			if round != "known ones" {
				w.restart()
			}
			var keys []object
			sessions := make([]*megolm, len(people))
			for i, device := range people {
				if round == "new Olm sessions" {
					device.olm = nil
				}
				sessions[i] = newMegolm(trustRoom)
				keys = append(keys, w.share(device, sessions[i]))
			}
			count := w.statements(table)
			w.sync(syncPart{toDevice: keys})
			if got := count.count.Load(); got > most {
				t.Errorf("%s: %d statements with %q for %d senders", round, got, table, len(people))
			}
			for i, device := range people {
				w.wantState(sessions[i], device, StateSenderUnverified)
			}
		}
	}
}

// What was looked up is what mautrix's own look-up would give, or is left to that.
func TestDevicesThatWereLookedUpAreThoseOfMautrix(t *testing.T) {
	w := newTrustWorld(t)
	put := func(userID id.UserID, deviceID id.DeviceID, key id.IdentityKey, deleted bool) {
		t.Helper()
		device := &id.Device{UserID: userID, DeviceID: deviceID, IdentityKey: key, SigningKey: id.Ed25519("s" + deviceID), Trust: id.TrustStateCrossSignedTOFU, Name: "a phone", Deleted: deleted}
		if err := w.hook.uow.PutDevice(w.ctx, userID, device); err != nil {
			t.Fatal(err)
		}
	}
	key := func(c string) id.IdentityKey { return id.IdentityKey(fmt.Sprintf("%043s", c)) }
	put("@alice:test", "PHONE", key("a"), false)
	put("@alice:test", "GONE", key("b"), true)
	put("@bob:test", "PHONE", key("a"), false) // with Alice's key
	put("@carol:test", "ONE", key("c"), false)
	put("@carol:test", "TWO", key("c"), false)
	wanted := []deviceOfKey{
		{"@alice:test", key("a")}, {"@alice:test", key("b")}, {"@alice:test", key("c")}, {"@bob:test", key("a")}, {"@bob:test", key("b")},
		{"@carol:test", key("c")}, {"@nobody:test", key("a")},
	}
	r := w.lookingUp(wanted...)
	for _, key := range wanted {
		got, looked := r.devices[key]
		want := must(w.hook.uow.SQLCryptoStore.FindDeviceByKey(w.ctx, key.userID, key.key))
		switch {
		case key.userID == "@carol:test":
			if looked {
				t.Errorf("one of two devices under a key was chosen: %v", got)
			}
		case !looked:
			t.Errorf("%v was not looked up", key)
		case !reflect.DeepEqual(got, want):
			t.Errorf("%v: looked up %+v, mautrix finds %+v", key, got, want)
		}
	}
}

// What was looked up of a user is what the store says.
func TestUsersThatWereLookedUpAreThoseOfTheStore(t *testing.T) {
	w := newTrustWorld(t)
	people := w.crowdOf(3)
	if err := w.hook.uow.MarkTrackedUsersOutdated(w.ctx, []id.UserID{people[1].owner.userID}); err != nil {
		t.Fatal(err)
	}
	stranger := newActor("@stranger:test").addDevice("PHONE")
	r := w.lookingUp(ofKey(people[0]), ofKey(people[1]), ofKey(stranger))
	for device, current := range map[*actorDevice]bool{people[0]: true, people[1]: false, stranger: false, people[2]: true} {
		userID := device.owner.userID
		looked := r.cachesFor(w.hook.store)
		if got := must(looked.deviceListCurrent(w.ctx, userID)); got != current || got != must(w.hook.store.deviceListCurrent(w.ctx, userID)) {
			t.Errorf("the device list of %s is current: %t", userID, got)
		}
		if got, want := must(looked.identity(w.ctx, userID)), must(w.hook.store.identity(w.ctx, userID)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, want %+v", userID, got, want)
		}
	}
}

// What is learnt of a sender while a /sync is received makes void what was looked up at its beginning.
func TestWhatWasLookedUpIsNotUsedBeyondWhatWasLearnt(t *testing.T) {
	w := newTrustWorld(t)
	people := w.crowdOf(2)
	r := w.lookingUp(ofKey(people[0]), ofKey(people[1]))
	if user, looked := r.users[people[0].owner.userID]; !looked || user.identity == nil || !user.current {
		t.Fatalf("looked up %+v", r.users)
	}
	people[0].owner.reset()
	w.mustFetch(people[0].owner.userID)
	w.resolve()
	for _, device := range people {
		s := newMegolm(trustRoom)
		arrived := &arrivedKey{olmEvent: arriving(t, device, s)}
		arrived.readDevice()
		arrived.read()
		claim := must(w.hook.deriveSender(w.ctx, arrived, true, r))
		if claim.State != StateSenderUnverified || claim.MasterKey != device.owner.masterKey() {
			t.Errorf("%s: %s by the master key %s, which is %s", claim.Sender, claim.State, claim.MasterKey, device.owner.masterKey())
		}
	}
	if _, still := r.users[people[0].owner.userID]; still {
		t.Error("it is still there")
	}
}

// One device's damaged Olm session does not keep those of others from being read.
func TestOlmSessionsAreLookedUpOrLeftToBeReadOneByOne(t *testing.T) {
	w := newTrustWorld(t)
	people := w.crowdOf(3)
	var keys []object
	for _, device := range people {
		keys = append(keys, w.share(device, newMegolm(trustRoom)))
	}
	w.sync(syncPart{toDevice: keys})
	stranger := newActor("@stranger:test").addDevice("PHONE")
	all := []deviceOfKey{ofKey(people[0]), ofKey(people[1]), ofKey(people[2]), ofKey(stranger)}
	read := func() (loaded int) {
		t.Helper()
		w.lookingUp(all...)
		count := w.statements("FROM crypto_olm_session")
		for _, device := range people[:2] {
			if sessions := must(w.hook.uow.GetSessions(w.ctx, device.senderKey())); len(sessions) != 1 {
				t.Errorf("%s has %d Olm sessions", device.owner.userID, len(sessions))
			}
		}
		if sessions := must(w.hook.uow.GetSessions(w.ctx, stranger.senderKey())); len(sessions) != 0 {
			t.Errorf("the stranger has %d Olm sessions", len(sessions))
		}
		return 3 - int(count.count.Load())
	}
	w.restart()
	if loaded := read(); loaded != 3 {
		t.Errorf("%d of 3 were loaded at once", loaded)
	}
	w.restart()
	if _, err := w.db.Exec(w.ctx, "UPDATE crypto_olm_session SET session=$1 WHERE sender_key=$2", []byte("damage"), people[2].senderKey()); err != nil {
		t.Fatal(err)
	}
	if loaded := read(); loaded != 0 {
		t.Errorf("%d were loaded at once, though one is damaged", loaded)
	}
	if _, err := w.hook.uow.GetSessions(w.ctx, people[2].senderKey()); err == nil {
		t.Error("the damaged one was read")
	}
}

func TestTwoListsArePutIntoAStatement(t *testing.T) {
	query, params := withTwo("a IN ($1) AND b IN ($2) AND c", []string{"x", "y"}, []id.UserID{"@z:test"})
	if query != "a IN ($1, $2) AND b IN ($3) AND c" || !slices.Equal(params, []any{"x", "y", id.UserID("@z:test")}) {
		t.Errorf("%s with %v", query, params)
	}
}
