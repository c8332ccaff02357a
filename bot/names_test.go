package bot

import (
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

func TestNamesShowWhatCannotBeSeen(t *testing.T) {
	for name, want := range map[string]string{
		"@alice:example.org":                 "@alice:example.org",
		"@jörg-дмитрий_山田=~+/.1:example.org": "@jörg-дмитрий_山田=~+/.1:example.org",
		"@\u202emoc.live:example.org":        "@⟨U+202E⟩moc.live:example.org", // right-to-left override
		"@ali\u200bce:example.org":           "@ali⟨U+200B⟩ce:example.org",    // zero-width space
		"@ali\u200dce:example.org":           "@ali⟨U+200D⟩ce:example.org",    // zero-width joiner
		"@ali\u00adce:example.org":           "@ali⟨U+00AD⟩ce:example.org",    // soft hyphen
		"@ali\ufeffce:example.org":           "@ali⟨U+FEFF⟩ce:example.org",
		"@ali\u2069ce:example.org":           "@ali⟨U+2069⟩ce:example.org",  // ends what stands by itself
		"@ali\u3164ce:example.org":           "@ali⟨U+3164⟩ce:example.org",  // a letter that is only a filler
		"@ali\u2800ce:example.org":           "@ali⟨U+2800⟩ce:example.org",  // a Braille sign without dots
		"@ali\ufe0fce:example.org":           "@ali⟨U+FE0F⟩ce:example.org",  // a variation selector
		"@ali\U000e0061ce:x":                 "@ali⟨U+E0061⟩ce:x",           // a tag
		"@alice\n⛔:example.org":              "@alice⟨U+000A⟩⛔:example.org", // a line of its own
		"@alice\u2028:example.org":           "@alice⟨U+2028⟩:example.org",
		"@a is verified:example.org":         "@a⟨U+0020⟩is⟨U+0020⟩verified:example.org",
		"@a\u00a0b:example.org":              "@a⟨U+00A0⟩b:example.org",
		"@שלום:example.org":                  "\u2066@שלום:example.org\u2069",
		"@عل\u202eي:example.org":             "\u2066@عل⟨U+202E⟩ي:example.org\u2069",
		"@٣:example.org":                     "\u2066@٣:example.org\u2069",
	} {
		if shown := showUser(id.UserID(name)); shown != want {
			t.Errorf("%q is shown as %q, want %q", name, shown, want)
		}
	}
	if shown := showText("two words\u202e\n"); shown != "two words⟨U+202E⟩⟨U+000A⟩" {
		t.Errorf("words are shown as %q", shown)
	}
	long := showUser(id.UserID("@" + strings.Repeat("ש", 64<<10)))
	if letters := []rune(long); len(letters) > longestName+3 || letters[len(letters)-1] != '\u2069' {
		t.Errorf("a long name is shown as %q", long)
	}
}

func TestLookAlikesAreFound(t *testing.T) {
	for name, want := range map[string]string{
		"@аlice:example.org":       "а", // Cyrillic
		"@аliсе:example.org":       "асе",
		"@alicе-аdmin:example.org": "еа",
		"@αlice:example.org":       "α", // Greek
		"@alice\u0561:example.org": "ա", // Armenian, beside Latin
		"@сосо:example.org":        "со",
		"@сосо_1:example.org":      "со",
		"@Ꭺ:example.org":           "Ꭺ",
		"@admın:example.org":       "ı", // Latin, and not the common one
		"@ɑlice:example.org":       "ɑ",
		"@ａlice:example.org":       "ａ", // full-width
		"@𝐚lice:example.org":       "𝐚", // mathematical
		"@alice：example.org:x.org": "：",
		"@alice꞉example.org:x.org": "꞉",
		"@alice∶example.org:x.org": "∶",
		"@jörg∶example.org:x.org":  "∶",
		"@дима∶example.org:x.org":  "дима∶",
		"@bot‐1:example.org":       "‐",
		"@alice:exаmple.org":       "а", // in the server's name

		"@alice:example.org":        "",
		"@ALICE_1.2-3=4/5+6:x":      "",
		"@jörg:example.org":         "",
		"@zoë.çelik.ñ:example.org":  "",
		"@дмитрий:example.org":      "",
		"@дмитрий_1:example.org":    "",
		"@γιώργος:example.org":      "",
		"@tanaka山田:example.org":     "",
		"@שלום:example.org":         "",
		"@kæthe.ørsted:example.org": "",
		"@さとう:example.org":          "",
		"@alice:пример.example.org": "приме", // a server's name is ASCII, so this is one of another kind
		"":                          "",
		"@":                         "",
		"@:":                        "",
	} {
		if odd := string(lookAlikes(id.UserID(name))); odd != want {
			t.Errorf("in %s, odd are %q, want %q", name, odd, want)
		}
	}
}

func TestAnswersWarnOfLookAlikes(t *testing.T) {
	const odd = "Careful: the name @аliсe:example.org contains letters of another alphabet that look like common ones: а (U+0430), с (U+0441)."
	for name, verdict := range allVerdicts(t) {
		named := verdict.Code != cryptohook.CodeNotEncrypted
		if said := english.explain(verdict, "@аliсe:example.org").known; strings.Contains(said, odd) != named {
			t.Errorf("%s: %s", name, said)
		}
		if said := english.explain(verdict, "@alice:example.org").known; strings.Contains(said, "Careful") {
			t.Errorf("%s: %s", name, said)
		}
	}
	for name, verdict := range map[string]cryptohook.Verdict{
		"owner":  {Code: cryptohook.CodeMismatchedSender, UserID: "@аliсe:example.org"},
		"giver":  {Code: cryptohook.CodeAuthenticityNotGuaranteed, Source: cryptohook.SourceHistoryBundle, SourceUser: "@аliсe:example.org"},
		"sender": {Code: cryptohook.CodeMismatchedSender, UserID: "@alice:example.org"},
	} {
		sender := id.UserID("@alice:example.org")
		if name == "sender" {
			sender = "@аliсe:example.org"
		}
		if said := english.explain(verdict, sender).known; !strings.Contains(said, odd) {
			t.Errorf("%s: %s", name, said)
		}
	}
	if said := english.lookAlike("@\u202eecila:example.org"); !strings.Contains(said, "cannot be seen") || !strings.Contains(said, "@⟨U+202E⟩ecila:example.org") {
		t.Error(said)
	}
	if said := speeches["de"].lookAlike("@аlice:example.org"); !strings.Contains(said, "eines anderen Alphabets") || !strings.Contains(said, "а (U+0430)") {
		t.Error(said)
	}
	if said := english.lookAlike("@alice:example.org"); said != "" {
		t.Error(said)
	}
	if said := english.lookAlike("@aбвгдежз:example.org"); !strings.HasSuffix(strings.Split(said, ". ")[0], "е (U+0435), …") {
		t.Error(said)
	}
}

func FuzzNames(f *testing.F) {
	for _, name := range []string{"@alice:example.org", "@аlice:example.org", "@\u202e:x", "\xff", "@שלום:x", "⟨U+202E⟩", strings.Repeat("a", 200)} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		shown := showUser(id.UserID(name))
		inner := strings.TrimSuffix(strings.TrimPrefix(shown, leftToRightIsolate), popDirectionalIsolate)
		if !utf8.ValidString(shown) || strings.ContainsFunc(inner, oddInName) || len([]rune(shown)) > 10*longestName+3 {
			t.Errorf("%q is shown as %q", name, shown)
		}
		if (inner != shown) != strings.ContainsFunc(inner, rightToLeft) {
			t.Errorf("%q is set apart wrongly: %q", name, shown)
		}
		if odd := lookAlikes(id.UserID(name)); slices.ContainsFunc(odd, func(letter rune) bool { return letter < utf8.RuneSelf }) {
			t.Errorf("%q: common letters are odd: %q", name, odd)
		}
		for _, s := range speeches {
			if said := s.lookAlike(id.UserID(name)); strings.Contains(said, "<no value>") || strings.HasPrefix(said, "name.") {
				t.Error(said)
			}
		}
	})
}
