package bot

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

func testBot(t testing.TB) *Bot {
	t.Helper()
	client, err := mautrix.NewClient("http://homeserver.invalid", "@bot:example.org", "token")
	if err != nil {
		t.Fatal(err)
	}
	return &Bot{config: defaultConfig(), client: client, metrics: newMetrics()}
}

func roomEvent(t *testing.T, evtType event.Type, sender id.UserID, content string) *event.Event {
	t.Helper()
	evt := &event.Event{ID: "$event", Sender: sender, Type: evtType, RoomID: "!room:example.org"}
	if err := json.Unmarshal([]byte(content), &evt.Content); err != nil {
		t.Fatal(err)
	}
	if err := evt.Content.ParseRaw(evtType); err != nil && !errors.Is(err, event.ErrUnsupportedContentType) {
		t.Fatal(err)
	}
	return evt
}

func TestOnlyMessagesOfPeopleAreAnswered(t *testing.T) {
	b := testBot(t)
	for name, test := range map[string]struct {
		evt      *event.Event
		answered bool
	}{
		"text":             {roomEvent(t, event.EventMessage, "@alice:example.org", `{"msgtype":"m.text","body":"hi"}`), true},
		"emote":            {roomEvent(t, event.EventMessage, "@alice:example.org", `{"msgtype":"m.emote","body":"hi"}`), true},
		"sticker":          {roomEvent(t, event.EventSticker, "@alice:example.org", `{"body":"hi"}`), true},
		"undecryptable":    {roomEvent(t, event.EventEncrypted, "@alice:example.org", `{"algorithm":"x"}`), true},
		"notice":           {roomEvent(t, event.EventMessage, "@alice:example.org", `{"msgtype":"m.notice","body":"hi"}`), false},
		"own":              {roomEvent(t, event.EventMessage, "@bot:example.org", `{"msgtype":"m.text","body":"hi"}`), false},
		"edit":             {roomEvent(t, event.EventMessage, "@alice:example.org", `{"msgtype":"m.text","body":"hi","m.relates_to":{"rel_type":"m.replace","event_id":"$x"}}`), false},
		"encrypted edit":   {roomEvent(t, event.EventEncrypted, "@alice:example.org", `{"algorithm":"x","m.relates_to":{"rel_type":"m.replace","event_id":"$x"}}`), false},
		"reaction":         {roomEvent(t, event.EventReaction, "@alice:example.org", `{"m.relates_to":{"rel_type":"m.annotation","event_id":"$x","key":"+"}}`), false},
		"redaction":        {roomEvent(t, event.EventRedaction, "@alice:example.org", `{}`), false},
		"encrypted thread": {roomEvent(t, event.EventEncrypted, "@alice:example.org", `{"algorithm":"x","m.relates_to":{"rel_type":"m.thread","event_id":"$x"}}`), true},
	} {
		if answered := b.isForUs(test.evt); answered != test.answered {
			t.Errorf("%s: answered %v", name, answered)
		}
	}
}

func TestAnswerStaysInTheThread(t *testing.T) {
	replyToEvent := func(evt *event.Event) *event.RelatesTo { return replyTo(evt.ID, threadOf(evt)) }
	reply := replyToEvent(roomEvent(t, event.EventMessage, "@alice:example.org", `{"msgtype":"m.text","body":"hi","m.relates_to":{"rel_type":"m.thread","event_id":"$root"}}`))
	if reply.Type != event.RelThread || reply.EventID != "$root" || reply.InReplyTo.EventID != "$event" || reply.IsFallingBack {
		t.Errorf("%+v", reply)
	}
	unreadable := roomEvent(t, event.EventEncrypted, "@alice:example.org", `{"algorithm":"m.megolm.v1.aes-sha2","ciphertext":"x","m.relates_to":{"rel_type":"m.thread","event_id":"$root"}}`)
	if reply = replyToEvent(unreadable); reply.Type != event.RelThread || reply.EventID != "$root" {
		t.Errorf("to a message that cannot be read: %+v", reply)
	}
	reply = replyToEvent(roomEvent(t, event.EventMessage, "@alice:example.org", `{"msgtype":"m.text","body":"hi"}`))
	if reply.Type != "" || reply.EventID != "" || reply.InReplyTo.EventID != "$event" {
		t.Errorf("%+v", reply)
	}
}

func TestBotIsAskedByNameOrCommand(t *testing.T) {
	b := testBot(t)
	for content, asked := range map[string]bool{
		`{"msgtype":"m.text","body":"hello"}`:                                                         false,
		`{"msgtype":"m.text","body":"!trust"}`:                                                        true,
		`{"msgtype":"m.text","body":"@bot:example.org are you there?"}`:                               true,
		`{"msgtype":"m.text","body":"Trust bot: hey","m.mentions":{"user_ids":["@bot:example.org"]}}`: true,
		`{"msgtype":"m.text","body":"hey","m.mentions":{"user_ids":["@carol:example.org"]}}`:          false,
	} {
		if b.asksUs(roomEvent(t, event.EventMessage, "@alice:example.org", content)) != asked {
			t.Errorf("%s: want %v", content, asked)
		}
	}
}

func TestAnnotationLeavesOutWhatIsNotKnown(t *testing.T) {
	b := testBot(t)
	raw, err := json.Marshal(b.annotate(cryptohook.Verdict{EventID: "$event", Code: cryptohook.CodeSentInClear}))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"event_id":"$event","code":"sent_in_clear","shield":"red","legacy":false}`; string(raw) != want {
		t.Errorf("got %s, want %s", raw, want)
	}
}

func TestShieldsFollowTheConfiguration(t *testing.T) {
	b := testBot(t)
	if shield := b.shield(cryptohook.CodeUnverifiedIdentity); shield != cryptohook.ShieldNone {
		t.Errorf("lax: %s", shield)
	}
	b.config.Annotate.Shields = ShieldsStrict
	if shield := b.shield(cryptohook.CodeUnverifiedIdentity); shield != cryptohook.ShieldRed {
		t.Errorf("strict: %s", shield)
	}
}

func TestTransactionIDDependsOnTheEventAlone(t *testing.T) {
	if transactionID("$a") != transactionID("$a") || transactionID("$a") == transactionID("$b") {
		t.Error("transaction IDs must be the same for the same event, and differ for others")
	}
}

func httpError(status int, respError *mautrix.RespError) error {
	return mautrix.HTTPError{Response: &http.Response{StatusCode: status}, RespError: respError}
}

func TestSendingIsTriedAgainUnlessRefusedForGood(t *testing.T) {
	limited := mautrix.MLimitExceeded
	limited.ExtraData = map[string]any{"retry_after_ms": float64(1500)}
	for name, test := range map[string]struct {
		err   error
		pause time.Duration
		final bool
	}{
		"network":            {errors.New("connection refused"), time.Second, false},
		"server":             {httpError(502, nil), time.Second, false},
		"rate limit":         {httpError(429, &limited), 1500 * time.Millisecond, false},
		"rate limit, silent": {httpError(429, nil), time.Second, false},
		"token":              {httpError(401, nil), time.Second, false},
		"forbidden":          {httpError(403, nil), time.Second, true},
		"too large":          {httpError(413, nil), time.Second, true},
	} {
		if pause, final := retryAfter(test.err, time.Second); final != test.final || !final && pause != test.pause {
			t.Errorf("%s: pause %s, final %v", name, pause, final)
		}
	}
}

func TestRateLimitedAnswerIsSentAgainUnderTheSameTransactionID(t *testing.T) {
	var paths []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		paths = append(paths, r.URL.Path)
		if len(paths) == 1 {
			w.WriteHeader(http.StatusTooManyRequests)
			_, _ = io.WriteString(w, `{"errcode":"M_LIMIT_EXCEEDED","error":"slow down","retry_after_ms":20}`)
			return
		}
		_, _ = io.WriteString(w, `{"event_id":"$answer"}`)
	}))
	defer server.Close()
	b := testBot(t)
	b.client.HomeserverURL, _ = url.Parse(server.URL)
	begun := time.Now()
	eventID, sent := b.send(t.Context(), "!room:example.org", &event.Content{Raw: map[string]any{"body": "x"}}, "txn")
	if !sent || eventID != "$answer" || len(paths) != 2 || paths[0] != paths[1] {
		t.Errorf("sent %v as %s, by requests %v", sent, eventID, paths)
	}
	if took := time.Since(begun); took < 20*time.Millisecond {
		t.Errorf("did not wait as long as it was told: %s", took)
	}
}
