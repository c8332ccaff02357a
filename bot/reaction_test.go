package bot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// signsOn are the reactions to a message that are there: those that were sent, and not taken back.
func (f *fakeRooms) signsOn(eventID id.EventID) (signs []string) {
	gone := make(map[id.EventID]bool)
	for _, said := range f.said {
		gone[said.redacts] = true
	}
	for _, said := range f.said {
		if relation := said.relation(); said.evtType == "m.reaction" && relation.EventID == eventID && !gone[said.id] {
			signs = append(signs, relation.Key)
		}
	}
	return signs
}

func (f *fakeRooms) wantSign(eventID id.EventID, want string) {
	f.t.Helper()
	if signs := f.signsOn(eventID); len(signs) != 1 || signs[0] != want {
		f.t.Errorf("the signs on %s are %v, not %s", eventID, signs, want)
	}
}

func TestReactionIsASignAndNothingElse(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	for code, sign := range map[cryptohook.Code]string{
		cryptohook.CodeVerified: "✅", cryptohook.CodeUnverifiedIdentity: "ℹ️", cryptohook.CodeIdentityChanged: "⚠️",
		cryptohook.CodeAuthenticityNotGuaranteed: "⚠️", cryptohook.CodeUnsignedDevice: "⛔", cryptohook.CodeSentInClear: "⛔",
		cryptohook.CodeUnableToDecrypt: "⛔", cryptohook.CodeVerificationViolation: "⛔",
	} {
		eventID := id.EventID("$" + code)
		said := f.only(f.hear(from(eventID, "PHONE", code)))
		if said.evtType != "m.reaction" || len(said.content) != 1 {
			t.Errorf("%s: %v", code, said)
		}
		if relation := said.relation(); relation.Type != "m.annotation" || relation.EventID != eventID || relation.Key != sign {
			t.Errorf("%s: %+v", code, relation)
		}
	}
	f.bot.config.Annotate.Shields = ShieldsStrict
	f.says(f.hear(from("$strict", "PHONE", cryptohook.CodeUnverifiedIdentity)))
	f.wantSign("$strict", "⛔")
}

func TestReactionIsCorrectedByAnother(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	first := f.only(f.hear(from("$one", "PHONE", cryptohook.CodeVerified)))
	f.becomesOf("sPHONE", "PHONE", cryptohook.CodeVerificationViolation)
	said := f.says(f.work)
	if len(said) != 3 || said[0].evtType != "m.room.message" || !strings.Contains(said[0].body(), "no longer holds") {
		t.Fatalf("said %v", said)
	}
	// First the new one, so that there is none without a sign.
	if said[1].relation().Key != "⛔" || said[2].redacts != first.id {
		t.Errorf("said %v", said)
	}
	f.wantSign("$one", "⛔")
	f.becomesOf("sPHONE", "PHONE", fine)
	f.silence("within a minute", func() {})
	f.now = f.now.Add(editPause)
	f.becomesOf("sPHONE", "PHONE", fine)
	f.says(f.work)
	f.wantSign("$one", "ℹ️")
}

func TestReactionStaysIfItsSignIsTheSame(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	f.says(f.hear(from("$one", "PHONE", cryptohook.CodeUnableToDecrypt)))
	late := from("$one", "PHONE", bad)
	f.silence("a key came late", func() {
		answered, err := f.bot.reviser.correctLate(t.Context(), f.event(late), late.verdict)
		if !answered || err != nil {
			t.Errorf("%v, %v", answered, err)
		}
	})
	f.becomesOf("sPHONE", "PHONE", cryptohook.CodeVerified) // it would be no change, had it not been noted
	f.says(f.work)
	f.wantSign("$one", "✅")
}

func TestReactionIsTheWorstOfAMessageAndItsEdits(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	f.says(f.hear(from("$one", "PHONE", cryptohook.CodeVerified)))
	f.silence("an edit from the same device", f.hear(from("$edit1", "PHONE", cryptohook.CodeVerified).editing("$one")))
	if said := f.says(f.hear(from("$edit2", "STOLEN", bad).editing("$one"))); len(said) > 0 {
		t.Errorf("said %v", said)
	}
	f.says(f.work)
	f.wantSign("$one", "⛔")
	f.silence("another device that is better", f.hear(from("$edit3", "TABLET", cryptohook.CodeIdentityChanged).editing("$one")))
	f.wantSign("$one", "⛔")
	f.becomesOf("sSTOLEN", "STOLEN", fine)
	f.now = f.now.Add(editPause)
	f.says(f.work)
	f.wantSign("$one", "⚠️")
	f.now = f.now.Add(editPause)
	f.says(func() { f.redact("$edit3", "@alice:example.org")(); f.work() })
	f.wantSign("$one", "ℹ️")
	f.now = f.now.Add(editPause)
	f.says(func() { f.hear(from("$clear", "", cryptohook.CodeSentInClear).editing("$one"))(); f.work() })
	f.wantSign("$one", "⛔")
}

// Whoever sees a sign that is an edit's can ask about it.
func TestEditsAreExplainedWithTheirMessage(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	one := from("$one", "PHONE", fine)
	f.says(f.hear(one))
	f.says(f.hear(from("$edit1", "PHONE", fine).editing("$one")))
	f.says(f.hear(from("$edit2", "STOLEN", bad).editing("$one")))
	f.says(f.hear(from("$edit3", "STOLEN", bad).editing("$one")))
	for n := range 10 {
		f.says(f.hear(from(id.EventID(fmt.Sprint("$more", n)), id.DeviceID(fmt.Sprint("D", n)), bad).editing("$one")))
	}
	said := page(f.bot.editsInWords(t.Context(), speeches["en"], f.event(one), one.verdict)).plain()
	if strings.Count(said, "put there later: Sent from a device that @alice:example.org has not confirmed") != mostEditsTold || strings.Count(said, "STOLEN") != 1 || strings.Contains(said, "PHONE") {
		t.Errorf("says %s", said)
	}
	f.redact("$edit2", "@alice:example.org")()
	f.redact("$edit3", "@alice:example.org")()
	if said = page(f.bot.editsInWords(t.Context(), speeches["en"], f.event(one), one.verdict)).plain(); strings.Contains(said, "STOLEN") {
		t.Errorf("says of what was deleted %s", said)
	}
}

func TestReactionToAnEditOfAMessageThatTheBotNeverSaw(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	f.silence("nothing wrong", f.hear(from("$fine", "PHONE", fine).editing("$old")))
	f.says(f.hear(from("$edit", "STOLEN", bad).editing("$old")))
	f.wantSign("$old", "⛔")
	f.becomesOf("sSTOLEN", "STOLEN", fine)
	f.says(f.work)
	f.wantSign("$old", "ℹ️")
}

func TestReactionToADeletedMessageIsTakenBack(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	first := f.only(f.hear(from("$one", "PHONE", bad)))
	if said := f.only(func() { f.redact("$one", "@alice:example.org")(); f.work() }); said.redacts != first.id {
		t.Errorf("said %v", said)
	}
	f.becomesOf("sPHONE", "PHONE", fine)
	f.silence("afterwards", func() { f.now = f.now.Add(time.Hour) })
}

func TestReactionThatWasTakenAwayIsLeftAlone(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	first := f.only(f.hear(from("$one", "PHONE", bad)))
	f.silence("the reaction", f.redact(first.id, "@moderator:example.org"))
	f.becomesOf("sPHONE", "PHONE", fine)
	f.silence("its message changes", func() {})
}

var errCrash = errors.New("crash")

// The process dies at each request of a correction: after the homeserver has it, and before the process knows. Meanwhile the truth may
// have changed once more. In the end one sign is there, the right one.
func TestCrashWhileAReactionIsCorrectedLeavesOne(t *testing.T) {
	for _, after := range []cryptohook.Code{bad, cryptohook.CodeVerified, fine, cryptohook.CodeIdentityChanged} {
		for dies := range 2 {
			t.Run(fmt.Sprintf("at request %d, then %s", dies, after), func(t *testing.T) {
				f := newFakeRooms(t, ModeReaction)
				f.says(f.hear(from("$one", "PHONE", fine)))
				f.bot.reviser.records.noteSaid(t.Context(), warning{"!room:example.org", "@alice:example.org", bad, "M"}, f.now)
				f.becomesOf("sPHONE", "PHONE", bad)
				ctx, crash := context.WithCancelCause(t.Context())
				requests := 0
				f.crash = func(saidEvent) {
					if requests == dies {
						crash(errCrash)
					}
					requests++
				}
				if _, err := f.bot.reviser.round(ctx); !errors.Is(err, context.Canceled) {
					t.Fatalf("error %v", err)
				}
				f.crash = nil
				f.start()
				f.becomesOf("sPHONE", "PHONE", after)
				f.work()
				f.now = f.now.Add(editPause)
				f.work()
				f.wantSign("$one", f.bot.sign(cryptohook.Verdict{Code: after}))
				f.silence("later", func() { f.now = f.now.Add(time.Hour) })
			})
		}
	}
}

// The same, and then the message is deleted.
func TestCrashWhileAReactionIsCorrectedAndItsMessageDeletedLeavesNone(t *testing.T) {
	for dies := range 2 {
		f := newFakeRooms(t, ModeReaction)
		f.says(f.hear(from("$one", "PHONE", fine)))
		f.becomesOf("sPHONE", "PHONE", cryptohook.CodeIdentityChanged)
		ctx, crash := context.WithCancelCause(t.Context())
		requests := 0
		f.crash = func(said saidEvent) {
			if said.evtType == "m.room.message" {
				return
			}
			if requests == dies {
				crash(errCrash)
			}
			requests++
		}
		if _, err := f.bot.reviser.round(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("error %v", err)
		}
		f.crash = nil
		f.start()
		f.redact("$one", "@alice:example.org")()
		f.work()
		if signs := f.signsOn("$one"); len(signs) > 0 {
			t.Errorf("%v is left", signs)
		}
	}
}

// A message is answered again after a crash: with the sign that it was about to get.
func TestReactionOfACrashIsTheSameOne(t *testing.T) {
	f := newFakeRooms(t, ModeReaction)
	f.only(f.hear(from("$one", "PHONE", bad)))
	if err := f.bot.reviser.records.exec(t.Context(), setAnswerQuery, "$one", ""); err != nil {
		t.Fatal(err)
	}
	f.start()
	if said := f.says(f.hear(from("$one", "PHONE", fine))); len(said) > 0 {
		t.Errorf("said %v", said)
	}
	f.becomesOf("sPHONE", "PHONE", fine)
	f.says(f.work)
	f.wantSign("$one", "ℹ️")
}
