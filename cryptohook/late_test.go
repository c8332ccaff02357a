package cryptohook

import (
	"context"
	"testing"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// lost is a message whose handler was told that its key has not come.
func lost(t *testing.T) (w *trustWorld, alice *actorDevice, s *megolm, evt object) {
	t.Helper()
	w, alice, _ = twoPeople(t)
	s = newMegolm(trustRoom)
	evt = w.say(alice, s, "lost and found")
	w.sync(syncPart{timeline: []object{evt}})
	w.clock.advance(time.Minute)
	w.handle()
	wantCode(t, w.sawOne(id.EventID(evt["event_id"].(string))), CodeUnableToDecrypt)
	return w, alice, s, evt
}

// last gives what the handler saw last of the event, and how often it saw it.
func (w *trustWorld) last(evt object) (last seenEvent, times int) {
	for _, seen := range w.seen {
		if string(seen.eventID) == evt["event_id"].(string) {
			last = seen
			times++
		}
	}
	return last, times
}

func TestLateKeyBringsTheMessageToItsHandlerAgain(t *testing.T) {
	for name, bring := range map[string]func(w *trustWorld, alice *actorDevice, s *megolm) Code{
		"from the sender": func(w *trustWorld, alice *actorDevice, s *megolm) Code {
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			return CodeUnverifiedIdentity
		},
		"from the backup": func(w *trustWorld, alice *actorDevice, s *megolm) Code {
			if err := importFromBackup(t, w, alice, exportOf(t, s.key, 0), s.id(), trustRoom); err != nil {
				t.Fatal(err)
			}
			return CodeAuthenticityNotGuaranteed
		},
		"after a restart": func(w *trustWorld, alice *actorDevice, s *megolm) Code {
			w.restart()
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			return CodeUnverifiedIdentity
		},
		"before a restart": func(w *trustWorld, alice *actorDevice, s *megolm) Code {
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			w.restart()
			return CodeUnverifiedIdentity
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, s, evt := lost(t)
			w.handle()
			if _, times := w.last(evt); times != 1 || w.pending() != 0 {
				t.Fatalf("told %d times without a key, %d pending", times, w.pending())
			}
			code := bring(w, alice, s)
			w.handle()
			seen, times := w.last(evt)
			wantCode(t, seen, code)
			if times != 2 || !seen.verdict.Late || seen.body != "lost and found" {
				t.Errorf("seen %d times, last %q, late %v", times, seen.body, seen.verdict.Late)
			}
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			w.handle()
			if _, again := w.last(evt); again != 2 || w.pending() != 0 {
				t.Errorf("handled %d times, %d pending", again, w.pending())
			}
		})
	}
}

// A key that opens later messages only changes nothing, and a better one may still come.
func TestKeyThatDoesNotOpenALateMessageIsNoNews(t *testing.T) {
	w, alice, s, evt := lost(t)
	for range 3 {
		w.sync(syncPart{toDevice: []object{w.olmEvent(alice, "m.room_key", s.later())}})
		w.handle()
		w.handle()
	}
	if _, times := w.last(evt); times != 1 || w.pending() != 0 {
		t.Fatalf("told %d times, %d pending", times, w.pending())
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.handle()
	if seen, times := w.last(evt); times != 2 || seen.body != "lost and found" {
		t.Errorf("told %d times, last %q", times, seen.body)
	}
}

// The key comes between the judgement and the note that the event is late.
func TestKeyThatComesWhileTheHandlerIsToldIsNotMissed(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	evt := w.say(alice, s, "just in time")
	w.sync(syncPart{timeline: []object{evt}})
	w.clock.advance(time.Minute)
	w.hook.syncer.OnEventType(event.EventEncrypted, func(context.Context, *event.Event) {
		w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	})
	w.handle()
	w.handle()
	if seen, times := w.last(evt); times != 2 || seen.body != "just in time" || !seen.verdict.Late {
		t.Errorf("told %d times, last %q", times, seen.body)
	}
}

func TestLateMessagesAreGivenUpAfterADay(t *testing.T) {
	w, alice, s, evt := lost(t)
	if err := w.hook.store.giveUpLate(w.ctx, w.clock.Now().Add(-keepLate)); err != nil {
		t.Fatal(err)
	}
	w.clock.advance(keepLate)
	if err := w.hook.store.giveUpLate(w.ctx, w.clock.Now().Add(-keepLate)); err != nil {
		t.Fatal(err)
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.handle()
	if _, times := w.last(evt); times != 1 {
		t.Errorf("told %d times", times)
	}
}

func TestWhatNoKeyCanOpenIsNotKept(t *testing.T) {
	for reason, late := range map[string]bool{
		ReasonUnknownSession: true, ReasonUnknownIndex: true, ReasonKeyDeleted: true, "m.unverified": true, "m.blacklisted": true,
		ReasonMalformed: false, ReasonWrongRoom: false, ReasonUnsupportedAlgorithm: false,
	} {
		if got := (Verdict{Code: CodeUnableToDecrypt, Reason: reason, SessionID: "s"}).mayComeLate(); got != late {
			t.Errorf("%s: kept %v", reason, got)
		}
	}
	if (Verdict{Code: CodeMismatchedSender, Reason: ReasonReplayed, SessionID: "s"}).mayComeLate() {
		t.Error("a repetition is kept")
	}
}

// A /sync is being received: its room key can be used already, and who sent it is not stored yet.
func TestKeyThatIsNotStoredYetBringsItsSender(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	evt := w.say(alice, s, "hello")
	w.sync(syncPart{timeline: []object{evt}})
	resp, _ := w.response(syncPart{toDevice: []object{w.share(alice, s)}})
	if _, err := w.hook.receive(w.ctx, resp); err != nil {
		t.Fatal(err)
	}
	w.handle()
	wantCode(t, w.sawOne(id.EventID(evt["event_id"].(string))), CodeUnverifiedIdentity)
}
