package soak

import (
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/proxy"
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
	*proxy.Proxy

	mu     sync.Mutex
	waves  []wave
	every  time.Duration
	next   time.Time
	owner  id.UserID
	device map[id.DeviceID]any
	joins  *proxy.Hook
}

const (
	// joinFloodRoom is the joining of a room to which a flood invites: their IDs begin with floodRoom.
	joinFloodRoom = "POST v3/rooms/" + floodRoom + "*/join"
	floodRoom     = "!flood"
	// joinTime is how long that takes.
	joinTime = 300 * time.Millisecond
)

func newFlooder(t *testing.T, homeserver string) *flooder {
	t.Helper()
	f := &flooder{Proxy: must(proxy.Start(homeserver))(t)}
	t.Cleanup(f.Close)
	f.OnRequest(proxy.Sync, 0, func(r *proxy.Request) *proxy.Answer {
		if wait, more := f.untilNext(); more {
			query := r.URL.Query()
			query.Set("timeout", strconv.FormatInt(wait.Milliseconds(), 10))
			r.URL.RawQuery = query.Encode()
		}
		return nil
	})
	f.OnAnswer(proxy.Sync, 0, proxy.Edit(func(answer map[string]any) bool {
		w, due := f.take()
		if due {
			w.addTo(answer)
		}
		return due
	}))
	f.OnAnswer(proxy.KeysQuery, 0, proxy.Edit(f.addDevices))
	f.joins = f.OnRequest(joinFloodRoom, 0, func(*proxy.Request) *proxy.Answer {
		answer := proxy.JSON(http.StatusOK, map[string]any{"room_id": floodRoom})
		answer.Delay = joinTime
		return answer
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

func (f *flooder) joined() int { return f.joins.Used() }

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

func (f *flooder) addDevices(answer map[string]any) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	published, asked := object(answer, "device_keys")[f.owner.String()].(map[string]any)
	if !asked {
		return false
	}
	for deviceID, keys := range f.device {
		published[deviceID.String()] = keys
	}
	return true
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
