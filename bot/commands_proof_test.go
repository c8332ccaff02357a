package bot

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

func TestProofIsAFileWithTheCommandThatChecksIt(t *testing.T) {
	a := newAskedBot(t)
	eventID := id.EventID("$abcD-_ghIJKLmnop")
	a.events[eventID.String()] = message("@bob:example.com")
	for _, language := range Languages {
		r := a.proveMessage(t.Context(), a.asked(language, "proof", eventID), (&knowing{proof: []byte(`{"a":1}`)}).prove, masterKeyA)
		if len(r.attachments) != 1 {
			t.Fatalf("%d files: %s", len(r.attachments), r.words.plain())
		}
		file := r.attachments[0]
		if file.msgType != event.MsgFile || file.mimeType != "application/json" || file.name != "sendertrust-proof-abcD-_gh.json" || string(file.data) != `{"a":1}` {
			t.Errorf("%+v", file)
		}
		command := `sendertrust --verify-proof sendertrust-proof-abcD-_gh.json --master-key "` + masterKeyA.String() + `"`
		plain, html := r.words.plain(), r.words.html()
		if !strings.Contains(plain, command) || !strings.Contains(html, "<code>"+escapeHTML(command)+"</code>") || strings.Contains(plain, "proof.") && strings.Contains(plain, "proof.m") {
			t.Errorf("%s: %s", language, plain)
		}
	}
}

// What a command replies to is the server's word, so the answer has to say which message it is about.
func TestAnswersNameTheMessageThatTheyAreAbout(t *testing.T) {
	a := newAskedBot(t)
	a.events["$message"] = message("@bob:example.com")
	knows := &knowing{found: provenBy(cryptohook.CodeVerified, cryptohook.StateSenderVerified, "verified"), proof: []byte("{}")}
	for _, language := range Languages {
		for name, r := range map[string]response{
			"explain": a.explainMessage(t.Context(), a.asked(language, "explain", "$message"), knows),
			"proof":   a.proveMessage(t.Context(), a.asked(language, "proof", "$message"), knows.prove, masterKeyA),
		} {
			above, _, _ := strings.Cut(r.words.plain(), "$message")
			if lines := strings.Count(above, "\n"); above == r.words.plain() || lines > 3 || !strings.Contains(above, "2023-11-14 22:13 UTC") {
				t.Errorf("%s, %s: %s", language, name, r.words.plain())
			}
		}
	}
}

func TestProofFileNamesAreFitForFiles(t *testing.T) {
	for eventID, want := range map[id.EventID]string{
		"$abcdefghij": "sendertrust-proof-abcdefgh.json", "$old:example.org": "sendertrust-proof-oldexamp.json", "$../../etc/passwd": "sendertrust-proof-etcpassw.json",
		"$": "sendertrust-proof-.json", "$\"; rm -rf ~; \u202e": "sendertrust-proof-rm-rf.json",
	} {
		if name := proofName(eventID); name != want {
			t.Errorf("%q: %q", eventID, name)
		}
	}
}

func TestRefusedProofSaysWhy(t *testing.T) {
	a := newAskedBot(t)
	a.events["$message"] = message("@bob:example.com")
	reasons := constantsOf(t, "proof.go", "NoProof")
	if len(reasons) < 8 {
		t.Fatalf("found %d reasons", len(reasons))
	}
	for name, reason := range reasons {
		for _, language := range Languages {
			if !speeches[language].has("proof.no_" + reason + ".known") {
				t.Errorf("%s has no words for %s", language, name)
			}
			verdict := cryptohook.Verdict{Code: cryptohook.CodeSessionRejected}
			refused := fmt.Errorf("failed: %w", &cryptohook.UnprovableError{Reason: cryptohook.ProofReason(reason), Verdict: verdict})
			r := a.proveMessage(t.Context(), a.asked(language, "proof", "$message"), (&knowing{proofNo: refused}).prove, masterKeyA)
			if said := r.words.plain(); r.outcome != outcomeRefused || len(r.attachments) != 0 || strings.Contains(said, "proof.no") || strings.Contains(said, "no value") {
				t.Errorf("%s, %s: %s", name, language, said)
			}
		}
	}
	odd := &cryptohook.UnprovableError{Reason: "<new>"}
	if r := a.proveMessage(t.Context(), a.asked("en", "proof", "$message"), (&knowing{proofNo: odd}).prove, masterKeyA); !strings.Contains(r.words.plain(), "no words yet: <new>") || strings.Contains(r.words.html(), "<new>") {
		t.Error(r.words.plain())
	}
	if r := a.proveMessage(t.Context(), a.asked("en", "proof", "$message"), (&knowing{proofNo: errors.New("the database is away")}).prove, masterKeyA); r.outcome != outcomeFailed {
		t.Errorf("%+v", r)
	}
}
