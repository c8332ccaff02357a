package soak

import (
	"bytes"
	"encoding/json"
	"fmt"
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
	"time"

	"maunium.net/go/mautrix/id"
)

// wave is what one /sync brings of a flood.
type wave struct {
	toDevice []any
	// timelines and invites are by room.
	timelines map[id.RoomID][]any
	invites   map[id.RoomID][]any
	changed   []id.UserID
}

// flooder stands between the bot and the homeserver, and puts a flood into the answers of /sync: as fast as a homeserver could bring it
// that is not itself busy with taking it in. What the flood leads to elsewhere, it answers itself.
type flooder struct {
	URL   string
	proxy *httputil.ReverseProxy

	mu     sync.Mutex
	waves  []wave
	every  time.Duration
	next   time.Time
	owner  id.UserID
	device map[id.DeviceID]any
	// joins are the rooms of the flood that the bot has joined; each join takes joinTime.
	joins int
}

// joinTime is how long joining one of the rooms takes to which the flood invites.
const joinTime = 300 * time.Millisecond

func newFlooder(t *testing.T, homeserver string) *flooder {
	t.Helper()
	f := &flooder{proxy: httputil.NewSingleHostReverseProxy(must(url.Parse(homeserver))(t))}
	f.proxy.ErrorLog = log.New(io.Discard, "", 0) // it tells of each request that the bot gives up at its end
	f.proxy.ModifyResponse = f.change
	server := httptest.NewServer(f)
	f.URL = server.URL
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return f
}

// flood has the waves come one after the other, with a pause in between.
func (f *flooder) flood(every time.Duration, waves ...wave) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waves, f.every, f.next = append(f.waves, waves...), every, time.Now()
}

func (f *flooder) left() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.waves)
}

// publish has the homeserver publish more devices of a user.
func (f *flooder) publish(owner id.UserID, devices map[id.DeviceID]any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.owner, f.device = owner, devices
}

func (f *flooder) joined() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.joins
}

// floodRoom begins the IDs of the rooms to which a flood invites.
const floodRoom = "!flood"

func (f *flooder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case strings.HasSuffix(r.URL.Path, "/sync"):
		if wait, more := f.untilNext(); more {
			query := r.URL.Query()
			query.Set("timeout", strconv.FormatInt(wait.Milliseconds(), 10))
			r.URL.RawQuery = query.Encode()
		}
	case strings.Contains(r.URL.Path, "/join") && strings.Contains(r.URL.Path, floodRoom):
		time.Sleep(joinTime)
		f.mu.Lock()
		f.joins++
		f.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"room_id":"!flood"}`)
		return
	}
	f.proxy.ServeHTTP(w, r)
}

// untilNext is how long the homeserver may have nothing to tell before the next wave comes.
func (f *flooder) untilNext() (wait time.Duration, more bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return max(0, time.Until(f.next)), len(f.waves) > 0
}

func (f *flooder) take() (w wave, due bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.waves) == 0 || time.Now().Before(f.next) {
		return w, false
	}
	w, f.waves = f.waves[0], f.waves[1:]
	f.next = time.Now().Add(f.every)
	return w, true
}

func (f *flooder) change(resp *http.Response) error {
	path := resp.Request.URL.Path
	if resp.StatusCode != http.StatusOK || !strings.HasSuffix(path, "/sync") && !strings.HasSuffix(path, "/keys/query") {
		return nil
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	var answer map[string]any
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.UseNumber()
	if err = decoder.Decode(&answer); err != nil {
		return err
	}
	if strings.HasSuffix(path, "/sync") {
		if w, due := f.take(); due {
			w.addTo(answer)
		}
	} else {
		f.addDevices(answer)
	}
	if body, err = json.Marshal(answer); err != nil {
		return err
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	resp.Header.Set("Content-Length", strconv.Itoa(len(body)))
	return nil
}

func (f *flooder) addDevices(answer map[string]any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if published, ok := object(answer, "device_keys")[f.owner.String()].(map[string]any); ok {
		for deviceID, keys := range f.device {
			published[deviceID.String()] = keys
		}
	}
}

func (w *wave) addTo(answer map[string]any) {
	appendTo(object(answer, "to_device"), "events", w.toDevice)
	for roomID, events := range w.timelines {
		appendTo(object(answer, "rooms", "join", roomID.String(), "timeline"), "events", events)
	}
	for roomID, events := range w.invites {
		appendTo(object(answer, "rooms", "invite", roomID.String(), "invite_state"), "events", events)
	}
	for _, userID := range w.changed {
		appendTo(object(answer, "device_lists"), "changed", []any{userID})
	}
}

func appendTo(outer map[string]any, key string, items []any) {
	list, _ := outer[key].([]any)
	outer[key] = append(list, items...)
}
