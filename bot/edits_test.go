package bot

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// fakeRooms is a bot on a real database, with a homeserver that takes what it sends.
type fakeRooms struct {
	*revisedRooms
	mu   sync.Mutex
	said []saidEvent
	// byTxn are the events of the requests so far: the same request again is the same event.
	byTxn map[string]id.EventID
	// sent are the events of others that the bot can ask for.
	sent map[id.EventID]map[string]any
	// crash, if set, ends the work at a request: after it was taken.
	crash func(saidEvent)
}

// saidEvent is what the bot has sent.
type saidEvent struct {
	id      id.EventID
	evtType string
	content map[string]any
	// redacts is what it takes back.
	redacts id.EventID
}

func (s saidEvent) code() string           { return sentEvent{content: s.content}.code() }
func (s saidEvent) body() string           { return sentEvent{content: s.content}.body() }
func (s saidEvent) edits() string          { return sentEvent{content: s.content}.edits() }
func (s saidEvent) relation() relatesTo    { return relationIn(s.content) }
func (s saidEvent) annotation() annotation { return annotationOf(s.content) }

type relatesTo struct {
	Type    string     `json:"rel_type"`
	EventID id.EventID `json:"event_id"`
	Key     string     `json:"key"`
	ReplyTo struct {
		EventID id.EventID `json:"event_id"`
	} `json:"m.in_reply_to"`
}

func relationIn(content map[string]any) (relation relatesTo) {
	raw, _ := json.Marshal(content["m.relates_to"])
	_ = json.Unmarshal(raw, &relation)
	return relation
}

func annotationOf(content map[string]any) (a annotation) {
	if edited, ok := content["m.new_content"].(map[string]any); ok {
		content = edited
	}
	raw, _ := json.Marshal(content[annotationKey])
	_ = json.Unmarshal(raw, &a)
	return a
}

func newFakeRooms(t *testing.T, mode string) *fakeRooms {
	t.Helper()
	f := &fakeRooms{revisedRooms: newRevisedRooms(t, mode), byTxn: make(map[string]id.EventID), sent: make(map[id.EventID]map[string]any)}
	server := httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(server.Close)
	f.bot.client.HomeserverURL, _ = url.Parse(server.URL)
	f.bot.client.StateStore = mautrix.NewMemoryStateStore()
	f.start()
	return f
}

// start is a process with the same database.
func (f *fakeRooms) start() {
	f.t.Helper()
	f.revisedRooms.start()
	f.bot.reviser.send = f.bot.send
	f.bot.limiter = newLimiter(f.bot.config, f.bot.clock)
	if err := f.bot.loadModes(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeRooms) serve(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := strings.Split(strings.TrimPrefix(r.URL.Path, "/_matrix/client/v3/rooms/"), "/")
	said := saidEvent{id: id.EventID(fmt.Sprintf("$said%d", len(f.said)))}
	_ = json.NewDecoder(r.Body).Decode(&said.content)
	txn := r.URL.Path
	switch path[1] {
	case "event":
		if sent := f.sent[id.EventID(path[2])]; sent != nil {
			_ = json.NewEncoder(w).Encode(sent)
			return
		}
		http.Error(w, `{"errcode":"M_NOT_FOUND","error":"no such event"}`, http.StatusNotFound)
		return
	case "send":
		said.evtType = path[2]
	case "state":
		said.evtType, txn = "state "+path[2], ""
	case "redact":
		said.evtType, said.redacts = "m.room.redaction", id.EventID(path[2])
	}
	if known, repeated := f.byTxn[txn]; repeated {
		said.id = known
	} else {
		f.said = append(f.said, said)
		if txn != "" {
			f.byTxn[txn] = said.id
		}
	}
	if f.crash != nil {
		f.crash(said)
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"event_id": said.id})
}

// says gives what the bot has sent while something was done.
func (f *fakeRooms) says(do func()) []saidEvent {
	f.t.Helper()
	before := len(f.said)
	do()
	return f.said[before:]
}

// only gives the one event that the bot has sent.
func (f *fakeRooms) only(do func()) saidEvent {
	f.t.Helper()
	said := f.says(do)
	if len(said) != 1 {
		f.t.Fatalf("said %v", said)
	}
	return said[0]
}

// silence makes sure that the bot says nothing, now and when it looks at its answers again.
func (f *fakeRooms) silence(why string, do func()) {
	f.t.Helper()
	if said := f.says(func() { do(); f.work() }); len(said) > 0 {
		f.t.Errorf("%s: said %v", why, said)
	}
}

// work lets the reviser look at what has changed.
func (f *fakeRooms) work() {
	f.t.Helper()
	if _, err := f.bot.reviser.round(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
}

// heard is an event of a person, with the verdict on it.
type heard struct {
	eventID id.EventID
	roomID  id.RoomID
	sender  id.UserID
	verdict cryptohook.Verdict
	content map[string]any
}

// from is a message from a device.
func from(eventID id.EventID, device id.DeviceID, code cryptohook.Code) heard {
	return heard{
		eventID: eventID, roomID: "!room:example.org", sender: "@alice:example.org",
		verdict: cryptohook.Verdict{EventID: eventID, Code: code, SessionID: id.SessionID("s" + device), UserID: "@alice:example.org", DeviceID: device, MasterKey: "M"},
		content: map[string]any{"msgtype": "m.text", "body": "hello"},
	}
}

// editing makes it an edit of another message.
func (m heard) editing(original id.EventID) heard {
	m.content = map[string]any{
		"msgtype": "m.text", "body": "* new", "m.new_content": map[string]any{"msgtype": "m.text", "body": "new"},
		"m.relates_to": map[string]any{"rel_type": "m.replace", "event_id": original},
	}
	return m
}

func (m heard) with(key string, value any) heard {
	content := map[string]any{key: value}
	for name, value := range m.content {
		if name != key {
			content[name] = value
		}
	}
	m.content = content
	return m
}

func (m heard) by(sender id.UserID) heard {
	m.sender = sender
	return m
}

func (f *fakeRooms) event(m heard) *event.Event {
	f.t.Helper()
	raw := must(json.Marshal(m.content))(f.t)
	evt := &event.Event{ID: m.eventID, RoomID: m.roomID, Sender: m.sender, Type: event.EventMessage}
	if err := json.Unmarshal(raw, &evt.Content); err != nil {
		f.t.Fatal(err)
	}
	if err := evt.Content.ParseRaw(evt.Type); err != nil {
		f.t.Fatal(err)
	}
	return evt
}

func (f *fakeRooms) hear(m heard) func() {
	return func() { f.bot.answerMessage(f.t.Context(), f.event(m), m.verdict) }
}

func (f *fakeRooms) redact(eventID id.EventID, by id.UserID) func() {
	return func() {
		f.t.Helper()
		if err := f.bot.reviser.redacted(f.t.Context(), "!room:example.org", eventID, by); err != nil {
			f.t.Fatal(err)
		}
	}
}

const (
	fine = cryptohook.CodeUnverifiedIdentity
	bad  = cryptohook.CodeUnsignedDevice
)

func TestEditFromTheSameDeviceIsNotMentioned(t *testing.T) {
	for _, mode := range []string{ModeReply, ModeWarnings, ModeReaction} {
		for _, code := range []cryptohook.Code{cryptohook.CodeVerified, fine, bad, cryptohook.CodeSentInClear} {
			f := newFakeRooms(t, mode)
			f.says(f.hear(from("$one", "PHONE", code)))
			f.work()
			f.silence(mode+", "+string(code), f.hear(from("$edit", "PHONE", code).editing("$one")))
		}
	}
}

func TestEditFromAnotherDeviceIsTold(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	inThread := from("$one", "PHONE", fine).with("m.relates_to", map[string]any{"rel_type": "m.thread", "event_id": "$root"})
	first := f.only(f.hear(inThread))
	said := f.only(f.hear(from("$edit", "STOLEN", bad).editing("$one")))
	relation, a := said.relation(), said.annotation()
	if relation.ReplyTo.EventID != "$one" || relation.Type != "m.thread" || relation.EventID != "$root" {
		t.Errorf("relates to %+v", relation)
	}
	if a.EventID != "$edit" || a.Code != bad || a.DeviceID != "STOLEN" || a.Shield != cryptohook.ShieldRed {
		t.Errorf("annotation %+v", a)
	}
	if body := said.body(); !strings.Contains(body, "Changed afterwards: Sent from a device that @alice:example.org has not confirmed") || !strings.Contains(body, "STOLEN") {
		t.Errorf("says %q", body)
	}
	if strings.Contains(first.body(), "Changed afterwards") {
		t.Errorf("says of the message itself %q", first.body())
	}
	f.silence("the same again", f.hear(from("$edit2", "STOLEN", bad).editing("$one")))
	f.silence("as it was first", f.hear(from("$edit3", "PHONE", fine).editing("$one")))
	f.only(f.hear(from("$edit4", "TABLET", fine).editing("$one")))
}

func TestEditIsToldInTheLanguageOfTheRoom(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.bot.config.Annotate.Language = "de"
	f.says(f.hear(from("$one", "PHONE", fine)))
	if said := f.only(f.hear(from("$edit", "STOLEN", bad).editing("$one"))); !strings.Contains(said.body(), "Nachträglich geändert:") {
		t.Errorf("says %q", said.body())
	}
}

func TestWarningsModeTellsOfEditsThatItWarnsAbout(t *testing.T) {
	f := newFakeRooms(t, ModeWarnings)
	f.silence("a message", f.hear(from("$one", "PHONE", fine)))
	f.silence("an edit without a fault", f.hear(from("$edit", "TABLET", fine).editing("$one")))
	if said := f.only(f.hear(from("$edit2", "STOLEN", bad).editing("$one"))); said.annotation().EventID != "$edit2" {
		t.Errorf("said %v", said)
	}
}

func TestAnswerToAnEditStaysTrue(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.says(f.hear(from("$one", "PHONE", fine)))
	told := f.only(f.hear(from("$edit", "TABLET", bad).editing("$one")))
	f.becomesOf("sTABLET", "TABLET", fine)
	corrected := f.only(f.work)
	if corrected.edits() != string(told.id) || corrected.annotation().EventID != "$edit" || corrected.code() != string(fine) {
		t.Errorf("corrected %v", corrected)
	}
	if !strings.Contains(corrected.body(), "Changed afterwards") {
		t.Errorf("says %q", corrected.body())
	}
}

// becomesOf is becomes for any device of Alice's.
func (f *fakeRooms) becomesOf(session id.SessionID, device id.DeviceID, code cryptohook.Code) {
	f.verdict[session] = cryptohook.Verdict{Code: code, SessionID: session, UserID: "@alice:example.org", DeviceID: device, MasterKey: "M"}
	f.bot.reviser.changed(cryptohook.Change{Sessions: []id.SessionID{session}})
}

// An edit that was worth what the message was need not stay so.
func TestEditThatBecomesWorseIsTold(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.says(f.hear(from("$one", "PHONE", fine)))
	edit := from("$edit", "PHONE", fine).editing("$one")
	edit.verdict.SessionID = "s2"
	f.silence("the edit", f.hear(edit))
	f.becomesOf("s2", "PHONE", cryptohook.CodeSessionConflict)
	said := f.only(f.work)
	if said.relation().ReplyTo.EventID != "$one" || said.annotation().EventID != "$edit" || said.code() != string(cryptohook.CodeSessionConflict) {
		t.Errorf("said %v", said)
	}
	f.silence("again", f.work)
}

// Nothing was said of either of two edits. That both are worth less now is said once.
func TestQuietEditsThatBecomeWorseAreToldOnce(t *testing.T) {
	f := newFakeRooms(t, ModeWarnings)
	f.silence("a message", f.hear(from("$one", "PHONE", fine)))
	f.silence("an edit", f.hear(from("$edit1", "TABLET", fine).editing("$one")))
	f.silence("another", f.hear(from("$edit2", "TABLET", fine).editing("$one")))
	f.becomesOf("sTABLET", "TABLET", bad)
	if said := f.only(f.work); said.relation().ReplyTo.EventID != "$one" || said.code() != string(bad) {
		t.Errorf("said %v", said)
	}
	f.silence("later", func() { f.now = f.now.Add(time.Hour) })
}

// What becomes of the message becomes of its edits: that is said once.
func TestMessageAndItsEditBecomeWorseTogether(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.says(f.hear(from("$one", "PHONE", fine)))
	f.silence("the edit", f.hear(from("$edit", "PHONE", fine).editing("$one")))
	f.becomesOf("sPHONE", "PHONE", cryptohook.CodeIdentityChanged)
	for _, said := range f.says(f.work) {
		if said.annotation().EventID == "$edit" {
			t.Errorf("said of the edit: %v", said)
		}
	}
	f.silence("later", func() { f.now = f.now.Add(time.Hour) })
}

func TestEditsThatNoClientAppliesAreIgnored(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.says(f.hear(from("$one", "PHONE", fine)))
	f.says(f.hear(from("$edit", "STOLEN", bad).editing("$one")))
	f.silence("somebody else's edit", f.hear(from("$mallory", "MALLORY", bad).editing("$one").by("@mallory:example.org")))
	f.silence("an edit of an edit", f.hear(from("$edit2", "OTHER", bad).editing("$edit")))
	elsewhere := from("$edit3", "OTHER", bad).editing("$one")
	elsewhere.roomID = "!other:example.org"
	if said := f.says(f.hear(elsewhere)); len(said) > 0 {
		t.Errorf("of another room's message: said %v", said)
	}
}

func TestEditOfAMessageThatTheBotNeverSaw(t *testing.T) {
	for _, mode := range []string{ModeReply, ModeWarnings} {
		f := newFakeRooms(t, mode)
		f.sent["$old"] = map[string]any{
			"event_id": "$old", "sender": "@alice:example.org", "type": "m.room.encrypted",
			"content": map[string]any{"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "x", "m.relates_to": map[string]any{"rel_type": "m.thread", "event_id": "$root"}},
		}
		f.silence("nothing wrong", f.hear(from("$fine", "PHONE", fine).editing("$old")))
		said := f.only(f.hear(from("$edit", "STOLEN", bad).editing("$old")))
		if relation := said.relation(); relation.ReplyTo.EventID != "$old" || relation.EventID != "$root" || said.annotation().EventID != "$edit" {
			t.Errorf("said %v", said)
		}
		f.silence("the same again", f.hear(from("$edit2", "STOLEN", bad).editing("$old")))
		f.silence("somebody else's", f.hear(from("$mallory", "MALLORY", bad).editing("$old").by("@mallory:example.org")))
		if said = f.only(f.hear(from("$edit3", "THIRD", bad).editing("$gone"))); said.relation().ReplyTo.EventID != "$gone" {
			t.Errorf("of a message that nobody has: said %v", said)
		}
		f.silence("another bot's", f.hear(from("$edit4", "BOT", bad).editing("$unseen").with("msgtype", "m.notice")))
	}
	f := newFakeRooms(t, ModeCommand)
	f.silence("a bot that nobody asks", f.hear(from("$edit", "STOLEN", bad).editing("$old")))
}

// Whoever makes an edit look like a bot's message changes what people read all the same.
func TestEditThatPassesForANoticeIsTold(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.says(f.hear(from("$one", "PHONE", fine)))
	f.only(f.hear(from("$edit", "STOLEN", bad).editing("$one").with("msgtype", "m.notice")))
}

func TestEditsCountTowardsTheLimits(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.bot.config.Limits.AnswersPerSender = 5
	f.bot.limiter = newLimiter(f.bot.config, f.bot.clock)
	f.says(f.hear(from("$one", "PHONE", fine)))
	said := f.says(func() {
		for n := range 50 {
			f.hear(from(id.EventID(fmt.Sprint("$edit", n)), id.DeviceID(fmt.Sprint("DEVICE", n)), bad).editing("$one"))()
			f.hear(from(id.EventID(fmt.Sprint("$blind", n)), id.DeviceID(fmt.Sprint("DEVICE", n)), bad).editing(id.EventID(fmt.Sprint("$unseen", n))))()
		}
	})
	if len(said) != 5 { // four edits, and that it has stopped
		t.Errorf("%d messages for 100 edits", len(said))
	}
}

func TestAnswerToADeletedMessageIsCleared(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	answer := f.only(f.hear(from("$one", "PHONE", bad)))
	notice := f.only(f.hear(from("$edit", "STOLEN", bad).editing("$one")))
	f.work()
	cleared := f.says(func() { f.redact("$one", "@moderator:example.org")(); f.work() })
	if len(cleared) != 2 {
		t.Fatalf("said %v", cleared)
	}
	var edited []string
	for _, c := range cleared {
		edited = append(edited, c.edits())
		body := c.body()
		if !strings.Contains(body, "deleted by @moderator:example.org") || !strings.Contains(body, "Sent from a device that @alice:example.org has not confirmed") {
			t.Errorf("says %q", body)
		}
		whole := string(must(json.Marshal(c.content))(t))
		for _, repeated := range []string{"PHONE", "STOLEN", `"M"`, "master_key", "device_id", "session_id"} {
			if strings.Contains(whole, repeated) {
				t.Errorf("repeats %s: %s", repeated, whole)
			}
		}
		if a := c.annotation(); a.Code != bad || a.Shield != cryptohook.ShieldRed || a.EventID != "$one" && a.EventID != "$edit" {
			t.Errorf("annotation %+v", a)
		}
	}
	slices.Sort(edited)
	if want := []string{string(answer.id), string(notice.id)}; !slices.Equal(edited, want) {
		t.Errorf("edited %v, not %v", edited, want)
	}
	f.becomesOf("sPHONE", "PHONE", cryptohook.CodeVerificationViolation)
	f.silence("what was cleared is not revised", func() { f.now = f.now.Add(time.Hour) })
	f.start()
	f.silence("nor after a restart", func() {})
	f.silence("redacted twice", f.redact("$one", "@alice:example.org"))
	f.silence("an edit of it", f.hear(from("$edit9", "THIRD", bad).editing("$one")))
}

// What was asked for is gone with the question; while it stands, it is never corrected.
func TestAnswerToADeletedCommandIsCleared(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	command := from("$command", "PHONE", fine).with("body", "!trust what about @secret:example.org")
	o := f.order(command)
	answer := f.only(func() { f.bot.obey(t.Context(), o) })
	f.silence("it is edited", f.hear(from("$edit", "PHONE", fine).editing("$command")))
	f.becomesOf("sPHONE", "PHONE", cryptohook.CodeVerificationViolation)
	f.silence("its verdict changes", func() {})
	f.silence("after a restart", f.start)
	cleared := f.only(func() { f.redact("$command", "@alice:example.org")(); f.work() })
	if cleared.edits() != string(answer.id) || !strings.Contains(cleared.body(), "deleted by @alice:example.org") || strings.Contains(cleared.body(), "mode") {
		t.Errorf("said %v", cleared)
	}
	f.redact("$other", "@alice:example.org")()
	if !f.bot.wasDeleted(t.Context(), "$other") || !f.bot.wasDeleted(t.Context(), "$command") || f.bot.wasDeleted(t.Context(), "$nothing") {
		t.Error("it is not known what was deleted")
	}
}

// The worker may be behind, or the process may die in between.
func TestClearingSurvivesARestart(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	answer := f.only(f.hear(from("$one", "PHONE", bad)))
	f.redact("$one", "@alice:example.org")()
	f.start()
	if cleared := f.only(f.work); cleared.edits() != string(answer.id) || !strings.Contains(cleared.body(), "deleted by") {
		t.Errorf("said %v", cleared)
	}
}

func TestDeletedEditIsClearedAlone(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.says(f.hear(from("$one", "PHONE", fine)))
	notice := f.only(f.hear(from("$edit", "STOLEN", bad).editing("$one")))
	if cleared := f.only(func() { f.redact("$edit", "@alice:example.org")(); f.work() }); cleared.edits() != string(notice.id) {
		t.Errorf("said %v", cleared)
	}
	f.becomesOf("sPHONE", "PHONE", cryptohook.CodeVerified)
	if said := f.only(f.work); said.code() != string(cryptohook.CodeVerified) {
		t.Errorf("the message itself is not revised any more: %v", said)
	}
}

func TestDeletionsDoNotFloodARoom(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	for n := range 30 {
		f.says(f.hear(from(id.EventID(fmt.Sprint("$m", n)), "PHONE", fine)))
	}
	for n := range 30 {
		f.redact(id.EventID(fmt.Sprint("$m", n)), "@alice:example.org")()
	}
	total := 0
	for range 6 {
		cleared := f.says(f.work)
		total += len(cleared)
		if len(cleared) > f.bot.config.Limits.EditsPerRoom {
			t.Errorf("%d edits at once", len(cleared))
		}
		f.now = f.now.Add(editPause)
	}
	if total != 30 {
		t.Errorf("%d answers were cleared", total)
	}
}

// The message was deleted while its key was still missing.
func TestMessageThatWasDeletedMeanwhileIsNotAnswered(t *testing.T) {
	for _, mode := range Modes {
		f := newFakeRooms(t, mode)
		f.silence(mode, f.redact("$one", "@alice:example.org"))
		f.silence(mode, f.hear(from("$one", "PHONE", bad)))
	}
}

// The process died before it was answered.
func TestMessageThatWasDeletedAfterACrashIsNotAnswered(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	f.says(f.hear(from("$one", "PHONE", bad)))
	if err := f.bot.reviser.records.exec(t.Context(), setAnswerQuery, "$one", ""); err != nil {
		t.Fatal(err)
	}
	clear(f.byTxn) // the request never reached the homeserver
	f.redact("$one", "@alice:example.org")()
	f.start()
	f.silence("the message again", f.hear(from("$one", "PHONE", bad)))
}

func TestDeletedAnswerIsLeftAlone(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	answer := f.only(f.hear(from("$one", "PHONE", bad)))
	f.silence("the answer", f.redact(answer.id, "@moderator:example.org"))
	f.becomesOf("sPHONE", "PHONE", fine)
	f.silence("its message changes", func() {})
	f.silence("its message is deleted", f.redact("$one", "@alice:example.org"))
}

func TestDeletionInAnotherRoomClearsNothing(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	answer := f.only(f.hear(from("$one", "PHONE", bad)))
	for _, eventID := range []id.EventID{"$one", answer.id} {
		if err := f.bot.reviser.redacted(t.Context(), "!other:example.org", eventID, "@mallory:example.org"); err != nil {
			t.Fatal(err)
		}
	}
	f.silence("another room's", func() {})
	f.becomesOf("sPHONE", "PHONE", fine)
	f.only(f.work)
}

func TestRedactionNamesItsEventInEitherPlace(t *testing.T) {
	for name, tc := range map[string]struct {
		top    id.EventID
		within string
		want   id.EventID
	}{
		"room version 10": {"$x", `{}`, "$x"},
		"room version 11": {"", `{"redacts":"$x"}`, "$x"},
		"both":            {"$x", `{"redacts":"$x"}`, "$x"},
		"they differ":     {"$mine", `{"redacts":"$yours"}`, ""},
		"neither":         {"", `{"reason":"x"}`, ""},
		"junk":            {"", `{"redacts":["$x"]}`, ""},
	} {
		evt := &event.Event{Type: event.EventRedaction, Redacts: tc.top}
		_ = json.Unmarshal([]byte(tc.within), &evt.Content)
		if evt.Content.ParseRaw(evt.Type) != nil {
			evt.Content.Parsed = nil
		}
		if got := redactedBy(evt); got != tc.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestMessageThatComesDeletedIsNotAnswered(t *testing.T) {
	f := newFakeRooms(t, ModeReply)
	for _, evtType := range []event.Type{event.EventMessage, event.EventEncrypted} {
		evt := &event.Event{ID: "$one", RoomID: "!room:example.org", Sender: "@alice:example.org", Type: evtType}
		evt.Unsigned.RedactedBecause = &event.Event{}
		_ = json.Unmarshal([]byte(`{}`), &evt.Content)
		_ = evt.Content.ParseRaw(evtType)
		if f.bot.isForUs(evt) {
			t.Errorf("an empty %s is answered", evtType.Type)
		}
		// That it was deleted is the server's word; what is there is there.
		_ = json.Unmarshal([]byte(`{"msgtype":"m.text","body":"still here","algorithm":"x"}`), &evt.Content)
		evt.Content.Parsed = nil
		_ = evt.Content.ParseRaw(evtType)
		if !f.bot.isForUs(evt) {
			t.Errorf("a %s that is called deleted is not answered", evtType.Type)
		}
	}
}
