package bot

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

var english = speeches["en"]

// constantsOf gives the string constants of a file of cryptohook whose names begin so: a new code or reason without words must fail here.
func constantsOf(t *testing.T, name, prefix string) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../cryptohook/"+name, nil, 0)
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

// allVerdicts are one verdict for each code, reason, and way of a key, by what sets it apart.
func allVerdicts(t *testing.T) map[string]cryptohook.Verdict {
	t.Helper()
	codes, reasons, sources := constantsOf(t, "verdict.go", "Code"), constantsOf(t, "verdict.go", "Reason"), constantsOf(t, "senderdata.go", "Source")
	if len(codes) != 13 || len(reasons) < 8 || len(sources) != 5 {
		t.Fatalf("found %d codes, %d reasons and %d sources", len(codes), len(reasons), len(sources))
	}
	all := make(map[string]cryptohook.Verdict)
	add := func(name string, code cryptohook.Code, reason string, source cryptohook.Source, giver id.UserID) {
		all[name] = cryptohook.Verdict{
			Code: code, Reason: reason, Source: source, SourceUser: giver, UserID: "@owner:example.org", DeviceID: "DEVICE", MasterKey: "masterkey",
			Claimants: []cryptohook.Claimant{{UserID: "@alice:example.org", DeviceID: "ONE"}, {}},
		}
	}
	for name, code := range codes {
		switch code := cryptohook.Code(code); code {
		case cryptohook.CodeUnableToDecrypt, cryptohook.CodeAuthenticityNotGuaranteed: // each reason and source has words of its own
		default:
			add(name, code, "", "", "")
		}
	}
	for name, reason := range reasons {
		switch reason {
		case cryptohook.ReasonOtherSender: // CodeMismatchedSender without a reason says the same
		case cryptohook.ReasonReplayed:
			add(name, cryptohook.CodeMismatchedSender, reason, "", "")
		default:
			add(name, cryptohook.CodeUnableToDecrypt, reason, "", "")
		}
	}
	for _, code := range []event.RoomKeyWithheldCode{
		event.RoomKeyWithheldBlacklisted, event.RoomKeyWithheldUnverified, event.RoomKeyWithheldUnauthorized,
		event.RoomKeyWithheldUnavailable, event.RoomKeyWithheldNoOlmSession, "org.example.100%_new",
	} {
		add(string(code), cryptohook.CodeUnableToDecrypt, string(code), "", "")
	}
	for name, source := range sources {
		add(name, cryptohook.CodeAuthenticityNotGuaranteed, "", cryptohook.Source(source), "@carol:example.org")
	}
	add("unknown giver", cryptohook.CodeAuthenticityNotGuaranteed, "", cryptohook.SourceHistoryBundle, "")
	add("unknown code", "code_of_the_future", "", "", "")
	return all
}

// checkWords finds texts that are missing, and gaps that were not filled.
func checkWords(t *testing.T, name string, words text) {
	t.Helper()
	if words.sign == "" || words.headline == "" || words.known == "" {
		t.Errorf("%s has no words: %+v", name, words)
	}
	for _, part := range []string{words.headline, words.known, words.advice} {
		for _, flaw := range []string{"<no value>", "{{", "%!", "  ", "()"} {
			if strings.Contains(part, flaw) {
				t.Errorf("%s is badly filled in: %q", name, part)
			}
		}
		if part != "" && !strings.Contains(part, " ") {
			t.Errorf("%s has no text, but a key: %q", name, part)
		}
	}
}

func TestEveryCodeAndReasonHasItsOwnWords(t *testing.T) {
	for language, s := range speeches {
		said := make(map[string]string)
		for name, verdict := range allVerdicts(t) {
			name = language + ": " + name
			words := s.explain(verdict, "@alice:example.org")
			checkWords(t, name, words)
			if verdict.Code != cryptohook.CodeVerified && words.advice == "" {
				t.Errorf("%s does not say what to do", name)
			}
			if strings.Contains(words.known, "code_of_the_future") != (verdict.Code == "code_of_the_future") {
				t.Errorf("%s is known by no name: %s", name, words.known)
			}
			if known := verdict.Reason != "org.example.100%_new"; verdict.Code == cryptohook.CodeUnableToDecrypt && strings.Contains(words.known, verdict.Reason) == known {
				t.Errorf("%s is a reason without words of its own: %s", name, words.known)
			}
			if other, repeated := said[words.known]; repeated {
				t.Errorf("%s says the same as %s", name, other)
			}
			said[words.known] = name

			verdict.Outdated, verdict.ContentWithheld = true, true
			more := s.explain(verdict, "@alice:example.org")
			checkWords(t, name+", outdated and withheld", more)
			if !strings.HasPrefix(more.known, words.known+" ") || more.headline != words.headline {
				t.Errorf("%s, outdated and withheld, says something else: %q", name, more.known)
			}
		}
	}
}

func TestWordsAboutTheBotAndItsLimitsAreThere(t *testing.T) {
	for language, s := range speeches {
		for name, state := range constantsOf(t, "ownidentity.go", "Own") {
			checkWords(t, language+": "+name, s.doubtInMyself(cryptohook.OwnIdentity{State: cryptohook.OwnState(state)}))
		}
		checkWords(t, language+": trust", s.trustInMyself())
		for _, sender := range []id.UserID{"", "@alice:example.org"} {
			stopped := s.stoppedAnswering(sender)
			checkWords(t, language+": stopped", stopped)
			if !strings.Contains(stopped.headline, string(sender)) {
				t.Errorf("does not name %s: %s", sender, stopped.plain())
			}
			for _, unanswered := range []int{1, 2, 5000} {
				again := s.answeringAgain(sender, unanswered)
				checkWords(t, language+": again", again)
				if !strings.Contains(again.known, " "+strconv.Itoa(unanswered)+" ") || !strings.Contains(again.headline, string(sender)) {
					t.Errorf("answering %q again after %d: %s", sender, unanswered, again.plain())
				}
			}
		}
	}
	for unanswered, want := range map[int]string{1: "1 message of theirs", 2: "2 messages of theirs"} {
		if said := english.answeringAgain("@alice:example.org", unanswered).known; !strings.Contains(said, want) {
			t.Error(said)
		}
	}
	for unanswered, want := range map[int]string{1: "1 Nachricht in", 2: "2 Nachrichten in"} {
		if said := speeches["de"].answeringAgain("", unanswered).known; !strings.Contains(said, want) {
			t.Error(said)
		}
	}
}

func TestWordsNameTheSenderWithoutJargon(t *testing.T) {
	for name, verdict := range allVerdicts(t) {
		for language, s := range speeches {
			words := s.explain(verdict, "@alice:example.org").plain()
			if verdict.Code != cryptohook.CodeNotEncrypted && verdict.Code != "code_of_the_future" && !strings.Contains(words, "@alice:example.org") {
				t.Errorf("%s: %s does not name the sender: %s", language, name, words)
			}
			for _, jargon := range []string{"master key", "session", "security key", "recovery key", "bundle", "Sitzung", "Hauptschlüssel"} {
				if strings.Contains(words, jargon) {
					t.Errorf("%s: %s speaks of %q: %s", language, name, jargon, words)
				}
			}
		}
	}
}

func TestWordsEscapeWhatStrangersWrite(t *testing.T) {
	const hostile = "<b>&\"'{{.User}}\u202e"
	for name, verdict := range allVerdicts(t) {
		verdict.DeviceID, verdict.UserID, verdict.SourceUser = hostile, "@"+hostile+":o", "@"+hostile+":s"
		verdict.Claimants = []cryptohook.Claimant{{UserID: "@" + hostile + ":c", DeviceID: hostile}}
		if verdict.Code == cryptohook.CodeUnableToDecrypt {
			verdict.Reason += hostile
		}
		for language, s := range speeches {
			now := s.explain(verdict, "@"+hostile+":example.org")
			for _, words := range []text{
				now, s.corrected(cryptohook.Verdict{}, verdict, "@"+hostile+":example.org"), s.warnOf(cryptohook.Verdict{}, verdict, "@"+hostile+":example.org"),
				s.stoppedAnswering("@" + hostile), s.answeringAgain("@"+hostile, 2),
			} {
				shown := ourMarkup.Replace(words.html())
				if strings.ContainsAny(shown, "<>\"'") {
					t.Errorf("%s: %s is not escaped: %s", language, name, shown)
				}
				if strings.Contains(words.plain(), "\u202e") {
					t.Errorf("%s: %s turns the text around: %q", language, name, words.plain())
				}
				if words != now {
					continue
				}
				if named := verdict.Code != cryptohook.CodeNotEncrypted && verdict.Code != "code_of_the_future"; named && !strings.Contains(words.plain(), "{{.User}}") {
					t.Errorf("%s: %s reads what strangers wrote as its own: %s", language, name, words.plain())
				}
			}
		}
	}
}

func TestWordsClipLongNames(t *testing.T) {
	long := id.DeviceID(strings.Repeat("ä", 64*1024))
	unseen := id.DeviceID(strings.Repeat("\u202e", 64*1024))
	for _, name := range []id.DeviceID{long, unseen} {
		claimants := make([]cryptohook.Claimant, 1000)
		for i := range claimants {
			claimants[i] = cryptohook.Claimant{UserID: id.UserID(name), DeviceID: name}
		}
		for _, verdict := range []cryptohook.Verdict{
			{Code: cryptohook.CodeUnsignedDevice, DeviceID: name},
			{Code: cryptohook.CodeSessionConflict, Claimants: claimants},
			{Code: cryptohook.CodeUnableToDecrypt, Reason: string(name)},
		} {
			words := english.explain(verdict, "@alice:example.org")
			if size := len(words.plain()) + len(words.html()); size > 40*1024 {
				t.Errorf("%s takes %d bytes", verdict.Code, size)
			}
		}
	}
}

func TestKeysAreShownInGroups(t *testing.T) {
	if shown := groups("nX4e+/MXGYuVReRtzrS"); shown != "nX4e +/MX GYuV ReRt zrS" {
		t.Error(shown)
	}
}

// A warning is about all the messages that somebody has sent: what was said of them, and what is said of each of them now.
func TestWarningsAreAboutSeveralMessages(t *testing.T) {
	before := cryptohook.Verdict{Code: cryptohook.CodeVerified}
	for name, now := range allVerdicts(t) {
		for language, s := range speeches {
			each, words := s.explain(now, "@alice:example.org"), s.warnOf(before, now, "@alice:example.org")
			if !worse(before.Code, now.Code) {
				continue
			}
			checkWords(t, language+": "+name, words)
			if strings.Contains(words.headline, each.headline) || !strings.Contains(words.headline, "@alice:example.org") || words.sign != each.sign {
				t.Errorf("%s: %s is about one message: %s", language, name, words.plain())
			}
			said := s.explain(before, "@alice:example.org").headline
			for _, want := range []string{"@alice:example.org", said, each.headline, each.known} {
				if !strings.Contains(words.known, want) {
					t.Errorf("%s: %s does not say %q: %s", language, name, want, words.known)
				}
			}
			if !strings.Contains(words.advice, each.advice) {
				t.Errorf("%s: %s does not say what to do: %s", language, name, words.advice)
			}
		}
	}
	words := english.warnOf(before, cryptohook.Verdict{Code: cryptohook.CodeUnsignedDevice}, "@alice:example.org")
	const want = "I said “Verified: this is really @alice:example.org.” about earlier messages of @alice:example.org here. That no longer holds, and " +
		"I am correcting my answers. Of each of them I now say: “Sent from a device that @alice:example.org has not confirmed.” It came from a device."
	if !strings.HasPrefix(words.known, want) {
		t.Error(words.known)
	}
}

func TestAnswersAreInTheLanguageOfTheRoom(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.bot.config.Annotate.RoomLanguages = map[id.RoomID]string{"!room:example.org": "de", "!other:example.org": "en"}
	for room, want := range map[id.RoomID]string{"!room:example.org": "Gerät", "!other:example.org": "device", "!third:example.org": "device"} {
		words := w.bot.speech(room).explain(verdictOf("$one", "s", cryptohook.CodeUnsignedDevice), "@alice:example.org")
		if !strings.Contains(words.plain(), want) {
			t.Errorf("in %s: %s", room, words.plain())
		}
	}
	w.bot.config.Annotate.Language = "de"
	if words := w.bot.speech("!third:example.org").trustInMyself(); words.headline != "Ich antworte wieder." {
		t.Errorf("where the language is German: %s", words.plain())
	}
}

// Answers, corrections, warnings, limits: all that a room is told is in its language.
func TestGermanRoomIsToldEverythingInGerman(t *testing.T) {
	c := newChattyRoom(t, ModeReply)
	c.bot.config.Annotate.RoomLanguages = map[id.RoomID]string{"!room:example.org": "de"}
	said := c.hear("$one", "@alice:example.org", cryptohook.CodeVerified)
	if body := said[0]["body"].(string); !strings.Contains(body, "Geprüft: Das ist wirklich @alice:example.org.") {
		t.Errorf("the answer is %q", body)
	}
	c.becomes("s$one", cryptohook.CodeVerificationViolation)
	sent := c.round()
	if len(sent) != 2 {
		t.Fatalf("sent %v", sent)
	}
	for _, s := range sent {
		if !strings.Contains(s.body(), "Die geprüfte Identität von @alice:example.org wurde ersetzt.") || strings.Contains(s.body(), "said") {
			t.Errorf("said %q", s.body())
		}
	}
	for n := range 10 {
		said = c.hear("$more"+strconv.Itoa(n), "@alice:example.org", cryptohook.CodeVerified)
		if n == 4 && (len(said) != 1 || !strings.Contains(said[0]["body"].(string), "Ich antworte @alice:example.org vorerst nicht mehr.")) {
			t.Errorf("said %v above the limit", said)
		}
	}

	w := newWatchedBot(t)
	w.speech = func(roomID id.RoomID) speech {
		if roomID == "!one:example.org" {
			return speeches["de"]
		}
		return english
	}
	w.shows(cryptohook.OwnOtherIdentity)
	w.later(ownConfirm)
	w.works()
	w.shows(cryptohook.OwnFine)
	w.works()
	var bodies []string
	for _, told := range w.told {
		if told.roomID == "!one:example.org" {
			bodies = append(bodies, told.body())
		} else if !strings.Contains(told.body(), "I answer") && !strings.Contains(told.body(), "I am answering") {
			t.Errorf("told %s: %s", told.roomID, told.body())
		}
	}
	if len(bodies) != 2 || !strings.Contains(bodies[0], "Verlass dich vorerst nicht auf mich.") || !strings.Contains(bodies[1], "Ich antworte wieder.") {
		t.Errorf("told %q", bodies)
	}
}

// What has not changed but for the language is not told again.
func TestAnotherLanguageIsNoReasonToCorrectAnswers(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.answered("$one", "s", cryptohook.CodeUnsignedDevice)
	w.round()
	w.bot.config.Annotate.Language = "de"
	w.start()
	w.bot.reviser.changed(cryptohook.Change{Sessions: []id.SessionID{"s"}})
	if sent := w.round(); len(sent) > 0 {
		t.Errorf("sent %v", sent)
	}
}

func TestLanguagesAreThoseThatCanBeConfigured(t *testing.T) {
	if spoken := slices.Sorted(maps.Keys(speeches)); !slices.Equal(spoken, slices.Sorted(slices.Values(Languages))) || Languages[0] != "en" {
		t.Errorf("speaks %v, and %v can be chosen", spoken, Languages)
	}
}
