package e2e

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
)

// fault spoils one answer of /sync that the homeserver has given.
type fault func(w http.ResponseWriter, answer *httptest.ResponseRecorder)

const errorPage = "<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>"

func page(status int) fault {
	return func(w http.ResponseWriter, _ *httptest.ResponseRecorder) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(status)
		_, _ = w.Write([]byte(errorPage))
	}
}

// cutOff promises the whole answer and closes the connection in the middle of it.
func cutOff(w http.ResponseWriter, answer *httptest.ResponseRecorder) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", answer.Header().Get("Content-Length"))
	_, _ = w.Write(answer.Body.Bytes()[:answer.Body.Len()/2])
	panic(http.ErrAbortHandler)
}

// half gives half of the answer as if it were the whole.
func half(w http.ResponseWriter, answer *httptest.ResponseRecorder) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(answer.Body.Bytes()[:answer.Body.Len()/2])
}

func reset(http.ResponseWriter, *httptest.ResponseRecorder) { panic(http.ErrAbortHandler) }

// faultyProxy passes everything on to the homeserver, and spoils the answers of /sync that bring something.
type faultyProxy struct {
	URL string
	// rewrite, if there is one, changes all answers of /sync.
	rewrite func(answer string) string
	proxy   *httputil.ReverseProxy

	lock sync.Mutex
	next []fault
}

func (w *world) newFaultyProxy(t *testing.T) *faultyProxy {
	t.Helper()
	proxy := &faultyProxy{proxy: httputil.NewSingleHostReverseProxy(must(url.Parse(w.server.URL))(t))}
	proxy.proxy.ErrorLog = log.New(io.Discard, "", 0) // it tells of each request that the bot gives up at its end
	server := httptest.NewServer(proxy)
	proxy.URL = server.URL
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return proxy
}

func (p *faultyProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.HasSuffix(r.URL.Path, "/sync") {
		p.proxy.ServeHTTP(w, r)
		return
	}
	answer := httptest.NewRecorder()
	p.proxy.ServeHTTP(answer, r)
	if p.rewrite != nil {
		answer.Body = bytes.NewBufferString(p.rewrite(answer.Body.String()))
		answer.Header().Set("Content-Length", strconv.Itoa(answer.Body.Len()))
	}
	brings := strings.Contains(answer.Body.String(), `"timeline"`) || strings.Contains(answer.Body.String(), `"to_device"`)
	p.lock.Lock()
	var spoil fault
	if brings && len(p.next) > 0 {
		spoil, p.next = p.next[0], p.next[1:]
	}
	p.lock.Unlock()
	if spoil != nil {
		spoil(w, answer)
		return
	}
	for name, values := range answer.Header() {
		w.Header()[name] = values
	}
	w.WriteHeader(answer.Code)
	_, _ = w.Write(answer.Body.Bytes())
}

func (p *faultyProxy) spoil(faults ...fault) {
	p.lock.Lock()
	defer p.lock.Unlock()
	p.next = append(p.next, faults...)
}

func (p *faultyProxy) left() int {
	p.lock.Lock()
	defer p.lock.Unlock()
	return len(p.next)
}

func TestSpoiltSyncsLoseNothing(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	proxy := w.newFaultyProxy(t)
	bot := w.newBot(t, func(config botproc.Config) { config["homeserver"] = botproc.Config{"address": proxy.URL} })
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, bot, alice)
	settle(t, alice, room)
	ctx := within(t, 2*patience)
	var sent []id.EventID
	for name, spoil := range map[string]fault{
		"cut off": cutOff, "half": half, "reset": reset, "HTML and 500": page(500), "HTML and 502": page(502), "HTML and 200": page(200),
	} {
		proxy.spoil(spoil)
		alice.RotateSession(room)
		eventID := must(alice.Send(ctx, room, say(name)))(t)
		expect(t, bot, alice, eventID, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
		sent = append(sent, eventID)
		if left := proxy.left(); left > 0 {
			t.Errorf("%s: %d faults were not seen", name, left)
		}
	}
	expectOnlyAnswers(t, alice, room, sent...)
}

// Synapse refuses such names, but other homeservers need not.
func TestDisplayNamesOf64KiBAreSurvived(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	proxy := w.newFaultyProxy(t)
	const field = `"displayname":"`
	name := field + strings.Repeat("\xf0\x9f\x91\xbb\\u202e<b>", 64<<10/14) + "\xff\xfe"
	proxy.rewrite = func(answer string) string { return strings.ReplaceAll(answer, field, name) }
	bot := w.newBot(t, func(config botproc.Config) { config["homeserver"] = botproc.Config{"address": proxy.URL} })
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, bot, alice)
	ctx := within(t, patience)
	eventID := must(alice.Send(ctx, room, say("who am I?")))(t)
	expect(t, bot, alice, eventID, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
}
