package inputs

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// Homeserver is a [Server] for a whole bot, over HTTP: it takes what the bot publishes, gives it the events of rooms as they come, and
// notes when each was answered.
type Homeserver struct {
	*Server

	mu   sync.Mutex
	data map[string]json.RawMessage
	// timeline are the events that the next /sync brings, by their rooms; other is what else it brings.
	timeline map[id.RoomID][]json.RawMessage
	toDevice []json.RawMessage
	joins    []json.RawMessage
	syncs    int
	news     chan struct{}
	// given is when an event was given to the bot.
	given    map[id.EventID]time.Time
	sent     int
	onAnswer func(Answered)
}

// Answered says that the bot has answered an event.
type Answered struct {
	EventID id.EventID
	// Took is from just before the answer to /sync that brings the event is written to when the bot's request has come.
	Took time.Duration
}

// NewHomeserver makes a homeserver. Answers are told to onAnswer, which must not wait.
func NewHomeserver(s *Server, onAnswer func(Answered)) *Homeserver {
	return &Homeserver{
		Server: s, data: make(map[string]json.RawMessage), timeline: make(map[id.RoomID][]json.RawMessage), news: make(chan struct{}, 1),
		given: make(map[id.EventID]time.Time), onAnswer: onAnswer,
	}
}

// BringRoom has the bot see a room with these members.
func (h *Homeserver) BringRoom(roomID id.RoomID, members ...*Person) {
	h.bring(func() { h.joins = append(h.joins, joinedRoom(roomID, members)) })
}

// BringToDevice has the bot get a to-device event.
func (h *Homeserver) BringToDevice(event json.RawMessage) {
	h.bring(func() { h.toDevice = append(h.toDevice, event) })
}

// Bring has the bot get an event of a room.
func (h *Homeserver) Bring(roomID id.RoomID, event json.RawMessage) {
	h.bring(func() { h.timeline[roomID] = append(h.timeline[roomID], event) })
}

func (h *Homeserver) bring(add func()) {
	h.mu.Lock()
	add()
	h.mu.Unlock()
	h.notify()
}

func (h *Homeserver) notify() {
	select {
	case h.news <- struct{}{}:
	default:
	}
}

// ServeHTTP implements [http.Handler].
func (h *Homeserver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	place := strings.TrimPrefix(req.URL.Path, "/_matrix/client/v3/")
	switch {
	case place == "sync":
		h.serveSync(w, req)
	case strings.Contains(place, "/send/"):
		h.takeAnswer(body)
		h.mu.Lock()
		h.sent++
		eventID := fmt.Sprintf("$answer%d", h.sent)
		h.mu.Unlock()
		write(w, http.StatusOK, rawJSON(object{"event_id": eventID}))
	default:
		status, answer := h.other(req.Method, place, body)
		write(w, status, answer)
	}
}

func write(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

var notFound = []byte(`{"errcode":"M_NOT_FOUND","error":"there is none"}`)

// other answers what a bot asks for before and beside talking.
func (h *Homeserver) other(method, place string, body []byte) (status int, answer []byte) {
	isData := strings.Contains(place, "/account_data/") || strings.HasPrefix(place, "room_keys/") || strings.HasPrefix(place, "profile/")
	switch {
	case strings.HasSuffix(place, "versions"):
		return http.StatusOK, []byte(`{"versions":["v1.11"]}`)
	case place == "account/whoami":
		return http.StatusOK, rawJSON(object{"user_id": Receiver.String(), "device_id": ReceiverDevice.String()})
	case place == "keys/device_signing/upload":
		h.takeIdentity(body)
		return http.StatusOK, []byte("{}")
	case isData && method == http.MethodPut:
		h.mu.Lock()
		defer h.mu.Unlock()
		h.data[place] = body
		return http.StatusOK, []byte(`{"etag":"1","count":1}`)
	case isData && method == http.MethodGet:
		h.mu.Lock()
		defer h.mu.Unlock()
		if data := h.data[place]; data != nil {
			return http.StatusOK, data
		}
		return http.StatusNotFound, notFound
	case place == "room_keys/version":
		var made object
		Check(json.Unmarshal(body, &made))
		made["version"], made["etag"], made["count"] = "1", "1", 0
		h.mu.Lock()
		defer h.mu.Unlock()
		h.data[place] = rawJSON(made)
		return http.StatusOK, []byte(`{"version":"1"}`)
	case method == http.MethodGet && strings.HasPrefix(place, "rooms/"):
		return http.StatusNotFound, notFound
	case place == "joined_rooms":
		return http.StatusOK, []byte(`{"joined_rooms":[]}`)
	}
	answer, err := h.Server.answer(place, body)
	if err != nil {
		return http.StatusBadRequest, rawJSON(object{"errcode": "M_UNKNOWN", "error": err.Error()})
	}
	return http.StatusOK, answer
}

// takeIdentity publishes the cross-signing keys that the bot has made.
func (h *Homeserver) takeIdentity(body []byte) {
	var upload struct {
		Master      json.RawMessage `json:"master_key"`
		SelfSigning json.RawMessage `json:"self_signing_key"`
		UserSigning json.RawMessage `json:"user_signing_key"`
	}
	Check(json.Unmarshal(body, &upload))
	h.Server.mu.Lock()
	defer h.Server.mu.Unlock()
	p := h.people[Receiver]
	p.masterObject, p.selfSigningObject, p.userSigningObject = upload.Master, upload.SelfSigning, upload.UserSigning
}

// serveSync waits for news, as long as the bot wants to.
func (h *Homeserver) serveSync(w http.ResponseWriter, req *http.Request) {
	wait := 30 * time.Second
	if req.URL.Query().Get("since") == "" {
		wait = 0
	}
	select {
	case <-h.news:
	case <-time.After(wait):
	case <-req.Context().Done():
		return
	}
	write(w, http.StatusOK, h.takeNews())
}

// takeNews makes the answer to a /sync, and notes when the events in it are given away: just before it is written.
func (h *Homeserver) takeNews() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	rooms := object{}
	for _, join := range h.joins {
		var joined map[string]any
		Check(json.Unmarshal(join, &joined))
		maps.Copy(rooms, joined)
	}
	for roomID, timeline := range h.timeline {
		if _, joins := rooms[roomID.String()]; joins {
			// What is said in a room comes after the answer that brings the room: before that it would be history to the bot.
			h.notify()
			continue
		}
		delete(h.timeline, roomID)
		rooms[roomID.String()] = object{"timeline": object{"events": timeline}}
		for _, raw := range timeline {
			var evt struct {
				EventID id.EventID `json:"event_id"`
			}
			Check(json.Unmarshal(raw, &evt))
			h.given[evt.EventID] = time.Now()
		}
	}
	h.syncs++
	body := rawJSON(object{
		"next_batch": fmt.Sprintf("s%d", h.syncs), "device_one_time_keys_count": object{"signed_curve25519": 50},
		"to_device": object{"events": h.toDevice}, "rooms": object{"join": rooms},
	})
	h.toDevice, h.joins = nil, nil
	return body
}

// takeAnswer notes which event is answered: that is told in the clear.
func (h *Homeserver) takeAnswer(body []byte) {
	now := time.Now()
	var content struct {
		RelatesTo struct {
			InReplyTo struct {
				EventID id.EventID `json:"event_id"`
			} `json:"m.in_reply_to"`
		} `json:"m.relates_to"`
	}
	if json.Unmarshal(body, &content) != nil {
		return
	}
	eventID := content.RelatesTo.InReplyTo.EventID
	h.mu.Lock()
	given, known := h.given[eventID]
	delete(h.given, eventID)
	h.mu.Unlock()
	if known {
		h.onAnswer(Answered{eventID, now.Sub(given)})
	}
}

// AwaitDevice waits until the bot has published its device and has begun to sync, and gives the device. What comes in a bot's first
// /sync it takes for history.
func (h *Homeserver) AwaitDevice(ctx context.Context) *id.Device {
	for ctx.Err() == nil {
		if device := h.device(); device != nil {
			return device
		}
		time.Sleep(50 * time.Millisecond)
	}
	panic(ctx.Err())
}

// device gives the bot's device once it has one-time keys.
func (h *Homeserver) device() *id.Device {
	h.mu.Lock()
	synced := h.syncs > 0
	h.mu.Unlock()
	h.Server.mu.Lock()
	defer h.Server.mu.Unlock()
	if !synced || h.receiver == nil || len(h.oneTimeKeys) == 0 {
		return nil
	}
	var keys mautrix.DeviceKeys
	Check(json.Unmarshal(h.receiver, &keys))
	return &id.Device{
		UserID: Receiver, DeviceID: ReceiverDevice,
		IdentityKey: keys.Keys.GetCurve25519(ReceiverDevice), SigningKey: keys.Keys.GetEd25519(ReceiverDevice),
	}
}
