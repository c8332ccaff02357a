package bot

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// testClock stands still until it is moved.
type testClock struct {
	mu  sync.Mutex
	now time.Time
}

func newTestClock() *testClock { return &testClock{now: time.UnixMilli(1_700_000_000_000)} }

func (c *testClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *testClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func newTestLimiter(perSender, perRoom int) (*limiter, *testClock) {
	config, clock := defaultConfig(), newTestClock()
	config.Limits.AnswersPerSender, config.Limits.AnswersPerRoom = perSender, perRoom
	return newLimiter(config, clock.Now), clock
}

func TestWhoSendsTooManyIsNotAnsweredUntilTheySendFewer(t *testing.T) {
	l, clock := newTestLimiter(10, 1000)
	const room, mallory = id.RoomID("!room:x"), id.UserID("@mallory:x")
	for n := range 10 {
		if r := l.rule(room, mallory, true); !r.answer || len(r.stopped)+len(r.resumed) > 0 {
			t.Fatalf("message %d: %+v", n, r)
		}
	}
	if r := l.rule(room, mallory, true); r.answer || r.limit != limitAnswersPerSender || len(r.stopped) != 1 || r.stopped[0].sender != mallory {
		t.Fatalf("the first one too many: %+v", r)
	}
	// Another room is told, too; each is once.
	if r := l.rule("!other:x", mallory, false); r.answer || len(r.stopped) != 1 {
		t.Errorf("in another room: %+v", r)
	}
	// Going on as fast brings nothing, however long.
	for n := range 200 {
		clock.advance(5 * time.Second)
		if r := l.rule(room, mallory, false); r.answer || len(r.stopped)+len(r.resumed) > 0 {
			t.Fatalf("%d more: %+v", n, r)
		}
	}
	if r := l.rule(room, "@alice:x", false); !r.answer || len(r.stopped)+len(r.resumed) > 0 {
		t.Errorf("somebody else: %+v", r)
	}
	// At half the rate it is answered again. The room learns what was not.
	var again ruling
	sent := 201
	for ; !again.answer && sent < 300; sent++ {
		clock.advance(13 * time.Second)
		again = l.rule(room, mallory, false)
	}
	if len(again.resumed) != 1 || again.resumed[0] != (pause{mallory, sent - 1}) {
		t.Errorf("answered again after %d: %+v", sent, again)
	}
	if r := l.rule(room, mallory, false); !r.answer || len(r.resumed) > 0 {
		t.Errorf("and on: %+v", r)
	}
}

// A room's limit holds for what people within their own limits send; warnings still come, one a minute about each person.
func TestWarningsComeInSpiteOfTheRoomsLimit(t *testing.T) {
	l, clock := newTestLimiter(20, 50)
	const room = id.RoomID("!room:x")
	for n := range 1000 { // one person above the own limit does not use up the room's
		l.rule(room, "@mallory:x", n%2 == 0)
	}
	if r := l.rule(room, "@alice:x", false); !r.answer {
		t.Fatalf("one person has stopped the answers to everybody: %+v", r)
	}
	answered := 0
	var stops []pause
	for n := range 200 {
		r := l.rule(room, id.UserID(fmt.Sprintf("@sybil%d:x", n%20)), false)
		stops = append(stops, r.stopped...)
		if r.answer {
			answered++
		}
	}
	if answered > 50 || len(stops) != 1 || stops[0].sender != "" {
		t.Fatalf("%d answers, told of %v", answered, stops)
	}
	for _, sender := range []id.UserID{"@thief:x", "@forger:x"} {
		if r := l.rule(room, sender, true); !r.answer {
			t.Errorf("no warning about %s: %+v", sender, r)
		}
		if r := l.rule(room, sender, true); r.answer {
			t.Errorf("a second warning about %s at once", sender)
		}
	}
	clock.advance(time.Minute)
	if r := l.rule(room, "@alice:x", false); !r.answer || len(r.resumed) != 1 || r.resumed[0].sender != "" || r.resumed[0].unanswered < 150 {
		t.Errorf("a minute later: %+v", r)
	}
}

// Somebody whose rate goes up and down about the limit does not have the room told all the time.
func TestRateAboutTheLimitIsToldOnce(t *testing.T) {
	l, clock := newTestLimiter(10, 1000)
	told := 0
	for n := range 600 {
		clock.advance(time.Duration(5500+n%3*500) * time.Millisecond) // 9 to 11 a minute
		r := l.rule("!room:x", "@chatty:x", false)
		told += len(r.stopped) + len(r.resumed)
	}
	if told > 1 {
		t.Errorf("the room was told %d times within an hour", told)
	}
}

func TestLimiterForgetsWhoIsSilent(t *testing.T) {
	l, clock := newTestLimiter(10, 1000)
	for n := range 1000 {
		l.rule(id.RoomID(fmt.Sprint("!room", n)), id.UserID(fmt.Sprint("@user", n)), true)
	}
	for range 20 {
		l.rule("!loud", "@loud", true)
	}
	clock.advance(2 * time.Minute)
	l.rule("!room", "@user", true)
	if len(l.senders) != 1 || len(l.rooms) != 1 || len(l.warned) != 0 || len(l.stops) != 1 {
		t.Errorf("%d senders, %d rooms, %d warnings, %d stops are remembered", len(l.senders), len(l.rooms), len(l.warned), len(l.stops))
	}
	clock.advance(stopKept)
	l.rule("!room", "@user", true)
	if len(l.stops) != 0 {
		t.Error("a stop is remembered for ever")
	}
}

// chattyRoom is a bot with a homeserver that takes what it says.
type chattyRoom struct {
	*revisedRooms
	clock *testClock
	mu    sync.Mutex
	said  []map[string]any
	txns  []string
}

func newChattyRoom(t *testing.T, mode string) *chattyRoom {
	t.Helper()
	c := &chattyRoom{revisedRooms: newRevisedRooms(t, mode), clock: newTestClock()}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			http.Error(w, `{"errcode":"M_NOT_FOUND","error":"there is nothing"}`, http.StatusNotFound)
			return
		}
		var content map[string]any
		_ = json.NewDecoder(r.Body).Decode(&content)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.said = append(c.said, content)
		c.txns = append(c.txns, r.URL.Path)
		fmt.Fprintf(w, `{"event_id":"$said%d"}`, len(c.said))
	}))
	t.Cleanup(server.Close)
	c.bot.client.HomeserverURL, _ = url.Parse(server.URL)
	c.bot.config.Limits.AnswersPerSender = 5
	c.bot.limiter = newLimiter(c.bot.config, c.clock.Now)
	return c
}

func (c *chattyRoom) hear(eventID string, sender id.UserID, code cryptohook.Code) (said []map[string]any) {
	before := len(c.said)
	evt := &event.Event{ID: id.EventID(eventID), RoomID: "!room:example.org", Sender: sender, Type: event.EventMessage}
	evt.Content.Parsed = &event.MessageEventContent{MsgType: event.MsgText, Body: "hi"}
	log := zerolog.Nop()
	ctx := log.WithContext(context.Background())
	c.bot.answerMessage(ctx, evt, verdictOf(eventID, "s"+eventID, code))
	return c.said[before:]
}

func TestRoomIsToldOnceThatSomebodyIsNotAnswered(t *testing.T) {
	c := newChattyRoom(t, ModeReply)
	for n := range 5 {
		if said := c.hear(fmt.Sprint("$m", n), "@mallory:example.org", cryptohook.CodeUnverifiedIdentity); len(said) != 1 || said[0][annotationKey] == nil {
			t.Fatalf("message %d: said %v", n, said)
		}
	}
	said := c.hear("$m5", "@mallory:example.org", cryptohook.CodeUnsignedDevice)
	if len(said) != 1 || said[0][annotationKey] != nil || !strings.Contains(said[0]["body"].(string), "stopped answering @mallory:example.org") {
		t.Fatalf("said %v", said)
	}
	for n := range 50 {
		if said = c.hear(fmt.Sprint("$n", n), "@mallory:example.org", cryptohook.CodeUnsignedDevice); len(said) > 0 {
			t.Fatalf("said %v", said)
		}
	}
	// A warning about somebody else comes.
	if said = c.hear("$a", "@alice:example.org", cryptohook.CodeVerificationViolation); len(said) != 1 || said[0][annotationKey] == nil {
		t.Errorf("said %v of somebody else", said)
	}
	// A crash before it is noted that it was answered: the same request again.
	if err := c.bot.reviser.records.exec(t.Context(), setAnswerQuery, "$m3", ""); err != nil {
		t.Fatal(err)
	}
	c.bot.limiter = newLimiter(c.bot.config, c.clock.Now)
	for range 10 {
		c.bot.limiter.rule("!room:example.org", "@mallory:example.org", false)
	}
	if said = c.hear("$m3", "@mallory:example.org", cryptohook.CodeUnverifiedIdentity); len(said) == 0 || c.txns[len(c.txns)-1] != c.txns[3] {
		t.Errorf("said %v", said)
	}
	c.clock.advance(time.Minute)
	said = c.hear("$again", "@mallory:example.org", cryptohook.CodeUnverifiedIdentity)
	if len(said) != 2 || !strings.Contains(said[0]["body"].(string), "I answer @mallory:example.org again") || said[1][annotationKey] == nil {
		t.Errorf("said %v", said)
	}
	if n := counterValue(t, c.bot.metrics, `sendertrust_bot_limits_reached_total{limit="answers_per_sender"}`); n < 51 {
		t.Errorf("%v are counted", n)
	}
}

// What a bot that only warns is silent about anyway uses up no limit.
func TestSilenceIsNotLimited(t *testing.T) {
	c := newChattyRoom(t, ModeWarnings)
	for n := range 20 {
		if said := c.hear(fmt.Sprint("$m", n), "@alice:example.org", cryptohook.CodeVerified); len(said) != 0 {
			t.Fatalf("said %v", said)
		}
	}
	if said := c.hear("$stolen", "@alice:example.org", cryptohook.CodeUnsignedDevice); len(said) != 1 || said[0][annotationKey] == nil {
		t.Errorf("said %v", said)
	}
}
