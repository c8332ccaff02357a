package bot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// askedBot is a bot in a room, with a homeserver that has some events.
type askedBot struct {
	*Bot
	t      *testing.T
	events map[string]object
	broken bool
}

func newAskedBot(t *testing.T) *askedBot {
	t.Helper()
	a := &askedBot{Bot: testBot(t), t: t, events: make(map[string]object)}
	server := httptest.NewServer(http.HandlerFunc(a.serve))
	t.Cleanup(server.Close)
	a.client.HomeserverURL, _ = url.Parse(server.URL)
	a.client.StateStore = mautrix.NewMemoryStateStore()
	a.client.DefaultHTTPRetries = 0
	a.log, a.clock = zerolog.Nop(), time.Now
	a.reviser = &reviser{records: auditTable(t)}
	return a
}

func (a *askedBot) serve(w http.ResponseWriter, r *http.Request) {
	at := strings.LastIndexByte(r.URL.Path, '/')
	found, there := a.events[r.URL.Path[at+1:]]
	switch {
	case a.broken:
		w.WriteHeader(http.StatusBadGateway)
	case !there:
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"errcode":"M_NOT_FOUND","error":"no such event"}`))
	default:
		_ = json.NewEncoder(w).Encode(found)
	}
}

// message is an encrypted event of a sender's.
func message(sender string) object {
	return object{"type": "m.room.encrypted", "sender": sender, "origin_server_ts": 1_700_000_000_000, "content": object{
		"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "AwgA", "session_id": "SESSION", "sender_key": "KEY", "device_id": "DEV",
	}}
}

// asked is a command that replies to an event.
func (a *askedBot) asked(language, name string, about id.EventID) *order {
	content := object{"msgtype": "m.text", "body": "!trust " + name}
	if about != "" {
		content["m.relates_to"] = object{"m.in_reply_to": object{"event_id": about}}
	}
	return &order{evt: messageOf(a.t, content), speech: speeches[language], name: name}
}

// knowing is a hook that says what a test tells it to. The error comes instead of the first answer.
type knowing struct {
	found   cryptohook.Examination
	err     error
	backup  *cryptohook.Examination // what is found with the key from the backup
	looked  int
	judged  []id.EventID
	proof   []byte
	proofNo error
}

func (k *knowing) Examine(_ context.Context, evt *event.Event) (*cryptohook.Examination, error) {
	k.judged = append(k.judged, evt.ID)
	found := k.found
	found.Event = evt
	return &found, k.err
}

func (k *knowing) FindKey(_ context.Context, roomID id.RoomID, sessionID id.SessionID) (bool, error) {
	k.looked++
	if roomID != "!room:example.com" || sessionID == "" {
		return false, fmt.Errorf("asked for %q in %q", sessionID, roomID)
	}
	if k.backup == nil {
		return false, errors.New("no backup")
	}
	k.found = *k.backup
	return true, nil
}

func (k *knowing) prove(context.Context, *event.Event) ([]byte, error) { return k.proof, k.proofNo }

const (
	masterKeyA   = id.Ed25519("AAAAnX4e+/MXGYuVReRtzrSaaaaaaaaaaaaaaaaaaag")
	masterKeyB   = id.Ed25519("BBBBnX4e+/MXGYuVReRtzrSbbbbbbbbbbbbbbbbbbbg")
	selfSigningA = id.Ed25519("SSSSnX4e+/MXGYuVReRtzrSssssssssssssssssssSg")
	signingKeyA  = id.Ed25519("FFFFnX4e+/MXGYuVReRtzrSfffffffffffffffffffg")
)

func steps(outcomes string) (walked []cryptohook.Step) {
	for _, part := range strings.Fields(outcomes) {
		letter, outcome, _ := strings.Cut(part, ":")
		walked = append(walked, cryptohook.Step{Letter: letter, Outcome: cryptohook.StepOutcome(outcome)})
	}
	return walked
}

const wayToJ = "A:embedded_keys D:signed E:identity_known G:signed_by_owner H:signature_valid "

// provenBy is the examination of a message whose sender is proven.
func provenBy(code cryptohook.Code, state cryptohook.State, last string) cryptohook.Examination {
	return cryptohook.Examination{
		Verdict: cryptohook.Verdict{EventID: "$message", Code: code, State: state, UserID: "@bob:example.com", DeviceID: "BOBDEV", MasterKey: masterKeyA, SessionID: "SESSION", Source: cryptohook.SourceDirect},
		Claims: []cryptohook.Claim{{
			UserID: "@bob:example.com", DeviceID: "BOBDEV", SenderKey: "CURVE", SigningKey: signingKeyA, State: state, MasterKey: masterKeyA,
			Source: cryptohook.SourceDirect, ReceivedAt: time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC), Steps: steps(wayToJ + "J:" + last),
		}},
		Identity: &cryptohook.UserReport{
			UserID: "@bob:example.com", MasterKey: masterKeyA, FirstMasterKey: masterKeyA, SelfSigningKey: selfSigningA,
			Standing: cryptohook.StandingUnverified, FirstSeen: time.Date(2026, 1, 2, 3, 4, 0, 0, time.UTC),
		},
	}
}

func TestExplainSaysWhatIsWrongWithWhatItRepliesTo(t *testing.T) {
	a := newAskedBot(t)
	state, redacted, reaction, own := message("@bob:example.com"), message("@bob:example.com"), message("@bob:example.com"), message("@bot:example.org")
	state["type"], state["state_key"] = "m.room.name", ""
	redacted["content"], redacted["unsigned"] = object{}, object{"redacted_because": object{"type": "m.room.redaction", "sender": "@bob:example.com"}}
	reaction["type"], reaction["content"] = "m.reaction", object{"m.relates_to": object{"rel_type": "m.annotation", "event_id": "$x", "key": "+"}}
	odd := message("@bob:example.com")
	odd["type"], odd["content"] = "org.example.<b>\u202e"+strings.Repeat("x", 60_000), object{"a": 1}
	a.events = map[string]object{"$state": state, "$redacted": redacted, "$reaction": reaction, "$own": own, "$odd": odd, "$empty": {}}
	for about, key := range map[id.EventID]string{
		"": "no_target", "$missing": "not_found", "$empty": "not_found", "$state": "state", "$redacted": "redacted", "$reaction": "no_message",
		"$own": "own", "$odd": "no_message",
	} {
		for _, command := range []string{"explain", "proof"} {
			hook := new(knowing)
			run := func() response { return a.explainMessage(t.Context(), a.asked("en", command, about), hook) }
			if command == "proof" {
				run = func() response {
					return a.proveMessage(t.Context(), a.asked("en", command, about), hook.prove, masterKeyA)
				}
			}
			r := run()
			if r.outcome != outcomeRefused || r.detail != key || len(r.attachments) != 0 || len(hook.judged) != 0 {
				t.Errorf("%s of %q: %s (%s)", command, about, r.outcome, r.detail)
			}
			if want := speeches["en"].phrase("explain."+key+".headline", nil); !strings.Contains(r.words.plain(), want) || strings.Contains(r.words.html(), "<b>") {
				t.Errorf("%s of %q says %s", command, about, r.words.plain())
			}
			if size := sizeOf(t, r.words); size > longestAnswer {
				t.Errorf("%s of %q takes %d bytes", command, about, size)
			}
		}
	}
	called := message("@bob:example.com")
	called["unsigned"] = redacted["unsigned"]
	a.events["$called"] = called
	if r := a.explainMessage(t.Context(), a.asked("en", "explain", "$called"), &knowing{found: provenBy(cryptohook.CodeUnverifiedIdentity, cryptohook.StateSenderUnverified, "unverified")}); r.outcome != outcomeDone {
		t.Errorf("what is called deleted, and is there: %+v", r)
	}
	a.broken = true
	if r := a.explainMessage(t.Context(), a.asked("en", "explain", "$state"), new(knowing)); r.outcome != outcomeFailed {
		t.Errorf("with a homeserver that does not work: %+v", r)
	}
}

// People reply to the bot's answer as well as to the message, and in threads.
func TestExplainIsAboutTheMessageThatTheAnswerIsAbout(t *testing.T) {
	a := newAskedBot(t)
	answer := message("@bot:example.org")
	answer["content"].(object)["m.relates_to"] = object{"m.in_reply_to": object{"event_id": "$message"}}
	a.events = map[string]object{"$message": message("@bob:example.com"), "$answer": answer, "$other": message("@bob:example.com")}
	thread := a.asked("en", "explain", "$answer")
	thread.evt = messageOf(t, object{"msgtype": "m.text", "body": "!trust explain", "m.relates_to": object{
		"rel_type": "m.thread", "event_id": "$other", "is_falling_back": false, "m.in_reply_to": object{"event_id": "$answer"},
	}})
	fallback := a.asked("en", "explain", "")
	fallback.evt = messageOf(t, object{"msgtype": "m.text", "body": "!trust explain", "m.relates_to": object{
		"rel_type": "m.thread", "event_id": "$other", "is_falling_back": true, "m.in_reply_to": object{"event_id": "$other"},
	}})
	for name, o := range map[string]*order{"answer": a.asked("en", "explain", "$answer"), "message": a.asked("en", "explain", "$message"), "thread": thread} {
		hook := &knowing{found: provenBy(cryptohook.CodeUnverifiedIdentity, cryptohook.StateSenderUnverified, "unverified")}
		if r := a.explainMessage(t.Context(), o, hook); r.outcome != outcomeDone || !slices.Equal(hook.judged, []id.EventID{"$message"}) {
			t.Errorf("%s: %v was judged, %s", name, hook.judged, r.detail)
		}
	}
	if r := a.explainMessage(t.Context(), fallback, new(knowing)); r.detail != "no_target" {
		t.Errorf("a reply for old clients, in a thread: %s", r.detail)
	}
}

func TestExplainTellsTheProofStepByStep(t *testing.T) {
	a := newAskedBot(t)
	a.events["$message"] = message("@bob:example.com")
	for name, test := range map[string]struct {
		change func(*cryptohook.Examination)
		said   []string
		unsaid []string
	}{
		"unverified": {nil, []string{
			"From the account @bob:example.com, not verified in person.",
			"The server says that @bob:example.com sent this message. That alone proves nothing.",
			"came directly from the device that made it", "I received it on 2026-03-04 05:06 UTC.",
			"made by the device BOBDEV of @bob:example.com. The fingerprint of that device is FFFF nX4e +/MX",
			"signed with the key by which @bob:example.com signs their own devices, SSSS nX4e", "I have checked the signature",
			"signed in turn by the key of the account (experts call it the master key): AAAA nX4e",
			"Nobody has checked for me that the key of the account belongs",
			"I saw the key of this account first on 2026-01-02 03:04 UTC, and it has not changed since.",
			"A: device keys came with it → D: device is signed → E: identity known → G: signed by the owner → H: signature valid → J: not verified",
			"Session SESSION", "curve25519 CURVE",
		}, []string{"another key of the account"}},
		"by a pin": {func(x *cryptohook.Examination) {
			x.Verdict.Code, x.Identity.Standing, x.Identity.VerifiedBy = cryptohook.CodeVerified, cryptohook.StandingVerified, cryptohook.VerifiedByPin
			x.Identity.Pinned, x.Identity.PinnedKey = true, masterKeyA
		}, []string{"Verified: this is really @bob:example.com.", "Whoever runs this bot has checked that today's key belongs to @bob:example.com"}, nil},
		"by the account": {func(x *cryptohook.Examination) {
			x.Verdict.Code, x.Identity.Standing, x.Identity.VerifiedBy = cryptohook.CodeVerified, cryptohook.StandingVerified, cryptohook.VerifiedBySignature
		}, []string{"was verified with my account"}, []string{"an operator of this bot, has verified"}},
		"pinned to another key": {func(x *cryptohook.Examination) {
			x.Verdict.Code, x.Identity.Standing = cryptohook.CodeVerificationViolation, cryptohook.StandingViolation
			x.Identity.Pinned, x.Identity.PinnedKey = true, masterKeyB
		}, []string{"my configuration names BBBB nX4e", "Today's is not that one."}, nil},
		"replaced": {func(x *cryptohook.Examination) {
			x.Verdict.Code, x.Identity.Standing = cryptohook.CodeVerificationViolation, cryptohook.StandingViolation
			x.Identity.MasterKey, x.Identity.FirstMasterKey = masterKeyB, masterKeyA
			x.Identity.Changes = []cryptohook.IdentityChange{{MasterKey: masterKeyA}, {MasterKey: masterKeyB, SeenAt: time.Date(2026, 5, 6, 7, 8, 0, 0, time.UTC)}}
		}, []string{"Today @bob:example.com has another key of the account: BBBB nX4e", "verified once, with another key. Nobody has checked today's.", "has changed since I know it: on 2026-05-06 07:08 UTC to BBBB nX4e"},
			[]string{"by which @bob:example.com signs their own devices"}},
		"withdrawn": {func(x *cryptohook.Examination) { x.Identity.Withdrawn = true }, []string{"An operator has said that @bob:example.com is not to count as verified, or whoever runs this bot"}, nil},
		"not signed": {func(x *cryptohook.Examination) {
			x.Verdict.Code, x.Claims[0].MasterKey, x.Claims[0].State = cryptohook.CodeUnsignedDevice, "", cryptohook.StateDeviceInfo
			x.Claims[0].Steps = steps("A:no_embedded_keys B:device_found D:not_signed")
		}, []string{"Nobody has confirmed this device in the name of @bob:example.com", "Do not rely on this message", "A: no device keys came with it → B: device found → D: device is not signed"},
			[]string{"signed in turn by the key of the account"}},
		"forged": {func(x *cryptohook.Examination) {
			x.Verdict.Code, x.Claims[0].MasterKey, x.Claims[0].State = cryptohook.CodeSessionRejected, "", cryptohook.StateRejected
			x.Claims[0].Steps = steps("A:embedded_keys D:signed E:identity_known G:signed_by_owner H:signature_forged")
		}, []string{"that is not genuine. Somebody has forged it."}, []string{"I have checked the signature"}},
		"unknown device": {func(x *cryptohook.Examination) {
			x.Verdict.Code, x.Verdict.DeviceID, x.Claims[0].DeviceID, x.Claims[0].MasterKey, x.Identity = cryptohook.CodeUnknownDevice, "", "", "", nil
			x.Claims[0].Steps, x.Claims[0].ReceivedAt = steps("A:no_embedded_keys B:device_not_found C:given_up"), time.Time{}
		}, []string{"No device of @bob:example.com with this fingerprint is known to me.", "When that was I did not note."}, []string{"key of the account"}},
		"bundle": {func(x *cryptohook.Examination) {
			x.Claims[0].Source, x.Claims[0].SourceUser, x.Verdict.Source, x.Verdict.SourceUser = cryptohook.SourceHistoryBundle, "@carol:example.com", cryptohook.SourceHistoryBundle, "@carol:example.com"
		}, []string{"came from @carol:example.com, together with an invitation"}, []string{"directly"}},
		"backup":    {func(x *cryptohook.Examination) { x.Claims[0].Source = cryptohook.SourceBackup }, []string{"came from my key backup on the server"}, []string{"directly"}},
		"forwarded": {func(x *cryptohook.Examination) { x.Claims[0].Source = cryptohook.SourceForwarded }, []string{"sent on to me by another device of my own account"}, []string{"directly"}},
		"import":    {func(x *cryptohook.Examination) { x.Claims[0].Source = cryptohook.SourceImport }, []string{"came from a file, or was there before"}, []string{"directly"}},
		"two claim it": {func(x *cryptohook.Examination) {
			x.Verdict.Code = cryptohook.CodeSessionConflict
			x.Claims = append(x.Claims, cryptohook.Claim{UserID: "@mallory:example.com", DeviceID: "MALDEV", SigningKey: masterKeyB, Steps: steps("A:embedded_keys D:not_signed")})
		}, []string{"from another device, too: MALDEV of @mallory:example.com", "At most one of them tells the truth."}, nil},
		"another's": {func(x *cryptohook.Examination) {
			x.Verdict.Code, x.Verdict.Reason = cryptohook.CodeMismatchedSender, cryptohook.ReasonOtherSender
			x.Claims[0].UserID, x.Verdict.UserID, x.Identity.UserID = "@mallory:example.com", "@mallory:example.com", "@mallory:example.com"
		}, []string{"So the key belongs to @mallory:example.com, and the message came under the name of @bob:example.com"}, nil},
		"not encrypted": {func(x *cryptohook.Examination) {
			*x = cryptohook.Examination{Verdict: cryptohook.Verdict{EventID: "$message", Code: cryptohook.CodeNotEncrypted}}
		}, []string{"not encrypted"}, []string{"How I know"}},
		"nothing is known": {func(x *cryptohook.Examination) {
			*x = cryptohook.Examination{Verdict: cryptohook.Verdict{EventID: "$message", Code: cryptohook.CodeAuthenticityNotGuaranteed, SessionID: "SESSION"}, Claims: []cryptohook.Claim{{Source: cryptohook.SourceImport}}}
		}, []string{"It was made by nobody known", "Which device made it is not known."}[1:], nil},
	} {
		found := provenBy(cryptohook.CodeUnverifiedIdentity, cryptohook.StateSenderUnverified, "unverified")
		if test.change != nil {
			test.change(&found)
		}
		for _, language := range Languages {
			r := a.explainMessage(t.Context(), a.asked(language, "explain", "$message"), &knowing{found: found})
			plain, html := r.words.plain(), r.words.html()
			headline := speeches[language].explain(found.Verdict, "@bob:example.com").headline
			if !strings.Contains(plain, headline) || strings.Contains(plain, "explain.") || strings.Contains(plain, "<no value>") {
				t.Errorf("%s, %s: %s", name, language, plain)
			}
			if strings.Contains(html, "explain.") || !strings.Contains(html, "<details>") {
				t.Errorf("%s, %s: %s", name, language, html)
			}
			if language != "en" {
				continue
			}
			for _, part := range test.said {
				if !strings.Contains(plain, part) {
					t.Errorf("%s does not say %q:\n%s", name, part, plain)
				}
			}
			for _, part := range test.unsaid {
				if strings.Contains(plain, part) {
					t.Errorf("%s says %q:\n%s", name, part, plain)
				}
			}
		}
	}
}

// Every step, source and reason that the library knows has words in both languages.
func TestEveryStepHasWords(t *testing.T) {
	outcomes := constantsOf(t, "examine.go", "Step")
	if len(outcomes) < 20 {
		t.Fatalf("found %d outcomes", len(outcomes))
	}
	sources := constantsOf(t, "senderdata.go", "Source")
	if len(sources) != 5 {
		t.Fatalf("found %d sources", len(sources))
	}
	for _, language := range Languages {
		for _, outcome := range outcomes {
			if !speeches[language].has("explain.step." + outcome) {
				t.Errorf("%s has no words for %s", language, outcome)
			}
		}
		for _, source := range sources {
			if !speeches[language].has("explain.key_" + source) {
				t.Errorf("%s has no words for %s", language, source)
			}
		}
	}
}

func TestExplainNamesTheOperatorWhoVerified(t *testing.T) {
	a := newAskedBot(t)
	a.events["$message"] = message("@bob:example.com")
	bobs := "@bob:example.com AAAA nX4e +/MX GYuV ReRt zrSa aaaa aaaa aaaa aaaa aag"
	for i, line := range []auditLine{
		{command: "verify", arguments: bobs, outcome: auditDone, sender: "@early:example.com"},
		{command: "verify", arguments: "https://matrix.to/#/@bob:example.com " + masterKeyA.String() + "=", outcome: auditDone, sender: "@olga:example.com"},
		{command: "verify", arguments: bobs, outcome: string(outcomeRefused), sender: "@mallory:example.com"},
		{command: "verify", arguments: "@bob:example.com " + masterKeyB.String(), outcome: auditDone, sender: "@otherkey:example.com"},
		{command: "verify", arguments: "@carol:example.com " + masterKeyA.String(), outcome: auditDone, sender: "@otheruser:example.com"},
		{command: "verify", arguments: "@bob:example.com", outcome: auditDone, sender: "@nokey:example.com"},
		{command: "unverify", arguments: bobs, outcome: auditDone, sender: "@unverify:example.com"},
	} {
		line.eventID, line.at, line.deviceID = id.EventID(fmt.Sprintf("$%d", i)), time.Date(2026, 2, 1+i, 0, 0, 0, 0, time.UTC), "OLGADEV"
		if err := a.reviser.records.putAudit(t.Context(), &line); err != nil {
			t.Fatal(err)
		}
	}
	found := provenBy(cryptohook.CodeVerified, cryptohook.StateSenderVerified, "verified")
	found.Identity.Standing, found.Identity.VerifiedBy = cryptohook.StandingVerified, cryptohook.VerifiedBySignature
	said := a.explainMessage(t.Context(), a.asked("en", "explain", "$message"), &knowing{found: found}).words.plain()
	if want := "@olga:example.com, an operator of this bot, has verified @bob:example.com in a chat with me on 2026-02-02 00:00 UTC (from the device OLGADEV)."; !strings.Contains(said, want) {
		t.Error(said)
	}
	for detail, counts := range map[string]bool{
		"verified @bob:example.com " + masterKeyA.String():   true,
		"waits for @bob:example.com " + masterKeyA.String():  false,
		"verified @bob:example.com " + masterKeyB.String():   false,
		"verified @carol:example.com " + masterKeyA.String(): false,
		"denied": false,
		"":       false,
	} {
		line := auditLine{command: "confirm", arguments: bobs, outcome: auditDone, detail: detail}
		if got := line.verified("@bob:example.com", masterKeyA); got != counts {
			t.Errorf("%q: somebody was verified by it: %v", detail, got)
		}
	}
}

func TestExplainAsksTheBackupForAKeyThatIsMissing(t *testing.T) {
	a := newAskedBot(t)
	a.events["$message"] = message("@bob:example.com")
	missing := cryptohook.Examination{Verdict: cryptohook.Verdict{Code: cryptohook.CodeUnableToDecrypt, Reason: cryptohook.ReasonUnknownSession, SessionID: "SESSION"}}
	restored := provenBy(cryptohook.CodeAuthenticityNotGuaranteed, cryptohook.StateUnknownDevice, "unverified")
	restored.Verdict.Source, restored.Claims[0].Source = cryptohook.SourceBackup, cryptohook.SourceBackup
	hook := &knowing{found: missing, backup: &restored}
	if said := a.explainMessage(t.Context(), a.asked("en", "explain", "$message"), hook).words.plain(); !strings.Contains(said, "came from my key backup") || hook.looked != 1 {
		t.Errorf("looked %d times: %s", hook.looked, said)
	}
	hook = &knowing{found: missing}
	if said := a.explainMessage(t.Context(), a.asked("en", "explain", "$message"), hook).words.plain(); !strings.Contains(said, "I cannot read this message.") || hook.looked != 1 {
		t.Errorf("without a backup, looked %d times: %s", hook.looked, said)
	}
	broken := cryptohook.Examination{Verdict: cryptohook.Verdict{Code: cryptohook.CodeUnableToDecrypt, Reason: cryptohook.ReasonMalformed}}
	hook = &knowing{found: broken}
	if a.explainMessage(t.Context(), a.asked("en", "explain", "$message"), hook); hook.looked != 0 {
		t.Error("looked for the key of a message that names none")
	}
	hook = &knowing{found: missing, err: errors.New("the database is away")}
	if r := a.explainMessage(t.Context(), a.asked("en", "explain", "$message"), hook); r.outcome != outcomeFailed {
		t.Errorf("%+v", r)
	}
}

func TestExplainSaysThatTheMessageWasEdited(t *testing.T) {
	a := newAskedBot(t)
	edited := message("@bob:example.com")
	edited["unsigned"] = object{"m.relations": object{"m.replace": object{"event_id": "$edit", "sender": "@bob:example.com", "origin_server_ts": 1}}}
	a.events = map[string]object{"$message": message("@bob:example.com"), "$edited": edited}
	found := provenBy(cryptohook.CodeUnverifiedIdentity, cryptohook.StateSenderUnverified, "unverified")
	for about, want := range map[id.EventID]bool{"$message": false, "$edited": true} {
		said := a.explainMessage(t.Context(), a.asked("en", "explain", about), &knowing{found: found}).words.plain()
		if strings.Contains(said, "was edited later") != want {
			t.Errorf("%s: %s", about, said)
		}
	}
}

// Whatever strangers call themselves and their devices: it is no HTML, turns nothing around, and leaves the answer short enough to be sent.
func TestExplanationsBearHostileNames(t *testing.T) {
	a := newAskedBot(t)
	long := `<img src=x>"&` + "\u202e\u200b" + strings.Repeat("<\U000e0001", 64*1024)
	a.events["$message"] = message("@bob:example.com")
	found := provenBy(cryptohook.CodeSessionConflict, cryptohook.StateSenderUnverified, "unverified")
	claim, now := found.Claims[0], time.Now()
	claim.UserID, claim.DeviceID, claim.SourceUser, claim.Reason = id.UserID("@"+long+":example.com"), id.DeviceID(long), id.UserID(long), long
	claim.SenderKey, claim.SigningKey, claim.MasterKey, claim.Source = id.SenderKey(long), id.Ed25519(long), id.Ed25519(long), cryptohook.SourceHistoryBundle
	found.Claims = nil
	for range 1000 {
		found.Claims = append(found.Claims, claim)
		found.Verdict.Claimants = append(found.Verdict.Claimants, cryptohook.Claimant{UserID: claim.UserID, DeviceID: claim.DeviceID, SenderKey: claim.SenderKey})
		found.Identity.Changes = append(found.Identity.Changes, cryptohook.IdentityChange{MasterKey: id.Ed25519(long), SeenAt: now})
	}
	found.Identity.UserID, found.Identity.MasterKey, found.Identity.PinnedKey, found.Identity.Pinned = claim.UserID, id.Ed25519(long), id.Ed25519(long), true
	found.Identity.FirstMasterKey, found.Identity.SelfSigningKey = id.Ed25519(long), id.Ed25519(long)
	found.Verdict.Reason, found.Verdict.SessionID, found.Verdict.EventID = long, id.SessionID(long), id.EventID(long)
	for _, language := range Languages {
		said := a.explainMessage(t.Context(), a.asked(language, "explain", "$message"), &knowing{found: found}).words
		if size := sizeOf(t, said); size > longestAnswer {
			t.Errorf("%s: %d bytes", language, size)
		}
		if html := said.html(); strings.Contains(html, "<img") || strings.Contains(html, "\u202e") {
			t.Errorf("%s: %.2000s", language, html)
		}
		// With keys as they are, and names as long as servers let them be, the steps are told.
		few := provenBy(cryptohook.CodeUnverifiedIdentity, cryptohook.StateSenderUnverified, "unverified")
		few.Claims[0].UserID = id.UserID("@" + long[:24] + strings.Repeat("<\U000e0001", 45) + ":x")
		few.Claims[0].DeviceID, few.Identity.UserID = id.DeviceID(long[:24]+strings.Repeat("<\U000e0001", 90)), few.Claims[0].UserID
		few.Claims = append(few.Claims, few.Claims[0], few.Claims[0])
		said = a.explainMessage(t.Context(), a.asked(language, "explain", "$message"), &knowing{found: few}).words
		if size := sizeOf(t, said); size > longestAnswer {
			t.Errorf("%s: %d bytes", language, size)
		}
		html := said.html()
		if strings.Contains(html, "<img") || strings.Contains(html, "\u202e") || !strings.Contains(html, "<ol>") {
			t.Errorf("%s: %.2000s", language, html)
		}
	}
}
