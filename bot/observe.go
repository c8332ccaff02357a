package bot

import (
	"context"
	"errors"
	"fmt"
	stdlog "log"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"sendertrust/cryptohook"
)

// What can be seen of the bot from outside: numbers for Prometheus, and whether it lives and is ready. No names, rooms or messages are part
// of it, nor anything else that strangers choose.

// The limits of the bot, as they are counted. Those of the hook are in cryptohook.
const (
	limitAnswersPerSender = "answers_per_sender"
	limitAnswersPerRoom   = "answers_per_room"
	limitEditsPerRoom     = "edits_per_room"
	limitInvites          = "invites"
)

// readyWithin is how old the last /sync may be. The server answers one after 30 s at the latest.
const readyWithin = 90 * time.Second

// metrics are the numbers of one process.
type metrics struct {
	clock          func() time.Time
	registry       *prometheus.Registry
	answers        *prometheus.CounterVec
	limits         *prometheus.CounterVec
	edits, retries prometheus.Counter
	// hook is the one at work, nil while there is none.
	hook atomic.Pointer[cryptohook.Hook]
	// invites are those at work.
	invites atomic.Pointer[invitations]
}

const metricsNamespace = "sendertrust"

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: metricsNamespace, Name: name, Help: help}
	}
	m := &metrics{
		clock: time.Now, registry: prometheus.NewRegistry(),
		answers: prometheus.NewCounterVec(counter("answers_total", "Messages that were answered, by the code of the answer."), []string{"code"}),
		limits: prometheus.NewCounterVec(counter("bot_limits_reached_total",
			"What the bot has not done, or has put off, since a limit was reached, by the limit."), []string{"limit"}),
		edits:   prometheus.NewCounter(counter("edits_total", "Answers that were corrected.")),
		retries: prometheus.NewCounter(counter("send_retries_total", "Answers that could not be sent and were tried again.")),
	}
	for _, limit := range []string{limitAnswersPerSender, limitAnswersPerRoom, limitEditsPerRoom, limitInvites} {
		m.limits.WithLabelValues(limit)
	}
	m.registry.MustRegister(m.answers, m.limits, m.edits, m.retries, m,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// observe takes the numbers from a hook and its invitations from now on; nil while there are none.
func (m *metrics) observe(hook *cryptohook.Hook, invitations *invitations) {
	m.hook.Store(hook)
	m.invites.Store(invitations)
}

// reached counts that a limit was reached.
func (m *metrics) reached(limit string) { m.limits.WithLabelValues(limit).Inc() }

// hookMetric is one of the hook's numbers.
type hookMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(s *cryptohook.Stats) float64
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(metricsNamespace, "", name), help, labels, nil)
}

var hookMetrics = []hookMetric{
	{describe("queued_events", "Room events in memory that were not handed on yet."), prometheus.GaugeValue,
		func(s *cryptohook.Stats) float64 { return float64(s.QueuedEvents) }},
	{describe("waiting_events", "Room events that wait for a key, or for what their senders publish."), prometheus.GaugeValue,
		func(s *cryptohook.Stats) float64 { return float64(s.WaitingEvents) }},
	{describe("key_searches", "Keys that are being looked for."), prometheus.GaugeValue,
		func(s *cryptohook.Stats) float64 { return float64(s.KeySearches) }},
	{describe("pending_users", "Users whose device lists are to be asked for."), prometheus.GaugeValue,
		func(s *cryptohook.Stats) float64 { return float64(s.PendingUsers) }},
	{describe("keys_to_back_up", "Keys that are to be put into the account's key backup; 0 also while none is kept."), prometheus.GaugeValue,
		func(s *cryptohook.Stats) float64 { return float64(s.KeysToBackUp) }},
	{describe("events_total", "Room events that were judged and handed on."), prometheus.CounterValue,
		func(s *cryptohook.Stats) float64 { return float64(s.Events) }},
	{describe("room_keys_total", "Room keys that were stored."), prometheus.CounterValue,
		func(s *cryptohook.Stats) float64 { return float64(s.RoomKeys) }},
	{describe("judged_again_total", "How often a user's unproven sessions were judged again."), prometheus.CounterValue,
		func(s *cryptohook.Stats) float64 { return float64(s.JudgedAgain) }},
	{describe("key_queries_total", "Requests for the device lists of users."), prometheus.CounterValue,
		func(s *cryptohook.Stats) float64 { return float64(s.KeyQueries) }},
	{describe("key_queries_failed_total", "Requests for the device lists of users that were not answered."), prometheus.CounterValue,
		func(s *cryptohook.Stats) float64 { return float64(s.FailedKeyQueries) }},
	{describe("syncs_failed_total", "Requests for news that the homeserver did not answer properly."), prometheus.CounterValue,
		func(s *cryptohook.Stats) float64 { return float64(s.FailedSyncs) }},
	{describe("database_errors_total", "Transactions that failed."), prometheus.CounterValue,
		func(s *cryptohook.Stats) float64 { return float64(s.FailedWrites) }},
}

var (
	hookLimitsDesc     = describe("hook_limits_reached_total", "What was not done, or was put off, since a limit was reached, by the limit.", "limit")
	syncAgeDesc        = describe("sync_age_seconds", "How long ago the last news from the homeserver were taken in.")
	readyDesc          = describe("ready", "1 while the bot is connected to the homeserver, as /ready says.")
	pendingInvitesDesc = describe("pending_invites", "Invitations that are to be accepted.")
	backupAgeDesc      = describe("backup_age_seconds", "How long ago keys were last put into the account's key backup.")
	ownIdentityDesc    = describe("own_identity", "1 for what the homeserver shows of the bot's own device and identity; anything but fine stops the answers.", "state")
)

// Describe implements [prometheus.Collector].
func (m *metrics) Describe(descs chan<- *prometheus.Desc) {
	for _, metric := range hookMetrics {
		descs <- metric.desc
	}
	for _, desc := range []*prometheus.Desc{hookLimitsDesc, syncAgeDesc, readyDesc, pendingInvitesDesc, backupAgeDesc, ownIdentityDesc} {
		descs <- desc
	}
}

// Collect implements [prometheus.Collector]. Of a hook that is not there, only that it is not.
func (m *metrics) Collect(values chan<- prometheus.Metric) {
	var ready float64
	if m.readiness() == nil {
		ready = 1
	}
	values <- prometheus.MustNewConstMetric(readyDesc, prometheus.GaugeValue, ready)
	if invites := m.invites.Load(); invites != nil {
		values <- prometheus.MustNewConstMetric(pendingInvitesDesc, prometheus.GaugeValue, float64(invites.length()))
	}
	hook := m.hook.Load()
	if hook == nil {
		return
	}
	values <- prometheus.MustNewConstMetric(ownIdentityDesc, prometheus.GaugeValue, 1, string(hook.OwnIdentity().State))
	stats := hook.Stats()
	for _, metric := range hookMetrics {
		values <- prometheus.MustNewConstMetric(metric.desc, metric.kind, metric.value(&stats))
	}
	for limit, reached := range stats.Reached {
		values <- prometheus.MustNewConstMetric(hookLimitsDesc, prometheus.CounterValue, float64(reached), string(limit))
	}
	if !stats.SyncedAt.IsZero() {
		values <- prometheus.MustNewConstMetric(syncAgeDesc, prometheus.GaugeValue, m.clock().Sub(stats.SyncedAt).Seconds())
	}
	if !stats.BackedUpAt.IsZero() {
		values <- prometheus.MustNewConstMetric(backupAgeDesc, prometheus.GaugeValue, m.clock().Sub(stats.BackedUpAt).Seconds())
	}
}

// Why the bot is not ready.
var (
	errNotConnected = errors.New("not connected to the homeserver yet, or another process has the database")
	errNoNews       = errors.New("the homeserver has not answered for a while")
)

// readiness says why the bot is not ready; nil: it is.
func (m *metrics) readiness() error {
	hook := m.hook.Load()
	if hook == nil {
		return errNotConnected
	}
	switch synced := hook.Stats().SyncedAt; {
	case synced.IsZero():
		return errNotConnected
	case m.clock().Sub(synced) > readyWithin:
		return errNoNews
	}
	return nil
}

// handler serves /metrics, /live and /ready, and nothing else.
func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := m.readiness(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	return mux
}

const (
	observeTimeout = 10 * time.Second
	mostHeader     = 8 << 10
)

// serveMetrics serves the numbers where the configuration says. The returned function ends that.
func (b *Bot) serveMetrics(ctx context.Context) (stop func(), err error) {
	if b.config.Metrics.Listen == "" {
		return func() {}, nil
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", b.config.Metrics.Listen)
	if err != nil {
		return nil, setupError("metrics.listen: cannot listen on %s (%w); choose an address of this machine with a port that nobody uses, or empty it",
			b.config.Metrics.Listen, err)
	}
	server := &http.Server{
		Handler: b.metrics.handler(), ReadTimeout: observeTimeout, WriteTimeout: observeTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: mostHeader,
		ErrorLog: stdlog.New(b.log, "", 0),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			b.log.Err(err).Msg("The metrics are not served any more")
		}
	}()
	b.log.Info().Stringer("address", listener.Addr()).Msg("Serving metrics")
	return func() {
		_ = server.Close()
		<-done
	}, nil
}
