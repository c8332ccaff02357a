package cryptohook

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/id"
)

// accountServer is what the homeserver has for our account: a key backup, files, and what was sent to devices.
type accountServer struct {
	w *trustWorld
	// backupKey is the private key of the newest backup; without it there is none.
	backupKey *backup.MegolmBackupKey
	// entries are the bodies that the backup answers with, by session.
	entries map[id.SessionID][]byte
	files   map[string][]byte
	// down: nothing of this is answered. status, if set, is what downloads are answered with.
	down   bool
	status int
	// lookUps, downloads and sent are what was asked for and sent.
	lookUps   []id.SessionID
	downloads int
	sent      []sentToDevice
}

// sentToDevice is an m.room_key_request that was sent.
type sentToDevice struct {
	to      string
	content object
}

func newAccountServer(w *trustWorld) *accountServer {
	s := &accountServer{w: w, entries: make(map[id.SessionID][]byte), files: make(map[string][]byte)}
	w.server.other = s.answer
	return s
}

var notFound = []byte(`{"errcode": "M_NOT_FOUND", "error": "there is none"}`)

func (s *accountServer) answer(req *http.Request) (status int, body []byte) {
	path := strings.Split(strings.TrimPrefix(req.URL.EscapedPath(), "/_matrix/client/"), "/")
	for i, part := range path {
		path[i] = must(url.PathUnescape(part))
	}
	known := path[1] == "room_keys" || path[1] == "sendToDevice" || path[1] == "media"
	switch {
	case known && s.down:
		return http.StatusBadGateway, []byte(`{"errcode": "M_UNKNOWN"}`)
	case path[1] == "room_keys" && path[2] == "version":
		if s.backupKey == nil {
			return http.StatusNotFound, notFound
		}
		return http.StatusOK, rawJSON(object{
			"version": "7", "algorithm": string(id.KeyBackupAlgorithmMegolmBackupV1), "count": 1, "etag": "1",
			"auth_data": object{"public_key": unpaddedBase64(s.backupKey.PublicKey().Bytes())},
		})
	case path[1] == "room_keys" && path[2] == "keys":
		sessionID := id.SessionID(path[4])
		s.lookUps = append(s.lookUps, sessionID)
		entry, found := s.entries[sessionID]
		if !found || path[3] != trustRoom.String() || req.URL.Query().Get("version") != "7" {
			return http.StatusNotFound, notFound
		}
		return http.StatusOK, entry
	case path[1] == "sendToDevice":
		s.note(path[2], must(io.ReadAll(req.Body)))
	case path[1] == "media":
		s.downloads++
		if s.status != 0 {
			return s.status, []byte(`{"errcode": "M_UNKNOWN"}`)
		}
		file, found := s.files[path[4]]
		if !found || req.Header.Get("Authorization") == "" {
			return http.StatusNotFound, notFound
		}
		return http.StatusOK, file
	}
	return 0, nil
}

func (s *accountServer) note(eventType string, body []byte) {
	var request struct {
		Messages map[string]map[string]object `json:"messages"`
	}
	if err := json.Unmarshal(body, &request); err != nil {
		s.w.t.Error(err)
	}
	for userID, devices := range request.Messages {
		for deviceID, content := range devices {
			if eventType == "m.room_key_request" {
				s.sent = append(s.sent, sentToDevice{userID + " " + deviceID, content})
			}
		}
	}
}

// searchNow lets what events wait for be searched for, as if the time of grace were over.
func (w *trustWorld) searchNow() {
	w.t.Helper()
	w.clock.advance(searchDelay)
	for range 500 {
		worked, err := w.hook.search.pass(w.ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		if !worked {
			return
		}
	}
	w.t.Fatal("the search finds no end")
}

// wait delivers an event whose key is not there.
func (w *trustWorld) wait(evt object) {
	w.t.Helper()
	w.sync(syncPart{timeline: []object{evt}})
	w.handle()
	if w.saw(evt["event_id"]) {
		w.t.Fatal("the event does not wait for its key")
	}
}

// exported is a session as alice's, as somebody exports it.
func exported(t *testing.T, s *megolm, device *actorDevice) *crypto.ExportedSession {
	t.Helper()
	return &crypto.ExportedSession{
		Algorithm: id.AlgorithmMegolmV1, RoomID: s.roomID, SessionID: s.id(), SenderKey: device.senderKey(),
		SenderClaimedKeys: crypto.SenderClaimedKeys{Ed25519: device.signingKey()}, SessionKey: string(exportOf(t, s.key, 0)),
	}
}

// element is another device of the bot's own account, which the account's identity has signed.
func (w *trustWorld) element() *actorDevice {
	w.t.Helper()
	device := w.bot.addDevice("ELEMENT")
	w.know(w.bot)
	return device
}

func TestMissingKeyIsNotSearchedForBeforeItHadTimeToCome(t *testing.T) {
	w, alice, _ := twoPeople(t)
	server := newAccountServer(w)
	w.element()
	s := newMegolm(trustRoom)
	w.wait(w.say(alice, s, "hello"))
	w.clock.advance(searchDelay - time.Millisecond)
	if worked, err := w.hook.search.pass(w.ctx); worked || err != nil {
		t.Errorf("searched at once (%v)", err)
	}
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.searchNow()
	if len(server.sent) > 0 || len(server.lookUps) > 0 {
		t.Errorf("a key that has come was asked for: %v", server.sent)
	}
	if w.server.count("room_keys/version") > 1 {
		t.Error("the backup was opened more than once")
	}
}

func TestKeyIsSearchedForOnceASessionAndHour(t *testing.T) {
	w, alice, _ := twoPeople(t, func(o *Options) { o.KeyWait = 12 * time.Hour })
	server := newAccountServer(w)
	server.backupKey = must(backup.NewMegolmBackupKey())
	if err := w.hook.SetBackupKey(w.ctx, server.backupKey.Bytes()); err != nil {
		t.Fatal(err)
	}
	w.element()
	s := newMegolm(trustRoom)
	for range 3 {
		w.wait(w.say(alice, s, "hello"))
		w.searchNow()
	}
	w.restart()
	w.server.other = server.answer
	w.handle()
	w.searchNow()
	if len(server.lookUps) != 1 || len(server.sent) != 1 {
		t.Errorf("looked up %d times, asked %d times, within an hour", len(server.lookUps), len(server.sent))
	}
	w.clock.advance(searchAgain)
	w.handle()
	w.searchNow()
	if len(server.lookUps) != 2 || len(server.sent) != 2 {
		t.Errorf("looked up %d times, asked %d times, after an hour", len(server.lookUps), len(server.sent))
	}
}

func TestFinalWithheldCodesAreNotSearchedFor(t *testing.T) {
	for code, searched := range map[string]bool{"m.blacklisted": false, "m.unverified": false, "m.unauthorised": false, "m.no_olm": true, "m.unavailable": true} {
		w, alice, _ := twoPeople(t)
		server := newAccountServer(w)
		w.element()
		s := newMegolm(trustRoom)
		w.sync(syncPart{toDevice: []object{{"type": "m.room_key.withheld", "sender": "@alice:test", "content": object{
			"algorithm": string(id.AlgorithmMegolmV1), "room_id": trustRoom.String(), "session_id": s.id().String(), "code": code, "sender_key": alice.senderKey().String(),
		}}}})
		w.sync(syncPart{timeline: []object{w.say(alice, s, "not for you")}})
		w.handle()
		w.searchNow()
		if asked := len(server.sent) > 0; asked != searched {
			t.Errorf("%s: asked for the key: %v", code, asked)
		}
	}
}

// Anybody in a room can send messages of sessions that do not exist.
func TestStormOfUndecryptableEventsDoesNotStormTheServer(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	server := newAccountServer(w)
	w.element()
	var storm []object
	ciphertext := newMegolm(trustRoom).message("nothing")["ciphertext"]
	limits := w.hook.options.Limits
	for i := range 2 * limits.SearchesPerRoom {
		fake := unpaddedBase64([]byte(fmt.Sprintf("%032d", i)))
		storm = append(storm, w.roomEvent(alice.owner.userID, "m.room.encrypted", object{
			"algorithm": string(id.AlgorithmMegolmV1), "session_id": fake, "ciphertext": ciphertext,
		}))
	}
	storm = append(storm, w.roomEvent(alice.owner.userID, "m.room.encrypted", object{
		"algorithm": string(id.AlgorithmMegolmV1), "session_id": strings.Repeat("A", 60_000), "ciphertext": ciphertext,
	}))
	w.sync(syncPart{timeline: storm})
	w.handle()
	w.clock.advance(searchDelay)
	if _, err := w.hook.search.pass(w.ctx); err != nil {
		t.Fatal(err)
	}
	if len(server.sent) > searchesAtOnce {
		t.Errorf("%d requests in one pass", len(server.sent))
	}
	for range 10 {
		w.searchNow()
		w.handle()
	}
	if len(server.sent) != limits.SearchesPerSender {
		t.Errorf("%d requests for one sender in an hour", len(server.sent))
	}
	if reached := w.hook.Stats().Reached[LimitSearches]; reached == 0 {
		t.Error("that the limit was reached is not counted")
	}
	w.clock.advance(defaultKeyWait)
	for range 2 {
		w.handle()
	}
	// Another room is not affected.
	s := newMegolm("!other:test")
	w.sync(syncPart{room: "!other:test", timeline: []object{w.say(alice, s, "hello")}})
	w.handle()
	w.searchNow()
	if len(server.sent) != limits.SearchesPerSender {
		t.Error("the sender has more searched for in another room")
	}
	// Nor is anybody else, in this one.
	honest := newMegolm(trustRoom)
	w.sync(syncPart{timeline: []object{w.say(mallory, honest, "hello")}})
	w.handle()
	w.searchNow()
	if len(server.sent) != limits.SearchesPerSender+1 {
		t.Error("one sender's storm keeps another's keys from being asked for")
	}
}

// Each pass makes a few searches: the senders take turns.
func TestSearchesAreMadeInTurn(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	server := newAccountServer(w)
	w.element()
	var storm []object
	for range 90 {
		storm = append(storm, w.say(mallory, newMegolm(trustRoom), "nothing"))
	}
	honest := newMegolm(trustRoom)
	w.sync(syncPart{timeline: append(storm, w.say(alice, honest, "hello"))})
	w.handle()
	w.clock.advance(searchDelay)
	if _, err := w.hook.search.pass(w.ctx); err != nil {
		t.Fatal(err)
	}
	if len(server.sent) != searchesAtOnce {
		t.Fatalf("%d requests in one pass", len(server.sent))
	}
	for _, sent := range server.sent {
		if strings.Contains(fmt.Sprint(sent), honest.id().String()) {
			return
		}
	}
	t.Error("alice's key was not among the first that were asked for")
}
