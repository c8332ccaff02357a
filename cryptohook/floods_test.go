package cryptohook

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// What one sender can do to the others: nothing that they would notice. The clock stands still in these tests, so nothing goes on because
// some time is over.

// runInbox has the inbox of the world run until the test ends.
func (w *trustWorld) runInbox() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	var running sync.WaitGroup
	running.Go(func() { w.hook.inbox.run(ctx) })
	w.t.Cleanup(func() {
		cancel()
		running.Wait()
	})
}

// until waits for something that the running inbox brings about.
func (w *trustWorld) until(what string, is func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !is() {
		if time.Now().After(deadline) {
			held, waiting := w.hook.inbox.lengths()
			w.t.Fatalf("%s: not within 30 s; %d events in memory, %d of them wait", what, held, waiting)
		}
		time.Sleep(time.Millisecond)
	}
}

func (w *trustWorld) untilSeen(evt object) {
	w.t.Helper()
	w.until(fmt.Sprintf("%s is handed on", evt["event_id"]), func() bool { return w.saw(evt["event_id"]) })
}

// codes counts what handlers saw of a sender by code.
func (w *trustWorld) codes(sender id.UserID) map[Code]int {
	w.seenLock.Lock()
	defer w.seenLock.Unlock()
	counts := make(map[Code]int)
	for _, seen := range w.seen {
		if seen.evt.Sender == sender {
			counts[seen.verdict.Code]++
		}
	}
	return counts
}

// unreadable makes events of sessions that do not exist.
func (w *trustWorld) unreadable(sender id.UserID, count int) (events []object) {
	ciphertext := newMegolm(trustRoom).message("nothing")["ciphertext"]
	for range count {
		w.events++
		events = append(events, object{
			"type": "m.room.encrypted", "event_id": fmt.Sprintf("$event%d", w.events), "sender": sender.String(), "origin_server_ts": w.events,
			"content": object{
				"algorithm": string(id.AlgorithmMegolmV1), "ciphertext": ciphertext,
				"session_id": unpaddedBase64([]byte(fmt.Sprintf("%032d", w.events))),
			},
		})
	}
	return events
}

func TestUndecryptableEventsOfOneSenderHoldNobodyUp(t *testing.T) {
	for _, room := range []id.RoomID{trustRoom, "!other:test"} {
		t.Run("an honest member of "+room.String(), func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			w.runInbox()
			w.sync(syncPart{timeline: w.unreadable("@mallory:test", 2000)})
			s := newMegolm(room)
			said := w.say(alice, s, "good morning")
			w.sync(syncPart{room: room, toDevice: []object{w.share(alice, s)}, timeline: []object{said}})
			w.untilSeen(said)
			wantCode(t, w.sawOne(id.EventID(said["event_id"].(string))), CodeUnverifiedIdentity)
			limit := w.hook.options.Limits.WaitingPerSender
			w.until("all that may not wait are told of", func() bool { return w.codes("@mallory:test")[CodeUnableToDecrypt] >= 2000-limit-roomsAtOnce })
			w.until("the others wait", func() bool {
				held, waiting := w.hook.inbox.lengths()
				return held == waiting && waiting > 0 && waiting <= limit+roomsAtOnce
			})
			if reached := w.hook.Stats().Reached[LimitWaiting]; reached < uint64(2000-limit-roomsAtOnce) {
				t.Errorf("the limit was reached %d times", reached)
			}
		})
	}
}

// What is told at once is not lost: it comes again with its key.
func TestEventBeyondTheLimitComesAgainWithItsKey(t *testing.T) {
	w, _, mallory := twoPeople(t, func(o *Options) { o.Limits.WaitingPerSender = 3 })
	w.runInbox()
	var sessions []*megolm
	var events []object
	for i := range 10 {
		s := newMegolm(trustRoom)
		sessions = append(sessions, s)
		events = append(events, w.say(mallory, s, fmt.Sprint("message ", i)))
	}
	w.sync(syncPart{timeline: events})
	w.until("seven are told of", func() bool { return w.codes("@mallory:test")[CodeUnableToDecrypt] == 7 })
	var keys []object
	for _, s := range sessions {
		keys = append(keys, w.share(mallory, s))
	}
	w.sync(syncPart{toDevice: keys})
	w.until("all are read", func() bool { return w.codes("@mallory:test")[CodeUnverifiedIdentity] == 10 })
	late := 0
	w.seenLock.Lock()
	defer w.seenLock.Unlock()
	for _, seen := range w.seen {
		if seen.verdict.Late {
			late++
		}
	}
	if late != 7 {
		t.Errorf("%d came late", late)
	}
}

// A few of each sender may wait however many others fill the room's quota.
func TestEverybodyMayWaitInAFullRoom(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) { o.Limits.WaitingPerRoom = 20 })
	w.runInbox()
	for i := range 4 {
		w.sync(syncPart{timeline: w.unreadable(id.UserID(fmt.Sprintf("@sybil%d:test", i)), 20)})
	}
	w.until("the room is full", func() bool { return w.hook.Stats().Reached[LimitWaiting] >= 30 })
	s := newMegolm(trustRoom)
	said := w.say(alice, s, "my key is late")
	w.sync(syncPart{timeline: []object{said}})
	w.until("it waits, too", func() bool {
		w.hook.inbox.mu.Lock()
		defer w.hook.inbox.mu.Unlock()
		return w.hook.inbox.events.keysOfSender["@alice:test"] == 1
	})
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.untilSeen(said)
	wantCode(t, w.sawOne(id.EventID(said["event_id"].(string))), CodeUnverifiedIdentity)
}

// A sender with thousands of readable messages, which each cost time, is not before the others either.
func TestSendersOfARoomTakeTurns(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	flood, honest := newMegolm(trustRoom), newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(mallory, flood), w.share(alice, honest)}})
	var timeline []object
	for i := range 500 {
		timeline = append(timeline, w.say(mallory, flood, fmt.Sprint("noise ", i)))
	}
	said := []object{w.say(alice, honest, "one"), w.say(alice, honest, "two")}
	w.sync(syncPart{timeline: append(timeline, said...)})
	first := true
	w.onMessage = func(context.Context, *event.Event) {
		if first {
			w.until("all is in memory", func() bool { held, _ := w.hook.inbox.lengths(); return held == 502 })
		}
		first = false
	}
	w.runInbox()
	w.untilSeen(said[1])
	w.until("all is handed on", func() bool { held, _ := w.hook.inbox.lengths(); return held == 0 })
	w.seenLock.Lock()
	defer w.seenLock.Unlock()
	next := make(map[id.UserID]int)
	for n, seen := range w.seen[:502] {
		var want string
		switch sender := seen.evt.Sender; sender {
		case "@mallory:test":
			want = fmt.Sprint("noise ", next[sender])
			next[sender]++
		case "@alice:test":
			want = []string{"one", "two"}[next[sender]]
			next[sender]++
			if n > 30 {
				t.Errorf("alice's message comes as number %d", n)
			}
		}
		if seen.body != want {
			t.Fatalf("%q came in the place of %q", seen.body, want)
		}
	}
}

// As long as nobody sends very many, a room's events come in the room's order.
func TestRoomsOrderIsKeptWithoutAFlood(t *testing.T) {
	m := newHeldEvents()
	for seq := range int64(30) {
		m.add(&inboxEvent{seq: seq, roomID: trustRoom, sender: id.UserID(fmt.Sprint("@user", seq%3))})
	}
	for seq := range int64(30) {
		e := m.take()
		if e == nil || e.seq != seq {
			t.Fatalf("%+v came as number %d", e, seq)
		}
		m.remove(e)
	}
	if len(m.rooms) != 0 || m.held != 0 {
		t.Errorf("%d rooms and %d events are left", len(m.rooms), m.held)
	}
}

// Many busy rooms take turns, too.
func TestRoomsTakeTurns(t *testing.T) {
	m := newHeldEvents()
	for room := range 100 {
		for seq := range 50 {
			m.add(&inboxEvent{seq: int64(seq), roomID: id.RoomID(fmt.Sprint("!room", room)), sender: "@mallory:test"})
		}
	}
	for round := range 3 {
		turns := make(map[id.RoomID]int)
		for range 100 {
			e := m.take()
			turns[e.roomID]++
			m.remove(e)
		}
		if len(turns) != 100 {
			t.Errorf("%d rooms of 100 had a turn in round %d", len(turns), round)
		}
	}
}

// What comes for one event does not have all the others tried again.
func TestOnlyWhatSomethingCameForIsTriedAgain(t *testing.T) {
	m := newHeldEvents()
	var events []*inboxEvent
	for i := range 100 {
		e := &inboxEvent{
			seq: int64(i), roomID: trustRoom, sender: id.UserID(fmt.Sprint("@user", i%10)), awaitsKey: i%2 == 0, sessionID: id.SessionID(fmt.Sprint("session", i/2)),
		}
		events = append(events, e)
		m.add(e)
	}
	for range events {
		m.setAside(m.take())
	}
	tried := func(what string, want ...*inboxEvent) {
		t.Helper()
		got := make(map[*inboxEvent]bool)
		for e := m.take(); e != nil; e = m.take() {
			got[e] = true
			m.setAside(e)
		}
		if len(got) != len(want) {
			t.Errorf("%s: %d are tried again, want %d", what, len(got), len(want))
		}
		for _, e := range want {
			if !got[e] {
				t.Errorf("%s: event %d is not tried again", what, e.seq)
			}
		}
	}
	m.tryStirred()
	tried("nothing")
	m.stirIn("session7")
	tried("a key that is not committed")
	for range stirs {
		m.tryStirred()
		tried("a key", events[14], events[15])
	}
	m.tryStirred()
	tried("a key, long ago")
	m.tryOf("@user3")
	var ofUser []*inboxEvent
	for i := 3; i < 100; i += 10 {
		ofUser = append(ofUser, events[i])
	}
	tried("a user's devices", ofUser...)
	m.tryOf("@user4")
	tried("the devices of a user whose events lack their keys")
	m.stirOf("@user4", "session2")
	m.tryStirred()
	tried("a session that is withheld", events[4])
	m.stirOf("@user4", "")
	m.tryStirred()
	var withheld []*inboxEvent
	for i := 4; i < 100; i += 10 {
		withheld = append(withheld, events[i])
	}
	tried("all sessions that a user withholds", withheld...)
}

// Something may come for an event while it is judged.
func TestEventIsTriedAgainForWhatCameWhileItWasJudged(t *testing.T) {
	for name, comes := range map[string]func(m *heldEvents){
		"a key":     func(m *heldEvents) { m.stirIn("session"); m.tryStirred() },
		"devices":   func(m *heldEvents) { m.tryOf("@alice:test") },
		"a refusal": func(m *heldEvents) { m.stirOf("@alice:test", "session"); m.tryStirred() },
	} {
		m := newHeldEvents()
		m.add(&inboxEvent{roomID: trustRoom, sender: "@alice:test", sessionID: "session"})
		e := m.take()
		comes(&m)
		m.setAside(e)
		if m.take() != e {
			t.Errorf("%s: not tried again", name)
		}
	}
}

func TestNoMoreEventsAreInMemoryThanMayBe(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) { o.Limits.QueuedEvents = 50 })
	s := newMegolm(trustRoom)
	var timeline []object
	for i := range 300 {
		timeline = append(timeline, w.say(alice, s, fmt.Sprint(i)))
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: timeline})
	most := 0
	w.onMessage = func(context.Context, *event.Event) {
		held, _ := w.hook.inbox.lengths()
		most = max(most, held)
	}
	w.runInbox()
	w.until("all is handed on", func() bool { return w.codes("@alice:test")[CodeUnverifiedIdentity] == 300 })
	if most > 50 {
		t.Errorf("%d events were in memory", most)
	}
	if w.hook.Stats().Reached[LimitQueuedEvents] == 0 {
		t.Error("that the limit was reached is not counted")
	}
}

// Large events are in memory only while they are judged.
func TestLargeEventsAreReadAtTheirTurn(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	said := w.say(alice, s, strings.Repeat("x", 40<<10))
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: []object{said}})
	loaded := must(w.hook.inbox.load(w.ctx, 0))
	if len(loaded) != 1 || loaded[0].event != "" || loaded[0].sender != "@alice:test" || loaded[0].sessionID != s.id() {
		t.Fatalf("loaded %+v", loaded)
	}
	if !w.hook.inbox.handle(w.ctx, loaded[0]) {
		t.Fatal("it has to wait")
	}
	if seen := w.sawOne("$event1"); len(seen.body) != 40<<10 {
		t.Errorf("read %d bytes", len(seen.body))
	}
}

func TestFewEventsOfOneSenderAreKeptForLateKeys(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) { o.Limits.LatePerSender = 5 })
	count := func() (late int) {
		if err := w.db.RawDB.QueryRow(`SELECT COUNT(*) FROM sendertrust_inbox WHERE late_session IS NOT NULL`).Scan(&late); err != nil {
			t.Fatal(err)
		}
		return late
	}
	w.sync(syncPart{timeline: w.unreadable("@mallory:test", 20)})
	w.clock.advance(time.Minute)
	w.handle()
	if late := count(); late != 5 || w.codes("@mallory:test")[CodeUnableToDecrypt] != 20 {
		t.Fatalf("%d are kept, %d were told of", late, w.codes("@mallory:test")[CodeUnableToDecrypt])
	}
	if reached := w.hook.Stats().Reached[LimitLate]; reached != 15 {
		t.Errorf("the limit was reached %d times", reached)
	}
	// The others have theirs, and a restart does not make it more.
	w.restart()
	w.hook.inbox.prune(w.ctx, w.clock.Now())
	s := newMegolm(trustRoom)
	said := w.say(alice, s, "late")
	w.sync(syncPart{timeline: append(w.unreadable("@mallory:test", 3), said)})
	w.clock.advance(time.Minute)
	w.handle()
	if late := count(); late != 6 {
		t.Errorf("%d are kept", late)
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.handle()
	if seen, times := w.last(said); times != 2 || seen.verdict.Code != CodeUnverifiedIdentity {
		t.Errorf("alice's was seen %d times, last as %s", times, seen.verdict.Code)
	}
	if late := w.hook.inbox.lateOf["@alice:test"]; late != 0 {
		t.Errorf("%d of alice's are counted", late)
	}
}

func TestOversizedToDeviceEventsAreIgnored(t *testing.T) {
	w, alice, _ := twoPeople(t)
	padded := func(bytes int) func(object) {
		return func(payload object) { payload["content"].(object)["padding"] = strings.Repeat("x", bytes) }
	}
	large, small := newMegolm(trustRoom), newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, large, padded(60<<10)), w.share(alice, small, padded(30<<10))}})
	if w.storedKey(large, trustRoom) != nil {
		t.Error("the key in the large event was taken")
	}
	if w.storedKey(small, trustRoom) == nil {
		t.Error("the key in the small event was not taken")
	}
	if reached := w.hook.Stats().Reached[LimitToDevice]; reached != 1 {
		t.Errorf("the limit was reached %d times", reached)
	}
}

// A key may be stored between the moment at which a message is judged and the one at which it is noted that it waits on.
func TestKeyThatComesWhileAMessageIsGivenUp(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	said := w.say(alice, s, "just too late")
	w.sync(syncPart{timeline: []object{said}})
	w.clock.advance(time.Minute)
	e := must(w.hook.store.pendingInbox(w.ctx, 0, 10))[0]
	if !w.hook.inbox.handle(w.ctx, e) {
		t.Fatal("it has to wait")
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.handle()
	if seen, times := w.last(said); times != 2 || seen.verdict.Code != CodeUnverifiedIdentity {
		t.Errorf("seen %d times, last as %s", times, seen.verdict.Code)
	}
	// Other keys change nothing.
	lost := w.say(alice, newMegolm(trustRoom), "lost")
	w.sync(syncPart{timeline: []object{lost}})
	w.clock.advance(time.Minute)
	w.hook.inbox.handle(w.ctx, must(w.hook.store.pendingInbox(w.ctx, 0, 10))[0])
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
	if w.pending() != 0 {
		t.Error("the message is judged again for another's key")
	}
}

// looks counts how often all unproven sessions of a sender were judged again.
func (w *trustWorld) looks() int { return int(w.hook.Stats().JudgedAgain) }

// Each key of somebody of whom something was just learnt has the others judged first: once, not once a key.
func TestThousandsOfKeysAreJudgedTogether(t *testing.T) {
	w := newTrustWorld(t)
	unsigned := newActor("@unsigned:test").addDevice("UNSIGNED")
	unsigned.crossSigned, unsigned.owner.hidden = false, true
	w.know(unsigned.owner)
	keys := func(count int) (keys []object) {
		for range count {
			keys = append(keys, w.share(unsigned, newMegolm(trustRoom)))
		}
		return keys
	}
	w.sync(syncPart{toDevice: keys(50)})
	w.hook.resolver.judgeAgain([]id.UserID{"@unsigned:test"})
	before := w.looks()
	w.sync(syncPart{toDevice: keys(100)})
	if looked := w.looks() - before; looked != 1 {
		t.Errorf("looked %d times at the sessions before 100 keys", looked)
	}
	// What is learnt between two units of work counts again.
	w.resolve()
	w.hook.resolver.judgeAgain([]id.UserID{"@unsigned:test"})
	before = w.looks()
	w.sync(syncPart{toDevice: keys(10)})
	if looked := w.looks() - before; looked != 1 {
		t.Errorf("looked %d times at the sessions when more was learnt", looked)
	}
}

// Anybody can sign the own device with keys that they have made up: another one for each message.
func TestMadeUpSignaturesHaveNothingJudgedAgain(t *testing.T) {
	w := newTrustWorld(t)
	mallory := newActor("@mallory:test").addDevice("MALLORY")
	mallory.crossSigned = false
	w.know(mallory.owner)
	madeUp := func(signer jsonSigner, name string) func(object) {
		keys := mallory.keys()
		signInto(keys, mallory.owner.userID, name, signer)
		return embedding(keys)
	}
	var keys []object
	sessions := []*megolm{newMegolm(trustRoom)}
	keys = append(keys, w.share(mallory, sessions[0]))
	for range 100 {
		signer := newActor("@mallory:test").selfSigning
		s := newMegolm(trustRoom)
		sessions = append(sessions, s)
		keys = append(keys, w.share(mallory, s, madeUp(signer, signer.PublicKey().String())))
	}
	before := w.looks()
	w.sync(syncPart{toDevice: keys})
	if looked := w.looks() - before; looked > 0 {
		t.Errorf("looked %d times at the sessions for signatures that prove nothing", looked)
	}
	// That of the key that is the user's proves all of them.
	signer := mallory.owner.selfSigning
	w.sync(syncPart{toDevice: []object{w.share(mallory, newMegolm(trustRoom), madeUp(signer, signer.PublicKey().String()))}})
	for i, s := range sessions {
		if state := w.row(s, mallory).State; state != StateSenderUnverified {
			t.Fatalf("session %d is %s", i, state)
		}
	}
}

// Notices are not encrypted, so that anybody can send any number of them. What is in them is not to fill the database.
func TestNoticesThatCannotBeOfAKeyAreIgnored(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	notice := func(code, session string) object {
		return withheldEvent("@alice:test", object{"code": code, "room_id": trustRoom.String(), "session_id": session, "sender_key": alice.senderKey().String()})
	}
	w.sync(syncPart{toDevice: []object{
		notice("m.unverified", strings.Repeat("A", 50_000)), notice("m.unverified", "short"), notice(strings.Repeat("m", 50_000), s.id().String()),
		notice("m.unverified", newMegolm(trustRoom).id().String()),
	}})
	var kept int
	if err := w.db.RawDB.QueryRow(`SELECT COUNT(*) FROM sendertrust_withheld`).Scan(&kept); err != nil {
		t.Fatal(err)
	}
	if kept != 1 {
		t.Errorf("%d notices are kept", kept)
	}
}

// An invitation is found again by the next process, until it is accepted or withdrawn.
func TestInvitationsOutliveTheProcess(t *testing.T) {
	w, _, _ := twoPeople(t)
	invite := func(room id.RoomID, membership string) object {
		return object{room.String(): object{"invite_state": object{"events": []object{{
			"type": "m.room.member", "state_key": "@bot:test", "sender": "@alice:test", "content": object{"membership": membership},
		}}}}}
	}
	deliver := func(rooms object) {
		t.Helper()
		w.syncs++
		var resp mautrix.RespSync
		body := object{"next_batch": fmt.Sprint("s", w.syncs+1), "device_one_time_keys_count": object{"signed_curve25519": 50}, "rooms": rooms}
		if err := json.Unmarshal(rawJSON(body), &resp); err != nil {
			t.Fatal(err)
		}
		if err := w.client.Syncer.ProcessResponse(w.ctx, &resp, fmt.Sprint("s", w.syncs)); err != nil {
			t.Fatal(err)
		}
	}
	deliver(object{"invite": invite("!one:test", "invite")})
	deliver(object{"invite": invite("!two:test", "invite")})
	w.restart()
	want := []Invitation{{"!one:test", "@alice:test"}, {"!two:test", "@alice:test"}}
	if got := must(w.hook.Invitations(w.ctx)); len(got) != 2 || got[0] != want[0] && got[0] != want[1] {
		t.Fatalf("got %v", got)
	}
	deliver(object{"join": object{"!one:test": object{"timeline": object{"events": []object{membershipEvent("@bot:test", "join", "invite")}}}}})
	if got := must(w.hook.Invitations(w.ctx)); len(got) != 1 || got[0] != want[1] {
		t.Errorf("after one was accepted: %v", got)
	}
	w.clock.advance(keepBundles + time.Minute)
	if got := must(w.hook.Invitations(w.ctx)); len(got) != 0 {
		t.Errorf("a day later: %v", got)
	}
}
