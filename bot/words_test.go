package bot

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// constantsOf gives the string constants of cryptohook whose names begin so: a new code or reason without words must fail here.
func constantsOf(t *testing.T, prefix string) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../cryptohook/verdict.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]string)
	ast.Inspect(file, func(node ast.Node) bool {
		spec, ok := node.(*ast.ValueSpec)
		if !ok {
			return true
		}
		for i, name := range spec.Names {
			if !strings.HasPrefix(name.Name, prefix) || i >= len(spec.Values) {
				continue
			}
			if literal, ok := spec.Values[i].(*ast.BasicLit); ok {
				found[name.Name], _ = strconv.Unquote(literal.Value)
			}
		}
		return true
	})
	return found
}

func TestEveryCodeAndReasonHasItsOwnWords(t *testing.T) {
	codes, reasons := constantsOf(t, "Code"), constantsOf(t, "Reason")
	if len(codes) != 13 || len(reasons) < 8 {
		t.Fatalf("found %d codes and %d reasons in verdict.go", len(codes), len(reasons))
	}
	said := make(map[string]string)
	check := func(name string, verdict cryptohook.Verdict) {
		words := explain(verdict, "@alice:example.org")
		if strings.Contains(words.known, "has no word") || words.headline == "" || words.known == "" {
			t.Errorf("%s has no words: %+v", name, words)
		}
		if verdict.Code != cryptohook.CodeVerified && words.advice == "" {
			t.Errorf("%s does not say what to do", name)
		}
		if other, repeated := said[words.known]; repeated {
			t.Errorf("%s says the same as %s", name, other)
		}
		said[words.known] = name
		if strings.Contains(words.plain(), "%!") {
			t.Errorf("%s is badly filled in: %s", name, words.plain())
		}
	}
	for name, code := range codes {
		verdict := cryptohook.Verdict{Code: cryptohook.Code(code), UserID: "@alice:example.org", DeviceID: "DEVICE"}
		if verdict.Code != cryptohook.CodeUnableToDecrypt {
			check(name, verdict)
		}
	}
	for name, reason := range reasons {
		switch reason {
		case cryptohook.ReasonOtherSender:
			continue
		case cryptohook.ReasonReplayed:
			check(name, cryptohook.Verdict{Code: cryptohook.CodeMismatchedSender, Reason: reason})
		default:
			check(name, cryptohook.Verdict{Code: cryptohook.CodeUnableToDecrypt, Reason: reason})
		}
	}
	for _, code := range []event.RoomKeyWithheldCode{
		event.RoomKeyWithheldBlacklisted, event.RoomKeyWithheldUnverified, event.RoomKeyWithheldUnauthorized,
		event.RoomKeyWithheldUnavailable, event.RoomKeyWithheldNoOlmSession, "org.example.100%_new",
	} {
		check(string(code), cryptohook.Verdict{Code: cryptohook.CodeUnableToDecrypt, Reason: string(code)})
	}
}

func TestWordsNameTheSenderWithoutJargon(t *testing.T) {
	for name, code := range constantsOf(t, "Code") {
		words := explain(cryptohook.Verdict{Code: cryptohook.Code(code), UserID: "@alice:example.org"}, "@alice:example.org").plain()
		if code != string(cryptohook.CodeNotEncrypted) && !strings.Contains(words, "@alice:example.org") {
			t.Errorf("%s does not name the sender: %s", name, words)
		}
		for _, jargon := range []string{"MSK", "cross-sign", "Megolm", "Olm", "curve25519", "master key", "session", "security key", "recovery key"} {
			if strings.Contains(words, jargon) {
				t.Errorf("%s speaks of %q: %s", name, jargon, words)
			}
		}
	}
}

func TestWordsEscapeWhatStrangersWrite(t *testing.T) {
	words := explain(cryptohook.Verdict{Code: cryptohook.CodeUnsignedDevice, DeviceID: `<img src=x onerror="alert(1)">`}, "@<b>alice:example.org")
	if html := words.html(); strings.Contains(html, "<img") || strings.Contains(html, "<b>") {
		t.Errorf("not escaped: %s", html)
	}
}

func TestWordsClipLongNames(t *testing.T) {
	long := id.DeviceID(strings.Repeat("ä", 64*1024))
	claimants := make([]cryptohook.Claimant, 1000)
	for i := range claimants {
		claimants[i] = cryptohook.Claimant{UserID: id.UserID(long), DeviceID: long}
	}
	for _, verdict := range []cryptohook.Verdict{
		{Code: cryptohook.CodeUnsignedDevice, DeviceID: long},
		{Code: cryptohook.CodeSessionConflict, Claimants: claimants},
		{Code: cryptohook.CodeUnableToDecrypt, Reason: string(long)},
	} {
		words := explain(verdict, "@alice:example.org")
		if size := len(words.plain()) + len(words.html()); size > 8*1024 {
			t.Errorf("%s takes %d bytes", verdict.Code, size)
		}
	}
}

func TestKeysAreShownInGroups(t *testing.T) {
	if shown := groups("nX4e+/MXGYuVReRtzrS"); shown != "nX4e +/MX GYuV ReRt zrS" {
		t.Error(shown)
	}
}

// A warning is about all the messages that somebody has sent, whatever it is that has become worse.
func TestWarningsAreAboutSeveralMessages(t *testing.T) {
	before := cryptohook.Verdict{Code: cryptohook.CodeVerified}
	for name, code := range constantsOf(t, "Code") {
		for _, source := range []cryptohook.Source{"", cryptohook.SourceBackup, cryptohook.SourceForwarded, cryptohook.SourceHistoryBundle, cryptohook.SourceImport} {
			now := cryptohook.Verdict{Code: cryptohook.Code(code), Source: source}
			words := warnOf(before, now, "@alice:example.org").plain()
			switch {
			case !worse(before.Code, now.Code), now.Code == cryptohook.CodeUnableToDecrypt, now.Code == cryptohook.CodeNotEncrypted, now.Code == cryptohook.CodeSentInClear:
				// Nothing becomes that.
			case !strings.Contains(words, "I said “Verified: this is really @alice:example.org.” about earlier messages of @alice:example.org here."):
				t.Errorf("%s does not say what has changed: %s", name, words)
			case strings.Contains(words, "this message"), strings.Contains(words, "send it again"), strings.Contains(words, "sent this."), strings.Contains(words, "It was sent"):
				t.Errorf("%s is about one message: %s", name, words)
			}
		}
	}
}
