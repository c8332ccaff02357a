package cryptohook

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

func TestReplayOfAMessageIndexIsAMismatch(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	original := w.say(alice, s, "once")
	wantCode(t, w.judgeNow(original), CodeUnverifiedIdentity)
	// The server sends the same ciphertext again, in alice's name.
	replay := w.judgeNow(w.copyOf(original, "@alice:test"))
	wantCode(t, replay, CodeMismatchedSender)
	if replay.verdict.Reason != ReasonReplayed || replay.body != "" {
		t.Errorf("reason %q, read %q", replay.verdict.Reason, replay.body)
	}
	w.restart()
	wantCode(t, w.judgeNow(w.copyOf(original, "@alice:test")), CodeMismatchedSender)
}

func TestCopyByAnotherMemberDoesNotUseUpTheIndex(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	original := w.say(alice, s, "alice's words")
	stolen := w.judgeNow(w.copyOf(original, "@mallory:test"))
	wantCode(t, stolen, CodeMismatchedSender)
	if stolen.verdict.Reason != ReasonOtherSender || stolen.body != "" || !stolen.verdict.ContentWithheld {
		t.Errorf("reason %q, read %q", stolen.verdict.Reason, stolen.body)
	}
	if stolen.verdict.UserID != "@alice:test" {
		t.Errorf("the owner is %s", stolen.verdict.UserID)
	}
	seen := w.judgeNow(original)
	wantCode(t, seen, CodeUnverifiedIdentity)
	if seen.body != "alice's words" {
		t.Errorf("read %q", seen.body)
	}
}

// In a conflict it is not known whose the session is. A copy by somebody who claims it, or by a third, must not use up the index
// of the original: nothing is lost.
func TestCopyInAConflictDoesNotUseUpTheIndex(t *testing.T) {
	for _, copier := range []id.UserID{"@mallory:test", "@third:test"} {
		t.Run(copier.String(), func(t *testing.T) {
			w, alice, mallory := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			w.sync(syncPart{toDevice: []object{w.share(mallory, s)}})
			original := w.say(alice, s, "alice's words")
			stolen := w.judgeNow(w.copyOf(original, copier))
			if copier == "@third:test" {
				wantCode(t, stolen, CodeMismatchedSender)
			} else {
				wantCode(t, stolen, CodeSessionConflict)
			}
			seen := w.judgeNow(original)
			wantCode(t, seen, CodeSessionConflict)
			if seen.body != "alice's words" {
				t.Errorf("the original is lost: %s", seen.verdict.Reason)
			}
		})
	}
}

func TestKeyAfterTheMessage(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	said := w.say(alice, s, "first the message")
	w.sync(syncPart{timeline: []object{said}})
	w.handle()
	if w.saw("$event1") {
		t.Fatal("the message did not wait for its key")
	}
	w.restart()
	w.handle()
	if w.saw("$event1") {
		t.Fatal("the message did not wait across the restart")
	}
	w.clock.advance(24 * time.Second)
	w.handle()
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnverifiedIdentity)
	if seen.body != "first the message" || seen.verdict.State != StateSenderUnverified {
		t.Errorf("read %q in state %s", seen.body, seen.verdict.State)
	}
}

func TestMessageWithoutAKeyIsGivenUp(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) { o.KeyWait = 10 * time.Second })
	s := newMegolm(trustRoom)
	w.sync(syncPart{timeline: []object{w.say(alice, s, "lost")}})
	w.clock.advance(9 * time.Second)
	w.handle()
	if w.saw("$event1") {
		t.Fatal("given up too early")
	}
	w.clock.advance(2 * time.Second)
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnableToDecrypt)
	if seen.verdict.Reason != ReasonUnknownSession || seen.verdict.State != "" || seen.verdict.Legacy {
		t.Errorf("verdict %+v", seen.verdict)
	}
}

func TestMessageBeforeTheKeysFirstIndex(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	early := w.say(alice, s, "early")
	w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", s.later())}, timeline: []object{early}})
	w.handle()
	if w.saw("$event1") {
		t.Fatal("a better key could still come")
	}
	w.clock.advance(time.Minute)
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnableToDecrypt)
	if seen.verdict.Reason != ReasonUnknownIndex {
		t.Errorf("reason %q", seen.verdict.Reason)
	}
}

func withheldEvent(sender id.UserID, content object) object {
	content["algorithm"] = string(id.AlgorithmMegolmV1)
	return object{"type": "m.room_key.withheld", "sender": sender.String(), "content": content}
}

func TestWithheldCodes(t *testing.T) {
	for _, tc := range []struct {
		code  string
		final bool
	}{
		{"m.blacklisted", true}, {"m.unverified", true}, {"m.unauthorised", true}, {"m.unavailable", false}, {"m.no_olm", false},
	} {
		t.Run(tc.code, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			content := object{"code": tc.code, "sender_key": alice.senderKey().String()}
			if tc.code != "m.no_olm" {
				content["room_id"], content["session_id"] = trustRoom.String(), s.id().String()
			}
			w.sync(syncPart{toDevice: []object{withheldEvent("@alice:test", content)}, timeline: []object{w.say(alice, s, "for others")}})
			w.handle()
			if w.saw("$event1") != tc.final {
				t.Errorf("handled at once: %v", !tc.final)
			}
			w.clock.advance(time.Minute)
			w.handle()
			seen := w.sawOne("$event1")
			wantCode(t, seen, CodeUnableToDecrypt)
			if seen.verdict.Reason != tc.code {
				t.Errorf("reason %q", seen.verdict.Reason)
			}
		})
	}
}

// A withheld notice is not encrypted: anybody can send one about anybody's session.
func TestForgedWithheldNoticeHidesNothing(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	about := func() object {
		return object{"code": "m.blacklisted", "room_id": trustRoom.String(), "session_id": s.id().String(), "sender_key": alice.senderKey().String()}
	}
	// Mallory's word does not count for alice's message.
	w.sync(syncPart{toDevice: []object{withheldEvent("@mallory:test", about())}, timeline: []object{w.say(alice, s, "one")}})
	w.handle()
	if w.saw("$event1") {
		t.Error("mallory's notice ended the wait for alice's key")
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.handle()
	wantCode(t, w.sawOne("$event1"), CodeUnverifiedIdentity)
	// Nor does a notice in alice's own name outweigh the key that came.
	w.sync(syncPart{toDevice: []object{withheldEvent("@alice:test", about())}})
	wantCode(t, w.judgeNow(w.say(alice, s, "two")), CodeUnverifiedIdentity)
	if w.storedKey(s, trustRoom) == nil {
		t.Error("the key is gone")
	}
}

func TestVerdictWaitsFiveSecondsForItsOwnSenderOnly(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s, others := newMegolm(trustRoom), newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s), w.share(mallory, others)}})
	w.server.down = true
	w.sync(syncPart{changed: []id.UserID{"@alice:test"}, timeline: []object{w.say(alice, s, "slow"), w.say(mallory, others, "quick")}})
	w.handle()
	if w.saw("$event1") || !w.saw("$event2") {
		t.Fatal("each verdict has to wait for its own sender's list, and for no other")
	}
	if quick := w.sawOne("$event2"); quick.verdict.Outdated {
		t.Error("mallory's list is called outdated")
	}
	w.clock.advance(4900 * time.Millisecond)
	w.handle()
	if w.saw("$event1") {
		t.Fatal("given too early")
	}
	w.clock.advance(200 * time.Millisecond)
	w.handle()
	slow := w.sawOne("$event1")
	wantCode(t, slow, CodeUnverifiedIdentity)
	if !slow.verdict.Outdated {
		t.Error("the verdict from an outdated list is not marked")
	}
}

// On each kind of database: what mautrix does with an empty list differs.
func TestOrdinarySyncHasNothingToComplainOf(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: []object{w.say(alice, s, "hello")}})
	w.sync(syncPart{})
	w.handle()
	wantCode(t, w.sawOne("$event1"), CodeUnverifiedIdentity)
	for line := range strings.Lines(w.log.String()) {
		if strings.Contains(line, `"level":"error"`) || strings.Contains(line, `"level":"warn"`) {
			t.Error(line)
		}
	}
}

// The inbox may look at a message as soon as it is durable, which is before anybody asks for its sender's new list.
func TestVerdictWaitsForAListThatNobodyHasAskedForYet(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	alice.owner.verifiedBy = w.bot
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	alice.owner.reset()
	looked := false
	w.hook.options.OnChange = func(Change) {
		looked = true
		w.handle()
	}
	// Another key, for there to be a change to tell at the moment in question.
	w.sync(syncPart{
		changed: []id.UserID{"@alice:test"}, toDevice: []object{w.share(alice, newMegolm(trustRoom))}, timeline: []object{w.say(alice, s, "still me?")},
	})
	w.hook.options.OnChange = nil
	if !looked || w.saw("$event1") {
		t.Fatalf("looked at: %v; answered before the new list came: %v", looked, w.saw("$event1"))
	}
	w.resolve()
	w.handle()
	wantCode(t, w.sawOne("$event1"), CodeVerificationViolation)
}

// The identity comes after the message: the verdict waits, and is right.
func TestIdentityAfterTheMessage(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	alice.owner.verifiedBy = w.bot
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: []object{w.say(alice, s, "hello")}})
	w.handle()
	if w.saw("$event1") {
		t.Fatal("did not wait")
	}
	w.clock.advance(3 * time.Second)
	w.resolve()
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeVerified)
	if seen.verdict.Outdated {
		t.Error("marked as from an outdated list")
	}
}

// A key query that fails has answered nothing: until it does, the verdict rests on an outdated list, waits, and says so.
func TestFailedKeyQueryIsNoLook(t *testing.T) {
	w := newTrustWorld(t)
	w.server.down = true
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: []object{w.say(alice, s, "hello")}})
	w.resolve()
	w.handle()
	if w.saw("$event1") {
		t.Error("the verdict did not wait for a list that was never seen")
	}
	w.clock.advance(6 * time.Second)
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnsignedDevice)
	if !seen.verdict.Outdated {
		t.Error("the verdict does not say that the list was never seen")
	}
}

func TestUnanswerableVerdictIsGivenAfterFiveSeconds(t *testing.T) {
	w := newTrustWorld(t)
	w.server.down = true
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}, timeline: []object{w.say(alice, s, "hello")}})
	w.clock.advance(5 * time.Second)
	w.handle()
	seen := w.sawOne("$event1")
	wantCode(t, seen, CodeUnknownDevice)
	if !seen.verdict.Outdated {
		t.Error("not marked")
	}
}

// Whoever claims a session again and again, each time from a device of which nothing is known, does not hold its messages up.
func TestClaimsCannotDelayAMessageForEver(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: []object{w.say(alice, s, "hello")}})
	for i := 0; i < 30 && !w.saw("$event1"); i++ {
		device := mallory.owner.addDevice(id.DeviceID(fmt.Sprintf("NEW%d", i)))
		w.sync(syncPart{toDevice: []object{w.share(device, s, withoutDeviceKeys)}})
		w.clock.advance(4 * time.Second)
		w.handle()
	}
	wantCode(t, w.sawOne("$event1"), CodeSessionConflict)
}

func TestMalformedEventsAreToldOrSkippedAndHoldNothingUp(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	good := s.message("good")
	broken := func(change func(object)) object {
		content := maps.Clone(good)
		change(content)
		return w.roomEvent("@alice:test", "m.room.encrypted", content)
	}
	events := []object{
		broken(func(c object) { delete(c, "session_id") }),
		broken(func(c object) { c["session_id"] = 5 }),
		broken(func(c object) { c["session_id"] = "short" }),
		broken(func(c object) { c["ciphertext"] = object{} }),
		broken(func(c object) { c["ciphertext"] = "" }),
		broken(func(c object) { c["ciphertext"] = strings.Repeat("~", 100) }),
		broken(func(c object) { c["ciphertext"] = strings.Repeat("A", 100) }),
		broken(func(c object) { delete(c, "algorithm") }),
		broken(func(c object) { c["algorithm"] = "m.olm.v1.curve25519-aes-sha2"; c["ciphertext"] = object{} }),
		broken(func(c object) { c["algorithm"] = "m.megolm.v2" }),
		broken(clearObject),
		w.roomEvent("@alice:test", "m.room.message", object{"msgtype": 5, "body": []any{}}),
		w.roomEvent("@alice:test", "m.room.message", object{}),
	}
	last := w.roomEvent("@alice:test", "m.room.encrypted", good)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: append(events, last)})
	w.handle()
	w.clock.advance(time.Hour)
	w.handle()
	for i, evt := range events[:11] {
		if !w.saw(evt["event_id"]) {
			t.Errorf("event %d was not told to anybody", i)
			continue
		}
		wantCode(t, w.sawOne(id.EventID(evt["event_id"].(string))), CodeUnableToDecrypt)
	}
	seen := w.sawOne(id.EventID(last["event_id"].(string)))
	wantCode(t, seen, CodeUnverifiedIdentity)
	if w.pending() != 0 {
		t.Errorf("%d events stay in the inbox", w.pending())
	}
}

func clearObject(c object) { clear(c) }

func TestBrokenMegolmPayloads(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	for _, tc := range []struct{ plaintext, reason string }{
		{`not json`, ReasonMalformed},
		{`{"room_id":"!other:test","type":"m.room.message","content":{}}`, ReasonWrongRoom},
		{`{"type":"m.room.message","content":{}}`, ReasonWrongRoom},
		{`{"room_id":"!room:test","type":5}`, ReasonMalformed},
	} {
		content := object{
			"algorithm": string(id.AlgorithmMegolmV1), "session_id": s.id().String(), "ciphertext": string(must(s.outbound.Encrypt([]byte(tc.plaintext)))),
		}
		seen := w.judgeNow(w.roomEvent("@alice:test", "m.room.encrypted", content))
		wantCode(t, seen, CodeUnableToDecrypt)
		if seen.verdict.Reason != tc.reason {
			t.Errorf("%s: reason %q, want %q", tc.plaintext, seen.verdict.Reason, tc.reason)
		}
	}
}

func TestVerdictInAnEventsContentIsReplaced(t *testing.T) {
	w, alice, _ := twoPeople(t)
	seen := w.judgeNow(w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "x", verdictKey: object{"Code": "verified"}}))
	wantCode(t, seen, CodeSentInClear)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	plaintext := rawJSON(object{"room_id": trustRoom.String(), "type": "m.room.message", "content": object{"msgtype": "m.text", "body": "x", verdictKey: object{"Code": "verified"}}})
	content := object{"algorithm": string(id.AlgorithmMegolmV1), "session_id": s.id().String(), "ciphertext": string(must(s.outbound.Encrypt(plaintext)))}
	wantCode(t, w.judgeNow(w.roomEvent("@alice:test", "m.room.encrypted", content)), CodeUnverifiedIdentity)
}

func TestHandlerThatPanicsHoldsNothingUp(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.onMessage = func(_ context.Context, evt *event.Event) {
		if evt.ID == "$event1" {
			panic("a handler's fault")
		}
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: []object{w.say(alice, s, "one"), w.say(alice, s, "two")}})
	w.handle()
	if w.saw("$event1") || !w.saw("$event2") {
		t.Error("the event after the panic was not handed on")
	}
	if w.pending() != 0 {
		t.Error("the event at which the handler panics would be handed on for ever")
	}
}

func TestHandlerCutShortByShutdownSeesTheEventAgain(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: []object{w.say(alice, s, "one"), w.say(alice, s, "two")}})
	ctx, cancel := context.WithCancel(w.ctx)
	begun := 0
	w.onMessage = func(context.Context, *event.Event) { begun++; cancel() }
	var inbox sync.WaitGroup
	inbox.Go(func() { w.hook.inbox.run(ctx) })
	w.hook.inbox.signal()
	inbox.Wait()
	if begun != 1 {
		t.Fatalf("%d handlers were begun", begun)
	}
	w.onMessage, w.seen = nil, nil
	// What Run does last.
	if err := w.hook.uow.flush(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.restart()
	w.handle()
	one, two := w.sawOne("$event1"), w.sawOne("$event2")
	wantCode(t, one, CodeUnverifiedIdentity)
	wantCode(t, two, CodeUnverifiedIdentity)
	if one.body != "one" || two.body != "two" || w.pending() != 0 {
		t.Errorf("read %q and %q, %d pending", one.body, two.body, w.pending())
	}
}

func TestRunningInboxHandsOnInOrder(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s, late := newMegolm(trustRoom), newMegolm(trustRoom)
	ctx, cancel := context.WithCancel(w.ctx)
	handled := make(chan string, 100)
	w.onMessage = func(_ context.Context, evt *event.Event) { handled <- evt.Content.AsMessage().Body }
	var inbox sync.WaitGroup
	inbox.Go(func() { w.hook.inbox.run(ctx) })
	defer inbox.Wait()
	defer cancel()
	timeline := []object{w.say(alice, late, "waits for its key")}
	for i := range 20 {
		timeline = append(timeline, w.say(alice, s, fmt.Sprint(i)))
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: timeline})
	for i := range 20 {
		if got := <-handled; got != fmt.Sprint(i) {
			t.Fatalf("message %q came as number %d", got, i)
		}
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, late)}})
	if got := <-handled; got != "waits for its key" {
		t.Errorf("read %q", got)
	}
}

func TestEventDeliveredTwiceIsHandledOnce(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	said := w.say(alice, s, "hello")
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}, timeline: []object{said}})
	w.handle()
	w.sync(syncPart{timeline: []object{said}})
	w.handle()
	w.restart()
	w.sync(syncPart{timeline: []object{said}})
	w.handle()
	w.sawOne("$event1")
}

func TestOwnEchoIsNotHandedOn(t *testing.T) {
	w, _, _ := twoPeople(t)
	echo := w.roomEvent("@bot:test", "m.room.message", object{"msgtype": "m.text", "body": "echo"})
	echo["unsigned"] = object{"transaction_id": "txn"}
	foreign := w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "alice's"})
	foreign["unsigned"] = object{"transaction_id": "txn"}
	other := w.roomEvent("@bot:test", "m.room.message", object{"msgtype": "m.text", "body": "from our other device"})
	w.sync(syncPart{timeline: []object{echo, foreign, other}})
	w.handle()
	if w.saw("$event1") || !w.saw("$event2") || !w.saw("$event3") {
		t.Errorf("handed on: %v", w.seen)
	}
}

func membershipEvent(user id.UserID, now, before string) object {
	evt := object{
		"type": "m.room.member", "state_key": user.String(), "event_id": "$member" + now + before, "sender": user.String(),
		"content": object{"membership": now}, "unsigned": object{},
	}
	if before != "" {
		evt["unsigned"] = object{"prev_content": object{"membership": before}}
	}
	return evt
}

func TestEventsBeforeJoiningAreNotHandedOn(t *testing.T) {
	w, _, _ := twoPeople(t)
	say := func(body string) object {
		return w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": body})
	}
	w.sync(syncPart{room: "!new:test", timeline: []object{
		say("before"), membershipEvent("@bot:test", "join", "invite"), say("after"), membershipEvent("@bot:test", "join", "join"), say("after a new name"),
		membershipEvent("@bob:test", "join", "invite"), say("after another's joining"),
	}})
	w.handle()
	if w.saw("$event1") {
		t.Error("handed on what was said before we joined")
	}
	for _, eventID := range []string{"$event2", "$event3", "$event4"} {
		if !w.saw(eventID) {
			t.Errorf("%s was not handed on", eventID)
		}
	}
}

func TestFirstSyncShowsHistoryOnly(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{initial: true, toDevice: []object{w.share(alice, s)}, timeline: []object{w.say(alice, s, "answered by a former database")}})
	w.handle()
	if w.saw("$event1") {
		t.Error("handed on")
	}
	w.wantState(s, alice, StateSenderUnverified)
}

func encryptionEvent(content object) object {
	return object{"type": "m.room.encryption", "state_key": "", "event_id": "$off", "sender": "@mallory:test", "content": content}
}

func TestEncryptionCannotBeSwitchedOff(t *testing.T) {
	for name, content := range map[string]object{
		"another algorithm": {"algorithm": "m.none"}, "no algorithm": {}, "an algorithm that is no string": {"algorithm": 5},
	} {
		for _, where := range []string{"state", "timeline"} {
			t.Run(name+" in the "+where, func(t *testing.T) {
				w, _, _ := twoPeople(t)
				part := syncPart{timeline: []object{w.roomEvent("@mallory:test", "m.room.message", object{"msgtype": "m.text", "body": "in the clear"})}}
				if where == "state" {
					part.state = []object{encryptionEvent(content)}
				} else {
					part.timeline = append([]object{encryptionEvent(content)}, part.timeline...)
				}
				w.sync(part)
				w.handle()
				wantCode(t, w.sawOne("$event1"), CodeSentInClear)
				if encrypted := must(w.client.StateStore.IsEncrypted(w.ctx, trustRoom)); !encrypted {
					t.Error("we would send in the clear now")
				}
				wantCode(t, w.judgeNow(w.roomEvent("@mallory:test", "m.room.message", object{"msgtype": "m.text", "body": "later"})), CodeSentInClear)
			})
		}
	}
}

func TestRotationMayStillChange(t *testing.T) {
	w, _, _ := twoPeople(t)
	w.sync(syncPart{state: []object{encryptionEvent(object{"algorithm": string(id.AlgorithmMegolmV1), "rotation_period_msgs": 5})}})
	if config := must(w.hook.mach.StateStore.GetEncryptionEvent(w.ctx, trustRoom)); config.RotationPeriodMessages != 5 {
		t.Errorf("stored %+v", config)
	}
}

func TestRoomIsInTheClearUntilItIsEncrypted(t *testing.T) {
	w, _, _ := twoPeople(t)
	say := func(body string) object {
		return w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": body})
	}
	on := encryptionEvent(object{"algorithm": string(id.AlgorithmMegolmV1)})
	w.sync(syncPart{room: "!clear:test", timeline: []object{say("before"), on, say("after")}})
	w.sync(syncPart{room: "!clear:test", timeline: []object{say("much later")}})
	w.handle()
	wantCode(t, w.sawOne("$event1"), CodeNotEncrypted)
	wantCode(t, w.sawOne("$event2"), CodeSentInClear)
	wantCode(t, w.sawOne("$event3"), CodeSentInClear)
}

func TestContentBelowTheRequirementIsWithheld(t *testing.T) {
	for _, requirement := range []TrustRequirement{RequireCrossSigned, RequireCrossSignedOrLegacy, RequireNothing} {
		w, alice, _ := twoPeople(t, func(o *Options) { o.Requirement = requirement })
		unsigned := alice.owner.addDevice("UNSIGNED")
		unsigned.crossSigned = false
		w.know(alice.owner)
		s, worse, legacy := newMegolm(trustRoom), newMegolm(trustRoom), newMegolm(trustRoom)
		w.sync(syncPart{toDevice: []object{w.share(alice, s), w.share(unsigned, worse)}})
		if err := importFromBackup(t, w, alice, exportOf(t, legacy.key, 0), legacy.id(), trustRoom); err != nil {
			t.Fatal(err)
		}
		for _, tc := range []struct {
			evt   object
			code  Code
			shown bool
		}{
			{w.say(alice, s, "proven"), CodeUnverifiedIdentity, true},
			{w.say(unsigned, worse, "unsigned"), CodeUnsignedDevice, requirement == RequireNothing},
			{w.say(alice, legacy, "legacy"), CodeAuthenticityNotGuaranteed, requirement != RequireCrossSigned},
			{w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "clear", "m.relates_to": object{"m.in_reply_to": object{"event_id": "$x"}}}),
				CodeSentInClear, requirement == RequireNothing},
		} {
			seen := w.judgeNow(tc.evt)
			wantCode(t, seen, tc.code)
			if (seen.body != "") != tc.shown || seen.verdict.ContentWithheld == tc.shown {
				t.Errorf("%s under %s: read %q, withheld %v", tc.code, requirement, seen.body, seen.verdict.ContentWithheld)
			}
		}
	}
}

// The five rows of DESIGN.md, section 2: where the reference lets sender data go stale.
func TestStalenessTable(t *testing.T) {
	type scene struct {
		w     *trustWorld
		alice *actorDevice
		s     *megolm
	}
	begin := func(t *testing.T, verified bool) scene {
		w := newTrustWorld(t)
		alice := newActor("@alice:test").addDevice("ALICE")
		if verified {
			alice.owner.verifiedBy = w.bot
		}
		w.know(alice.owner)
		s := newMegolm(trustRoom)
		w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
		return scene{w, alice, s}
	}
	say := func(sc scene, body string) seenEvent { return sc.w.judgeNow(sc.w.say(sc.alice, sc.s, body)) }

	t.Run("user verified after the session came", func(t *testing.T) {
		sc := begin(t, false)
		wantCode(t, say(sc, "before"), CodeUnverifiedIdentity)
		sc.alice.owner.verifiedBy = sc.w.bot
		sc.w.know(sc.alice.owner)
		wantCode(t, say(sc, "after"), CodeVerified)
		sc.w.wantState(sc.s, sc.alice, StateSenderVerified)
	})
	t.Run("verified user resets the identity", func(t *testing.T) {
		sc := begin(t, true)
		wantCode(t, say(sc, "before"), CodeVerified)
		sc.alice.owner.reset()
		sc.w.know(sc.alice.owner)
		wantCode(t, say(sc, "after"), CodeVerificationViolation)
		sc.w.wantState(sc.s, sc.alice, StateVerificationViolation)
		fresh := newMegolm(trustRoom)
		sc.w.sync(syncPart{toDevice: []object{sc.w.share(sc.alice, fresh)}})
		wantCode(t, sc.w.judgeNow(sc.w.say(sc.alice, fresh, "on a fresh session")), CodeVerificationViolation)
		sc.alice.owner.verifiedBy = sc.w.bot
		sc.w.know(sc.alice.owner)
		wantCode(t, sc.w.judgeNow(sc.w.say(sc.alice, fresh, "verified again")), CodeVerified)
		// The device that made the old session is one of the verified identity's, too.
		wantCode(t, say(sc, "the old session, verified again"), CodeVerified)
	})
	t.Run("never-verified user resets the identity", func(t *testing.T) {
		sc := begin(t, false)
		wantCode(t, say(sc, "before"), CodeUnverifiedIdentity)
		sc.alice.owner.reset()
		sc.w.know(sc.alice.owner)
		wantCode(t, say(sc, "after"), CodeIdentityChanged)
		fresh := newMegolm(trustRoom)
		sc.w.sync(syncPart{toDevice: []object{sc.w.share(sc.alice, fresh)}})
		wantCode(t, sc.w.judgeNow(sc.w.say(sc.alice, fresh, "on a fresh session")), CodeIdentityChanged)
	})
	t.Run("verification withdrawn", func(t *testing.T) {
		// Our user-signing key is replaced, as the specification's only way to take signatures back.
		sc := begin(t, true)
		wantCode(t, say(sc, "before"), CodeVerified)
		keys := sc.w.hook.mach.CrossSigningKeys
		sc.w.hook.mach.CrossSigningKeys = &crypto.CrossSigningKeysCache{
			MasterKey: keys.MasterKey, SelfSigningKey: keys.SelfSigningKey, UserSigningKey: newActor("@bot:test").userSigning,
		}
		if seen := say(sc, "after"); seen.verdict.Code == CodeVerified {
			t.Errorf("still %s", seen.verdict.Code)
		}
	})
	t.Run("plaintext in an encrypted room", func(t *testing.T) {
		sc := begin(t, true)
		wantCode(t, sc.w.judgeNow(sc.w.roomEvent("@alice:test", "m.room.message", object{"msgtype": "m.text", "body": "clear"})), CodeSentInClear)
	})
}

// From nobody to violation: one user's whole life, on a session that came in the beginning and on fresh ones.
func TestAUsersLife(t *testing.T) {
	pins := make(map[id.UserID]id.Ed25519)
	w := newTrustWorld(t, func(o *Options) { o.VerifiedUsers = pins })
	alice := newActor("@alice:test").addDevice("ALICE")
	alice.crossSigned, alice.owner.hidden = false, true
	w.know(alice.owner)
	old := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, old)}})
	judge := func(s *megolm) Code { return w.judgeNow(w.say(alice, s, "hello")).verdict.Code }
	fresh := func() *megolm {
		s := newMegolm(trustRoom)
		w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
		w.resolve()
		return s
	}
	expect := func(when string, s *megolm, want Code) {
		t.Helper()
		if got := judge(s); got != want {
			t.Errorf("%s: %s, want %s", when, got, want)
		}
	}
	w.clock.advance(time.Minute)
	w.resolve()
	expect("unsigned", old, CodeUnsignedDevice)
	expect("unsigned, fresh", fresh(), CodeUnsignedDevice)

	alice.crossSigned, alice.owner.hidden = true, false
	w.know(alice.owner)
	expect("cross-signed", old, CodeUnverifiedIdentity)
	first := fresh()
	expect("cross-signed, fresh", first, CodeUnverifiedIdentity)

	// The operator pins the key; a restart takes the configuration up, and the hook signs.
	pins["@alice:test"] = alice.owner.masterKey()
	w.restart()
	if err := w.hook.resolver.begin(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.resolve()
	expect("pinned", old, CodeVerified)
	expect("pinned, fresh", fresh(), CodeVerified)
	if w.server.count("keys/signatures/upload") != 1 {
		t.Errorf("signed %d times", w.server.count("keys/signatures/upload"))
	}

	alice.owner.reset()
	w.know(alice.owner)
	expect("reset", old, CodeVerificationViolation)
	expect("reset, the session of before", first, CodeVerificationViolation)
	second := fresh()
	expect("reset, fresh", second, CodeVerificationViolation)

	pins["@alice:test"] = alice.owner.masterKey()
	w.restart()
	if err := w.hook.resolver.begin(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.resolve()
	expect("pinned anew", second, CodeVerified)
	expect("pinned anew, the session of before", old, CodeVerified)
}
