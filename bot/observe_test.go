package bot

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"

	"sendertrust/cryptohook"
)

// scrape gives what /metrics says.
func scrape(t *testing.T, m *metrics) string {
	t.Helper()
	answer := httptest.NewRecorder()
	m.handler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if answer.Code != http.StatusOK {
		t.Fatalf("status %d: %s", answer.Code, answer.Body)
	}
	return answer.Body.String()
}

// counterValue gives one of the numbers, by its name with the labels.
func counterValue(t *testing.T, m *metrics, name string) float64 {
	t.Helper()
	for line := range strings.Lines(scrape(t, m)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return must(strconv.ParseFloat(strings.TrimSpace(value), 64))(t)
		}
	}
	t.Fatalf("there is no %s", name)
	return 0
}

// observedHook is a hook on a new database that has seen one /sync if it is to.
func observedHook(t *testing.T, synced bool) *cryptohook.Hook {
	t.Helper()
	client := must(mautrix.NewClient("http://homeserver.invalid", "@bot:example.org", "token"))(t)
	client.DeviceID, client.Log = "BOT", zerolog.Nop()
	hook := installedHook(t, client)
	if synced {
		resp := &mautrix.RespSync{NextBatch: "s1", DeviceOTKCount: mautrix.OTKCount{SignedCurve25519: 100}}
		if err := client.Syncer.ProcessResponse(t.Context(), resp, "s0"); err != nil {
			t.Fatal(err)
		}
	}
	return hook
}

func TestReadinessFollowsTheHook(t *testing.T) {
	m := newMetrics()
	status := func(path string) int {
		answer := httptest.NewRecorder()
		m.handler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, path, nil))
		return answer.Code
	}
	expect := func(when string, ready int) {
		t.Helper()
		if status("/ready") != ready || status("/live") != http.StatusOK {
			t.Errorf("%s: ready %d, live %d", when, status("/ready"), status("/live"))
		}
		want := 0.
		if ready == http.StatusOK {
			want = 1
		}
		if got := counterValue(t, m, "sendertrust_ready"); got != want {
			t.Errorf("%s: the metric says %v", when, got)
		}
	}
	expect("without a hook", http.StatusServiceUnavailable)
	m.observe(observedHook(t, false), nil)
	expect("before the first /sync", http.StatusServiceUnavailable)
	m.observe(observedHook(t, true), nil)
	expect("after it", http.StatusOK)
	m.clock = func() time.Time { return time.Now().Add(readyWithin + time.Second) }
	expect("long after it", http.StatusServiceUnavailable)
	m.observe(nil, nil)
	expect("after the end", http.StatusServiceUnavailable)
}

func TestMetricsNameNobody(t *testing.T) {
	c := newChattyRoom(t, ModeReply)
	c.bot.metrics.observe(observedHook(t, true), newLobby(1, 1).invitations)
	for n := range 20 {
		c.hear("$event"+strconv.Itoa(n), "@mallory:example.org", cryptohook.CodeUnsignedDevice)
	}
	text := scrape(t, c.bot.metrics)
	for _, name := range []string{
		"sendertrust_sync_age_seconds", "sendertrust_queued_events", "sendertrust_waiting_events", "sendertrust_key_queries_total", "sendertrust_pending_invites", "sendertrust_keys_to_back_up",
		"sendertrust_database_errors_total", `sendertrust_hook_limits_reached_total{limit="waiting_events"}`, `sendertrust_bot_limits_reached_total{limit="answers_per_sender"}`,
		"sendertrust_send_retries_total", "process_resident_memory_bytes", "go_goroutines",
	} {
		if !strings.Contains(text, "\n"+name+" ") {
			t.Errorf("there is no %s", name)
		}
	}
	for _, private := range []string{"mallory", "example.org", "$event", "!room", "MASTER", "hi"} {
		if regexp.MustCompile(`[{,"]` + regexp.QuoteMeta(private)).MatchString(text) {
			t.Errorf("%q is in the metrics:\n%s", private, text)
		}
	}
}

func TestOnlyWhatIsAskedForIsServed(t *testing.T) {
	handler := newMetrics().handler()
	for _, tc := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/live", 200}, {"HEAD", "/live", 200}, {"POST", "/live", 405}, {"DELETE", "/metrics", 405},
		{"GET", "/", 404}, {"GET", "/debug/pprof/", 404}, {"GET", "/metrics/x", 404}, {"GET", "/liveness", 404},
	} {
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, httptest.NewRequest(tc.method, tc.path, nil))
		if answer.Code != tc.status {
			t.Errorf("%s %s: %d, want %d", tc.method, tc.path, answer.Code, tc.status)
		}
	}
}

func TestMetricsAreServedWhereTheConfigurationSays(t *testing.T) {
	b := New(defaultConfig(), zerolog.Nop())
	if stop, err := b.serveMetrics(t.Context()); err != nil {
		t.Fatal(err)
	} else {
		stop() // nothing is served by default
	}
	free := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	address := free.Addr().String()
	b.config.Metrics.Listen = address
	if _, err := b.serveMetrics(t.Context()); !errors.Is(err, ErrSetup) || !strings.Contains(err.Error(), "metrics.listen: cannot listen on "+address) {
		t.Errorf("on an address in use: %v", err)
	}
	_ = free.Close()
	stop := must(b.serveMetrics(t.Context()))(t)
	resp := must(http.Get("http://" + address + "/live"))(t)
	body := must(io.ReadAll(resp.Body))(t)
	_ = resp.Body.Close()
	if string(body) != "alive\n" {
		t.Errorf("got %q", body)
	}
	stop()
	if _, err := net.Dial("tcp", address); err == nil {
		t.Error("served after the end")
	}
}

func TestAnswersAreCountedByTheirCode(t *testing.T) {
	c := newChattyRoom(t, ModeReply)
	answers := func() float64 {
		for line := range strings.Lines(scrape(t, c.bot.metrics)) {
			if value, ok := strings.CutPrefix(line, `sendertrust_answers_total{code="not_encrypted"} `); ok {
				return must(strconv.ParseFloat(strings.TrimSpace(value), 64))(t)
			}
		}
		return 0
	}
	c.hear("$one", "@alice:example.org", cryptohook.CodeNotEncrypted)
	if answers() != 1 {
		t.Errorf("%v answers are counted", answers())
	}
}

func TestOwnIdentityIsSeenFromOutside(t *testing.T) {
	m := newMetrics()
	m.observe(observedHook(t, true), nil)
	if value := counterValue(t, m, `sendertrust_own_identity{state="unknown"}`); value != 1 {
		t.Errorf("it is %v", value)
	}
}
