package bot

import (
	"strings"
	"testing"

	"sendertrust/cryptohook"
)

func TestWordsSayByWhichWayAKeyCame(t *testing.T) {
	said := make(map[string]cryptohook.Source)
	for source, because := range map[cryptohook.Source]string{
		cryptohook.SourceBackup: "key backup", cryptohook.SourceForwarded: "another device of this bot", cryptohook.SourceImport: "from a file",
		cryptohook.SourceHistoryBundle: "@carol:example.org, together with the invitation", cryptohook.SourceDirect: "not the one it claims to be", "": "not known",
	} {
		words := english.explain(cryptohook.Verdict{
			Code: cryptohook.CodeAuthenticityNotGuaranteed, Source: source, SourceUser: "@carol:example.org",
		}, "@alice:example.org")
		if !strings.Contains(words.known, because) || !strings.Contains(words.known, "@alice:example.org") || words.advice == "" {
			t.Errorf("%s: %s", source, words.plain())
		}
		if other, repeated := said[words.known]; repeated && source != "" && other != "" {
			t.Errorf("%s says the same as %s", source, other)
		}
		said[words.known] = source
		for _, jargon := range []string{"Megolm", "session", "MSC", "recovery key", "bundle"} {
			if strings.Contains(words.plain(), jargon) {
				t.Errorf("%s speaks of %q: %s", source, jargon, words.plain())
			}
		}
	}
	nobody := english.explain(cryptohook.Verdict{Code: cryptohook.CodeAuthenticityNotGuaranteed, Source: cryptohook.SourceHistoryBundle}, "@alice:example.org")
	if !strings.Contains(nobody.known, "whoever invited this bot") {
		t.Error(nobody.plain())
	}
}
