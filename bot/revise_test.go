package bot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// revisedRooms is a reviser on a real database, with rooms and verdicts around it.
type revisedRooms struct {
	t       *testing.T
	bot     *Bot
	now     time.Time
	open    func() *dbutil.Database
	verdict map[id.SessionID]cryptohook.Verdict
	sent    []sentEvent
	// refused: the homeserver takes nothing; failing: the context ends while sending.
	refused bool
	failing bool
	// reviewed is how many verdicts were looked at again.
	reviewed int
}

type sentEvent struct {
	roomID  id.RoomID
	txnID   string
	content map[string]any
}

// body is what people read: of an edit, its new content.
func (s sentEvent) body() string {
	content := s.content
	if edited, ok := content["m.new_content"].(map[string]any); ok {
		content = edited
	}
	body, _ := content["body"].(string)
	return body
}

func (s sentEvent) edits() string {
	relation, _ := s.content["m.relates_to"].(map[string]any)
	if relation["rel_type"] != "m.replace" {
		return ""
	}
	return relation["event_id"].(string)
}

func (s sentEvent) code() string {
	content := s.content
	if edited, ok := content["m.new_content"].(map[string]any); ok {
		content = edited
	}
	verdict, _ := content[annotationKey].(map[string]any)
	code, _ := verdict["code"].(string)
	return code
}

func newRevisedRooms(t *testing.T, mode string) *revisedRooms {
	t.Helper()
	w := &revisedRooms{t: t, now: time.UnixMilli(1_700_000_000_000), open: newDatabase(t), verdict: make(map[id.SessionID]cryptohook.Verdict)}
	config := defaultConfig()
	config.Annotate.Mode = mode
	w.bot = testBot(t)
	w.bot.config, w.bot.clock, w.bot.log = config, func() time.Time { return w.now }, zerolog.Nop()
	w.start()
	return w
}

func (w *revisedRooms) start() {
	w.t.Helper()
	w.bot.db = w.open()
	w.bot.reviser = w.bot.newReviser()
	w.bot.reviser.review = func(_ context.Context, told cryptohook.Verdict, _ id.UserID) (cryptohook.Verdict, error) {
		w.reviewed++
		now, changed := w.verdict[told.SessionID]
		if !changed || told.Code == cryptohook.CodeUnableToDecrypt {
			return told, nil
		}
		now.EventID = told.EventID
		return now, nil
	}
	w.bot.reviser.send = w.send
	if err := w.bot.reviser.records.Upgrade(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *revisedRooms) send(_ context.Context, roomID id.RoomID, content *event.Content, txnID string) (id.EventID, bool) {
	if w.refused {
		return "", false
	}
	raw, err := json.Marshal(content)
	if err != nil {
		w.t.Fatal(err)
	}
	sent := sentEvent{roomID: roomID, txnID: txnID}
	if err = json.Unmarshal(raw, &sent.content); err != nil {
		w.t.Fatal(err)
	}
	for i, earlier := range w.sent {
		if earlier.txnID == txnID {
			return id.EventID(fmt.Sprintf("$sent%d", i)), true
		}
	}
	w.sent = append(w.sent, sent)
	return id.EventID(fmt.Sprintf("$sent%d", len(w.sent)-1)), true
}

func verdictOf(eventID string, session string, code cryptohook.Code) cryptohook.Verdict {
	return cryptohook.Verdict{EventID: id.EventID(eventID), Code: code, SessionID: id.SessionID(session), UserID: "@alice:example.org", DeviceID: "ALICE", MasterKey: "M"}
}

// record notes what the bot is about to tell of a message.
func (w *revisedRooms) record(evt *event.Event, verdict cryptohook.Verdict) (*record, error) {
	return w.bot.record(w.t.Context(), w.bot.newRecord(evt, verdict, w.bot.kindOf(evt.RoomID, verdict)))
}

// answered records an answer as the bot gives it.
func (w *revisedRooms) answered(eventID, session string, code cryptohook.Code) *record {
	w.t.Helper()
	evt := &event.Event{ID: id.EventID(eventID), RoomID: "!room:example.org", Sender: "@alice:example.org", Type: event.EventMessage}
	told := must(w.record(evt, verdictOf(eventID, session, code)))(w.t)
	if told.kind != kindQuiet {
		w.bot.noteAnswer(w.t.Context(), told, "$answer-to-"+id.EventID(eventID)[1:])
	}
	return told
}

func (w *revisedRooms) becomes(session string, code cryptohook.Code) {
	w.verdict[id.SessionID(session)] = verdictOf("", session, code)
	w.bot.reviser.changed(cryptohook.Change{Sessions: []id.SessionID{id.SessionID(session)}})
}

// round lets the reviser work, and gives what it has sent.
func (w *revisedRooms) round() []sentEvent {
	w.t.Helper()
	before := len(w.sent)
	if _, err := w.bot.reviser.round(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return w.sent[before:]
}

func TestChangedVerdictEditsItsAnswer(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.answered("$one", "s", cryptohook.CodeUnsignedDevice)
	if sent := w.round(); len(sent) != 0 {
		t.Fatalf("sent %v without a change", sent)
	}
	w.becomes("s", cryptohook.CodeUnverifiedIdentity)
	sent := w.round()
	if len(sent) != 1 || sent[0].edits() != "$answer-to-one" || sent[0].code() != "unverified_identity" {
		t.Fatalf("sent %v", sent)
	}
	if body := sent[0].body(); !strings.Contains(body, "not verified in person") || !strings.Contains(body, "said “Sent from a device that") {
		t.Errorf("body %q", body)
	}
	if fallback := sent[0].content["body"].(string); !strings.HasPrefix(fallback, "* ") {
		t.Errorf("fallback %q", fallback)
	}
	if sent = w.round(); len(sent) != 0 {
		t.Errorf("sent %v again", sent)
	}
}

func TestUsersChangeReachesAllTheirAnswers(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.answered("$one", "s1", cryptohook.CodeUnsignedDevice)
	w.answered("$two", "s2", cryptohook.CodeUnsignedDevice)
	for _, s := range []string{"s1", "s2"} {
		w.verdict[id.SessionID(s)] = verdictOf("", s, cryptohook.CodeVerified)
	}
	w.bot.reviser.changed(cryptohook.Change{Users: []id.UserID{"@bob:example.org"}})
	w.round() // what was told in between is looked at once
	w.bot.reviser.changed(cryptohook.Change{Users: []id.UserID{"@alice:example.org"}})
	w.round()
	if len(w.sent) != 2 {
		t.Errorf("%d edits", len(w.sent))
	}
}

// At most one edit a minute an answer, and the last state wins.
func TestAnswersAreEditedOnceAMinuteAndTheLastStateWins(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.answered("$one", "s", cryptohook.CodeUnsignedDevice)
	w.becomes("s", cryptohook.CodeUnverifiedIdentity)
	w.round()
	w.becomes("s", cryptohook.CodeVerified)
	if sent := w.round(); len(sent) != 0 {
		t.Fatalf("edited twice within a minute: %v", sent)
	}
	w.becomes("s", cryptohook.CodeUnverifiedIdentity)
	w.round()
	w.now = w.now.Add(editPause)
	if sent := w.round(); len(sent) != 0 {
		t.Errorf("a change that was taken back is told: %v", sent)
	}
	w.becomes("s", cryptohook.CodeVerified)
	if sent := w.round(); len(sent) != 1 || sent[0].code() != "verified" {
		t.Errorf("sent %v", sent)
	}
}

func TestCorrectionsSurviveARestart(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.answered("$one", "s", cryptohook.CodeUnsignedDevice)
	w.becomes("s", cryptohook.CodeUnverifiedIdentity)
	w.start() // before it could look
	if sent := w.round(); len(sent) != 1 || sent[0].code() != "unverified_identity" {
		t.Fatalf("sent %v", sent)
	}
	w.becomes("s", cryptohook.CodeVerified)
	w.round()
	w.start() // before the minute is over
	if sent := w.round(); len(sent) != 0 {
		t.Fatalf("the restart made an edit too early: %v", sent)
	}
	w.now = w.now.Add(editPause)
	if sent := w.round(); len(sent) != 1 || sent[0].code() != "verified" {
		t.Errorf("sent %v", sent)
	}
}

// A crash between sending and noting it: the same edit is the same request.
func TestCrashAfterAnEditSendsNoSecondOne(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.answered("$one", "s", cryptohook.CodeUnsignedDevice)
	w.becomes("s", cryptohook.CodeVerificationViolation)
	errCrash := errors.New("crash")
	ctx, crash := context.WithCancelCause(t.Context())
	w.bot.reviser.send = func(_ context.Context, roomID id.RoomID, content *event.Content, txnID string) (id.EventID, bool) {
		eventID, sent := w.send(ctx, roomID, content, txnID)
		if _, isEdit := content.Raw["m.new_content"]; isEdit {
			crash(errCrash)
		}
		return eventID, sent
	}
	if _, err := w.bot.reviser.round(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	w.start()
	w.round()
	if len(w.sent) != 2 {
		t.Errorf("%d events instead of a warning and an edit", len(w.sent))
	}
}

func TestWorseIsSaidAloudOnceASenderAndRoom(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	for i := range 30 {
		w.answered(fmt.Sprintf("$event%d", i), "s", cryptohook.CodeVerified)
	}
	w.becomes("s", cryptohook.CodeVerificationViolation)
	var warnings, edits int
	for range 10 {
		for _, sent := range w.round() {
			if sent.edits() == "" {
				warnings++
				if sent.code() != "" || !strings.Contains(sent.body(), "@alice:example.org") || !strings.Contains(sent.body(), "no longer holds") {
					t.Errorf("warned: %v", sent)
				}
			} else {
				edits++
			}
		}
		if edits > 0 && edits < 30 && edits%w.bot.config.Limits.EditsPerRoom != 0 {
			t.Errorf("%d edits", edits)
		}
		w.now = w.now.Add(editPause)
	}
	if warnings != 1 || edits != 30 {
		t.Errorf("%d warnings, %d edits", warnings, edits)
	}
	// It gets better, and worse in the same way again: the room knows.
	w.becomes("s", cryptohook.CodeVerified)
	w.round()
	w.now = w.now.Add(editPause)
	w.becomes("s", cryptohook.CodeVerificationViolation)
	for _, sent := range w.round() {
		if sent.edits() == "" {
			t.Errorf("warned again: %v", sent)
		}
	}
}

func TestBetterIsNotSaidAloud(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.answered("$one", "s", cryptohook.CodeVerificationViolation)
	w.becomes("s", cryptohook.CodeVerified)
	for _, sent := range w.round() {
		if sent.edits() == "" {
			t.Errorf("said aloud: %v", sent)
		}
	}
}

// A conversation in one session: each answer is looked at again because of itself, and not because of those that follow.
func TestAnswersOfOneSessionAreNotReviewedForEachOther(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.round()
	const answers = 100
	for i := range answers {
		w.answered(fmt.Sprintf("$event%d", i), "s", cryptohook.CodeUnverifiedIdentity)
		w.round()
	}
	if w.reviewed < answers || w.reviewed > 2*answers {
		t.Errorf("%d reviews of %d answers", w.reviewed, answers)
	}
}

// What changes between the verdict and the record of the answer is corrected.
func TestChangeBeforeTheRecordIsCorrected(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.round()
	w.verdict["s"] = verdictOf("", "s", cryptohook.CodeVerified)
	w.answered("$event", "s", cryptohook.CodeUnverifiedIdentity)
	if sent := w.round(); len(sent) != 1 || sent[0].edits() == "" {
		t.Errorf("sent %v", sent)
	}
}

func TestStormOfChangesDoesNotFloodARoom(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	for i := range 500 {
		w.answered(fmt.Sprintf("$event%d", i), fmt.Sprintf("s%d", i%50), cryptohook.CodeUnverifiedIdentity)
	}
	for i := range 500 {
		code := []cryptohook.Code{cryptohook.CodeVerified, cryptohook.CodeIdentityChanged, cryptohook.CodeUnverifiedIdentity, cryptohook.CodeVerificationViolation}[i%4]
		for session := range 50 {
			w.verdict[id.SessionID(fmt.Sprintf("s%d", session))] = verdictOf("", fmt.Sprintf("s%d", session), code)
		}
		w.bot.reviser.changed(cryptohook.Change{Users: []id.UserID{"@alice:example.org"}})
		if i%100 == 0 {
			w.round()
		}
	}
	w.round()
	var edits, warnings int
	for _, sent := range w.sent {
		if sent.edits() != "" {
			edits++
		} else {
			warnings++
		}
	}
	if edits > w.bot.config.Limits.EditsPerRoom || warnings > 2 {
		t.Errorf("%d edits and %d warnings within a minute", edits, warnings)
	}
	for range 60 {
		w.now = w.now.Add(editPause)
		before := len(w.sent)
		w.round()
		if made := len(w.sent) - before; made > w.bot.config.Limits.EditsPerRoom {
			t.Fatalf("%d edits in a minute", made)
		}
	}
	for _, rec := range must(w.bot.reviser.records.list(t.Context(), getSinceQuery, 0))(t) {
		if rec.verdict.Code != cryptohook.CodeVerificationViolation {
			t.Fatalf("the answer to %s says %s in the end", rec.eventID, rec.verdict.Code)
		}
	}
}

func must[T any](value T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

func TestQuietBotSpeaksUpWhenItGetsWorse(t *testing.T) {
	w := newRevisedRooms(t, ModeWarnings)
	w.answered("$one", "s", cryptohook.CodeUnverifiedIdentity)
	if sent := w.round(); len(sent) != 0 {
		t.Fatalf("sent %v", sent)
	}
	w.becomes("s", cryptohook.CodeVerified)
	if sent := w.round(); len(sent) != 0 {
		t.Fatalf("sent %v", sent)
	}
	w.becomes("s", cryptohook.CodeVerificationViolation)
	sent := w.round()
	if len(sent) != 1 || sent[0].edits() != "" || sent[0].code() != "verification_violation" {
		t.Fatalf("sent %v", sent)
	}
	reply := sent[0].content["m.relates_to"].(map[string]any)["m.in_reply_to"].(map[string]any)
	if reply["event_id"] != "$one" {
		t.Errorf("replies to %v", reply)
	}
	w.now = w.now.Add(editPause)
	w.becomes("s", cryptohook.CodeVerified)
	if sent = w.round(); len(sent) != 1 || sent[0].edits() != "$sent0" {
		t.Errorf("sent %v", sent)
	}
}

func TestOutdatedVerdictIsCorrectedThoughTheCodeStays(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	evt := &event.Event{ID: "$one", RoomID: "!room:example.org", Sender: "@alice:example.org", Type: event.EventMessage}
	verdict := verdictOf("$one", "s", cryptohook.CodeUnverifiedIdentity)
	verdict.Outdated = true
	w.bot.noteAnswer(t.Context(), must(w.record(evt, verdict))(t), "$answer")
	w.becomes("s", cryptohook.CodeUnverifiedIdentity)
	if sent := w.round(); len(sent) != 1 || strings.Contains(sent[0].body(), "not answered in time") {
		t.Errorf("sent %v", sent)
	}
}

func TestLateKeyCorrectsTheAnswerAtOnce(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	unreadable := verdictOf("$one", "s", cryptohook.CodeUnableToDecrypt)
	unreadable.Reason = cryptohook.ReasonUnknownSession
	evt := &event.Event{ID: "$one", RoomID: "!room:example.org", Sender: "@alice:example.org", Type: event.EventEncrypted}
	w.bot.noteAnswer(t.Context(), must(w.record(evt, unreadable))(t), "$answer")
	w.round()
	answered, err := w.bot.reviser.correctLate(t.Context(), evt, verdictOf("$one", "s", cryptohook.CodeVerified))
	if err != nil || !answered {
		t.Fatalf("answered %v (%v)", answered, err)
	}
	if len(w.sent) != 1 || w.sent[0].edits() != "$answer" || w.sent[0].code() != "verified" {
		t.Errorf("sent %v", w.sent)
	}
	other := &event.Event{ID: "$other", RoomID: "!room:example.org", Sender: "@alice:example.org"}
	if answered, err = w.bot.reviser.correctLate(t.Context(), other, verdictOf("$other", "s", cryptohook.CodeVerified)); answered || err != nil {
		t.Errorf("a message that was never answered: %v (%v)", answered, err)
	}
}

func TestRefusedEditsAndOldAnswersAreLeft(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	w.answered("$refused", "s", cryptohook.CodeUnsignedDevice)
	w.refused = true
	w.becomes("s", cryptohook.CodeVerified)
	w.round()
	w.refused = false
	w.now = w.now.Add(time.Hour)
	w.start()
	if sent := w.round(); len(sent) != 0 {
		t.Errorf("tried again: %v", sent)
	}
	w.answered("$old", "s2", cryptohook.CodeUnsignedDevice)
	w.now = w.now.Add(answersStayTrue + time.Second)
	w.becomes("s2", cryptohook.CodeVerified)
	if sent := w.round(); len(sent) != 0 {
		t.Errorf("corrected after a day: %v", sent)
	}
	w.answered("$left", "s3", cryptohook.CodeUnsignedDevice)
	if err := w.bot.reviser.forgetRoom(t.Context(), "!room:example.org"); err != nil {
		t.Fatal(err)
	}
	w.becomes("s3", cryptohook.CodeVerified)
	if sent := w.round(); len(sent) != 0 {
		t.Errorf("corrected in a room that was left: %v", sent)
	}
}

// The same message is handed on again after a crash: what is told is what was about to be told.
func TestRepeatedMessageIsToldTheSameVerdict(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	evt := &event.Event{ID: "$one", RoomID: "!room:example.org", Sender: "@alice:example.org", Type: event.EventMessage}
	must(w.record(evt, verdictOf("$one", "s", cryptohook.CodeUnsignedDevice)))(t)
	again := must(w.record(evt, verdictOf("$one", "s", cryptohook.CodeVerified)))(t)
	if again.verdict.Code != cryptohook.CodeUnsignedDevice || again.answerID != "" {
		t.Errorf("told %+v", again)
	}
}

// While an answer is being sent, a change must not make a second one.
func TestChangeWhileTheAnswerIsOnItsWayMakesNoSecondAnswer(t *testing.T) {
	w := newRevisedRooms(t, ModeReply)
	evt := &event.Event{ID: "$one", RoomID: "!room:example.org", Sender: "@alice:example.org", Type: event.EventMessage}
	told := must(w.record(evt, verdictOf("$one", "s", cryptohook.CodeUnsignedDevice)))(t)
	w.becomes("s", cryptohook.CodeVerified)
	if sent := w.round(); len(sent) != 0 {
		t.Fatalf("sent %v", sent)
	}
	w.bot.noteAnswer(t.Context(), told, "$answer")
	if sent := w.round(); len(sent) != 1 || sent[0].edits() != "$answer" || sent[0].code() != "verified" {
		t.Errorf("sent %v", sent)
	}
}

func TestCodesAreOrderedByWorth(t *testing.T) {
	for _, code := range []cryptohook.Code{
		cryptohook.CodeVerified, cryptohook.CodeUnverifiedIdentity, cryptohook.CodeIdentityChanged, cryptohook.CodeVerificationViolation,
		cryptohook.CodeUnsignedDevice, cryptohook.CodeUnknownDevice, cryptohook.CodeAuthenticityNotGuaranteed, cryptohook.CodeMismatchedSender,
		cryptohook.CodeSessionConflict, cryptohook.CodeSessionRejected, cryptohook.CodeSentInClear, cryptohook.CodeUnableToDecrypt, cryptohook.CodeNotEncrypted,
	} {
		found := 0
		for _, listed := range fromBest {
			if listed == code {
				found++
			}
		}
		if found != 1 {
			t.Errorf("%s is listed %d times", code, found)
		}
	}
	rank := map[cryptohook.Shield]int{cryptohook.ShieldNone: 0, cryptohook.ShieldGrey: 1, cryptohook.ShieldRed: 2}
	for i := 1; i < len(fromBest); i++ {
		if rank[fromBest[i].LaxShield()] < rank[fromBest[i-1].LaxShield()] {
			t.Errorf("%s is called worse than %s", fromBest[i], fromBest[i-1])
		}
	}
	for _, tc := range []struct {
		before, now cryptohook.Code
		worse       bool
	}{
		{cryptohook.CodeVerified, cryptohook.CodeUnverifiedIdentity, true},
		{cryptohook.CodeUnverifiedIdentity, cryptohook.CodeIdentityChanged, true},
		{cryptohook.CodeUnsignedDevice, cryptohook.CodeUnverifiedIdentity, false},
		{cryptohook.CodeUnverifiedIdentity, cryptohook.CodeUnsignedDevice, true},
		{cryptohook.CodeUnableToDecrypt, cryptohook.CodeSessionRejected, false},
		{cryptohook.CodeVerified, cryptohook.CodeVerified, false},
	} {
		if got := worse(tc.before, tc.now); got != tc.worse {
			t.Errorf("%s becomes %s: worse %v", tc.before, tc.now, got)
		}
	}
}
